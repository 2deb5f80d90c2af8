"""Each algorithm knows its keys, and `auto` becomes a number that is written down."""

from typing import Any

import pytest
import yaml
from config_trees import minimal

from kleash.config.algorithm import GRPOConfig, PPOConfig, RLOOConfig
from kleash.config.loading import dump_config, load_config, parse_config
from kleash.config.schema import Config
from kleash.errors import ConfigError
from kleash.models.batching import TokenBudget

SEVERAL = {"responses_per_prompt": 4}


def read(**changes: Any) -> Config:
    return parse_config(minimal(**changes), where="here")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("grpo", GRPOConfig),
        ({"name": "rloo", "epochs": 5}, RLOOConfig),
        ({"epochs": 5}, PPOConfig),
        ("ppo", PPOConfig),
    ],
)
def test_the_name_chooses_the_algorithm(given: Any, expected: type) -> None:
    algorithm = read(algorithm=given, rollout=SEVERAL).algorithm
    assert type(algorithm) is expected
    assert algorithm.epochs == (5 if isinstance(given, dict) else 2)


@pytest.mark.parametrize(
    ("name", "key", "value", "owner"),
    [
        ("grpo", "lam", 0.9, "ppo"),
        ("rloo", "epsilon", 0.1, "grpo"),
        ("ppo", "epsilon", 0.1, "grpo"),
        ("rloo", "value", {"kind": "trunk"}, "ppo"),
    ],
)
def test_a_key_of_another_algorithm_is_refused(
    name: str, key: str, value: object, owner: str
) -> None:
    with pytest.raises(ConfigError, match=f"`algorithm.{key}` is for `algorithm: {owner}` alone"):
        read(algorithm={"name": name, key: value}, rollout=SEVERAL)


def test_another_algorithm_on_the_command_line_keeps_the_keys_that_it_knows(tmp_path: Any) -> None:
    file = tmp_path / "c.yaml"
    (tmp_path / "x.jsonl").touch()
    file.write_text(yaml.safe_dump(minimal(algorithm={"name": "rloo", "epochs": 5})))
    overrides = {"algorithm": "grpo", "rollout.responses-per-prompt": "2"}
    assert load_config(file, overrides, base=file).algorithm == GRPOConfig(
        epochs=5, min_effective_samples=0
    )
    file.write_text(yaml.safe_dump(minimal(algorithm={"lam": 0.9}), sort_keys=False))
    with pytest.raises(ConfigError, match=r"c.yaml, line 12: `algorithm.lam` is for"):
        load_config(file, overrides, base=file)


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({}, "min_effective_samples", 0.0),
        ({"leash": {"beta": 1, "placement": "exact_weighted"}}, "min_effective_samples", 0.5),
        ({"algorithm": {"min_effective_samples": 0.1}}, "min_effective_samples", 0.1),
    ],
)
def test_auto_is_written_as_what_it_stands_for(
    changes: dict[str, Any], key: str, expected: float
) -> None:
    config = read(**changes)
    assert getattr(config.algorithm, key) == expected
    written = yaml.safe_load(dump_config(config))
    assert written["algorithm"][key] == expected
    assert parse_config(written, where="there") == config


def test_the_critics_learning_rate_is_the_policys_unless_given() -> None:
    both = read(optimizer={"lr": 3e-4}).algorithm
    own = read(optimizer={"lr": 3e-4}, algorithm={"value": {"lr": 1e-3}}).algorithm
    assert isinstance(both, PPOConfig) and both.value.lr == 3e-4
    assert isinstance(own, PPOConfig) and own.value.lr == 1e-3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"ppo": {"epochs": 2}}, "`ppo` is now `algorithm`"),
        ({"value": {"kind": "trunk"}}, "`value` is now `algorithm.value`"),
        ({"optimizer": {"value_lr": 1}}, "`optimizer.value_lr` is now `algorithm.value.lr`"),
        ({"policy": {"dtype": "bfloat16"}}, "`policy.dtype` is now `policy.precision`"),
    ],
)
def test_a_key_of_an_earlier_version_is_answered_with_its_new_place(
    old: dict[str, Any], new: str
) -> None:
    with pytest.raises(ConfigError, match=new):
        read(**old)


@pytest.mark.parametrize("section", ["algorithm", "rollout"])
def test_a_microbatch_has_one_size(section: str) -> None:
    both = {"microbatch_size": 64, "microbatch_tokens": 4096}
    why = f"in `{section}`: `microbatch_size` does nothing beside `microbatch_tokens`"
    with pytest.raises(ConfigError, match=f"{why}: leave it out"):
        read(**{section: both})
    with pytest.raises(ConfigError, match="greater than 0"):
        read(**{section: {"microbatch_tokens": 0}})


@pytest.mark.parametrize("section", ["algorithm", "rollout"])
def test_a_microbatch_of_tokens_is_written_alone_and_read_again(section: str) -> None:
    config = read(**{section: {"microbatch_tokens": 4096}})
    assert getattr(config, section).microbatch == TokenBudget(4096)
    written = yaml.safe_load(dump_config(config))
    assert "microbatch_size" not in written[section]
    assert parse_config(written, where="here") == config
    assert getattr(read(**{section: {"microbatch_size": 5}}), section).microbatch == 5


def test_the_command_line_takes_tokens_in_place_of_rows(tmp_path: Any) -> None:
    file = tmp_path / "c.yaml"
    (tmp_path / "x.jsonl").touch()
    file.write_text(yaml.safe_dump(minimal(algorithm={"microbatch_size": 5})))
    instead = {"algorithm.microbatch-size": "none", "algorithm.microbatch-tokens": "100"}
    assert load_config(file, instead, base=file).algorithm.microbatch == TokenBudget(100)
