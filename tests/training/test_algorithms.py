"""GRPO and RLOO in the loop: they learn, add up and resume as PPO does, and have no critic.

And the guard that ends the updates to a rollout once its samples no longer speak for the policy.
"""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import scipy.stats
import small_run
import torch
from small_run import numbers, policy_weights, save_material, two_words
from training_hooks import interrupt_after

from kleash.algorithms.dispatch import Settings, trained_scores
from kleash.algorithms.grpo import GRPOSettings
from kleash.algorithms.ppo import PPOSettings
from kleash.algorithms.rloo import RLOOSettings
from kleash.config.schema import Config
from kleash.errors import ConfigError
from kleash.kl.control.groups import OTHERS
from kleash.preflight.runner import check
from kleash.report.html import write_report
from kleash.storage.run_directory import read_run
from kleash.training.assembly import assemble
from kleash.training.calibration import draw
from kleash.training.loop import train
from kleash.training.metadata import objective_line
from kleash.types import Rollout, ScoredRollout

GROUPED = ("grpo", "rloo")
LAYER = {
    "rollout": {"prompts_per_step": 4, "responses_per_prompt": 4},
    "optimizer": {"lr": 3e-3},
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    return save_material(folder, prompts=two_words(range(8)), heldout=two_words(range(10, 13)))


def settings(material: Path, output: Path, name: str, **changes: Any) -> Config:
    """A small run with groups of four responses."""
    return small_run.settings(material, output, {**LAYER, "algorithm": {"name": name}}, **changes)


@pytest.mark.parametrize("algorithm", GROUPED)
def test_a_run_without_a_critic_learns_and_adds_up(
    material: Path, tmp_path: Path, algorithm: str
) -> None:
    path = train(settings(material, tmp_path / "run", algorithm, steps=12))
    lines = read_run(path).metrics
    first, last = lines[1], lines[-1]
    assert cast(float, last["objective/scores"]) > cast(float, first["objective/scores"]) + 0.2
    assert cast(float, first["objective/kl_ref"]) == pytest.approx(0, abs=1e-9)
    assert cast(float, last["objective/kl_ref"]) > 0.01
    assert cast(float, first["policy/ratio_first_error"]) < 1e-5
    for line in lines[1:]:
        assert cast(float, line["objective/accounting_residual"]) < 1e-5
        assert "loss/value" not in line
        assert line["value/explained_variance"] is None
        # GRPO's β is not in score per nat, so that score − β·KL would mean nothing.
        assert ("objective/rlhf_reward" in line) == (algorithm == "rloo")
    assert ("heldout/rlhf_reward" in lines[0]) == (algorithm == "rloo")
    assert not list(path.glob("checkpoints/*/value.safetensors"))
    page, _ = write_report([path])
    text = page.read_text()
    assert ("group sd per nat" in text) == (algorithm == "grpo")
    assert ("score − β·KL, last step" in text) == (algorithm == "rloo")


@pytest.mark.parametrize("algorithm", GROUPED)
def test_a_resumed_run_is_the_uninterrupted_one(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    leash = {"beta": None, "target_kl": 0.3}
    plan = {"prompts": 4, "responses": 4}
    whole = train(settings(material, tmp_path / "whole", algorithm, leash=leash, plan=plan))
    broken = settings(material, tmp_path / "broken", algorithm, leash=leash, plan=plan)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    resumed = train(broken)
    assert numbers(resumed) == numbers(whole)
    for name, tensor in policy_weights(whole).items():
        torch.testing.assert_close(policy_weights(resumed)[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", GROUPED)
def test_groups_of_prompts_have_budgets_of_their_own(
    material: Path, tmp_path: Path, algorithm: str
) -> None:
    labels = ["near", "far"] * 4
    rows = [{"prompt": f"w{i} w{i + 1}", "group": label} for i, label in enumerate(labels)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = settings(
        material,
        tmp_path / "run",
        algorithm,
        prompts={"train": str(file), "heldout": str(file)},
        leash={"beta": None, "groups": {"near": 0.05, "far": 0.5}},
        plan={"prompts": 4, "responses": 4},
        steps=2,
    )
    for line in numbers(train(config))[1:]:
        assert cast(float, line["objective/beta/near"]) > cast(float, line["objective/beta/far"])
        assert cast(float, line["objective/accounting_residual"]) < 1e-5


def test_the_plan_of_grpo_is_in_spreads_of_a_group(material: Path, tmp_path: Path) -> None:
    """scipy's z-scores of each prompt's responses are the scores that β is a price of."""
    plan = {"prompts": 4, "responses": 8}
    raw = settings(material, tmp_path / "a", "rloo", plan=plan)
    grouped = settings(material, tmp_path / "b", "grpo", plan=plan)
    torch.manual_seed(0)
    scores = draw(raw, assemble(raw)).scores
    torch.manual_seed(0)
    relative = draw(grouped, assemble(grouped)).scores
    varied = scores.std(1) > 0
    expected = scipy.stats.zscore(scores[varied].double().numpy(), axis=1, ddof=1)
    assert varied.sum() >= 2
    torch.testing.assert_close(
        relative[varied].double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-3
    )
    assert "group mean)/group sd" in objective_line(grouped, {OTHERS: 0.1})


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (PPOSettings(), [1.0, 3.0, 5.0, 9.0]),
        (RLOOSettings(), [1.0, 3.0, 5.0, 9.0]),
        (GRPOSettings(epsilon=0.0), [-(0.5**0.5), 0.5**0.5, -(0.5**0.5), 0.5**0.5]),
    ],
)
def test_what_is_trained_on(algorithm: Settings, expected: list[float]) -> None:
    ids, yes = torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1, dtype=torch.bool)
    rollout = Rollout(ids, yes, ids, yes, yes[:, 0], torch.tensor([0, 0, 1, 1]))
    zero = torch.zeros(4, 1)
    scored = ScoredRollout(rollout, zero, zero, zero, zero, torch.tensor([1.0, 3.0, 5.0, 9.0]))
    torch.testing.assert_close(trained_scores(scored, algorithm), torch.tensor(expected))


@pytest.mark.parametrize("algorithm", GROUPED)
def test_the_preflight_finds_nothing(material: Path, tmp_path: Path, algorithm: str) -> None:
    rollout = {"truncated": "score"}
    config = settings(material, tmp_path / "run", algorithm, rollout=rollout)
    report = check(config, quick=False)
    assert [f for f in report.findings if f.verdict == "fail" and "reward" not in f.name] == []


@pytest.mark.parametrize("algorithm", GROUPED)
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"algorithm": {"lam": 0.9, "value_coef": 1.0}},
            r"^the test: `algorithm.lam` is for `algorithm: ppo` .*`algorithm.value_coef` is",
        ),
        ({"algorithm": {"value": {"kind": "trunk"}}}, "`algorithm.value` is for `algorithm: ppo`"),
        ({"optimizer": {"value_lr": 1e-3}}, "`optimizer.value_lr` is now `algorithm.value.lr`"),
        ({"rollout": {"responses_per_prompt": 1}}, "`rollout.responses_per_prompt` of 2 or more"),
        ({"rollout": {"truncated": "bootstrap"}}, "needs a critic"),
        ({"leash": {"placement": "mixed"}}, "take `reward_k1` or `exact`"),
    ],
)
def test_options_of_another_algorithm_are_refused(
    material: Path, tmp_path: Path, algorithm: str, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        settings(material, tmp_path / "run", algorithm, **changes)


def test_a_group_is_normalised_once(material: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each group is normalised by itself"):
        settings(material, tmp_path / "run", "grpo", score_normalisation="running")
    settings(material, tmp_path / "run", "rloo", score_normalisation="running")


@pytest.mark.parametrize(
    ("placement", "bound", "enough"),
    [
        ("reward_k1", "auto", True),
        ("reward_k1", 0.8, False),
        ("exact_weighted", "auto", False),
        ("exact_weighted", 0.0, True),
    ],
)
def test_updates_end_where_too_few_samples_are_effective(
    material: Path, tmp_path: Path, placement: str, bound: float | str, enough: bool
) -> None:
    """Eight long strides: the policy leaves the one that wrote; only a bound ends the strides."""
    config = settings(
        material,
        tmp_path / "run",
        "ppo",
        leash={"placement": placement},
        algorithm={
            "epochs": 4,
            "minibatches": 2,
            "clip_range": 10.0,
            "min_effective_samples": bound,
        },
        optimizer={"lr": 0.02},
        steps=1,
    )
    (line,) = (line for line in read_run(train(config)).metrics if line["step"] == 1)
    updates, effective = line["policy/updates"], cast(float, line["policy/effective_samples"])
    if enough:
        assert updates == 8
        assert effective < 0.5
    else:
        assert 1 <= cast(int, updates) < 8
        assert effective < (0.5 if bound == "auto" else bound)


def test_small_strides_leave_every_sample_effective(material: Path, tmp_path: Path) -> None:
    leash = {"placement": "exact_weighted"}
    config = settings(
        material, tmp_path / "run", "rloo", leash=leash, optimizer={"lr": 1e-6}, steps=2
    )
    lines = read_run(train(config)).metrics
    for line in lines[1:]:
        assert line["policy/updates"] == 4
        assert line["policy/effective_samples"] == pytest.approx(1, abs=1e-4)
