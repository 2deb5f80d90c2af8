"""How far a run went, what it bought with it, and whether the books are in order.

Everything is read from the metrics of a run; nothing here needs a model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kleash.storage.run_directory import Metrics

_RATIO_TOLERANCE = 1e-4
_RESIDUAL_TOLERANCE = 1e-5
_BUDGET_TOLERANCE = 0.2


@dataclass(frozen=True)
class Diagnosis:
    """One thing that a reader should know, in a sentence, with the numbers it rests on."""

    level: Literal["good", "note", "warning"]
    name: str
    sentence: str


@dataclass(frozen=True)
class Efficiency:
    """What the last third of a run earned over its first step, and the KL it paid.

    The first rollout is written before any update. Where the policy starts as a copy of the
    reference, the first score is therefore the reference's.
    """

    score_gain: float
    kl: float
    per_nat: float
    """score_gain / KL, in score per nat."""
    per_root_nat: float
    """score_gain / √KL. Along the optimal frontier the score grows like √KL at first."""
    steps: int
    """Steps averaged."""


def series(metrics: Sequence[Metrics], key: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of a key, where there is a value; NaN and infinities stay."""
    pairs: list[tuple[int, float]] = []
    for line in metrics:
        value, step = line.get(key), line["step"]
        if value is not None and step is not None:
            pairs.append((int(step), float(value)))
    return pairs


def last_third(metrics: Sequence[Metrics], key: str) -> float | None:
    """Mean of a key over the last third of its steps; None where there are none.

    Example:
        >>> last_third([{"step": 1, "a": 9.0}, {"step": 2, "a": 9.0}, {"step": 3, "a": 2.0}], "a")
        2.0
    """
    values = [value for _, value in series(metrics, key)]
    kept = values[-max(1, len(values) // 3) :]
    return sum(kept) / len(kept) if kept else None


def efficiency(metrics: Sequence[Metrics]) -> Efficiency | None:
    """Score gained per nat and per √nat; None while there is nothing to divide by."""
    scores = series(metrics, "objective/scores")
    kl, score = last_third(metrics, "objective/kl_ref"), last_third(metrics, "objective/scores")
    if len(scores) < 2 or kl is None or score is None or not (kl > 0 and math.isfinite(kl)):
        return None
    gain = score - scores[0][1]
    return Efficiency(gain, kl, gain / kl, gain / math.sqrt(kl), max(1, len(scores) // 3))


def drift_findings(metrics: Sequence[Metrics]) -> list[Diagnosis]:
    """Check the KL against its budget, and the identities that every run must keep."""
    found = [
        _budget(metrics),
        _sampled_against_exact(metrics),
        _first_ratio(metrics),
        _accounting(metrics),
        _non_finite(metrics),
    ]
    return [finding for finding in found if finding is not None]


def _budget(metrics: Sequence[Metrics]) -> Diagnosis | None:
    kl, target = (last_third(metrics, f"objective/{key}") for key in ("kl_ref", "target_kl"))
    if kl is None or target is None or not target > 0:
        return None
    off = kl / target - 1
    said = f"KL averages {kl:.3g} nats over the last third, against a budget of {target:.3g}"
    share = f"{off:+.0%}".replace("-", "−")
    if abs(off) <= _BUDGET_TOLERANCE:
        return Diagnosis("good", "budget", f"On budget: {said} ({share}).")
    where = "Over" if off > 0 else "Under"
    return Diagnosis(
        "warning" if off > 0 else "note", "budget", f"{where} budget: {said} ({share})."
    )


def _sampled_against_exact(metrics: Sequence[Metrics]) -> Diagnosis | None:
    """The sampled KL must agree with the exact one, or the tokens came from elsewhere."""
    keys = ("kl_ref", "kl_ref_se", "kl_ref_k1", "kl_ref_k1_se")
    gaps: list[float] = []
    variance = 0.0
    for line in metrics:
        values = [line.get(f"objective/{key}") for key in keys]
        exact, exact_se, k1, k1_se = (math.nan if v is None else float(v) for v in values)
        if math.isfinite(k1 - exact) and math.isfinite(k1_se + exact_se):
            gaps.append(k1 - exact)
            # The two share their responses; the sum of errors bounds that of the difference.
            variance += (k1_se + exact_se) ** 2
    if not gaps or variance == 0:
        return None
    mean, error = sum(gaps) / len(gaps), math.sqrt(variance) / len(gaps)
    if abs(mean) <= 4 * error:
        return None
    return Diagnosis(
        "warning",
        "sampled-kl",
        f"The sampled KL differs from the exact one by {mean:+.3g} nats on average, "
        f"{abs(mean) / error:.1f} standard errors: the responses were probably not sampled from "
        "the distribution that was scored (temperature, top-p, forced tokens, dropout).",
    )


def _first_ratio(metrics: Sequence[Metrics]) -> Diagnosis | None:
    worst = max((v for _, v in series(metrics, "policy/ratio_first_error")), default=0.0)
    if worst <= _RATIO_TOLERANCE:
        return None
    return Diagnosis(
        "warning",
        "ratio",
        f"The first ratio of a step was off 1 by up to {worst:.2g}: the same tokens are scored "
        "differently on two paths (dropout, padding, precision).",
    )


def _accounting(metrics: Sequence[Metrics]) -> Diagnosis | None:
    worst = max((abs(v) for _, v in series(metrics, "objective/accounting_residual")), default=0.0)
    if worst <= _RESIDUAL_TOLERANCE:
        return None
    return Diagnosis(
        "warning",
        "accounting",
        f"Objective and score − β·KL disagree by up to {worst:.2g}: a penalty is counted "
        "twice or not at all.",
    )


def _non_finite(metrics: Sequence[Metrics]) -> Diagnosis | None:
    for line in metrics:
        for key, value in line.items():
            if value is not None and not math.isfinite(value):
                return Diagnosis(
                    "warning", "non-finite", f"{key} became {value} at step {line['step']}."
                )
    return None
