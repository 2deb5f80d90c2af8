"""Gradients of an embedding added where they belong, not made as a matrix of its size.

Of a vocabulary's matrix a batch of tokens reaches a few hundred rows, yet autograd makes a gradient
of the whole matrix, nearly all of it 0; where the matrix is the head too, it is then added to the
head's, which is another of that size. Here the rows that were read are added to `.grad` itself.
"""

import contextlib
from collections.abc import Generator
from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel


@contextlib.contextmanager
def embedding_gradient_in_place(policy: object) -> Generator[None]:
    """Within, what a policy's input embedding reads has a gradient that goes straight into `.grad`.

    `.backward()` then leaves the same sums as ever, but for the order of their terms;
    `torch.autograd.grad` sees none for the embedding. Embeddings of another kind, and divided ones,
    stay as they are.

    Args:
        policy: its `model` is a transformers model that is whole; of anything else nothing changes.
    """
    model = getattr(policy, "model", None)
    layer = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if not _suits(layer) or not torch.is_grad_enabled():
        yield
        return

    weight, padding = layer.weight, layer.padding_idx

    def forward(ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows hidden"]:
        return cast(Tensor, _Lookup.apply(ids, weight, padding))

    cast(Any, layer).forward = forward
    try:
        yield
    finally:
        del cast(Any, layer).forward


def takes_gradient_in_place(weight: Tensor) -> bool:
    """Whether a weight is a whole leaf, whose gradient can be added to outside autograd."""
    return weight.requires_grad and weight.is_leaf and not isinstance(weight, DTensor)


def _suits(layer: nn.Module | None) -> TypeGuard[nn.Embedding]:
    return (
        type(layer) is nn.Embedding
        and "forward" not in vars(layer)
        and layer.max_norm is None
        and not layer.scale_grad_by_freq
        and not layer.sparse
        and takes_gradient_in_place(layer.weight)
    )


class _Lookup(torch.autograd.Function):
    """Rows of a weight; backward adds to the weight's `.grad`."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Int[Tensor, "*rows"],
        weight: Float[Tensor, "vocab hidden"],
        padding: int | None,
    ) -> Float[Tensor, "*rows hidden"]:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Float[Tensor, "*rows hidden"]
    ) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        weight: Tensor = ctx.weight
        words, place = ids.flatten().unique(return_inverse=True)
        # A word that is read often is summed in float32, and rounded once; always in the same
        # order, which `index_put_` with several threads does not keep.
        exact = torch.promote_types(weight.dtype, torch.float32)
        rows = upstream.reshape(len(place), -1).to(exact)
        sums = torch.ops.aten.embedding_dense_backward(rows, place, len(words), -1, False)
        if ctx.padding is not None:
            sums[words == ctx.padding] = 0
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad[words] += sums.to(weight.dtype)
        return None, None, None
