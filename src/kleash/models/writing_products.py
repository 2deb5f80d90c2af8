"""Products of a few rows with a large matrix, which writing makes at every token.

    z = W h + b      for as many h as responses are written at once

Such a product takes as long as reading W takes, and torch's for float32 on a CPU takes two to three
times as long: it is made for many rows. While responses are written, layers multiply by a copy of
their weight in oneDNN's own order instead, or, where that memory is not to be had, piece by piece.
Rounding apart, which is that of float32, the numbers are the same.

Left out: half precision and GPUs, whose products are fast as they are; quantised, divided and
otherwise replaced layers, which multiply in their own way.
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

MOST_ROWS = 64
"""Responses written at once up to which torch's own product is the slower one."""
LEAST_TOKENS = 16
"""Tokens from which a copy is worth making: it takes as long as some eight products."""
WORTH = 1 << 12
"""Fewest numbers of a weight that is copied."""
PIECE = 512
"""Rows of a weight that are multiplied at once where it is not copied."""
LARGE = 1 << 25
"""Fewest numbers of a weight for which pieces are the faster way."""


@contextlib.contextmanager
def writing_products(model: nn.Module, *, rows: int, tokens: int) -> Generator[None]:
    """Within, the linear layers of a model are as fast for a few rows as reading weights allows.

    A weight that learns is copied: between two updates its gradient, which is as large, is not
    held. A frozen one has no such memory to spare and is multiplied piece by piece. The copies are
    of the weights as they are on entry. Layers are given back as they were, also after an error.

    Args:
        model: whose layers; no gradient flows within.
        rows: responses written at once.
        tokens: how often each layer will multiply at most.
    """
    with contextlib.ExitStack() as stack:
        if rows <= MOST_ROWS and tokens >= LEAST_TOKENS and not torch.is_autocast_enabled("cpu"):
            for layer in model.modules():
                product = _product_of(layer)
                if product is not None:
                    stack.enter_context(_replaced(layer, product))
        yield


def _product_of(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The faster product of a layer; None where there is none."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return None
    weight, bias = layer.weight, cast("Tensor | None", layer.bias)
    if isinstance(weight, DTensor) or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    fixed = None if bias is None else bias.detach()
    if weight.requires_grad and weight.numel() >= WORTH and can_copy():
        return _by_copy(weight.detach(), fixed)
    if weight.numel() >= LARGE:
        return _by_pieces(weight.detach(), fixed)
    return None


def can_copy() -> bool:
    """Whether this torch has oneDNN's products, by the names that it gives them."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


def _by_copy(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Callable[[Tensor], Tensor]:
    """Multiply by a copy in oneDNN's order, made for some eight rows."""
    copy = torch.ops.mkldnn._reorder_linear_weight(weight, 8)

    def product(hidden: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if _count(hidden) > MOST_ROWS:
            return functional.linear(hidden, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(hidden, copy, bias, "none", [], "")

    return product


def _by_pieces(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Callable[[Tensor], Tensor]:
    """Multiply by some rows of the weight at a time."""

    def product(hidden: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if _count(hidden) > MOST_ROWS:
            return functional.linear(hidden, weight, bias)
        rows = hidden.reshape(-1, hidden.shape[-1])
        out = rows.new_empty(len(rows), len(weight))
        for piece, columns in zip(weight.split(PIECE), out.split(PIECE, dim=1), strict=True):
            torch.mm(rows, piece.T, out=columns)
        if bias is not None:
            out += bias
        return out.view(*hidden.shape[:-1], -1)

    return product


def _count(hidden: Float[Tensor, "*rows in"]) -> int:
    return hidden.numel() // hidden.shape[-1]


@contextlib.contextmanager
def _replaced(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Generator[None]:
    cast(Any, layer).forward = forward
    try:
        yield
    finally:
        del cast(Any, layer).forward
