"""While training: a KL below zero by more than its noise, or a sampler that drifts, has a cause.

Four numbers of a batch know whether the words came from the law that is scored:

    mean Σ k1                 below 0 by more than its noise: no KL can be
    mean Σ (k1 − KL_t)        away from 0 by more than its noise, for each term has mean 0
    mean Σ (−log π − H_t)     the same: words are as surprising as their distributions say
    mean Σ (sampler − π)      away from its floor: the engine wrote by another law

When one of them does not, the checks of the preflight run on the very batch, which is kept beside
their findings, and the log and an event of the run name the cause. A batch that is well costs
four sums.
"""

import json
import logging
import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.errors import KleashError
from kleash.kl.sampler_gap import SamplerGap, sampler_gap
from kleash.kl.statistics import Estimate, clustered_mean, response_kl
from kleash.preflight.findings import Finding
from kleash.preflight.probe_batch import examine
from kleash.preflight.runner import OF_A_BATCH, refused, run_checks
from kleash.storage.atomic_directories import save_tensors
from kleash.storage.events import new_event
from kleash.training.callbacks import RolloutEvent
from kleash.types import ScoredRollout

_NOISE = 5.0
"""Standard errors if there were endless prompts: a false alarm in some million batches."""
_FLOOR = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Nats per token that rounding alone may put between sampler and trainer."""
_GROWTH = 4.0
"""Times its floor before the first update that the KL of the sampler may grow."""
_SHARP = 0.5
"""Nats of entropy below which the next word is nearly certain."""
_TEXTS = 4
_MOST = 5
"""Batches of a run that are examined and kept; of later ones the log has the symptom alone."""
_LOG = logging.getLogger("kleash")


class RuntimeMonitor:
    """A training callback that examines a batch whose numbers cannot be."""

    def on_rollout(self, event: RolloutEvent) -> None:
        """Examine the batch; a batch that is well costs four sums."""
        examine_batch(event)


def examine_batch(event: RolloutEvent) -> list[Finding]:
    """Examine a batch if its numbers cannot be; say nothing and return nothing if they can.

    The batch and the findings are kept as `diagnoses/step-000001.*` in the run directory.

    Returns:
        The findings that failed; the log and an event of the run have their causes.
    """
    if event.written_ahead:
        # Its words come from the law of one update ago: no number above has to hold for it.
        return []
    components, scored, step = event.components, event.scored, event.step
    dtype = components.policy.compute_dtype
    symptom = symptom_of(scored, dtype=dtype, sampler_floor=event.sampler_floor)
    if symptom is None:
        return []
    # Earlier ones alone: a run that is resumed comes to the same alarms, each reported once.
    own, folder = f"step-{step:06d}.json", event.folder / "diagnoses"
    if sum(file.name < own for file in folder.glob("*.json")) >= _MOST:
        _raise_alarm(event, symptom, "The first batches like it are in diagnoses/.")
        return []
    devices = [components.policy.device] if components.policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        findings = diagnose(event)
    causes = [finding for finding in findings if finding.verdict == "fail"]
    named = " ".join(f"{f.name}: {f.cause} {f.remedy}" for f in causes[:3])
    unnamed = "No check of this batch fails: check lr and this step's samples."
    _raise_alarm(event, symptom, named or unnamed)
    if components.mesh.is_first:
        _keep(folder, step, symptom, findings, scored)
    return causes


def _raise_alarm(event: RolloutEvent, symptom: str, cause: str) -> None:
    """Into the log and into the run's events."""
    _LOG.warning("step %d: %s %s", event.step, symptom, cause)
    event.append_event(new_event(event.step, "alarm", f"{symptom} {cause}"))


def symptom_of(
    scored: ScoredRollout, *, dtype: torch.dtype, sampler_floor: float | None = None
) -> str | None:
    """The first number of a batch that cannot be; None if all can.

    Args:
        scored: the batch.
        dtype: in which the policy computes.
        sampler_floor: KL of sampler against trainer before the first update, in nats per token;
            None: not known, and rounding alone is allowed for.
    """
    rollout = scored.rollout
    mask, clusters = rollout.response_mask, rollout.prompt_index
    floor = _FLOOR[dtype] * float(mask.sum(-1).double().mean())
    k1 = response_kl(scored.rollout_logprobs - scored.ref_logprobs, mask)
    exact = response_kl(scored.kl, mask)
    if rollout.sampler_logprobs is not None:
        found = sampler_gap(scored.rollout_logprobs, rollout.sampler_logprobs, mask, clusters)
        said = _beyond_floor(found, _FLOOR[dtype], sampler_floor, length=floor / _FLOOR[dtype])
        if said is not None:
            return said
    mean = clustered_mean(k1, clusters)
    if mean.mean < -_noise(mean, floor):
        return (
            f"The KL to the reference is {mean.mean:+.3g} nats per response (k1), below 0 by more "
            f"than its noise of {mean.standard_error or 0:.2g}."
        )
    surprise = response_kl(-scored.rollout_logprobs - scored.entropy, mask)
    unseen = float(response_kl(_rare_variance(scored.entropy), mask).mean()) / len(mask)
    for what, numbers in (
        ("Sampled and exact KL", k1 - exact),
        ("The words' surprise and their entropy", surprise),
    ):
        gap = clustered_mean(numbers, clusters)
        if abs(gap.mean) > _noise(gap, floor, unseen=unseen):
            return (
                f"{what} differ by {gap.mean:+.3g} nats per response, by more than their noise "
                f"of {gap.standard_error or 0:.2g}."
            )
    return None


