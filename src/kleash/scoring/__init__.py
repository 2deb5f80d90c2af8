"""From hidden states to log-probabilities and KL: the only place that touches the vocabulary.

api                    the quantities, their container, and checks of a request
streaming              a tile of logits at a time, with gradients; dense holds all of them
forward, backward      the two walks over tiles;  tiles, tile_reductions, logit_gradients  of one
triton, top_k          tiles on a GPU; the likeliest words apart
float64_check          a few streamed scores against float64

May import masked, types and errors; never transformers. Start reading at `dense.token_scores`.
"""

from kleash.scoring.api import Quantity, TokenScores
from kleash.scoring.streaming import token_scores

__all__ = ["Quantity", "TokenScores", "token_scores"]
