"""kleash keeps a language model on a KL leash."""

__version__ = "0.1.0"
