r"""Why do sampler and trainer disagree about the same tokens? Each explanation, and what it leaves.

The engine reports log σ of every token it wrote; the trainer knows its own law π at each of them.
An explanation is another law σ' that π, the reference or a rounded copy of the policy gives, and it
holds if it leaves little of the gap log σ − log π:

    a temperature     log softmax(z / T), the T that fits best
    a cut tail        log π − log(mass kept), by top-p, top-k or min-p, renormalised
    stale weights     the law of the reference, which is that of the run's first weights
    a number format   the policy rounded to it: the gaps go up and down with those of the copy
    kernels           small gaps that were there before the first update
    stale weights     gaps that were not

What the drawn words themselves say of their law, whatever the engine reports, is in
`sampling_distribution`.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from kleash.models.lm_head import apply_head
from kleash.models.policy import Policy
from kleash.preflight.probe_batch import Trial
from kleash.types import Rollout

CauseName = Literal[
    "temperature", "cut", "start weights", "number format", "kernels", "stale weights", "unknown"
]

_ENTRIES = 10**7
"""Tokens × vocabulary that are read at most."""
_FEWEST = 8
"""Tokens from which on a fit says something."""
_LEFT = 0.2
"""Share of the gap's root mean square that an explanation may leave: 96 % of it explained."""
_CORRELATION = 0.4
_SMALL = 0.1
"""Nats (root mean square over tokens) up to which kernels alone may differ."""
_HOTTEST = math.log(10)
_FORMATS = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}
_PRESENT = "Give the engine the policy's present weights before it writes"


@dataclass(frozen=True)
class GapCause:
    """What explains the gap, in a sentence, and what to change."""

    name: CauseName
    cause: str
    remedy: str

    @property
    def is_rounding(self) -> bool:
        """Whether both hold the same weights and draw by the same rule: a correction is made for
        it."""
        return self.name in ("number format", "kernels")


@dataclass(frozen=True)
class Readings:
    """The tokens of some responses, one after the other."""

    logits: Float[Tensor, "token vocab"]
    """The trainer's, at temperature 1, in float64."""
    drawn: Int[Tensor, "token 1"]
    """Their ids."""
    sampler: Float[Tensor, " token"]
    """log σ as the engine reports it."""
    reference: Float[Tensor, " token"]
    """log π_ref."""

    def logprobs(self, heat: float) -> Float[Tensor, "token vocab"]:
        """The law at a temperature."""
        return (self.logits / heat).log_softmax(-1)

    def of_drawn(self, heat: float) -> Float[Tensor, " token"]:
        """log-probabilities of the tokens at a temperature."""
        return self.logprobs(heat).gather(1, self.drawn).squeeze(1)


def explain_gap(trial: Trial) -> GapCause:
    """The cause of a gap between the sampler's log-probabilities and the trainer's."""
    policy, asked = trial.components.policy, trial.components.sampling.temperature
    readings = read(policy, trial)
    gap = readings.sampler - readings.of_drawn(asked)
    if len(gap) < _FEWEST or not bool(gap.isfinite().all()):
        return _unknown()
    return (
        _temperature(readings, gap, asked)
        or _cut(readings.logprobs(asked), gap)
        or _start_weights(trial, readings, gap)
        or _number_format(trial, readings, gap)
        or _by_when(trial, gap)
    )


@torch.no_grad()
def read(policy: Policy, trial: Trial) -> Readings:
    """Some responses of the batch as this policy reads them."""
    rollout, words = trial.rollout, policy.words
    assert rollout.sampler_logprobs is not None
    rows = list(_rows(rollout, _ENTRIES // words))
    parts: list[Tensor] = []
    for row in rows:
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]][None]
        response = rollout.response_ids[row][rollout.response_mask[row]][None]
        whole = (torch.ones_like(prompt).bool(), torch.ones_like(response).bool())
        states = policy.hidden_states(prompt, whole[0], response, whole[1])
        logits = apply_head(policy.head, states[0, : response.shape[1]])
        parts.append(logits[:, :words].double().cpu())
    mask = rollout.response_mask

    def flat(numbers: Tensor) -> Tensor:
        return torch.cat([numbers[row][mask[row]] for row in rows]).cpu()

    return Readings(
        logits=torch.cat(parts),
        drawn=flat(rollout.response_ids)[:, None],
        sampler=flat(rollout.sampler_logprobs).double(),
        reference=flat(trial.scored.ref_logprobs).double(),
    )


def _rows(rollout: Rollout, most: int) -> Iterator[int]:
    """Responses until there are enough tokens; one at least."""
    tokens = 0
    for row, length in enumerate(rollout.response_mask.sum(-1).tolist()):
        if row and tokens + length > most:
            return
        tokens += length
        yield row


def _rms(numbers: Float[Tensor, " token"]) -> float:
    return float(numbers.square().mean().sqrt())


def _explains(left: Float[Tensor, " token"], gap: Float[Tensor, " token"]) -> bool:
    return _rms(left) <= _LEFT * _rms(gap)


def _temperature(readings: Readings, gap: Float[Tensor, " token"], asked: float) -> GapCause | None:
    def left(log_heat: float) -> Tensor:
        return readings.sampler - readings.of_drawn(asked * math.exp(log_heat))

    grid = [_HOTTEST * (number / 10 - 1) for number in range(21)]
    best = min(grid, key=lambda log_heat: _rms(left(log_heat)))
    low, high = best - _HOTTEST / 10, best + _HOTTEST / 10
    for _ in range(40):
        third = (high - low) / 3
        if _rms(left(low + third)) < _rms(left(high - third)):
            high -= third
        else:
            low += third
    if not _explains(left((low + high) / 2), gap):
        return None
    heat = asked * math.exp((low + high) / 2)
    return GapCause(
        "temperature",
        f"The sampler wrote at temperature {heat:.3g} and the trainer scores at {asked:g}.",
        f"Set rollout.temperature: {heat:.3g}, at which the sampler writes, or make it write at "
        f"{asked:g}.",
    )


