"""From hidden states to log-probabilities and KL: the only place that touches the vocabulary."""
