"""Several processes do what one does: the same responses, the same numbers, the same refusals.

The oracle of a run by several processes is the same run in one.
"""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from ranks import Ranks
from small_run import numbers, policy_weights, save_material

from kleash.config.schema import Config
from kleash.storage.atomic_directories import load_tensors
from kleash.storage.run_directory import read_run
from kleash.training.loop import train

LAYER = {
    "rollout": {"prompts_per_step": 7, "microbatch_size": 4},
    "leash": {"beta": None, "target_kl": 0.3},
    "plan": {"prompts": 4, "responses": 4},
    "algorithm": {"minibatches": 1, "microbatch_size": 3},
    "logging": {"samples_per_step": 7},
    "steps": 3,
}
"""Rows that divide evenly among nobody."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    longer = [" ".join(f"w{i}" for i in range(n + 1)) for n in range(13)]
    return save_material(folder, prompts=longer[:8], heldout=longer[10:])


@pytest.fixture(scope="module")
def ranks() -> Generator[Ranks]:
    """Processes for the runs of this file."""
    started = Ranks()
    yield started
    started.close()


def settings(material: Path, output: Path, **changes: Any) -> Config:
    """A small run whose prompts are all of different lengths."""
    return small_run.settings(material, output, LAYER, **changes)


def texts(path: Path) -> list[tuple[int, str]]:
    return sorted((sample.step, sample.response) for sample in read_run(path).samples)


def require_same_run(ours: Path, theirs: Path, *, rel: float = 1e-5) -> None:
    """Responses identical; metrics and weights equal but for rounding."""
    assert texts(ours) == texts(theirs)
    for line, wanted in zip(numbers(ours), numbers(theirs), strict=True):
        known = {key: value for key, value in wanted.items() if value is not None}
        assert {key for key, value in line.items() if value is None} == set(wanted) - set(known)
        assert {key: line[key] for key in known} == pytest.approx(known, rel=rel, abs=rel)
    for name, tensor in policy_weights(theirs).items():
        torch.testing.assert_close(policy_weights(ours)[name], tensor, rtol=1e-5, atol=1e-5)


PPO = {"algorithm": {"value": {"kind": "trunk"}}, "leash": {"placement": "mixed"}}
GRPO = {
    "algorithm": {"name": "grpo", "minibatches": 2},
    "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2},
    "policy": {"lora": {"rank": 2, "targets": ["q_proj"]}},
}
RLOO = {
    "algorithm": {"name": "rloo", "minibatches": 2},
    "rollout": {"prompts_per_step": 5, "responses_per_prompt": 2},
    "leash": {"placement": "exact"},
}
CASES = [
    pytest.param(2, {}, id="ppo-2"),
    pytest.param(4, PPO, id="ppo-mixed-4"),
    pytest.param(4, GRPO, id="grpo-adapter-4"),
    pytest.param(2, RLOO, id="rloo-exact-2"),
]


@pytest.mark.parametrize(("size", "changes"), CASES)
def test_several_processes_are_one(
    material: Path, tmp_path: Path, ranks: Ranks, size: int, changes: dict[str, Any]
) -> None:
    alone = train(settings(material, tmp_path / "alone", **changes))
    together = ranks.train(settings(material, tmp_path / "many", **changes), size=size)
    require_same_run(together, alone)


def test_one_process_of_a_launcher_exchanges_nothing(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("torch.distributed.init_process_group", None)
    train(settings(material, tmp_path / "run", steps=1))


def test_everything_else_works_in_several_processes_too(
    material: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """What needs more than the loop: an anchor that moves, groups, a cache, a tracker."""
    folder = tmp_path / "grouped"
    folder.mkdir()
    lines = [{"prompt": f"w{i} w{i + 1}", "group": "ab"[i % 2]} for i in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {
        "prompts": {"train": str(folder / "prompts.jsonl"), "heldout": None},
        "leash": {"beta": None, "target_kl": None, "groups": {"a": 0.2, "b": 0.4}},
    }
    moved = {**changes, "leash": {**changes["leash"], "reanchor_every": 2}}
    cached = {**changes, "reference": {"kind": "cached", "cache": str(tmp_path / "cache")}}
    cached["logging"] = {"trackers": ["tensorboard"]}
    for name, wanted in (("moved", moved), ("cached", cached)):
        alone = train(settings(material, tmp_path / f"{name}-alone", **wanted))
        many = ranks.train(settings(material, tmp_path / f"{name}-many", **wanted))
        require_same_run(many, alone)
    assert list((tmp_path / "cached-many").glob("events.out.tfevents*"))


def test_a_resumed_run_is_the_uninterrupted_one(
    material: Path, tmp_path: Path, ranks: Ranks
) -> None:
    whole = ranks.train(settings(material, tmp_path / "whole"))
    broken = settings(material, tmp_path / "broken")
    ended = ranks.run(broken, fault={"kind": "asked to stop", "rank": 1, "step": 2})
    assert [answer and answer["error"] for answer in ended] == ["RunInterrupted"] * 2
    assert "stopped by SIGTERM after step 2 of 3" in str(ended[0])
    resumed = ranks.train(broken)
    assert numbers(resumed) == numbers(whole)
    for name, tensor in policy_weights(whole).items():
        torch.testing.assert_close(policy_weights(resumed)[name], tensor, rtol=0, atol=0)


def test_a_refusal_elsewhere_names_the_response(
    material: Path, tmp_path: Path, ranks: Ranks
) -> None:
    config = settings(material, tmp_path / "run")
    ended = ranks.run(config, fault={"kind": "not finite", "rank": 1})
    assert [answer and answer["error"] for answer in ended] == ["NonFiniteError"] * 2
    assert str(ended[0]) == str(ended[1])
    assert "got NaN at token 2 of response" in str(ended[0])
    run = read_run(tmp_path / "run")
    assert run.status == "failed"
    (refusal,) = (event for event in run.events if event.kind == "refused")
    evidence = json.loads((run.path / refusal.details["evidence"] / "refusal.json").read_text())
    assert f"response {evidence['response']}" in str(ended[0])
    # The second process reads every second of the responses in the order of their length.
    batch = load_tensors(run.path / refusal.details["evidence"] / "batch.safetensors")
    length = batch["prompt_mask"].sum(1) + batch["response_mask"].sum(1)
    assert length[evidence["response"]] == length.sort(descending=True).values[1]


def test_a_rollback_is_made_by_all(material: Path, tmp_path: Path, ranks: Ranks) -> None:
    wires = {"then": "rollback", "max_rollbacks": 1}
    logging = {"checkpoint_every": 1}
    fixed = {"leash": {"beta": 0.1, "target_kl": None}, "tripwires": wires, "logging": logging}
    config = settings(material, tmp_path / "run", **fixed)
    ranks.train(settings(material, tmp_path / "first", **{**fixed, "steps": 1}))
    ended = ranks.run(config, fault={"kind": "not finite", "rank": 1})
    assert "there is no good checkpoint to go back to yet" in str(ended[0])
    first = settings(material, tmp_path / "first", **fixed)
    ended = ranks.run(first, fault={"kind": "not finite", "rank": 1})
    assert [answer and answer["error"] for answer in ended] == [None, None]
    (back,) = (e for e in read_run(tmp_path / "first").events if e.kind == "rolled_back")
    assert back.details["to_step"] == 1


@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        ("broken", "LostProcessError", r"process 1 of 2 failed: RuntimeError: out of memory"),
        ("no file", "LostProcessError", "process 1 of 2 failed: FileNotFoundError: no such file"),
        ("killed", "LostProcessError", "process 1 of 2 ended without a word"),
        ("asleep", "LostProcessError", "process 1 of 2 ended without a word or did not answer"),
        ("other weights", "RunError", "got another in process 1: weights is"),
        ("other reference", "ReferenceChangedError", "the reference changed while training"),
    ],
)
def test_a_failure_elsewhere_ends_the_run_in_a_sentence(
    material: Path, tmp_path: Path, ranks: Ranks, fault: str, error: str, sentence: str
) -> None:
    config = settings(material, tmp_path / "run", distributed={"timeout_s": 10.0})
    ended = ranks.run(config, fault={"kind": fault, "rank": 1})[0]
    assert ended is not None
    assert ended["error"] == error
    assert sentence in ended["message"]
