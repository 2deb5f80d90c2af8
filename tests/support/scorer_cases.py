"""Cases on which scorers are compared, in value and gradient."""

import torch

from kleash.scoring.api import QUANTITIES, WITHOUT_GRADIENT
from kleash.scoring.tiles import Tiles
from kleash.types import Head

DIFFERENTIABLE = [name for name in QUANTITIES if name not in WITHOUT_GRADIENT]


NAMES = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")


PLAIN = Tiles(body="plain")


def tensors_of(seed, *, rows, words, width=5, ref_width=3, pad=0, ref_pad=0, size=1.0):
    """Both models' hidden states, weights and biases, in the order of NAMES."""
    make = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    return [
        size * randn(rows, width),
        randn(words + pad, width),
        randn(words + pad),
        size * randn(rows, ref_width),
        randn(words + ref_pad, ref_width),
        randn(words + ref_pad),
    ]


def models_of(tensors, words, **head):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = tensors
    policy = Head(weight, bias, vocab_size=words, **head)
    return (hidden, policy), (ref_hidden, Head(ref_weight, ref_bias, vocab_size=words))


def scored(scorer, tensors, words, targets, upstream, *, want=DIFFERENTIABLE, head=None, **kwargs):
    """Scores, and the gradient of their sum with random weights, finite or infinite."""
    (hidden, policy), reference = models_of(tensors, words, **(head or {}))
    scores = scorer.token_scores(hidden, policy, targets, reference=reference, want=want, **kwargs)
    values = {name: getattr(scores, name) for name in want}
    loss = sum(
        (values[name] * upstream[name]).sum() for name in want if name not in WITHOUT_GRADIENT
    )
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    return values, dict(zip(NAMES, gradients, strict=True))


def weights_for(rows, seed=0):
    make = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, generator=make, dtype=torch.float64) for name in DIFFERENTIABLE}


def assert_same(found, expected, **tolerance):
    tolerance = {"rtol": 1e-9, "atol": 1e-10} | tolerance
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(
                ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
            )
