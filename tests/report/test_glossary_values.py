"""What the table says of every number, its unit and its reduction, held to the logged value.

The documented unit picks the reduction; numpy applies it to a batch in which every reduction gives
another number. A definition that says "per response" of a mean per token fails here, and so does a
value that is computed in another way than it is documented.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run
import torch

from kleash.algorithms.common import select
from kleash.algorithms.losses import average, combine, explained_variance
from kleash.algorithms.ppo import PPOSettings, loss, prepare
from kleash.kl.control.budget import BudgetBeta
from kleash.kl.control.state import BetaState, Measurement
from kleash.report.glossary import GLOSSARY, define
from kleash.storage.run_directory import read_run
from kleash.training.loop import train
from kleash.training.metrics import (
    account,
    charge_measures,
    distill_measures,
    first_ratio_error,
    objective_measures,
    reward_measures,
    rollout_measures,
    sampler_measures,
)
from kleash.types import Experience, Fresh, Loss, Rollout, ScoredRollout

BETA = 0.3
LENGTHS = (1, 2, 4, 7, 3, 5)
PROMPTS = (0, 0, 0, 1, 1, 2)
TEXTS = ("a b a b a", "c", "d e f", "", "g g g g", "h i h i")
SETTINGS = PPOSettings(placement="exact", whiten_advantages=False)
WEIGHED = PPOSettings(correction="token_truncated", correction_clip=1.02)
MINIBATCHES = ([0, 3], [1, 2, 4, 5])
GROWTH = 0.35
"""Half-width of how far a ratio may stand from 1 in log: some tokens are clipped."""

OF_A_RUN = {
    "step", "episodes", "seconds", "tokens_per_second", "time/generate", "time/score",
    "time/update", "policy/updates", "optim/lr", "optim/grad_norm", "objective/beta",
    "objective/target_kl", "heldout/gold", "heldout/gold_se", "heldout/responses",
    "heldout/<objective>", "controller/kl_ref", "controller/kl_ref_se", "controller/responses",
    "controller/score_variance", "controller/beta_next", "controller/speed",
    "controller/limited", "controller/bounded",
}  # fmt: skip
"""Numbers that only a run or a controller has; the tests below compute them again."""
HELD_ELSEWHERE = {
    "objective/kl_efficiency": "training/test_loop.py",
    "objective/kl_original": "training/test_recovery.py",
    "objective/reverse_kl_ref": "integrations/test_trl.py",
    "objective/kl_after": "training/test_recovery.py",
    "policy/effective_samples": "training/test_algorithms.py",
    "loss/pretraining": "training/test_loop.py",
    "rollout/kl_sampler_exact_per_token": "training/test_sampler_correction.py",
    "rollout/kl_sampler_exact_reverse_per_token": "training/test_sampler_correction.py",
    "samples/kl_by_position": "report/diagnostics/test_kl_by_position.py",
    "loss/distill": "algorithms/test_distill.py",
    "<key>/<group>": "training/test_groups.py",
    **{
        f"controller/{name}": "kl/control/test_controllers.py"
        for name in ("error", "gain", "feedforward", "trim", "ignored", "quiet")
    },
}
"""Numbers of parts of a run that this batch has not; the test file that computes each by hand."""


def numbers(scale: float, *, seed: int) -> torch.Tensor:
    """Random positive numbers, other ones in each row, on the tokens of the batch; NaN outside."""
    drawn = torch.rand(6, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    size = torch.tensor([0.5, 1.0, 1.3, 0.6, 0.8, 0.4])[:, None]
    return torch.where(mask_of(), scale * size * drawn, torch.nan)


def mask_of() -> torch.Tensor:
    return torch.arange(7) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def scored() -> ScoredRollout:
    ids, logprobs = torch.zeros(6, 7, dtype=torch.long), -numbers(3.0, seed=1)
    rollout = Rollout(
        prompt_ids=ids[:, :1],
        prompt_mask=torch.ones(6, 1, dtype=torch.bool),
        response_ids=ids,
        response_mask=mask_of(),
        ended=torch.tensor([True, False, True, True, False, True]),
        prompt_index=torch.tensor(PROMPTS),
        sampler_logprobs=logprobs + numbers(0.1, seed=2),
    )
    return ScoredRollout(
        rollout=rollout,
        rollout_logprobs=logprobs,
        ref_logprobs=logprobs - numbers(0.5, seed=3),
        kl=numbers(0.8, seed=4),
        entropy=numbers(2.5, seed=5),
        scores=torch.tensor([0.5, -1.0, 2.0, 0.25, 3.0, -0.5], dtype=torch.float64),
        values=numbers(1.0, seed=6),
        teacher_kl=numbers(0.7, seed=12),
        teacher_forward_kl=numbers(0.6, seed=15),
    )


@pytest.fixture(scope="module")
def experience(scored: ScoredRollout) -> Experience:
    return prepare(scored, BETA, SETTINGS)


def fresh_of(rows: list[int]) -> Fresh:
    """What the models say after some updates: every number has moved."""
    logprobs = -numbers(3.0, seed=1) + (2 * numbers(GROWTH, seed=7) - GROWTH)
    return Fresh(logprobs[rows], numbers(1.3, seed=8)[rows], numbers(0.9, seed=9)[rows])


@pytest.fixture(scope="module")
def logged(scored: ScoredRollout, experience: Experience) -> dict[str, Any]:
    """Everything that one step says of this batch, by the functions that say it in a run."""
    made = []
    for rows in MINIBATCHES:
        part = select(experience, torch.tensor(rows))
        whole: Loss = loss(part, fresh_of(rows), SETTINGS, tokens=int(part.mask.sum()))
        made.append(combine([whole.metrics]))
    parts = {"helpful": scored.scores * 2, "polite": scored.scores.flip(0)}
    return {
        **objective_measures(scored, beta=BETA),
        **distill_measures(scored),
        **rollout_measures(scored, TEXTS),
        **sampler_measures(scored, WEIGHED, floor=None),
        **reward_measures(parts, parts["helpful"] + 3 * parts["polite"]),
        **average(made),
        "policy/ratio_first_error": first_ratio_error(
            fresh_of(list(range(6))).logprobs, scored.rollout_logprobs, mask_of()
        ),
        **charge_measures(SETTINGS, experience, BETA),
        "objective/accounting_residual": account(SETTINGS, experience, BETA),
        "value/explained_variance": explained_variance(
            scored.values, experience.returns, experience.mask
        ),
    }


def tokens_of(tensor: torch.Tensor) -> np.ndarray:
    return np.where(mask_of().numpy(), tensor.numpy(), 0.0)


REDUCTIONS: dict[str, Callable[[np.ndarray], float]] = {
    "per response": lambda x: float(x.sum(1).mean()),
    "per token": lambda x: float(x.sum() / sum(LENGTHS)),
    "per token of each response": lambda x: float((x.sum(1) / LENGTHS).mean()),
    "per response of each prompt": lambda x: float(
        np.mean([x[np.array(PROMPTS) == p].sum(1).mean() for p in set(PROMPTS)])
    ),
    "of all": lambda x: float(x.sum()),
}
BY_UNIT = {
    "nats per response": "per response",
    "tokens": "per response",
    "nats per token": "per token",
}


def token_quantities(scored: ScoredRollout) -> dict[str, np.ndarray]:
    """What each number per token or response sums, token by token."""
    rollout = scored.rollout
    assert rollout.sampler_logprobs is not None
    assert scored.teacher_kl is not None and scored.teacher_forward_kl is not None
    ratio = np.exp(tokens_of(scored.rollout_logprobs - rollout.sampler_logprobs))
    return {
        "objective/kl_ref": tokens_of(scored.kl),
        "objective/kl_ref_k1": tokens_of(scored.rollout_logprobs - scored.ref_logprobs),
        "objective/kl_ref_per_token": tokens_of(scored.kl),
        "objective/entropy": tokens_of(scored.entropy),
        "objective/entropy_per_token": tokens_of(scored.entropy),
        "distill/reverse_kl": tokens_of(scored.teacher_kl),
        "distill/reverse_kl_per_token": tokens_of(scored.teacher_kl),
        "distill/forward_kl": tokens_of(scored.teacher_forward_kl),
        "rollout/kl_sampler": tokens_of(rollout.sampler_logprobs - scored.rollout_logprobs),
        "rollout/kl_sampler_per_token": ratio - 1 - np.log(ratio),
        "rollout/kl_sampler_reverse_per_token": ratio * np.log(ratio) - ratio + 1,
        "rollout/length": mask_of().numpy().astype(float),
    }


@pytest.mark.parametrize("key", [
    "objective/kl_ref", "objective/kl_ref_k1", "objective/kl_ref_per_token", "objective/entropy",
    "objective/entropy_per_token", "rollout/kl_sampler", "rollout/kl_sampler_per_token",
    "rollout/kl_sampler_reverse_per_token", "rollout/length", "distill/reverse_kl",
    "distill/reverse_kl_per_token", "distill/forward_kl",
])  # fmt: skip
def test_a_sum_over_tokens_is_reduced_as_its_unit_says(
    key: str, scored: ScoredRollout, logged: dict[str, Any]
) -> None:
    quantity = token_quantities(scored)[key]
    metric = define(key)
    assert metric is not None
    said = BY_UNIT[metric.unit]
    found = {name: reduce(quantity) for name, reduce in REDUCTIONS.items()}
    assert logged[key] == pytest.approx(found[said], rel=1e-6), f"documented {said}, got {found}"
    # The batch tells the reductions apart: none of the others would have passed.
    if key != "rollout/length":
        others = [value for name, value in found.items() if name != said]
        assert all(abs(value / found[said] - 1) > 0.01 for value in others)


def clustered_error(each: np.ndarray) -> float:
    """Standard error of a mean over responses, with the responses to a prompt as one cluster."""
    sums = [(each[np.array(PROMPTS) == p] - each.mean()).sum() for p in set(PROMPTS)]
    return math.sqrt(3 / 2 * sum(s**2 for s in sums)) / len(each)


def test_standard_errors_are_clustered_by_prompt(
    scored: ScoredRollout, logged: dict[str, Any]
) -> None:
    sums = {key: x.sum(1) for key, x in token_quantities(scored).items()}
    each = {**sums, "objective/scores": scored.scores.numpy()}
    keys = (
        "objective/kl_ref",
        "objective/kl_ref_k1",
        "objective/scores",
        "rollout/kl_sampler",
        "distill/reverse_kl",
        "distill/forward_kl",
    )
    for key in keys:
        metric = define(f"{key}_se")
        assert metric is not None and metric.formula == "clustered by prompt"
        expected = clustered_error(each[key])
        assert logged[f"{key}_se"] == pytest.approx(expected, rel=1e-6)
        naive = each[key].std(ddof=1) / math.sqrt(6)
        assert abs(naive / expected - 1) > 0.01


def test_standard_errors_per_token_are_those_of_a_ratio(
    scored: ScoredRollout, logged: dict[str, Any]
) -> None:
    lengths = np.array(LENGTHS)
    for direction in ("", "_reverse"):
        key = f"rollout/kl_sampler{direction}_per_token"
        sums = token_quantities(scored)[key].sum(1)
        residual = sums - sums.sum() / lengths.sum() * lengths
        each = [residual[np.array(PROMPTS) == p].sum() for p in set(PROMPTS)]
        expected = math.sqrt(3 / 2 * sum(x**2 for x in each)) / lengths.sum()
        assert logged[f"{key}_se"] == pytest.approx(expected, rel=1e-6)


def test_the_correction_and_the_floor_of_its_gap(
    scored: ScoredRollout, logged: dict[str, Any]
) -> None:
    assert scored.rollout.sampler_logprobs is not None
    ratio = np.exp((scored.rollout_logprobs - scored.rollout.sampler_logprobs).numpy())
    ratio = ratio[mask_of().numpy()]
    weights = np.minimum(ratio, 1.02)
    effective = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
    assert logged["rollout/correction_effective_samples"] == pytest.approx(effective)
    assert logged["rollout/correction_clipped"] == pytest.approx((ratio > 1.02).mean())
    assert logged["rollout/correction_mean_weight"] == pytest.approx(weights.mean())
    first = logged["rollout/kl_sampler_per_token"]
    assert logged["rollout/kl_sampler_floor"] == first
    assert sampler_measures(scored, WEIGHED, floor=0.5)["rollout/kl_sampler_floor"] == 0.5
    assert not any("correction" in key for key in sampler_measures(scored, SETTINGS, floor=None))


def test_means_over_responses(scored: ScoredRollout, logged: dict[str, Any]) -> None:
    scores, spent = scored.scores.numpy(), tokens_of(scored.kl).sum(1)
    first = tokens_of(scored.kl)[:, 0]
    expected = {
        "objective/scores": scores.mean(),
        "objective/non_score_reward": -BETA * spent.mean(),
        "objective/rlhf_reward": scores.mean() - BETA * spent.mean(),
        "objective/trained_scores": scores.mean(),
        # Placement exact: the rewards pay for the states after a token, so never for the first.
        "objective/charge": BETA * (spent - first).mean(),
        "objective/trained_reward": (scores - BETA * (spent - first)).mean(),
        "rollout/eos_fraction": 4 / 6,
        # 2 of 4, none, 2 of 2, none, 1 of 3, 2 of 3: texts without a pair do not count.
        "rollout/distinct_2": (2 / 4 + 2 / 2 + 1 / 3 + 2 / 3) / 4,
        "reward/helpful": 2 * scores.mean(),
        "reward/polite": scores.mean(),
        "reward/total": 5 * scores.mean(),
        "objective/accounting_residual": 0.0,
    }
    for key, value in expected.items():
        assert logged[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key


def per_update(quantity: torch.Tensor, reduce: Callable[[np.ndarray, int], float]) -> list[float]:
    """A reduction of each minibatch's kept tokens."""
    found = []
    for rows in MINIBATCHES:
        kept = tokens_of(quantity)[rows]
        found.append(reduce(kept, sum(LENGTHS[row] for row in rows)))
    return found


