"""What differs between two configurations, and what a run may be continued with."""

from typing import Any

import pytest
from config_trees import minimal

from kleash.config.changes import config_differences, resumable_change
from kleash.config.loading import parse_config
from kleash.config.schema import Config


def read(**changes: Any) -> Config:
    return parse_config(minimal(**changes), where="here")


def test_differences_are_named_by_their_keys_with_both_values() -> None:
    old = read(steps=10, leash={"beta": 0.1}, optimizer={"lr": 1e-3})
    new = read(steps=20, leash={"target_kl": 2}, optimizer={"lr": 1e-3})
    assert config_differences(old, new) == [
        ("leash.beta", 0.1, None),
        ("leash.controller", None, "budget"),
        ("leash.initial_beta", None, "auto"),
        ("leash.target_kl", None, 2.0),
        ("steps", 10, 20),
    ]
    assert config_differences(old, old) == []


def test_a_value_that_follows_from_another_is_a_difference_too() -> None:
    keys = [key for key, _, _ in config_differences(read(), read(optimizer={"lr": 1}))]
    assert keys == ["algorithm.value.lr", "optimizer.lr"]


@pytest.mark.parametrize(
    ("changes", "resumable"),
    [
        ({"steps": 200}, True),
        ({"logging": {"checkpoint_every": 5}}, True),
        ({"output": "elsewhere"}, True),
        ({"algorithm": {"microbatch_size": 8}}, True),
        ({"algorithm": {"microbatch_tokens": 8}}, True),
        ({"rollout": {"microbatch_tokens": 8}}, True),
        ({"tripwires": {"undo": "memory"}}, True),
        ({"seed": 3}, False),
        ({"leash": {"beta": 0.2}}, False),
        ({"optimizer": {"lr": 1.0}}, False),
        ({"algorithm": {"epochs": 3}}, False),
        ({"policy": {"path": "q"}}, False),
    ],
)
def test_only_what_cannot_change_the_past_may_change(
    changes: dict[str, Any], resumable: bool
) -> None:
    old = read()
    differences = config_differences(old, read(**changes))
    assert differences
    assert {
        resumable_change(key, schedule=old.optimizer.schedule) for key, _, _ in differences
    } == {resumable}


def test_steps_may_not_change_where_the_learning_rate_falls_over_them() -> None:
    assert not resumable_change("steps", schedule="linear")
