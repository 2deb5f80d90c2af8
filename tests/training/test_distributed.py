"""Several processes do what one does: the same responses, the same numbers, the same refusals.

The oracle of a run by several processes is the same run in one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny_models
import torch
from ranks import Ranks
from small_run import numbers, policy_weights, save_material

from kleash.config.loading import dump_config
from kleash.config.schema import Config
from kleash.errors import ConfigError
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
"""Rows that no number of processes divides evenly."""


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
        close = pytest.approx(known, rel=rel, abs=rel, nan_ok=True)
        assert {key: line[key] for key in known} == close
    for name, tensor in policy_weights(theirs).items():
        torch.testing.assert_close(policy_weights(ours)[name], tensor, rtol=1e-5, atol=1e-5)


PPO = {"algorithm": {"value": {"kind": "trunk"}}, "leash": {"placement": "mixed"}}
GRPO = {
    "algorithm": {
        "name": "grpo",
        "minibatches": 2,
        "microbatch_tokens": 24,
    },
    "rollout": {
        "prompts_per_step": 2,
        "responses_per_prompt": 2,
        "microbatch_tokens": 30,
    },
    "policy": {"lora": {"rank": 2, "targets": ["q_proj"]}},
}
RLOO = {
    "algorithm": {"name": "rloo", "minibatches": 2},
    "rollout": {"prompts_per_step": 5, "responses_per_prompt": 2},
    "leash": {"placement": "exact"},
}
CASES = [
    pytest.param(2, {}, ["ddp"], id="ppo-2"),
    pytest.param(4, PPO, ["fsdp"], id="ppo-mixed-4"),
    pytest.param(4, GRPO, ["ddp"], id="grpo-adapter-4"),
    pytest.param(2, GRPO, ["fsdp"], id="grpo-adapter-2"),
    pytest.param(2, RLOO, ["ddp", "fsdp"], id="rloo-exact-2"),
]


@pytest.mark.parametrize(("size", "changes", "strategies"), CASES)
def test_several_processes_are_one(
    material: Path,
    tmp_path: Path,
    ranks: Ranks,
    size: int,
    changes: dict[str, Any],
    strategies: list[str],
) -> None:
    alone = train(settings(material, tmp_path / "alone", **changes))
    for strategy in strategies:
        divided = {**changes, "distributed": {"strategy": strategy}}
        together = ranks.train(settings(material, tmp_path / strategy, **divided), size=size)
        require_same_run(together, alone)
        assert read_run(together).meta["reference"] == read_run(alone).meta["reference"]


def test_accelerate_starts_the_same_run(material: Path, tmp_path: Path) -> None:
    """The command of docs/distributed.md, whose launcher finds no GPU here."""
    alone = train(settings(material, tmp_path / "alone"))
    config = settings(material, tmp_path / "run", distributed={"strategy": "fsdp"})
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    # The port is any that is free: other tests may run beside this one.
    given = ["--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *given]
    ended = subprocess.run(
        [*launch, "--main_process_port", "0", "-m", "kleash", "train", str(file), "--no-check"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    require_same_run(tmp_path / "run", alone)
    parts = (tmp_path / "run" / "checkpoints").glob("step-000003/optimizer/*.safetensors")
    assert len(list(parts)) == 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_check_before_a_run_is_made_by_all(
    material: Path, tmp_path: Path, ranks: Ranks, strategy: str
) -> None:
    changes = {**GRPO, "steps": 1, "distributed": {"strategy": strategy}}
    run = ranks.train(settings(material, tmp_path / "run", **changes), checked=True)
    assert read_run(run).meta["status"] == "finished"
    assert not list(run.glob("doctor/*"))


def test_a_run_goes_on_with_another_number_of_processes(
    material: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Two processes, then four, then one: the numbers of one, to rounding."""
    # An evaluation after the last step would draw random numbers that a longer run does not.
    whole: dict[str, Any] = {
        "algorithm": {"value": {"kind": "model", "path": str(material / "policy")}},
        "prompts": {"heldout": None},
    }
    alone = train(settings(material, tmp_path / "alone", **whole))
    for steps, size in ((1, 2), (2, 4)):
        part = {**whole, "steps": steps, "distributed": {"strategy": "fsdp"}}
        ranks.train(settings(material, tmp_path / "run", **part), size=size)
    require_same_run(train(settings(material, tmp_path / "run", **whole)), alone)


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
    divided = {**moved, "distributed": {"strategy": "fsdp"}, "logging": {"checkpoint_every": 2}}
    cached = {**changes, "reference": {"kind": "cached", "cache": str(tmp_path / "cache")}}
    cached["logging"] = {"trackers": ["tensorboard"]}
    for name, wanted in (("moved", moved), ("divided", divided), ("cached", cached)):
        alone = train(settings(material, tmp_path / f"{name}-alone", **wanted))
        many = ranks.train(settings(material, tmp_path / f"{name}-many", **wanted))
        require_same_run(many, alone)
    assert list((tmp_path / "cached-many").glob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("strategy", "precision"), [("ddp", "float32"), ("fsdp", "float32"), ("fsdp", "bf16")]
)
def test_a_resumed_run_is_the_uninterrupted_one(
    material: Path, tmp_path: Path, ranks: Ranks, strategy: str, precision: str
) -> None:
    """Of a model, too, whose head is its embedding."""
    tied = tiny_models.save_model(tmp_path / "tied", tie_word_embeddings=True)
    policy = {"path": str(tied), "precision": precision}
    divided = {"distributed": {"strategy": strategy}, "policy": policy}
    whole = ranks.train(settings(material, tmp_path / "whole", **divided))
    broken = settings(material, tmp_path / "broken", **divided)
    ended = ranks.run(broken, fault={"kind": "asked to stop", "rank": 1, "step": 2})
    assert [answer and answer["error"] for answer in ended] == ["RunInterrupted"] * 2
    assert "stopped by SIGTERM after step 2 of 3" in str(ended[0])
    resumed = ranks.train(broken)
    assert numbers(resumed) == numbers(whole)
    for name, tensor in policy_weights(whole).items():
        torch.testing.assert_close(policy_weights(resumed)[name], tensor, rtol=0, atol=0)
    if precision == "bf16":
        _require_rounded_alike(whole, train(settings(material, tmp_path / "alone", policy=policy)))
        # With the same rows in each process every product has the same factors, to the last step.
        replicated = {**divided, "distributed": {"strategy": "ddp"}}
        require_same_run(whole, ranks.train(settings(material, tmp_path / "ddp", **replicated)))


