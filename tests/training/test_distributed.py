"""Several processes do what one does: the same responses, the same numbers, the same refusals.

The oracle of a shared run is the same run in one process. This process leads; the others are
started once and lend a hand to every run.
"""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import pytest
import small_run
import torch
from small_run import numbers, policy_weights, save_material
from training_hooks import interrupt_after

from kleash.cli import main
from kleash.config.schema import Config
from kleash.errors import ConfigError, ModelError, NonFiniteError, RunError
from kleash.storage.run_directory import read_run
from kleash.training.distributed import runs
from kleash.training.loop import train
from kleash.training.process_group import Message, _pack, _unpack, is_distributed, is_leader

LAYER = {
    "rollout": {"prompts_per_step": 7, "microbatch_size": 4},
    "leash": {"beta": None, "target_kl": 0.3},
    "plan": {"prompts": 4, "responses": 4},
    "algorithm": {"minibatches": 1, "microbatch_size": 3},
    "logging": {"samples_per_step": 7},
    "steps": 3,
}
"""Rows that divide evenly among nobody."""
Together = Callable[..., Any]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    longer = [" ".join(f"w{i}" for i in range(n + 1)) for n in range(13)]
    return save_material(folder, prompts=longer[:8], heldout=longer[10:])


def settings(material: Path, output: Path, **changes: Any) -> Config:
    """A small run whose prompts are all of different lengths."""
    return small_run.settings(material, output, LAYER, **changes)


