"""Divergences of one model from several frozen ones, streamed: one walk over tiles for all.

With p the student's next-token distribution and q that of a frozen model, per row and in nats

    reverse_kl        KL(p‖q)  = Σ p_v log(p_v/q_v)                    ≥ 0, infinite where q bans
    forward_kl        KL(q‖p)  = Σ q_v log(q_v/p_v)                    ≥ 0, infinite where p bans
    jensen_shannon    ½ KL(p‖m) + ½ KL(q‖m),  m = ½ (p + q)            in [0, log 2]

named as in distillation: the reverse KL is `kl` of `kleash.scoring.api`, where p is the policy.
The gradient reaches p alone:

    ∂/∂z_v            p_v (log p_v/q_v − KL)   ·   p_v − q_v   ·   ½ p_v (log p_v/m_v − KL(p‖m))

A single KL is `token_scores` of a policy and its reference, with all its ways to be fast. For
several models, the KLs are read off one walk over tiles. Jensen–Shannon needs both normalisers
before it can be summed, and so a second one; nothing of [N, V] is held in either. The student's
tile is made once, however many models it is compared with.

A loss that is the mean over the rows can have its gradient made in the walk forward, up to that
factor: four products of [N, D] and [D, V], as with all logits, instead of six or eight
(`gradient="forward"`).

References:
    Agarwal et al., "On-Policy Distillation of Language Models", 2024,
    https://arxiv.org/abs/2306.13649. Gu et al., "MiniLLM", 2024, https://arxiv.org/abs/2306.08543.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from kleash.scoring.api import Quantity, check_request, working_dtype
from kleash.scoring.backward import SideGradients
from kleash.scoring.divergence_blocks import block_rows, walk_once
from kleash.scoring.divergence_walks import Comparison, Found, sum_up_all, walk_back_all
from kleash.scoring.streaming import token_scores
from kleash.scoring.tiles import Tiles, default_tiles, side
from kleash.types import Head

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon"]
GradientTime = Literal["backward", "forward"]


@dataclass(frozen=True)
class Frozen:
    """A model to be compared with: what its trunk said about the same rows, and its head."""

    hidden: Float[Tensor, "N D2"]
    head: Head
    divergence: Divergence


@dataclass(frozen=True)
class TokenDivergences:
    """Per row, in nats; float32, or float64 where the student's hidden states are float64."""

    logprobs: Float[Tensor, " N"]
    """log p of the target."""
    divergences: tuple[Float[Tensor, " N"], ...]
    """One for each frozen model, in the order given."""


def token_divergences(
    hidden: Float[Tensor, "N D"],
    head: Head,
    targets: Int[Tensor, " N"],
    frozen: Sequence[Frozen],
    *,
    temperature: float = 1.0,
    tiles: Tiles | None = None,
    gradient: GradientTime = "backward",
) -> TokenDivergences:
    """Exact divergences of the student's distributions from those of frozen models.

    Args:
        hidden: the student's final hidden states; row n predicts `targets[n]`.
        head: the student's head.
        targets: ids of the words that were written.
        frozen: at least one model with the same words; no gradient reaches it.
        temperature: divides the logits of all models, after scale and soft-cap.
        tiles: shape of the tiles; None: what suits the device. `keep_bytes` is used for a
            single KL alone, with the gradient made backward.
        gradient: when it is made. `forward`: of the sum over all rows, while their tiles are at
            hand; backward only scales it, by what the loss weighs each row alike. A loss that
            does not weigh them alike, or asks for the gradient of log-probabilities, gets the same
            gradient as with `backward`, from tiles made again. For one frozen model. The head's
            gradient is held from then on; a head in half precision is left to `backward` where
            its rows do not fit into one block.

    Returns:
        log-probabilities and divergences. Gradients flow to the student's hidden states, weight
        and bias; an infinite KL has gradient 0.

    Raises:
        ValueError: if there is no frozen model or no such divergence, or several models and
            `gradient="forward"`, or as `check_request` says.

    Example:
        >>> head = Head(weight=torch.eye(2))
        >>> student, teacher = torch.tensor([[0.7, 0.3]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> found = [
        ...     token_divergences(
        ...         student, head, torch.tensor([0]), [Frozen(teacher, head, name)]
        ...     ).divergences[0]
        ...     for name in ("reverse_kl", "forward_kl", "jensen_shannon")
        ... ]
        >>> torch.cat(found)
        tensor([0.0823, 0.0872, 0.0210])
    """
    _check(hidden, head, targets, frozen, temperature=temperature)
    if gradient == "forward" and len(frozen) > 1:
        raise ValueError(
            f'gradient="forward" is for one frozen model, got {len(frozen)}: use "backward"'
        )
    ahead = gradient == "forward" and torch.is_grad_enabled()
    if not ahead and len(frozen) == 1 and (name := _QUANTITY.get(frozen[0].divergence)) is not None:
        scores = token_scores(
            hidden,
            head,
            targets,
            reference=(frozen[0].hidden.detach(), _detached(frozen[0].head)),
            temperature=temperature,
            want=("logprobs", name),
            tiles=tiles,
        )
        return TokenDivergences(cast(Tensor, scores.logprobs), (getattr(scores, name),))
    tiles = default_tiles(hidden.device) if tiles is None else tiles
    request = _DivergenceRequest(
        head=head,
        frozen=tuple(frozen),
        temperature=temperature,
        dtype=working_dtype(hidden),
        tiles=replace(tiles, keep_bytes=0),
        ahead=ahead,
    )
    values = cast(
        tuple[Tensor, ...],
        _StreamedDivergences.apply(hidden, head.weight, head.bias, targets, request),
    )
    return TokenDivergences(values[0], values[1:])