def _require_rounded_alike(ours: Path, theirs: Path) -> None:
    """Until the first update has moved the weights, numbers agree to one rounding of bfloat16.

    A product over fewer rows is added up in another order, and its sum rounded to 8 bits: 2⁻⁸ of
    it. Later steps part by more, since Adam's first step is as long for a gradient of any size.
    """
    first, wanted = numbers(ours)[0], numbers(theirs)[0]
    assert [one for one in texts(ours) if one[0] == 1] == [t for t in texts(theirs) if t[0] == 1]
    known = {key: value for key, value in wanted.items() if isinstance(value, float)}
    assert {key: first[key] for key in known} == pytest.approx(known, rel=2**-8, abs=2**-8)


def test_slices_are_rounded_by_the_chance_of_one_process(ranks: Ranks) -> None:
    for found, held in zip(
        ranks.call("sharded_rounding:update", size=2), (18 + 3, 12 + 2), strict=True
    ):
        assert found["equal"] == found["moved"] == [True, True]
        assert sum(found["held"]) == held


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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rollback_is_made_by_all(
    material: Path, tmp_path: Path, ranks: Ranks, strategy: str
) -> None:
    wires = {"then": "rollback", "max_rollbacks": 1}
    logging = {"checkpoint_every": 1}
    fixed = {"leash": {"beta": 0.1, "target_kl": None}, "tripwires": wires, "logging": logging}
    fixed["distributed"] = {"strategy": strategy}
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


@pytest.mark.parametrize(
    ("given", "changes", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, {}, "got none for RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, {}, "expected numbers in a launcher's WORLD_SIZE"),
        ({"RANK": "1"}, {}, "got none for WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"},
            {"distributed": {"timeout_s": 1.0}},
            r"expected 2 processes to meet at 127.0.0.1:9 within 1 s, got",
        ),
    ],
)
def test_a_launcher_that_is_not_there(
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    changes: dict[str, Any],
    sentence: str,
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence):
        train(settings(material, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"distributed": {"strategy": "none"}}, "expected one process with `distributed.strategy"),
        ({"rollout": {"prompts_per_step": 1}}, "as many processes as the 1 responses of a step"),
        ({"rollout": {"engine": "vllm"}}, "expected a server of its own with several processes"),
        ({"device": "meta"}, "each takes a GPU of its own, got 'meta'"),
    ],
)
def test_several_processes_that_do_not_fit(
    material: Path, tmp_path: Path, ranks: Ranks, changes: dict[str, Any], sentence: str
) -> None:
    ended = ranks.run(settings(material, tmp_path / "run", **changes))
    assert [answer and answer["error"] for answer in ended] == ["ConfigError"] * 2
    assert sentence in str(ended[0])
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_a_part(material: Path, tmp_path: Path, ranks: Ranks) -> None:
    first = {"steps": 1, "distributed": {"strategy": "fsdp"}}
    run = ranks.train(settings(material, tmp_path / "run", **first))
    (lost, *_) = sorted((run / "checkpoints").glob("step-000001/optimizer/*.safetensors"))[1:]
    lost.unlink()
    ended = ranks.run(settings(material, tmp_path / "run", **{**first, "steps": 2}))
    assert [answer and answer["error"] for answer in ended] == ["RunError"] * 2
    assert f"optimizer/{lost.name} is missing" in str(ended[0])


def test_other_files_in_another_process(material: Path, tmp_path: Path, ranks: Ranks) -> None:
    ended = ranks.run(
        settings(material, tmp_path / "run"), fault={"kind": "other files", "rank": 1}
    )
    assert [answer and answer["error"] for answer in ended] == ["RunError"] * 2
    assert "expected the same reference in every process" in str(ended[0])
