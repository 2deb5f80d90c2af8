"""Diagnostics: silent on sound runs, specific on faulty ones, and never a forecast."""

import math
import random

import pytest

from kleash.report.diagnostics.drift import drift_findings, efficiency, last_third, series
from kleash.report.diagnostics.overoptimisation import overoptimisation_findings
from kleash.report.svg_chart import format_with_error


def metrics(**columns):
    count = len(next(iter(columns.values())))
    rows = [{"step": step} for step in range(1, count + 1)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name.replace("__", "/")] = value
    return rows


def names(findings):
    return [(finding.level, finding.name) for finding in findings]


def test_efficiency_is_gain_over_price():
    rows = metrics(objective__scores=[0.5, 0.7, 1.5], objective__kl_ref=[0.0, 1.0, 4.0])
    earned = efficiency(rows)
    assert (earned.score_gain, earned.kl, earned.steps) == (1.0, 4.0, 1)
    assert (earned.per_nat, earned.per_root_nat) == (0.25, 0.5)


@pytest.mark.parametrize("kl", [0.0, -0.1, math.nan, math.inf])
def test_efficiency_needs_a_price(kl):
    assert efficiency(metrics(objective__scores=[0.0, 1.0], objective__kl_ref=[0.0, kl])) is None
    assert efficiency([{"step": 1}]) is None


def test_series_skips_only_what_is_not_there():
    rows = [{"step": 1, "a": None}, {"step": 2}, {"step": 3, "a": math.inf}]
    assert series(rows, "a") == [(3, math.inf)] and last_third(rows, "b") is None


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(5.0, "good"), (5.9, "good"), (6.1, "warning"), (4.1, "good"), (3.9, "note")],
)
def test_budget(kl, expected):
    rows = metrics(objective__kl_ref=[0.0, 1.0, kl], objective__target_kl=[5.0] * 3)
    assert names(drift_findings(rows)) == [(expected, "budget")]


def test_no_budget_no_finding():
    rows = metrics(objective__kl_ref=[0.0, 9.0], objective__target_kl=[None, None])
    assert drift_findings(rows) == []


def sampled(gap, *, steps=40, seed=0):
    rng = random.Random(seed)
    return metrics(
        objective__kl_ref=[5.0] * steps,
        objective__kl_ref_se=[0.1] * steps,
        objective__kl_ref_k1=[5.0 + gap + rng.gauss(0, 0.4) for _ in range(steps)],
        objective__kl_ref_k1_se=[0.4] * steps,
    )


def test_sampled_kl_agrees_or_is_reported():
    assert not any(drift_findings(sampled(0.0, seed=seed)) for seed in range(200))
    assert names(drift_findings(sampled(-1.0))) == [("warning", "sampled-kl")]
    assert "not sampled from" in drift_findings(sampled(-1.0))[0].sentence


def test_identities():
    good = metrics(
        policy__ratio_first_error=[1e-6, None], objective__accounting_residual=[1e-7, 0.0]
    )
    assert drift_findings(good) == []
    assert names(drift_findings(metrics(policy__ratio_first_error=[0.0, 0.01]))) == [
        ("warning", "ratio")
    ]
    assert names(drift_findings(metrics(objective__accounting_residual=[0.0, 0.1]))) == [
        ("warning", "accounting")
    ]


def test_what_is_not_finite_is_named():
    (finding,) = drift_findings(metrics(loss__policy=[0.0, math.nan]))
    assert finding.name == "non-finite" and "loss/policy became nan at step 2" in finding.sentence


def gold_run(rng, *, gold, proxy, error=0.09):
    return metrics(
        heldout__gold=[value + rng.gauss(0, error) for value in gold],
        heldout__gold_se=[error] * len(gold),
        heldout__scores=proxy,
    )


def test_a_fall_of_gold_under_a_rising_score_is_evidence():
    rows = gold_run(random.Random(0), gold=[1.0, 1.6, 1.2, -0.3], proxy=[0.0, 1.0, 1.5, 1.8])
    (finding,) = overoptimisation_findings(rows)
    assert finding.name == "gold" and finding.sentence.startswith("Evidence of over-optimisation")
    assert "since step 2" in finding.sentence and "rose by 0.80" in finding.sentence


def test_false_alarms_keep_the_promised_rate():
    # Nothing happens to gold at all, and the best of ten noisy looks is compared with the last.
    alarms = 0
    for seed in range(400):
        rng = random.Random(seed)
        rows = gold_run(rng, gold=[1.0] * 10, proxy=[0.1 * k for k in range(10)])
        alarms += bool(overoptimisation_findings(rows))
    # 5 % promised; 31 of 400 is its 99 % point (scipy.stats.binom.ppf(.99, 400, .05) = 31).
    assert alarms <= 31


def test_a_planted_fall_is_found_nearly_always():
    found = 0
    for seed in range(100):
        rows = gold_run(random.Random(seed), gold=[1.0, 1.6, 1.0], proxy=[0.0, 1.0, 1.5])
        found += bool(overoptimisation_findings(rows))
    assert found >= 90


@pytest.mark.parametrize(
    "rows",
    [
        metrics(heldout__gold=[1.6, 0.0], heldout__gold_se=[0.1] * 2, heldout__scores=[1.0, 0.5]),
        metrics(heldout__gold=[1.6, 0.0], heldout__gold_se=[None] * 2, heldout__scores=[0.0, 1.0]),
        metrics(heldout__gold=[1.6, 0.0], heldout__gold_se=[0.1] * 2),
        metrics(heldout__gold=[1.6, math.nan], heldout__gold_se=[0.1] * 2, heldout__scores=[0, 1]),
        metrics(heldout__gold=[1.6], heldout__gold_se=[0.1], heldout__scores=[0.0]),
    ],
    ids=["score fell too", "no error", "no score", "not finite", "one point"],
)
def test_no_evidence_where_there_is_none(rows):
    assert overoptimisation_findings(rows) == []


def test_repetition():
    assert names(overoptimisation_findings(metrics(rollout__distinct_2=[0.95, 0.8, 0.4]))) == [
        ("warning", "repetition")
    ]
    assert overoptimisation_findings(metrics(rollout__distinct_2=[0.95, 0.9, 0.81])) == []


def test_errors_set_the_digits():
    assert format_with_error(-0.5, 12.0) == "−0 ± 12"
    assert format_with_error(5000.0, 1200.0) == "5,000 ± 1,200"
    assert format_with_error(math.nan, 0.1) == "NaN ± 0.100"
