"""Which body computes a tile of logits: plain torch, compiled, Triton, or a GPU in bfloat16."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from scorer_cases import (
    PLAIN,
    assert_same,
    scored,
    tensors_of,
    weights_for,
)

from kleash.scoring import backward, dense, forward, streaming, tiles
from kleash.scoring.tiles import Tiles
from kleash.types import Head


@pytest.mark.parametrize("head", [torch.bfloat16, torch.float32])
def test_bfloat16_on_a_gpu_is_multiplied_as_it_is_and_summed_in_float32(head, monkeypatch):
    """A CPU has no such product; a stand-in for it shows that the walks ask for the right one.

    A float32 head, whose numbers bfloat16 can hold here, is rounded for it tile by tile.
    """
    mm, asked = torch.mm, []

    def half_mm(left, right, *, out, out_dtype=None):
        asked.append((left.dtype, right.dtype, out_dtype))
        return out.copy_(mm(left.float(), right.float()))

    rounded = [tensor.bfloat16() for tensor in tensors_of(15, rows=5, words=9, pad=1)]
    hidden, weight, bias, *rest = rounded
    tensors = [hidden, weight.to(head), bias, *rest]
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    upstream = {name: weight.float() for name, weight in weights_for(5).items()}
    case = (tensors, 9, torch.tensor([0, 8, 3, 3, 1]), upstream)
    expected = scored(streaming, *case, tiles=Tiles(2, 4, body="plain"))
    monkeypatch.setattr(tiles.Side, "on_gpu", property(lambda _: True))
    monkeypatch.setattr(torch, "mm", half_mm)
    found = scored(streaming, *case, tiles=Tiles(2, 4, body="plain"))
    assert set(asked) == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    assert_same(found[:1], expected[:1], rtol=0, atol=0)
    # The tile of gradients is rounded to bfloat16 before it is multiplied.
    assert_same(found[1:], expected[1:], rtol=2**-5, atol=2**-5)
    assert [gradient.dtype for gradient in list(found[1].values())[:2]] == [torch.bfloat16, head]


def test_the_triton_body_is_taken_from_its_module(monkeypatch):
    def sums(bare, needs, out):
        out.copy_(forward.tile_sums(bare, needs))

    stand_in = SimpleNamespace(tile_sums=sums, tile_gradients=backward._plain_gradients)
    monkeypatch.setitem(sys.modules, "kleash.scoring.triton", stand_in)
    tensors = [tensor.requires_grad_() for tensor in tensors_of(16, rows=3, words=6)]
    case = (tensors, 6, torch.tensor([0, 1, 2]), weights_for(3))
    assert_same(scored(streaming, *case, tiles=Tiles(body="triton")), scored(dense, *case))


def test_a_gpu_gets_larger_tiles_and_triton_where_it_is_installed(monkeypatch):
    model = tiles.side(
        torch.zeros(2, 3), Head(torch.zeros(4, 3)), temperature=1.0, dtype=torch.float32
    )
    assert tiles.body_for(Tiles(), model) == "plain"
    monkeypatch.setattr(tiles.Side, "on_gpu", property(lambda _: True))
    for found, body in ((object(), "triton"), (None, "plain")):
        monkeypatch.setattr("importlib.util.find_spec", lambda _, found=found: found)
        assert tiles.body_for(Tiles(), model) == body
    gpu, cpu = (tiles.default_tiles(torch.device(name)) for name in ("cuda", "cpu"))
    assert gpu.columns > cpu.columns


def fake_compile(made):
    """torch.compile, but for the compiling."""
    return lambda body, **kwargs: made.append(body.__name__) or body


@pytest.fixture
def no_memory_of_compiling():
    tiles.compiled.cache_clear()
    tiles.compiler_works.cache_clear()
    yield
    tiles.compiled.cache_clear()
    tiles.compiler_works.cache_clear()


@pytest.mark.usefixtures("no_memory_of_compiling")
def test_both_walks_take_the_compiled_body_for_whole_tiles(monkeypatch):
    made, shapes = [], set()

    def run(body):
        return lambda tile, *rest: shapes.add(tile[0].product.shape) or body(tile, *rest)

    monkeypatch.setattr(torch, "compile", lambda body, **_: made.append(body.__name__) or run(body))
    tensors = [tensor.requires_grad_() for tensor in tensors_of(1, rows=4, words=8)]
    case = (tensors, 8, torch.tensor([0, 3, 7, 7]), weights_for(4))
    found = scored(streaming, *case, tiles=Tiles(2, 3, body="compiled"))
    assert made == ["tile_sums", "tile_gradients"]
    assert shapes == {(2, 3)}, "remnants are not compiled for"
    assert_same(found, scored(dense, *case))


@pytest.mark.usefixtures("no_memory_of_compiling")
def test_auto_compiles_large_calls_where_a_compiler_works(monkeypatch):
    def model(rows):
        return tiles.side(
            torch.zeros(rows, 1), Head(torch.zeros(256, 1)), temperature=1.0, dtype=torch.float32
        )

    monkeypatch.setattr(tiles, "WORTH_COMPILING", 1024)
    monkeypatch.setattr(torch, "compile", fake_compile([]))
    assert tiles.body_for(Tiles(), model(3)) == "plain"
    assert tiles.body_for(Tiles(), model(4)) == "compiled"
    assert tiles.body_for(PLAIN, model(4)) == "plain"

    def broken(*_):
        raise RuntimeError("no C++ compiler")

    tiles.compiler_works.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda _: broken)
    assert tiles.body_for(Tiles(), model(4)) == "plain"


COMPILED = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from kleash.scoring import streaming, tiles
from kleash.types import Head
make = torch.Generator().manual_seed(0)
given = [torch.randn(*shape, generator=make) for shape in ((5, 4), (70, 4), (70,), (5, 3), (70, 3))]
found = []
for body in ("plain", "compiled"):
    hidden, weight, bias, ref_hidden, ref_weight = (t.clone().requires_grad_() for t in given)
    scores = streaming.token_scores(
        hidden, Head(weight, bias), torch.arange(5), reference=(ref_hidden, Head(ref_weight)),
        want=("logprobs", "kl", "reverse_kl", "entropy", "log_ratio_variance"),
        tiles=tiles.Tiles(4, 64, body=body),
    )
    values = [v for v in vars(scores).values() if v is not None]
    loss = sum(v.square().sum() for v in values)
    found.append([*values, *torch.autograd.grad(loss, (hidden, weight, bias, ref_hidden))])
for ours, plain in zip(*found, strict=True):
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
print(tiles.compiler_works())
"""


@pytest.mark.slow
def test_really_compiled_says_the_same(tmp_path):
    """In a process of its own: what the tests' type checks wrap around functions is not traced.

    With kernels of its own too: another test may be compiling into the common cache.
    """
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "True", done.stderr
