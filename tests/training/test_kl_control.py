"""Budgets by group, from the file of prompts to the metrics: alone, together, resumed, refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tensors import everything
from small_run import numbers
from training_hooks import interrupt_after
from training_material import material as material  # the fixture
from training_material import settings

from kleash.config.loading import load_config
from kleash.config.schema import Config
from kleash.errors import ConfigError, PromptError
from kleash.kl.control.controllers import BetaState, BudgetBeta, Measurement
from kleash.report.glossary import define
from kleash.report.html import write_report
from kleash.storage.plan_file import read_frontier
from kleash.storage.run_directory import read_run
from kleash.training.loop import train

GROUPS = {"near": 0.05, "far": 0.4}


def grouped(folder: Path, labels: list[str | None], name: str = "grouped.jsonl") -> str:
    """A file of prompts, each with its label."""
    rows = [
        {"prompt": f"w{i} w{i + 1}", **({} if label is None else {"group": label})}
        for i, label in enumerate(labels)
    ]
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def run_of(material: Path, output: Path, labels: list[str | None], **leash: Any) -> Config:
    train_file = grouped(output.parent, labels, f"{output.name}.jsonl")
    return settings(
        material,
        output,
        reward_models={"w3": {"callable": "reward_functions:even"}},
        prompts={"train": train_file, "heldout": train_file},
        rollout={"prompts_per_step": 4, "responses_per_prompt": 2, "max_new_tokens": 6},
        leash={"beta": None, **leash},
        plan={"responses": 16},
        optimizer={"lr": 3e-3},
    )


def test_one_group_of_everyone_is_the_run_without_groups(material: Path, tmp_path: Path) -> None:
    plain = train(run_of(material, tmp_path / "plain", ["all"] * 6, target_kl=0.3))
    alone = train(run_of(material, tmp_path / "alone", ["all"] * 6, groups={"all": 0.3}))
    ours, theirs = numbers(alone), numbers(plain)
    shared = theirs[1].keys() & ours[1].keys()
    assert {"objective/beta", "objective/target_kl", "policy/ratio_max"} < shared
    for mine, other in zip(ours, theirs, strict=True):
        assert {k: mine[k] for k in other if k in mine} == {k: other[k] for k in other if k in mine}
        for key in other.keys() - mine.keys():  # the numbers of the leash, under the group's name
            assert mine[f"{key}/all"] == other[key]
    mine, other = everything(alone), everything(plain)
    assert [name for name in other if not torch.equal(mine[name], other[name])] == []


def test_groups_are_held_apart_and_resumed_to_the_bit(material: Path, tmp_path: Path) -> None:
    labels: list[str | None] = ["near", "far", "near", "far", None, "elsewhere"]
    leash = {"groups": GROUPS, "target_kl": 0.2}
    whole = train(run_of(material, tmp_path / "whole", labels, **leash))
    lines, run = numbers(whole), read_run(whole)
    assert list(run.meta["start"]) == ["near", "far", "others"]
    assert "0.05 nats per response of near (β from" in run.meta["objective"]
    newest = sorted((whole / "checkpoints").iterdir())[-1]
    states = json.loads((newest / "state.json").read_text())["betas"]
    assert list(states) == ["near", "far", "others"]
    assert states["near"]["beta"] > states["far"]["beta"]
    for before, after in zip(lines[1:], [*lines[2:], None], strict=True):
        for group in states:
            key = f"controller/beta_next/{group}"
            if key not in before:  # no prompt of it in this step: nothing of it moves
                continue
            known = states[group]["beta"] if after is None else after.get(f"objective/beta/{group}")
            assert known is None or before[key] == known
    plan = read_frontier(whole / "plan.json")
    assert list(plan.groups) == ["near", "far", "others"]
    assert [len(group.prompts) for group in plan.groups.values()] == [2, 2, 2]
    assert all(labels[number] == "far" for number in plan.groups["far"].prompts)

    broken = run_of(material, tmp_path / "broken", labels, **leash)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    train(broken)
    assert numbers(tmp_path / "broken") == lines
    ours, theirs = everything(tmp_path / "broken"), everything(whole)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []

    # Every number is defined, and a report is made of them.
    assert [key for line in lines for key in line if define(key) is None] == []
    assert write_report([whole])[0].is_file()


def test_means_over_the_step_are_those_of_its_groups(material: Path, tmp_path: Path) -> None:
    """In a step with as many responses of each group, the plain keys lie half way."""
    config = run_of(material, tmp_path / "run", ["near", "far"], groups=GROUPS)
    config = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"prompts_per_step": 2})}
    )
    for line in numbers(train(config))[1:]:
        for key in ("objective/beta", "objective/kl_ref", "objective/target_kl"):
            parts = [line[f"{key}/{group}"] for group in GROUPS]
            assert line[key] == pytest.approx(sum(parts) / 2, rel=1e-6), key
        price = sum(
            line[f"objective/beta/{group}"] * line[f"objective/kl_ref/{group}"] for group in GROUPS
        )
        assert line["objective/non_score_reward"] == pytest.approx(-price / 2, rel=1e-5)


def test_labels_without_budgets_are_only_labels(material: Path, tmp_path: Path) -> None:
    labelled = run_of(material, tmp_path / "a", ["x", "y", None, "x"], target_kl=0.3)
    bare = run_of(material, tmp_path / "b", [None] * 4, target_kl=0.3)
    assert numbers(train(labelled)) == numbers(train(bare))


@pytest.mark.parametrize(
    ("labels", "leash", "sentence"),
    [
        (["a", "b"], {"groups": {"a": 1}}, "got none for those of 'b': name each group"),
        (["a", None], {"groups": {"a": 1}}, "got none for those without a group"),
        (["a"], {"groups": {"a": 1, "c": 2}}, r"got none of \['c'\]: the groups there are \['a'\]"),
        (["a"], {"groups": {"a": 1}, "target_kl": 2}, "leave target_kl out"),
    ],
)
def test_targets_and_prompts_must_belong_together(
    material: Path, tmp_path: Path, labels: Any, leash: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PromptError, match=sentence):
        train(run_of(material, tmp_path / "run", labels, **leash))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("leash", "sentence"),
    [
        ({"groups": {"a": 1}, "beta": 0.1}, r"only `target_kl` goes with them, got \['beta'\]"),
        ({"groups": {"a": 1}, "target_kl_per_token": 0.1}, "only `target_kl` goes with them"),
        ({"groups": {"a": 1}, "schedule": [[0, 0.1]]}, "only `target_kl` goes with them"),
        ({"groups": {"others": 1}}, "a group may not be named `others`"),
        ({"groups": {}}, "expected one entry or more, got none"),
        ({"groups": {"a": -1}}, "greater than 0"),
    ],
)
def test_groups_that_cannot_be(
    material: Path, tmp_path: Path, leash: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        settings(material, tmp_path / "run", leash={"beta": None, **leash})


def test_a_bound_within_every_target_is_refused(material: Path, tmp_path: Path) -> None:
    leash = {"beta": None, "groups": {"a": 1.0, "b": 3.0}}
    with pytest.raises(ConfigError, match="within the target of 1"):
        settings(material, tmp_path / "run", leash=leash, tripwires={"stop_kl": 1.0})
    settings(material, tmp_path / "run", leash=leash, tripwires={"stop_kl": 2.0})


@pytest.mark.parametrize(
    ("overrides", "leash"),
    [
        ({"leash.beta": "0.2"}, {"beta": 0.2}),
        ({"leash.target-kl-per-token": "0.1"}, {"target_kl_per_token": 0.1}),
        ({"leash.target-kl": "4"}, {"target_kl": 4, "groups": {"a": 1}}),
        ({"leash.groups.b": "3"}, {"target_kl": 2, "groups": {"a": 1, "b": 3}}),
        ({"leash.groups": "{b: 3}", "leash.target-kl": "null"}, {"groups": {"b": 3}}),
    ],
)
def test_another_leash_on_the_command_line_takes_the_place_of_the_files(
    tmp_path: Path, overrides: dict[str, str], leash: dict[str, Any]
) -> None:
    file = tmp_path / "config.yaml"
    (tmp_path / "t").touch()
    file.write_text(
        "policy: {path: p}\nreward_models: {w: {callable: 'a:b'}}\nprompts: {train: t}\n"
        "output: o\nleash: {target_kl: 2, groups: {a: 1}}\n"
    )
    told = load_config(file, overrides, base=file).leash
    assert {key: value for key in told.model_fields_set if (value := getattr(told, key))} == leash


def test_what_a_controller_read_and_decided_is_written_down(material: Path, tmp_path: Path) -> None:
    """Replayed from the log alone: the controller comes to the β's of the run."""
    run = read_run(train(run_of(material, tmp_path / "run", [None] * 6, target_kl=0.3)))
    start = run.meta["start"]
    controller = BudgetBeta(0.3, start["beta"], plant_gain=start["plant_gain"])
    state = controller.init()
    for line in run.metrics[1:]:
        assert line["objective/beta"] == state.beta
        error, responses = line["controller/kl_ref_se"], line["controller/responses"]
        told = Measurement(
            response_kl=line["controller/kl_ref"],  # pyright: ignore[reportArgumentType]
            standard_error=math.nan if error is None else error,
            responses=responses,  # pyright: ignore[reportArgumentType]
            score_variance=line["controller/score_variance"],
        )
        state = controller.update(state, told)
        for key in ("error", "gain", "speed", "feedforward", "trim"):
            assert line[f"controller/{key}"] == getattr(state, key), key
        assert line["controller/beta_next"] == state.beta
        for key in ("quiet", "limited", "bounded"):
            assert line[f"controller/{key}"] == getattr(state, key), key


def test_a_beta_that_follows_no_kl_has_no_controller_to_tell_of(
    material: Path, tmp_path: Path
) -> None:
    path = train(settings(material, tmp_path / "run", steps=1))
    assert not [key for line in numbers(path) for key in line if key.startswith("controller/")]


def test_what_held_beta_back_is_told() -> None:
    controller = BudgetBeta(1.0, 0.5, beta_max=0.6)
    far = controller.update(controller.init(), Measurement(50.0, 0.0, 8, score_variance=100.0))
    assert (far.limited, far.bounded) == (True, True)
    still = controller.update(BetaState(0.5, kl=1.0), Measurement(1.1, 0.5, 8))
    assert (still.quiet, still.limited, still.bounded) == (True, False, False)
    moving = controller.update(BetaState(0.5, kl=1.0), Measurement(1.1, 0.0, 8))
    assert not moving.quiet
