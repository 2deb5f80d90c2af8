"""Exact scores from hidden states, never holding the logits: the same numbers as `dense.py`.

Even one sampled log-probability needs a sum over the vocabulary, and the matrix product that feeds
the sum costs far more than the sum. So a tile of both models' logits is made, summed up for all
quantities at once while it is in the cache, and forgotten. Backward makes the tile again (or finds
it kept), turns it into its gradient in place, and multiplies: two products, for whatever upstream
weight each row and quantity has. No product is made for a tensor that wants no gradient.

References:
    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2025,
    https://arxiv.org/abs/2411.09009, for one model's log-probability.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from kleash.scoring.api import (
    OF_REFERENCE,
    OF_TOP_K,
    WITHOUT_GRADIENT,
    Quantity,
    TokenScores,
    check_request,
    working_dtype,
)
from kleash.scoring.backward import NeededGradients, SideGradients, walk_back
from kleash.scoring.forward import scores_of, sum_up
from kleash.scoring.logit_gradients import Upstream
from kleash.scoring.tiles import Sides, Tiles, default_tiles, lacks, side
from kleash.types import Head


def token_scores(
    hidden: Float[Tensor, "N D"],
    head: Head,
    targets: Int[Tensor, " N"],
    *,
    reference: tuple[Float[Tensor, "N D2"], Head] | None = None,
    temperature: float = 1.0,
    want: Collection[Quantity] = ("logprobs",),
    top_k: int | None = None,
    tiles: Tiles | None = None,
) -> TokenScores:
    r"""Score each row's target and next-token distribution; see `kleash.scoring.api`.

        z = softcap(scale · (W h + b)) / temperature,    log p = z − log Σ_v e^(z_v)

    Equal in value and gradient to `dense.token_scores`, in memory of a few tiles instead of several
    [N, V] matrices. What is not asked for is not computed: without a quantity of the reference
    there is one product, not two. Products and sums of a tile are taken in float32 whatever comes
    in, and tiles are put together in float64.

    Args:
        hidden: the policy's final hidden states; row n predicts `targets[n]`.
        head: the policy's head; rows beyond its `words` take no part.
        targets: ids of the words that were written.
        reference: the reference's hidden states (its own width) and head (the same words).
        temperature: divides both models' logits, after scale and soft-cap.
        want: which quantities to compute.
        top_k: how many words `top_k_mass` and `top_k_kl` keep apart.
        tiles: shape of the tiles, and how many bytes of them to keep for backward; None for
            what suits the device.

    Returns:
        The quantities asked for, in nats, float32 (float64 for float64 hidden states). Gradients
        flow to every hidden state, weight and bias that requires one, the reference's included.

    Raises:
        ValueError: as `check_request` says, and if a head's bias bans every word.

    Example:
        >>> head = Head(weight=torch.eye(2))
        >>> hidden = torch.tensor([[0.7, 0.3]]).log()
        >>> uniform = torch.tensor([[0.5, 0.5]]).log()
        >>> token_scores(
        ...     hidden, head, torch.tensor([0]), reference=(uniform, head), want=("kl",)
        ... ).kl
        tensor([0.0823])
    """
    check_request(
        hidden, head, targets, reference=reference, temperature=temperature, want=want, top_k=top_k
    )
    tiles = default_tiles(hidden.device) if tiles is None else tiles
    if reference is not None and set(want) <= set(_OF_REFERENCE_ALONE):
        return _reference_alone(*reference, targets, temperature, want, tiles, hidden)
    if not set(want) & OF_REFERENCE:
        reference = None
    request = _Request(
        want=tuple(dict.fromkeys(want)),
        head=head,
        ref_head=None if reference is None else reference[1],
        temperature=temperature,
        dtype=working_dtype(hidden),
        top_k=top_k if set(want) & OF_TOP_K else None,
        tiles=tiles,
    )
    ref_hidden, ref_weight, ref_bias = (
        (None, None, None)
        if reference is None
        else (reference[0], reference[1].weight, reference[1].bias)
    )
    inputs = (hidden, head.weight, head.bias, ref_hidden, ref_weight, ref_bias)
    if not torch.is_grad_enabled():
        with torch.autocast(hidden.device.type, enabled=False):
            sides = request.sides(*inputs)
            summed = sum_up(sides, targets, want=request.want, top_k=request.top_k, tiles=tiles)
            scores = scores_of(summed, sides, targets)
        return TokenScores(**{name: scores[name].to(request.dtype) for name in request.want})
    values = cast(tuple[Tensor, ...], _Streamed.apply(*inputs, targets, request))
    return TokenScores(**dict(zip(request.want, values, strict=True)))


_OF_REFERENCE_ALONE: dict[Quantity, Quantity] = {
    "ref_logprobs": "logprobs",
    "ref_entropy": "entropy",
}


def _reference_alone(
    ref_hidden: Float[Tensor, "N D2"],
    ref_head: Head,
    targets: Int[Tensor, " N"],
    temperature: float,
    want: Collection[Quantity],
    tiles: Tiles,
    hidden: Float[Tensor, "N D"],
) -> TokenScores:
    """Score the reference without the policy: one product instead of two."""
    scores = token_scores(
        ref_hidden,
        ref_head,
        targets,
        temperature=temperature,
        want=[_OF_REFERENCE_ALONE[name] for name in want],
        tiles=tiles,
    )
    dtype = working_dtype(hidden)
    return TokenScores(
        **{name: getattr(scores, _OF_REFERENCE_ALONE[name]).to(dtype) for name in want}
    )


@dataclass(frozen=True)
class _Request:
    """What was asked for; autograd is handed the tensors apart, and they are put back here."""

    want: tuple[Quantity, ...]
    head: Head
    ref_head: Head | None
    temperature: float
    dtype: torch.dtype
    top_k: int | None
    tiles: Tiles

    def sides(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> Sides:
        head = replace(self.head, weight=weight, bias=bias)
        policy = side(hidden, head, temperature=self.temperature, dtype=self.dtype)
        if self.ref_head is None or ref_hidden is None or ref_weight is None:
            return (policy,)
        head = replace(self.ref_head, weight=ref_weight, bias=ref_bias)
        return (policy, side(ref_hidden, head, temperature=self.temperature, dtype=self.dtype))


class _Streamed(torch.autograd.Function):
    """The quantities of `request.want`, in that order."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        targets: Tensor,
        request: _Request,
    ) -> tuple[Tensor, ...]:
        tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        # Autocast would round the logits to half precision behind our back.
        with torch.autocast(hidden.device.type, enabled=False):
            sides = request.sides(*tensors)
            summed = sum_up(
                sides,
                targets,
                want=request.want,
                top_k=request.top_k,
                tiles=request.tiles,
                keep_bytes=request.tiles.keep_bytes if any(ctx.needs_input_grad) else 0,
            )
            scores = scores_of(summed, sides, targets)
        ctx.save_for_backward(*tensors, targets)
        ctx.request, ctx.summed = request, summed
        ctx.set_materialize_grads(False)
        out = {name: scores[name].to(request.dtype) for name in request.want}
        silent = [out[name] for name in request.want if name in WITHOUT_GRADIENT]
        ctx.mark_non_differentiable(*silent)
        return tuple(out.values())

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *upstream: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, targets = ctx.saved_tensors
        request: _Request = ctx.request
        with torch.autocast(targets.device.type, enabled=False):
            sides = request.sides(*tensors)
            weights = _upstream(request.want, upstream, sides)
            reached = (weights.to_policy, weights.to_reference)
            needs = (ctx.needs_input_grad[:3], ctx.needs_input_grad[3:6])
            # The live leaf, whose `.grad` is everyone's.
            leaf = request.head.weight if _adds_in_place(request) else None
            gradients = walk_back(
                sides,
                targets,
                upstream=weights,
                summed=ctx.summed,
                wanted=[
                    NeededGradients(*need) if reach else NeededGradients(False, False, False)
                    for need, reach, _ in zip(needs, reached, sides, strict=False)
                ],
                weight_rows=[weight.shape[0] for weight in (tensors[1], tensors[4])[: len(sides)]],
                tiles=request.tiles,
                added_to=None if leaf is None else leaf.grad,
            )
            if leaf is not None and gradients[0].weight is not None:
                leaf.grad, gradients[0].weight = gradients[0].weight, None
        found = [*_in_dtypes_of(gradients[0], tensors[:3]), None, None, None]
        if len(gradients) == 2:
            found[3:] = _in_dtypes_of(gradients[1], tensors[3:])
        return (*found, None, None)


def _adds_in_place(request: _Request) -> bool:
    weight = request.head.weight
    return request.tiles.weight_gradients == "in_place" and weight.is_leaf


def _upstream(
    want: tuple[Quantity, ...], upstream: tuple[Tensor | None, ...], sides: Sides
) -> Upstream:
    """Weights by quantity; an infinite KL is infinite for all logits nearby: no gradient."""
    weights = {
        name: weight.double()
        for name, weight in zip(want, upstream, strict=True)
        if weight is not None
    }
    if len(sides) == 2 and lacks(sides[1], sides[0]):
        weights.pop("kl", None)
        weights.pop("log_ratio_variance", None)
    if len(sides) == 2 and lacks(sides[0], sides[1]):
        weights.pop("reverse_kl", None)
    return Upstream(**weights)


def _in_dtypes_of(gradient: SideGradients, tensors: list[Tensor | None]) -> list[Tensor | None]:
    made = (gradient.hidden, gradient.weight, gradient.bias)
    return [
        None if one is None or tensor is None else one.to(tensor.dtype)
        for one, tensor in zip(made, tensors, strict=True)
    ]