def _beyond_floor(
    gap: SamplerGap, rounding: float, measured: float | None, *, length: float
) -> str | None:
    """What is wrong with the sampler's KL; None if rounding or the floor of this run explains it.

    Where the sampler's floor was above rounding from the first, that was said then; what counts
    afterwards is whether it grows.
    """
    allowed = rounding if measured is None else max(rounding, _GROWTH * measured)
    per_response, noise = gap.per_response, 0.0
    if allowed > rounding:
        noise = _NOISE * (per_response.standard_error or 0.0)
    if abs(per_response.mean) > allowed * length + noise:
        return (
            f"kl_sampler is {per_response.mean:+.3g} nats per response, beyond the "
            f"{allowed * length + noise:.2g} that rounding explains."
        )
    if gap.per_token.mean > allowed:
        return (
            f"kl_sampler is {gap.per_token.mean:.3g} nats per token, beyond the {allowed:.2g} that "
            "rounding explains."
        )
    return None


def diagnose(event: RolloutEvent) -> list[Finding]:
    """The preflight's checks of policy, reference and sampler, on this batch."""
    try:
        trial = examine(
            event.config,
            event.components,
            event.judged,
            event.scored,
            texts=_TEXTS,
            at_start=event.step == 1,
            sampler_floor=event.sampler_floor,
        )
    except (KleashError, ValueError) as error:
        return [refused("batch", error)]
    return run_checks(OF_A_BATCH, trial)


def _rare_variance(entropy: Float[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
    """Variance of the surprise where a word is nearly certain, from the entropy H alone.

    There it lies in words so rare that a batch may have none of them, and its own spread then says
    nothing of it: H ≈ p (1 − log p) for their probability p, and p log² p ≈ H (2 − log H).
    """
    # Rounding may leave an entropy of 0 a little below it.
    positive = entropy.double().clamp(min=0.0)
    return torch.where(entropy < _SHARP, 2 * positive - torch.xlogy(positive, positive), 0.0)


def _noise(estimate: Estimate, floor: float, *, unseen: float = 0.0) -> float:
    """How far a mean may be off: Student's quantile, for few prompts say little of their spread.

    `unseen` is variance of the mean that the sample cannot show.

    t ≈ √(ν (exp(z² (ν − 5/6)/(ν − 2/3 + 1/(10 ν))²) − 1)) for ν = prompts − 1.

    References:
        Wallace, "Bounds on normal approximations to Student's and the chi-square distributions",
        1959.
    """
    freedom = estimate.clusters - 1
    if estimate.standard_error is None or freedom < 2:
        return math.inf
    shrunk = (freedom - 5 / 6) / (freedom - 2 / 3 + 1 / (10 * freedom)) ** 2
    quantile = math.sqrt(freedom * math.expm1(_NOISE**2 * shrunk))
    return quantile * math.sqrt(estimate.standard_error**2 + unseen) + floor


def _keep(
    folder: Path, step: int, symptom: str, findings: list[Finding], scored: ScoredRollout
) -> None:
    """The batch as tensors and the findings as JSON, for whoever looks later."""
    folder.mkdir(exist_ok=True)
    rollout = scored.rollout
    tensors: dict[str, Tensor | None] = {
        "prompt_ids": rollout.prompt_ids,
        "prompt_mask": rollout.prompt_mask,
        "response_ids": rollout.response_ids,
        "response_mask": rollout.response_mask,
        "sampler_logprobs": rollout.sampler_logprobs,
        "rollout_logprobs": scored.rollout_logprobs,
        "ref_logprobs": scored.ref_logprobs,
        "kl": scored.kl,
        "scores": scored.scores,
    }
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
    save_tensors(folder / f"step-{step:06d}.safetensors", kept)
    record = {"step": step, "symptom": symptom, "findings": [vars(f) for f in findings]}
    (folder / f"step-{step:06d}.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
