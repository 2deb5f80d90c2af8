"""A configuration is read, refused with the nearest name, and survives its own YAML."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from config_trees import minimal, write

from kleash.config.loading import (
    dump_config,
    load_config,
    parse_config,
)
from kleash.config.schema import Config, RewardConfig
from kleash.errors import ConfigError, UsageError
from kleash.models.async_calls import CallLimits
from kleash.playground.build import with_world

FOLLOWS = minimal(leash={"target_kl": 5})
STOPS = minimal(tripwires={"stop_kl": 5})
RUNNING = minimal(score_normalisation="running")
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_what_where_from_and_how(recipe: Path) -> None:
    # Without looking for the files: some are the reader's own.
    parse_config(yaml.safe_load(recipe.read_text(encoding="utf-8")), where=recipe.name)
    head = recipe.read_text(encoding="utf-8").split("policy:")[0]
    for word in ("# What", "# From", "# Run"):
        assert word in head


def test_a_configuration_survives_its_own_yaml() -> None:
    config = parse_config(minimal(steps=7), where="here")
    assert parse_config(yaml.safe_load(dump_config(config)), where="there") == config


def test_overrides_win_and_dashes_are_underscores(tmp_path: Path) -> None:
    file = write(tmp_path, minimal(steps=7))
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
        (minimal(leash={"beta": 0.1, "horizon": 5}), "`horizon` does nothing with a fixed `beta`"),
        (minimal(leash={"target_kl": 6, "horizon": 5}), "`horizon` is for"),
        (minimal(leash={"beta": 0.1, "placement": "measure"}), "charges nothing"),
        (minimal(rollout={"truncated": "penalise"}), "goes with `truncated: penalise`"),
        (minimal(rollout={"missing_eos_penalty": 1}), "goes with `truncated: penalise`"),
        (minimal(algorithm={"value": {"kind": "model"}}), "`path` goes with `kind: model`"),
        (minimal(reward_models={}), "at least one of `reward_models`"),
        (minimal(reward_models={"r": {}}), "exactly one of `path` and `callable`"),
        (minimal(reward_models={"r": {"callable": "a:b", "template": "{prompt}"}}), "nothing for"),
        (minimal(algorithm={"minibatches": 3}), "does not divide the 64"),
        (
            minimal(reward_models={"r": {"callable": "a:b", "adapter": "x"}}),
            "`adapter` is for a cl",
        ),
        (
            minimal(reward_models={"r": {"path": "a", "retries": 5}}),
            "`retries` is for an async",
        ),
        (minimal(reward_models={"r": {"path": "a", "timeout_s": 0}}), "greater than 0"),
        (minimal(heldout={"every": 3}), "`heldout` does nothing without `prompts.heldout`"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_config(tree, where="c.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", r"c.yaml, line 1, column 5: not YAML"),
        ("- 1", "should hold keys and values, got list"),
    ],
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
    file = write(tmp_path, minimal(steps=3))
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
    file = write(tmp_path, minimal(leash=leash))
    found = load_config(file, overrides, base=file).leash
    assert found.model_dump(exclude_unset=True) == expected


def test_two_kinds_of_leash_on_the_command_line_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, minimal())
    with pytest.raises(UsageError, match=r"^--leash.beta and --leash.target_kl: .*got beta, targ"):
        load_config(file, {"leash.beta": "1", "leash.target_kl": "6"}, base=file)


def test_what_an_override_takes_the_place_of_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, minimal(leash={"target_kl": 5, "initial_beta": 0.2}))
    said: list[str] = []
    config = load_config(file, {"leash.beta": "0.1"}, base=file, say=said.append)
    assert config.leash.beta == 0.1
    assert said == [
        f"{file}, line 9: `leash.target_kl: 5` is left out, because --leash.beta takes its place",
        f"{file}, line 10: `leash.initial_beta: 0.2` is left out, because --leash.beta takes its "
        "place",
    ]
    load_config(file, {"leash.beta": "0.1"}, base=file)
    assert capsys.readouterr().err == "".join(f"kleash: {sentence}\n" for sentence in said)
    load_config(file, {"leash.target-kl": "2", "steps": "3"}, base=file)
    assert capsys.readouterr().err == ""


def test_no_other_key_of_the_file_is_dropped_for_an_override(tmp_path: Path) -> None:
    tripwires = {"then": "rollback", "beta_factor": 3}
    logging = {"checkpoint_every": 1}
    file = write(tmp_path, minimal(tripwires=tripwires, logging=logging))
    with pytest.raises(ConfigError, match=r"c.yaml, line 13: in `tripwires`: `beta_factor` is for"):
        load_config(file, {"tripwires.then": "stop"}, base=file)
    without = {"tripwires.then": "stop", "tripwires.beta-factor": "none"}
    assert load_config(file, without, base=file).tripwires.then == "stop"


@pytest.mark.parametrize(
    ("tree", "overrides", "key", "expected"),
    [
        (FOLLOWS, {"leash.target-kl": "none", "leash.beta": "1"}, "leash.target_kl", None),
        (STOPS, {"tripwires.stop-kl": "none"}, "tripwires.stop_kl", None),
        (minimal(steps=7), {"steps": "none"}, "steps", 100),
        (minimal(), {"algorithm.value-clip-range": "none"}, "algorithm.value_clip_range", None),
        (minimal(algorithm={"value_clip_range": "none"}), {}, "algorithm.value_clip_range", None),
        (minimal(pretraining={"texts": "x.jsonl"}), {"pretraining": "none"}, "pretraining", None),
        (RUNNING, {"score-normalisation": "none"}, "score_normalisation", "none"),
    ],
)
def test_none_is_no_value_as_the_documentation_prints_it(
    tmp_path: Path, tree: dict[str, Any], overrides: dict[str, str], key: str, expected: object
) -> None:
    file = write(tmp_path, tree)
    config = load_config(file, overrides, base=file)
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    assert found == expected
    assert parse_config(yaml.safe_load(dump_config(config)), where="its own YAML") == config


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"leash.beta": "-1"}, "^--leash.beta: `leash.beta`: .* got -1$"),
        ({"leash.beta": "tight"}, "^--leash.beta: .*got 'tight'"),
        ({"reward-models.r.weight": "x"}, "^--reward-models.r.weight: .*got 'x'"),
        ({"algorithm": "pp0"}, "^--algorithm: `algorithm`: expected one of 'ppo'.*got 'pp0'"),
        ({"leash.groups": "{a: "}, "^--leash.groups: cannot read .* at character 5"),
        ({"ppo.epochs": "3"}, "^no option --ppo.epochs: it is now --algorithm.epochs"),
        ({"optimizer.value-lr": "3"}, "it is now --algorithm.value.lr"),
    ],
)
def test_a_mistake_on_the_command_line_is_blamed_on_it(
    tmp_path: Path, overrides: dict[str, str], sentence: str
) -> None:
    file = write(tmp_path, minimal())
    with pytest.raises(UsageError, match=sentence):
        load_config(file, overrides, base=file)


def test_a_contradiction_names_both_places(tmp_path: Path) -> None:
    file = write(tmp_path, minimal(tripwires={"stop_kl": 2, "then": "rollback"}))
    with pytest.raises(ConfigError, match=r"c.yaml, line 13: `tripwires.then: rollback` needs"):
        load_config(file, {"leash.beta": "1"}, base=file)
    with pytest.raises(UsageError, match=r"^--algorithm and --rollout.responses_per_prompt: "):
        load_config(file, {"algorithm": "rloo", "rollout.responses_per_prompt": "1"}, base=file)


def test_limits_of_async_rewards_are_those_of_the_calls() -> None:
    limits, written = CallLimits(), RewardConfig(callable="a:b")
    for name in ("concurrency", "timeout_s", "retries"):
        assert getattr(limits, name) == getattr(written, name)