def _cut(laws: Float[Tensor, "token vocab"], gap: Float[Tensor, " token"]) -> GapCause | None:
    """A tail that is cut off leaves all others likelier, each state by a factor of its own."""
    ordered = laws.exp().sort(-1, descending=True).values
    summed = ordered.cumsum(-1)
    mass = (-gap).exp().clamp(max=1.0)
    near = 1 - 1e-6
    size = torch.searchsorted(summed, (mass * near)[:, None]).clamp(max=laws.shape[1] - 1) + 1
    relative = ordered / ordered[:, :1]
    dropped = torch.where(
        size < laws.shape[1], relative.gather(1, size.clamp(max=laws.shape[1] - 1)), 0.0
    )
    most, count = float(mass.min()), int(size[gap.argmax()])
    least = float(dropped.max())
    kept = {
        f"top-p, at about {most:.3g}": torch.searchsorted(
            summed, torch.full_like(gap, most * near)[:, None]
        )
        + 1,
        f"top-k, of {count} words": torch.full_like(size, count),
        f"min-p, at about {least:.3g}": (relative > least / near).sum(-1, keepdim=True),
    }
    lefts = {
        name: gap + summed.gather(1, number.clamp(1, laws.shape[1]) - 1).squeeze(1).log()
        for name, number in kept.items()
    }
    name = min(lefts, key=lambda name: _rms(lefts[name]))
    if not _explains(lefts[name], gap):
        return None
    return GapCause(
        "cut",
        f"The sampler cuts the tail of the distribution as {name} does, and shares its probability "
        "out among the words it keeps.",
        f"Draw from the whole distribution (no {name.partition(',')[0]} in the engine's settings "
        "or in generation_config.json), and sharpen with rollout.temperature.",
    )


def _start_weights(
    trial: Trial, readings: Readings, gap: Float[Tensor, " token"]
) -> GapCause | None:
    moved = trial.components.reference is not trial.components.original
    if moved or trial.config.reference.reference_differs:
        return None
    if not _explains(readings.sampler - readings.reference, gap):
        return None
    return GapCause(
        "start weights",
        "The sampler writes with stale weights, those that the run began with: its "
        "log-probabilities are the reference's.",
        f"{_PRESENT}: none of its updates has reached it.",
    )


def _number_format(
    trial: Trial, readings: Readings, gap: Float[Tensor, " token"]
) -> GapCause | None:
    """Rounding is no chance: a rounded copy of the policy errs at the same tokens."""
    policy, asked = trial.components.policy, trial.components.sampling.temperature
    own, found = policy.head.weight.dtype, dict[torch.dtype, float]()
    for dtype in _FORMATS:
        if dtype == own or own == torch.float64:
            continue
        model = cast(torch.nn.Module, deepcopy(policy.model)).to(dtype)
        rounded = replace(policy, model=cast(PreTrainedModel, model), adapter=None)
        other = read(rounded, trial).of_drawn(asked) - readings.of_drawn(asked)
        found[dtype] = float(torch.corrcoef(torch.stack([gap, other]))[0, 1])
    # Five standard errors of a correlation of nothing; NaN where the copy is not rounded at all.
    least = max(_CORRELATION, 5 / math.sqrt(len(gap)))
    alike = {dtype: number for dtype, number in found.items() if number > least}
    if not alike:
        return None
    best = max(alike, key=lambda dtype: alike[dtype])
    return GapCause(
        "number format",
        f"The sampler computes in {_FORMATS[best]} and the trainer in {_FORMATS[own]}: a copy of "
        f"the policy in {_FORMATS[best]} errs at the same tokens (correlation {alike[best]:.2f}).",
        f"Load the engine in {_FORMATS[own]}, or set policy.precision to what it computes in; or "
        "correct for it: rollout.correction: sequence_truncated.",
    )


def _by_when(trial: Trial, gap: Float[Tensor, " token"]) -> GapCause:
    """Nothing explains it token by token: was it there before the first update?"""
    # Half of the mean square is the KL per token, to second order.
    now, floor = _rms(gap) ** 2 / 2, trial.sampler_floor
    from_the_start = trial.at_start or (floor is not None and now <= 4 * floor)
    if from_the_start and _rms(gap) <= _SMALL:
        return GapCause(
            "kernels",
            "Sampler and trainer compute the same weights by different kernels: the gaps are small "
            f"({_rms(gap):.2g} nats), follow no setting or number format, and were there before "
            "the first update.",
            "Take the same attention kernel in both (policy.attention), or correct for it: "
            "rollout.correction: sequence_truncated.",
        )
    if floor is not None and now > 4 * floor:
        return GapCause(
            "stale weights",
            "The sampler writes with stale weights, those of another model than the policy as it "
            f"is: the gap was {floor:.2g} nats per token before the first update and is {now:.2g} "
            "now, and no setting or number format explains it.",
            f"{_PRESENT}, after every update and all of them.",
        )
    return _unknown()


def _unknown() -> GapCause:
    return GapCause(
        "unknown",
        "The sampler's log-probabilities are not the trainer's: another model, a cut distribution "
        "or a penalty wrote these responses.",
        f"{_PRESENT}, and draw with rollout.temperature and no other setting.",
    )