def test_numbers_of_the_updates_are_means_over_updates_of_means_over_tokens(
    scored: ScoredRollout, experience: Experience, logged: dict[str, Any]
) -> None:
    fresh = fresh_of(list(range(6)))
    assert fresh.values is not None and fresh.kl is not None and scored.values is not None
    log_ratio = fresh.logprobs - scored.rollout_logprobs
    ratio, A = log_ratio.exp(), experience.advantages
    error = (fresh.values - experience.returns) ** 2
    near = fresh.values.clamp(scored.values - 0.2, scored.values + 0.2)
    tokens: dict[str, torch.Tensor] = {
        "policy/approx_kl": ratio - 1 - log_ratio,
        "policy/clipfrac": ((ratio - 1).abs() > 0.2).double(),
        "loss/policy": -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A),
        "loss/value": 0.5 * torch.maximum(error, (near - experience.returns) ** 2),
        "loss/kl": BETA * fresh.kl,
    }
    for key, quantity in tokens.items():
        metric = define(key)
        assert metric is not None and metric.formula.startswith(("mean_u ", "−mean_u ", "½ mean_u"))
        means = per_update(quantity, lambda x, n: float(x.sum() / n))
        assert logged[key] == pytest.approx(np.mean(means), rel=1e-6), key
        # Neither the mean over all tokens of the step nor that over responses.
        whole = tokens_of(quantity).sum() / sum(LENGTHS)
        assert abs(np.mean(means) - whole) > 1e-3 * abs(whole), key
    assert 0 < logged["policy/clipfrac"] < 1