@pytest.fixture(scope="module")
def hands() -> Generator[list[subprocess.Popen[str]]]:
    """Two processes that help, and wait between runs."""
    here = Path(__file__).parents[1] / "support"
    paths = os.pathsep.join([str(here), *sys.path])
    helpers = [
        subprocess.Popen(
            [sys.executable, str(here / "distributed_worker.py")],
            stdin=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    yield helpers
    for helper in helpers:
        helper.stdin.close()
        assert helper.wait(60) == 0


@pytest.fixture
def together(hands: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch) -> Together:
    """Do something as the leader of so many processes; the last of them may have a fault."""

    def do(work: Callable[[], Any], *, size: int = 2, fault: str | None = None) -> Any:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(1, size):
            broken = fault if rank == size - 1 else None
            given = {"port": port, "rank": rank, "size": size, "fault": broken}
            stream = cast(Any, hands[rank - 1].stdin)
            stream.write(json.dumps(given) + "\n")
            stream.flush()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
        with monkeypatch.context() as patch:
            for name, value in {**where, "WORLD_SIZE": str(size), "RANK": "0"}.items():
                patch.setenv(name, value)
            assert is_distributed()
            assert is_leader()
            return work()

    return do


def texts(path: Path) -> list[tuple[int, str]]:
    return sorted((sample.step, sample.response) for sample in read_run(path).samples)


CASES = [
    pytest.param(2, {}, id="two"),
    pytest.param(
        3, {"algorithm": {"value": {"kind": "trunk"}}, "leash": {"placement": "mixed"}}, id="three"
    ),
    pytest.param(
        3,
        {
            "algorithm": {"name": "grpo", "minibatches": 2},
            "rollout": {"prompts_per_step": 1, "responses_per_prompt": 2},
            "policy": {"lora": {"rank": 2, "targets": ["q_proj"]}},
        },
        id="more-than-rows",
    ),
]


@pytest.mark.parametrize(("size", "changes"), CASES)
def test_several_processes_are_one(
    material: Path, tmp_path: Path, together: Together, size: int, changes: dict[str, Any]
) -> None:
    alone = train(settings(material, tmp_path / "alone", **changes))
    shared = together(lambda: train(settings(material, tmp_path / "many", **changes)), size=size)
    assert texts(shared) == texts(alone)
    for ours, theirs in zip(numbers(shared), numbers(alone), strict=True):
        known = {key: value for key, value in theirs.items() if value is not None}
        assert {key for key, value in ours.items() if value is None} == set(theirs) - set(known)
        assert {key: ours[key] for key in known} == pytest.approx(known, rel=2e-3, abs=2e-5)
    for name, tensor in policy_weights(alone).items():
        torch.testing.assert_close(policy_weights(shared)[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(
    material: Path, tmp_path: Path, together: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = together(lambda: train(settings(material, tmp_path / "whole")))
    broken = settings(material, tmp_path / "broken")

    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            together(lambda: train(broken))
    resumed = together(lambda: train(broken))
    assert numbers(resumed) == numbers(whole)
    for name, tensor in policy_weights(whole).items():
        torch.testing.assert_close(policy_weights(resumed)[name], tensor, rtol=0, atol=0)


def test_a_refusal_elsewhere_names_the_response(
    material: Path, tmp_path: Path, together: Together
) -> None:
    config = settings(material, tmp_path / "run")
    with pytest.raises(NonFiniteError, match="got NaN at token 2 of response") as refused:
        together(lambda: train(config), fault="not finite")
    run = read_run(tmp_path / "run")
    assert run.status == "failed"
    (refusal,) = (event for event in run.events if event.kind == "refused")
    evidence = json.loads(
        (tmp_path / "run" / refusal.details["evidence"] / "refusal.json").read_text()
    )
    assert evidence["response"] == refused.value.response


@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        ("broken", RunError, r"process 2 of 3 failed: RuntimeError: out of memory"),
        ("other reference", ModelError, "expected the same reference in every process"),
    ],
)
def test_a_failure_elsewhere_ends_the_run_in_a_sentence(
    material: Path,
    tmp_path: Path,
    together: Together,
    fault: str,
    error: type[Exception],
    sentence: str,
) -> None:
    config = settings(material, tmp_path / "run")
    with pytest.raises(error, match=sentence):
        together(lambda: train(config), size=3, fault=fault)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"leash": {"reanchor_every": 2}}, "leash.reanchor_every"),
        ({"logging": {"trackers": ["tensorboard"]}}, "logging.trackers"),
        ({"reference": {"kind": "cached", "cache": "somewhere"}}, "reference.kind: cached"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    material: Path, tmp_path: Path, together: Together, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` does not go with several processes"):
        together(lambda: train(settings(material, tmp_path / "run", **changes)))


def test_a_device_of_its_own(material: Path, tmp_path: Path, together: Together) -> None:
    config = settings(material, tmp_path / "run", device="meta")
    with pytest.raises(ConfigError, match="each takes a GPU of its own, got 'meta'"):
        together(lambda: train(config))


def test_without_the_others_there_is_one_sentence(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="start them with torchrun, or unset WORLD_SIZE"):
        train(settings(material, tmp_path / "run"))


def test_another_than_the_leader_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no configuration: the leader sends one."""
    helped: list[bool] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("kleash.training.worker.serve_requests", lambda: helped.append(True))
    main.app(["train", "no-such-file.yaml"])
    assert helped == [True]


def test_messages_arrive_as_they_were_sent() -> None:
    tensors = {"a": torch.tensor([[True], [False]]), "b": torch.randn(2, 3, dtype=torch.float64)}
    message = Message("score", {"rows": [1, 2], "text": "β ± \x00"}, tensors)
    got = _unpack(_pack(message))
    assert (got.name, got.facts) == (message.name, message.facts)
    for name, tensor in tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, rtol=0, atol=0)


def test_rows_are_dealt_out_once_and_evenly() -> None:
    draw = random.Random(0)
    for _ in range(200):
        count, size = draw.randrange(1, 40), draw.randrange(1, 9)
        shares = runs(count, size)
        dealt = [row for run in shares for row in range(run.start, run.stop)]
        assert dealt == list(range(count))
        sizes = [run.stop - run.start for run in shares]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] == max(sizes)
