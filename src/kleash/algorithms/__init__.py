"""Policy-gradient algorithms as two functions over tensors; none of them ever sees a model."""
