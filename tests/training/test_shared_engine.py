"""Several processes with one engine that writes: what one process with it does, and its failures.

The engine is a stand-in behind a real connection; `tests/cli/test_serve_rollouts.py` has vLLM's.
"""

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from ranks import Ranks
from small_run import numbers, policy_weights, save_material, two_words
from stand_in_engine import StandInEngine
from stand_in_server import StandInServer, serving

from kleash.config.schema import Config
from kleash.errors import ConfigError
from kleash.mesh import Mesh
from kleash.models.policy import load_policy
from kleash.storage.run_directory import read_run
from kleash.training.assembly import assemble
from kleash.training.loop import train

LAYER: dict[str, Any] = {
    "rollout": {"prompts_per_step": 5, "microbatch_size": 2, "engine": "vllm"},
    "algorithm": {"minibatches": 1, "microbatch_size": 3},
    "logging": {"spot_check_every": 2, "samples_per_step": 5},
    "prompts": {"heldout": None},
    "optimizer": {"lr": 1e-2},
    "steps": 3,
}
LORA = {"policy": {"lora": {"rank": 2, "targets": ["q_proj", "down_proj"]}}}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    return save_material(folder, prompts=two_words(range(8)), heldout=two_words([1]))


@pytest.fixture(scope="module")
def ranks() -> Generator[Ranks]:
    started = Ranks()
    yield started
    started.close()


@pytest.fixture
def stand_in(material: Path) -> StandInServer:
    return StandInServer(StandInEngine(load_policy(material / "policy")))


@pytest.fixture
def url(stand_in: StandInServer) -> Iterator[str]:
    with serving(stand_in) as address:
        yield address


def settings(material: Path, output: Path, url: str | None, **changes: Any) -> Config:
    vllm = {} if url is None else {"url": url, "timeout_s": 2.0}
    rollout = {**changes.pop("rollout", {}), "vllm": vllm}
    return small_run.settings(material, output, LAYER, rollout=rollout, **changes)


def require_same(ours: Path, theirs: Path, *, rel: float) -> None:
    """Responses identical; numbers and weights to `rel`."""
    one, other = (
        sorted((sample.step, sample.response) for sample in read_run(path).samples)
        for path in (ours, theirs)
    )
    assert one == other and len(one) == 15
    for line, wanted in zip(numbers(ours), numbers(theirs), strict=True):
        known = {key: value for key, value in wanted.items() if value is not None}
        assert {key: line[key] for key in known} == pytest.approx(known, rel=rel, abs=rel)
    for name, tensor in policy_weights(theirs).items():
        torch.testing.assert_close(policy_weights(ours)[name], tensor, rtol=rel, atol=rel)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        pytest.param("ddp", {}, id="ddp"),
        pytest.param("fsdp", {}, id="fsdp"),
        pytest.param("fsdp", LORA, id="fsdp-adapter"),
    ],
)
def test_several_processes_are_one_and_go_on_after_the_server_was_gone(
    material: Path,
    tmp_path: Path,
    ranks: Ranks,
    stand_in: StandInServer,
    url: str,
    strategy: str,
    changes: dict[str, Any],
) -> None:
    """The oracle is one process, and of going on the run that nothing happened to."""
    divided = {**changes, "distributed": {"strategy": strategy}}
    many = ranks.train(settings(material, tmp_path / "many", url, **divided))
    for line in numbers(many):
        assert line["rollout/kl_sampler_per_token"] < 1e-9
        if line["step"] == 2:
            assert line["rollout/kl_sampler_exact_per_token"] < 1e-9
    require_same(many, train(settings(material, tmp_path / "alone", url, **changes)), rel=1e-5)
    if changes:
        return
    broken = settings(material, tmp_path / "broken", url, **divided)
    # One request when it is reached, five in a step: gone in the middle of the second.
    stand_in.dies_after, stand_in.back_after = 1 + 5 + 3, 1e9
    ended = ranks.run(broken)
    assert [answer and answer["error"] for answer in ended] == ["EngineLostError"] * 2
    assert ended[0] == ended[1]
    assert "step 2 was not made" in str(ended[0]) and "kleash train --resume" in str(ended[0])
    assert [line["step"] for line in numbers(tmp_path / "broken")] == [1]
    assert read_run(tmp_path / "broken").status == "failed"
    stand_in.dead_until = 0.0
    require_same(ranks.train(broken), many, rel=0)


def test_a_server_that_does_not_fit_is_refused_by_all(
    material: Path, tmp_path: Path, ranks: Ranks, stand_in: StandInServer, url: str
) -> None:
    stand_in.version = "0.31.1"
    ended = ranks.run(settings(material, tmp_path / "run", url))
    assert [answer and answer["error"] for answer in ended] == ["EngineError"] * 2
    assert "expected vLLM 0.32 or newer, got 0.31.1" in str(ended[1])
    assert not (tmp_path / "run").exists()


def test_a_group_that_is_not_taken_is_named_by_all(
    material: Path, tmp_path: Path, ranks: Ranks, stand_in: StandInServer, url: str
) -> None:
    """Weights of a divided model are gathered for each question about the cause."""

    def takes(name: str) -> bool:
        return not name.startswith("model.layers.1.")

    stand_in.engine.takes = takes
    divided = {"distributed": {"strategy": "fsdp"}}
    ended = ranks.run(settings(material, tmp_path / "run", url, **divided))
    assert [answer and answer["error"] for answer in ended] == ["EngineError"] * 2
    assert "whatever is sent for model.layers.1 changes nothing in it" in json.dumps(ended[1])


def test_an_engine_in_one_of_several_processes_is_refused(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run", None)
    with pytest.raises(ConfigError, match=r"give its address as rollout\.vllm\.url"):
        assemble(config, mesh=Mesh(size=2))
