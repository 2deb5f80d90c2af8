"""Evidence that the reward model was optimised beyond what it knows.

The sign is a score that keeps rising while a judge that training never saw says that the responses
get worse. What is found here is evidence about the run at hand, never a forecast.

References:
    Gao, Schulman, Hilton, "Scaling Laws for Reward Model Overoptimization", 2022,
    https://arxiv.org/abs/2210.10760
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

from kleash.report.diagnostics.drift import Diagnosis, last_third, series
from kleash.storage.run_directory import Metrics

_LEVEL = 0.05
_REPETITION = 0.7
"""Distinct-2 below this share of its first value is called a collapse."""


def overoptimisation_findings(metrics: Sequence[Metrics]) -> list[Diagnosis]:
    """What speaks for over-optimisation in the metrics of a run."""
    found = (_gold_against_proxy(metrics), _repetition(metrics))
    return [finding for finding in found if finding is not None]


def _gold_against_proxy(metrics: Sequence[Metrics]) -> Diagnosis | None:
    """Compare the last gold measurement with every earlier one.

        gold_s − gold_end > z · √(se_s² + se_end²)   and   proxy_end > proxy_s

    with z for a one-sided 5 % shared among all comparisons (Bonferroni): the best of many noisy
    measurements looks good by luck, and the share pays for that.
    """
    points = [point for line in metrics if (point := _gold_point(line)) is not None]
    if len(points) < 2:
        return None
    _, gold_end, se_end, proxy_end = points[-1]
    z = NormalDist().inv_cdf(1 - _LEVEL / (len(points) - 1))
    falls = [
        (gold - gold_end, math.hypot(se, se_end), step, proxy)
        for step, gold, se, proxy in points[:-1]
        if gold - gold_end > z * math.hypot(se, se_end) and proxy_end > proxy
    ]
    if not falls:
        return None
    fall, error, step, proxy = max(falls)
    return Diagnosis(
        "warning",
        "gold",
        f"Evidence of over-optimisation: since step {step} the held-out gold score fell by "
        f"{fall:.2f} ± {error:.2f} while the score rose by {proxy_end - proxy:.2f}.",
    )


def _gold_point(line: Metrics) -> tuple[int, float, float, float] | None:
    proxy = next(
        (
            line[key]
            for key in ("heldout/scores", "heldout/objective/scores", "objective/scores")
            if line.get(key) is not None
        ),
        None,
    )
    gold, error, step = line.get("heldout/gold"), line.get("heldout/gold_se"), line["step"]
    if gold is None or error is None or proxy is None or step is None:
        return None
    point = (int(step), float(gold), float(error), float(proxy))
    return point if all(map(math.isfinite, point)) else None


def _repetition(metrics: Sequence[Metrics]) -> Diagnosis | None:
    values = series(metrics, "rollout/distinct_2")
    now = last_third(metrics, "rollout/distinct_2")
    if len(values) < 2 or now is None or not now < _REPETITION * values[0][1]:
        return None
    return Diagnosis(
        "warning",
        "repetition",
        f"Evidence of collapse into repetition: distinct-2 fell from {values[0][1]:.2f} to "
        f"{now:.2f} (mean of the last third).",
    )
