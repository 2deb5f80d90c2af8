"""A configuration is read, refused with the nearest name, and survives its own YAML."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kleash.config.loading import (
    dump_config,
    load_config,
    parse_config,
    with_world,
)
from kleash.config.schema import Config, RewardConfig
from kleash.errors import ConfigError, UsageError
from kleash.models.async_calls import CallLimits

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def minimal(**changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "policy": {"path": "p"},
        "reward_models": {"r": {"callable": "m:f"}},
        "prompts": {"train": "x.jsonl"},
        "leash": {"beta": 0.1},
        "output": "runs/x",
    }
    return tree | changes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_what_where_from_and_how(recipe: Path) -> None:
    load_config(recipe, {}, base=recipe)
    head = recipe.read_text(encoding="utf-8").split("policy:")[0]
    for word in ("# What", "# From", "# Run"):
        assert word in head


def test_a_configuration_survives_its_own_yaml() -> None:
    config = parse_config(minimal(steps=7), where="here")
    assert parse_config(yaml.safe_load(dump_config(config)), where="there") == config


def test_overrides_win_and_dashes_are_underscores(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(minimal(steps=7)))
    overrides = {"rollout.max-new-tokens": "9", "steps": "8", "reward-models.r.weight": "2"}
    config = load_config(file, overrides, base=file)
    assert (config.rollout.max_new_tokens, config.steps) == (9, 8)
    assert config.reward_models["r"].weight == 2


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (minimal(stepz=3), "unknown key `stepz`: did you mean steps?"),
        (minimal(leash={"beta": 0.1, "placment": "exact"}), "did you mean placement?"),
        (minimal(policy={}), "`policy.path` is missing"),
        (minimal(leash={"beta": -1}), "`leash.beta`: .* greater than or equal to 0, got -1"),
        (minimal(leash={"target_kl": 0}), "`leash.target_kl`: .*greater than 0, got 0"),
        (minimal(leash={}), "exactly one of `beta` .* got none of them"),
        (minimal(leash={"target_kl": 6, "target_kl_per_token": 0.1}), "got target_kl, target_kl_p"),
        (minimal(leash={"schedule": [[0, 1], [0, 2]]}), "responses of the points must increase"),
        (minimal(leash={"schedule": []}), "at least one"),
        (minimal(leash={"schedule": [[0, -1]]}), "greater than or equal to 0"),
        (
            minimal(leash={"schedule": [[0, 1]], "initial_beta": 1}),
            "nothing with a fixed `schedule`",
        ),
        (minimal(leash={"beta": 0.1, "target_kl": 6}), "exactly one of `beta`"),
        (minimal(leash={"beta": 0.1, "horizon": 5}), "do nothing with a fixed `beta`"),
        (minimal(leash={"target_kl": 6, "horizon": 5}), "`horizon` is for"),
        (minimal(leash={"beta": 0.1, "placement": "measure"}), "charges nothing"),
        (minimal(rollout={"truncated": "penalise"}), "goes with `truncated: penalise`"),
        (minimal(rollout={"missing_eos_penalty": 1}), "goes with `truncated: penalise`"),
        (minimal(value={"kind": "model"}), "`value.path` goes with"),
        (minimal(reward_models={}), "at least 1 item"),
        (minimal(reward_models={"r": {}}), "exactly one of `path` and `callable`"),
        (minimal(reward_models={"r": {"callable": "a:b", "template": "{prompt}"}}), "nothing for"),
        (
            minimal(reward_models={"r": {"callable": "a:b", "adapter": "x"}}),
            "`adapter` is for a cl",
        ),
        (minimal(reward_models={"r": {"path": "a", "retries": 5}}), "`retries` is for an async"),
        (minimal(reward_models={"r": {"path": "a", "timeout_s": 0}}), "greater than 0"),
        (minimal(ppo={"minibatches": 3}), "does not divide the 64"),
        (minimal(heldout={"every": 3}), "does nothing without `prompts.heldout`"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_config(tree, where="c.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("a: [", "is not YAML"), ("- 1", "should hold keys and values, got list")],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_config(file, {}, base=file)
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path, {}, base=file)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("leash.bta", "did you mean --leash.beta?"),
        ("lesh.beta", "did you mean --leash?"),
        ("steps.more", "`steps` is a single value"),
        ("reward_models.r.wieght", "did you mean --reward_models.r.weight?"),
    ],
)
def test_an_override_that_does_not_exist(tmp_path: Path, key: str, sentence: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(minimal(steps=3)))
    with pytest.raises(UsageError) as caught:
        load_config(file, {key: "1"}, base=file)
    assert sentence in str(caught.value)


def test_the_world_fills_in_its_directory() -> None:
    config = parse_config(minimal(policy={"path": "{world}/policy"}, world=0), where="here")
    filled = with_world(config, Path("/worlds/0"))
    assert isinstance(filled, Config)
    assert filled.policy.path == "/worlds/0/policy"


@pytest.mark.parametrize(
    ("leash", "overrides", "expected"),
    [
        ({"beta": 0.3}, {"leash.target-kl": "6"}, {"target_kl": 6.0}),
        ({"target_kl": 5, "controller": "budget"}, {"leash.beta": "0.1"}, {"beta": 0.1}),
        (
            {"target_kl": 5, "controller": "ziegler_paper"},
            {"leash.target_kl_per_token": "0.1"},
            {"target_kl_per_token": 0.1, "controller": "ziegler_paper"},
        ),
        ({"beta": 0.3, "placement": "exact"}, {"steps": "3"}, {"beta": 0.3, "placement": "exact"}),
    ],
)
def test_an_override_takes_the_place_of_the_files_kind_of_leash(
    tmp_path: Path, leash: dict[str, Any], overrides: dict[str, str], expected: dict[str, Any]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(minimal(leash=leash)))
    found = load_config(file, overrides, base=file).leash
    assert found.model_dump(exclude_unset=True) == expected


def test_two_kinds_of_leash_on_the_command_line_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(minimal()))
    with pytest.raises(ConfigError, match="got beta, target_kl"):
        load_config(file, {"leash.beta": "1", "leash.target_kl": "6"}, base=file)


def test_limits_of_async_rewards_are_those_of_the_calls() -> None:
    limits, written = CallLimits(), RewardConfig(callable="a:b")
    for name in ("concurrency", "timeout_s", "retries"):
        assert getattr(limits, name) == getattr(written, name)