def test_extremes_are_of_the_whole_step(scored: ScoredRollout, logged: dict[str, Any]) -> None:
    log_ratio = fresh_of(list(range(6))).logprobs - scored.rollout_logprobs
    ratios = np.exp(log_ratio.numpy())[mask_of().numpy()]
    assert logged["policy/ratio_max"] == pytest.approx(ratios.max())
    assert logged["policy/ratio_min"] == pytest.approx(ratios.min())
    assert logged["policy/ratio_first_error"] == pytest.approx(np.abs(ratios - 1).max())


def test_explained_variance(
    scored: ScoredRollout, experience: Experience, logged: dict[str, Any]
) -> None:
    assert scored.values is not None
    mask = mask_of().numpy()
    returns, values = experience.returns.numpy()[mask], scored.values.numpy()[mask]
    expected = 1 - (returns - values).var() / returns.var()
    assert logged["value/explained_variance"] == pytest.approx(expected, rel=1e-6)


HEARD: dict[str, list[list[float]]] = {"reward": [], "gold": []}


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    HEARD["reward"].append([float(len(text.split())) for text in responses])
    return HEARD["reward"][-1]


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    HEARD["gold"].append([float("w1" in text) for text in responses])
    return HEARD["gold"][-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of three steps of a small run whose reward and gold score are overheard."""
    folder = tmp_path_factory.mktemp("run")
    prompts, heldout = small_run.two_words(range(8)), small_run.two_words(range(9, 14))
    material = small_run.save_material(folder / "material", prompts=prompts, heldout=heldout)
    train(small_run.settings(
        material, folder / "out", steps=3,
        reward_models={"w3": {"callable": f"{__name__}:reward"}},
        heldout={"gold": {"callable": f"{__name__}:gold"}, "every": 1, "responses_per_prompt": 2},
        leash={"beta": None, "target_kl": 0.5, "initial_beta": 0.2},
        optimizer={"lr": 1e-3, "warmup_steps": 2, "schedule": "linear"},
        algorithm={"epochs": 2, "minibatches": 2},
    ))  # fmt: skip
    return [dict(line) for line in read_run(folder / "out").metrics]


def test_numbers_that_only_a_run_has(run: list[dict[str, Any]]) -> None:
    lines = [line for line in run if "objective/kl_ref" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["episodes"] for line in lines] == [8, 16, 24]
    before = 0.0
    for line in lines:
        assert line["policy/updates"] == 2 * 2
        seconds, before = line["seconds"] - before, line["seconds"]
        # Response tokens of the step over the wall time of the step.
        tokens = line["tokens_per_second"] * seconds
        assert tokens == pytest.approx(8 * line["rollout/length"], rel=0.02)
        phases = [line[f"time/{name}"] for name in ("generate", "score", "update")]
        assert min(phases) > 0 and sum(phases) <= seconds
        assert line["heldout/responses"] == 10 and line["controller/responses"] == 8
        # The controller reads what the step reports.
        assert line["controller/kl_ref"] == line["objective/kl_ref"]
        assert line["controller/kl_ref_se"] == line["objective/kl_ref_se"]
        assert line["objective/target_kl"] == 0.5
        assert line["optim/grad_norm"] > 0
    assert lines[0]["objective/beta"] == pytest.approx(0.2)
    for line, following in itertools.pairwise(lines):
        assert line["controller/beta_next"] == following["objective/beta"]
    # Warm-up from a tenth of the peak over 2 steps, and linear to zero over the run.
    assert lines[0]["optim/lr"] < lines[1]["optim/lr"] <= 1e-3
    means = [float(np.mean(scores)) for scores in HEARD["reward"] if len(scores) == 8]
    assert [line["reward/total"] for line in lines] == pytest.approx(means[-3:])
    golds = [float(np.mean(scores)) for scores in HEARD["gold"]]
    assert [line["heldout/gold"] for line in lines] == pytest.approx(golds[-3:])
    last = np.array(HEARD["gold"][-1]).reshape(5, 2).mean(1)
    assert lines[-1]["heldout/gold_se"] == pytest.approx(last.std(ddof=1) / math.sqrt(5))
    # The same reductions on held-out prompts: entropy per response is more than per token.
    for line in lines:
        length = line["heldout/length"]
        assert line["heldout/entropy"] == pytest.approx(length * line["heldout/entropy_per_token"])


def test_the_speed_is_the_slope_of_root_kl() -> None:
    """√KL that rises by 0.1 nats^½ at each clear reading has that speed, once it has settled."""
    controller = BudgetBeta(1e6, BETA)
    state = BetaState(BETA)
    for reading in range(1, 200):
        told = Measurement((0.1 * reading) ** 2, 0.0, 64)
        state = controller.update(state, told)
    assert state.speed == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize(("share", "cut"), [(1.0, False), (0.01, True)])
def test_a_step_of_beta_is_limited_where_it_is_the_largest_allowed(share: float, cut: bool) -> None:
    """β that stands a hundredth of where the closed form wants it goes there in several steps."""
    controller, before = BudgetBeta(1.0, BETA, plant_gain=2.0), BetaState(share * BETA)
    after = controller.update(before, Measurement(1.05, 0.0, 64))
    step = abs(math.log(after.beta / before.beta))
    assert after.limited == cut
    assert (step == pytest.approx(controller.rate_max)) == cut


@pytest.mark.parametrize(("bound", "stands"), [(BETA * 1.0001, True), (10.0, False)])
def test_beta_is_bounded_where_it_stands_at_a_bound(bound: float, stands: bool) -> None:
    controller = BudgetBeta(1.0, BETA, plant_gain=2.0, beta_max=bound)
    after = controller.update(BetaState(BETA), Measurement(2.0, 0.0, 64))
    assert after.bounded == stands == (after.beta == bound)


def test_every_number_of_the_table_is_held_to_its_value(
    logged: dict[str, Any], run: list[dict[str, Any]]
) -> None:
    """No key is left out: computed above, or by hand in the file named for it."""
    tests = Path(__file__).parents[1]
    for key, file in HELD_ELSEWHERE.items():
        text = (tests / file).read_text(encoding="utf-8")
        assert key.split("/")[-1].strip("<>") in text, key
    held = {metric.key for key in logged if (metric := define(key)) is not None}
    held |= OF_A_RUN | set(HELD_ELSEWHERE) | {f"{key}_se" for key in HELD_ELSEWHERE}
    assert [metric.key for metric in GLOSSARY if metric.key not in held] == []
    known = {metric.key for metric in GLOSSARY}
    assert sorted((OF_A_RUN | set(HELD_ELSEWHERE)) - known) == []
    # And no number is logged that the table does not define.
    assert sorted({key for line in run for key in line if define(key) is None}) == []
