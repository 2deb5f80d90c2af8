"""From hidden states to log-probabilities and KL: the only place that touches the vocabulary."""

from kleash.scoring.api import Quantity, TokenScores
from kleash.scoring.streaming import token_scores

__all__ = ["Quantity", "TokenScores", "token_scores"]
