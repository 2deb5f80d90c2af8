"""Checks `precision.*`: does an update reach the weights, or does rounding take it back?

AdamW moves a weight by about the learning rate. A weight in bfloat16 keeps 8 bits: next to 0.1 the
step from one number to the next is 0.0005, and a smaller move is mostly rounded away. Measured by
one trial step of AdamW on copies; the policy's own weights stay as they are.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.models.sharding import whole
from kleash.preflight.findings import Check, Finding
from kleash.preflight.probe_batch import Trial
from kleash.training.optimizers import round_by_chance

LEAST_SHARE = 0.9
_REPEATS = 64
_SAMPLE = 1 << 16
"""Weights of a matrix that are tried: enough for three digits of a share."""


def surviving_update_share(
    before: Float[Tensor, "*weights"], after: Float[Tensor, "*weights"], dtype: torch.dtype
) -> float:
    """Share of an optimiser's update that is still there after rounding into the weights' dtype.

        share = Σ min(|round(w + Δ) − w|, |Δ|) / Σ |Δ|,     Δ = after − before

    A move that is rounded back counts nothing; one that is rounded up counts as itself and not
    more, so that overshooting does not make up for what is lost elsewhere.

    Args:
        before: the weights w, representable in `dtype`.
        after: the updated weights in float32 (or float64), before rounding.
        dtype: in which they are kept.

    Returns:
        Between 0 (nothing is learnt) and 1; 1 if nothing was to change.

    Raises:
        ValueError: if `before` is not representable in `dtype`.
    """
    exact = before.double()
    if not torch.equal(exact.to(dtype).double(), exact):
        raise ValueError(f"expected weights that {dtype} can hold, got others: round them first")
    wanted = after.double() - exact
    total = wanted.abs().sum()
    if not total > 0:
        return 1.0
    kept = (after.to(dtype).double() - exact) * wanted.sign()
    return float(torch.minimum(kept, wanted.abs()).sum() / total)


def survival(trial: Trial) -> Finding:
    """Of one AdamW step at the peak learning rate, how much the weights can hold."""
    check = Check("precision.survival", f"at least {LEAST_SHARE:g} of an update survives rounding")
    group = trial.components.optimizer.param_groups[0]
    learning: list[Tensor] = group["params"]
    by_chance = trial.config.optimizer.rounding == "stochastic"
    sizes = [parameter.numel() for parameter in learning]
    shares = [_trial_share(parameter, group, by_chance=by_chance) for parameter in learning]
    share = sum(s * n for s, n in zip(shares, sizes, strict=True)) / sum(sizes)
    kinds = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in learning})
    name, rate = " and ".join(kinds), group["peak_lr"]
    if share >= LEAST_SHARE:
        return check.ok(f"{share:.4g} in {name} at a learning rate of {rate:g}")
    return check.fail(
        f"{share:.2g} in {name}",
        f"With policy.precision: {trial.config.policy.precision} and optimizer.lr: {rate:g}, "
        f"rounding leaves {share:.2g} of an AdamW update in the weights: most of what is learnt "
        "would be lost.",
        "Set policy.precision: bf16, which updates float32 weights and computes in bfloat16, or "
        "optimizer.rounding: stochastic, or train an adapter (policy.lora), whose weights are "
        "float32.",
    )


def _trial_share(parameter: Tensor, group: dict[str, object], *, by_chance: bool) -> float:
    """The share that survives of a first AdamW step on (a sample of) one matrix.

    The first step of AdamW does not depend on the size of a gradient, only on its sign; later
    ones are smaller rather than larger. So random gradients serve, and the share is the best case.
    """
    flat = whole(parameter.detach()).reshape(-1)
    stride = max(1, flat.numel() // _SAMPLE)
    # In float64, beside which float32 weights round too.
    before = flat[::stride][:_SAMPLE].double()
    copy = torch.nn.Parameter(before.clone())
    optimizer = torch.optim.AdamW(
        [copy],
        lr=group["peak_lr"],  # pyright: ignore[reportArgumentType]
        betas=group["betas"],  # pyright: ignore[reportArgumentType]
        eps=group["eps"],  # pyright: ignore[reportArgumentType]
        weight_decay=group["weight_decay"],  # pyright: ignore[reportArgumentType]
    )
    copy.grad = torch.randn_like(copy)
    optimizer.step()
    after = copy.detach()
    if by_chance and parameter.dtype == torch.bfloat16:
        # What one rounding does to one weight is chance; what many do is the mean of many.
        generator = torch.Generator(after.device).manual_seed(0)
        repeated = after.float().expand(_REPEATS, -1)
        mean = round_by_chance(repeated, generator).double().mean(0)
        wanted = after - before
        return float(((mean - before) * wanted.sign()).sum() / wanted.abs().sum())
    return surviving_update_share(before, after, parameter.dtype)
