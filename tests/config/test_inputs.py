"""A relative path is sought beside the YAML that names it, then in the working directory."""

import os
from pathlib import Path
from typing import Any

import pytest
from config_trees import minimal, write

from kleash.config.loading import load_config
from kleash.errors import ConfigError
from kleash.models.callable_reward import CallableReward


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folder of the file, and the working directory."""
    beside, here = tmp_path / "recipes", tmp_path / "work"
    here.mkdir()
    monkeypatch.chdir(here)
    return beside, here


def test_beside_the_file_comes_before_the_working_directory(places: tuple[Path, Path]) -> None:
    beside, here = places
    file = write(beside, minimal(policy={"path": "models/sft"}))
    (here / "x.jsonl").touch()
    (here / "models" / "sft").mkdir(parents=True)
    config = load_config(file, {}, base=file)
    assert config.prompts.train == str(beside / "x.jsonl")
    assert config.policy.path == "models/sft"  # found in the working directory: as it was written
    (beside / "models" / "sft").mkdir(parents=True)
    assert load_config(file, {}, base=file).policy.path == str(beside / "models" / "sft")
    named = load_config(file, {"policy.path": "models/sft"}, base=file)
    assert named.policy.path == "models/sft"  # the command line follows the working directory


def test_a_file_of_the_working_directory_is_as_before(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, _ = places
    file = write(beside, minimal())
    monkeypatch.chdir(beside)
    assert load_config(Path("c.yaml"), {}, base=file).prompts.train == "x.jsonl"


@pytest.mark.parametrize(
    ("changes", "key", "name"),
    [
        ({"prompts": {"train": "y.jsonl"}}, "prompts.train", "y.jsonl"),
        ({"policy": {"path": "../sft"}}, "policy.path", "../sft"),
        ({"pretraining": {"texts": "t.jsonl"}}, "pretraining.texts", "t.jsonl"),
        ({"reward_models": {"r": {"path": "./rm"}}}, "reward_models.r.path", "./rm"),
        ({"algorithm": {"value": {"kind": "model", "path": "./v"}}}, "algorithm.value.path", "./v"),
    ],
)
def test_a_message_says_where_it_was_sought(
    places: tuple[Path, Path], changes: dict[str, Any], key: str, name: str
) -> None:
    beside, here = places
    file = write(beside, minimal(**changes))
    with pytest.raises(ConfigError) as caught:
        load_config(file, {}, base=file)
    message = str(caught.value)
    assert message.startswith(f"{file}, line ") and f"`{key}`: expected" in message
    for folder in (beside, here):
        assert os.path.normpath(folder / name) in message


def test_a_name_on_the_hub_is_left_alone(places: tuple[Path, Path]) -> None:
    file = write(places[0], minimal(policy={"path": "org/name"}))
    assert load_config(file, {}, base=file).policy.path == "org/name"


def test_a_reward_beside_the_file_is_found_and_loaded(places: tuple[Path, Path]) -> None:
    beside, here = places
    file = write(beside, minimal(reward_models={"r": {"callable": "rewards:length"}}))
    code = (
        "import {helper}\ndef length(prompts, responses):\n    return [{value}] * len(responses)\n"
    )
    (beside / "neighbour_of_rewards.py").write_text("")
    (beside / "rewards.py").write_text(code.format(helper="neighbour_of_rewards", value=1.0))
    (here / "rewards.py").write_text(code.format(helper="math", value=2.0))
    name = load_config(file, {}, base=file).reward_models["r"].callable
    assert name is not None and name == f"{beside / 'rewards.py'}:length"
    assert CallableReward(name).score(["p"], ["r"]).tolist() == [1.0]
    assert CallableReward(name).score(["p"], ["r"]).tolist() == [1.0]


def test_the_world_is_filled_in_later(places: tuple[Path, Path]) -> None:
    file = write(places[0], minimal(prompts={"train": "{world}/prompts.jsonl"}, world=0))
    assert load_config(file, {}, base=file).prompts.train == "{world}/prompts.jsonl"