_QUANTITY: dict[Divergence, Quantity] = {"reverse_kl": "kl", "forward_kl": "reverse_kl"}
"""The names that `token_scores` has for them, where the student is the policy."""


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, weight=head.weight.detach(), bias=bias)


def _check(
    hidden: Float[Tensor, "N D"],
    head: Head,
    targets: Int[Tensor, " N"],
    frozen: Sequence[Frozen],
    *,
    temperature: float,
) -> None:
    if not frozen:
        raise ValueError("expected at least one frozen model to compare with, got none")
    for one in frozen:
        if one.divergence not in get_args(Divergence):
            names = ", ".join(get_args(Divergence))
            raise ValueError(f"divergence must be one of {names}, got {one.divergence!r}")
        check_request(
            hidden,
            head,
            targets,
            reference=(one.hidden, one.head),
            temperature=temperature,
            want=("logprobs", "kl"),
            top_k=None,
        )


@dataclass(frozen=True)
class _DivergenceRequest:
    """What was asked for, but for the tensors that autograd is handed apart."""

    head: Head
    frozen: tuple[Frozen, ...]
    temperature: float
    dtype: torch.dtype
    tiles: Tiles
    ahead: bool
    """Make the gradient of the sum over all rows in the walk forward."""

    def comparisons(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Comparison]:
        head = replace(self.head, weight=weight, bias=bias)
        student = side(hidden, head, temperature=self.temperature, dtype=self.dtype)
        return [
            Comparison(
                (
                    student,
                    side(
                        one.hidden.detach(),
                        one.head,
                        temperature=self.temperature,
                        dtype=self.dtype,
                    ),
                ),
                one.divergence,
            )
            for one in self.frozen
        ]


class _StreamedDivergences(torch.autograd.Function):
    """log p of the targets, and a divergence for each frozen model."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        request: _DivergenceRequest,
    ) -> tuple[Tensor, ...]:
        # Autocast would round the logits to half precision behind our back.
        with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
            found, made = _sum_up(
                request.comparisons(hidden, weight, bias),
                targets,
                request,
                needed=ctx.needs_input_grad[:3],
                weight_rows=weight.shape[0],
            )
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.request, ctx.found, ctx.made = request, found, made
        ctx.set_materialize_grads(False)
        return tuple(value.to(request.dtype) for value in (found.logprobs, *found.divergences))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *upstream: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        request: _DivergenceRequest = ctx.request
        found: Found = ctx.found
        # Scaled in place, and so good for one walk back alone.
        gradient, ctx.made = _scaled(ctx.made, upstream), None
        if gradient is None:
            with torch.autocast(targets.device.type, enabled=False):
                gradient = walk_back_all(
                    request.comparisons(hidden, weight, bias),
                    targets,
                    found=found,
                    upstream=[None if one is None else one.double() for one in upstream],
                    needed=ctx.needs_input_grad[:3],
                    weight_rows=weight.shape[0],
                    tiles=request.tiles,
                )
        made = (gradient.hidden, gradient.weight, gradient.bias)
        return (
            *(
                None if one is None or tensor is None else one.to(tensor.dtype)
                for one, tensor in zip(made, (hidden, weight, bias), strict=True)
            ),
            None,
            None,
        )


def _sum_up(
    comparisons: list[Comparison],
    targets: Tensor,
    request: _DivergenceRequest,
    *,
    needed: Sequence[bool],
    weight_rows: int,
) -> tuple[Found, SideGradients | None]:
    """What the walk forward finds; and the gradient of the sum over all rows, if it is made now."""
    student, rows = comparisons[0].sides[0], targets.shape[0]
    # Blocks add up in the memory of the gradient, which half precision would round each time.
    exact = student.weight.dtype == request.dtype or rows <= block_rows(comparisons[0])
    if not (request.ahead and exact and any(needed)):
        return sum_up_all(comparisons, targets, request.tiles), None
    return walk_once(
        comparisons[0], targets, needed=needed, weight_rows=weight_rows, tiles=request.tiles
    )


def _scaled(made: SideGradients | None, upstream: Sequence[Tensor | None]) -> SideGradients | None:
    """The gradient of a loss that weighs every row alike; None for any other loss."""
    weight = upstream[1]
    if made is None or upstream[0] is not None or weight is None or not len(weight):
        return None
    if not bool((weight == weight[0]).all()):
        return None
    for each in (made.hidden, made.weight, made.bias):
        if each is not None:
            each.mul_(weight[0])
    return made
