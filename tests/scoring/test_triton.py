"""The Triton kernels against plain torch: interpreted on a CPU, compiled where there is a GPU."""

import os

import pytest
import torch
from scorer_cases import DIFFERENTIABLE, assert_same, scored, tensors_of, weights_for

from kleash.scoring import streaming
from kleash.scoring.tiles import Tiles
from kleash.types import Head

if not torch.cuda.is_available():
    # Without a GPU kernels are interpreted; Triton decides that when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is installed with torch for CUDA")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS, PLAIN = (Tiles(4, 6, body=body) for body in ("triton", "plain"))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("want", [[name] for name in DIFFERENTIABLE] + [DIFFERENTIABLE])
def test_same_numbers_as_plain_torch(want, softcap):
    tensors = [
        tensor.to(DEVICE).requires_grad_() for tensor in tensors_of(0, rows=5, words=9, pad=2)
    ]
    upstream = {name: weight.to(DEVICE) for name, weight in weights_for(5).items()}
    case = (tensors, 9, torch.tensor([0, 8, 3, 3, 1], device=DEVICE), upstream)
    kwargs = {"want": want, "head": {"softcap": softcap, "scale": 1.3}, "temperature": 0.7}
    found = scored(streaming, *case, tiles=KERNELS, **kwargs)
    assert_same(found, scored(streaming, *case, tiles=PLAIN, **kwargs))


@pytest.mark.parametrize("size", [1.0, 2500.0])
def test_no_larger_error_than_plain_torch_in_float32(size):
    doubles = tensors_of(1, rows=16, words=200, width=32, ref_width=32, size=size)
    targets = torch.arange(16, device=DEVICE)
    upstream = {name: weight.to(DEVICE) for name, weight in weights_for(16).items()}
    found = {}
    for dtype, cut in ((torch.float64, PLAIN), (torch.float32, PLAIN), (torch.float32, KERNELS)):
        tensors = [tensor.float().to(DEVICE, dtype).requires_grad_() for tensor in doubles]
        weights = {name: weight.to(dtype) for name, weight in upstream.items()}
        values, gradients = scored(streaming, tensors, 200, targets, weights, tiles=cut)
        found[dtype, cut] = {**values, **gradients}
    truth = found[torch.float64, PLAIN]
    for part, exact in truth.items():
        plain, ours = (
            (found[torch.float32, cut][part].double() - exact).square().mean().sqrt()
            for cut in (PLAIN, KERNELS)
        )
        assert ours <= 1.1 * plain + 1e-6 * exact.abs().max(), part


def test_nothing_to_score():
    empty = torch.zeros(0, 3, device=DEVICE)
    weight = torch.ones(4, 3, device=DEVICE, requires_grad=True)
    scores = streaming.token_scores(
        empty, Head(weight), torch.zeros(0, dtype=torch.long, device=DEVICE), tiles=KERNELS
    )
    scores.logprobs.sum().backward()
    assert not weight.grad.any()
