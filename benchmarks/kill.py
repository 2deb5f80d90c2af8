"""Kill −9 of one process at random moments, then resume: is it the uninterrupted run, bit for bit?

    python benchmarks/kill.py                      20 kills of one of two processes, fsdp and ddp
    python benchmarks/kill.py --processes 1        of the only one
    python benchmarks/kill.py --times 5 --first 15 trials 15 to 19

The processes of a run, of one thread each, are forked from this one, which has loaded the
libraries, with the variables that a launcher sets; no launcher ends the ones that are left. Moment
and victim are drawn from the trial's number; the moment lies between the making of the run
directory and the end of the uninterrupted run, and is halved where the run was quicker.
Compared are the metrics but for times, the kept responses, the events but for restarts, and every
tensor of the last checkpoint, which must also be whole by its manifest. Exits 1 if one run is
another one.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from several import SMALL, machine, material, numbers, tree

from kleash.config.loading import parse_config
from kleash.errors import KleashError
from kleash.storage.atomic_directories import (
    list_checkpoints,
    load_tensors,
    step_of,
    verify_checkpoint,
)
from kleash.storage.run_directory import read_run
from kleash.training.loop import train

STRATEGIES = {1: ["none"], 2: ["fsdp", "ddp"]}


def configuration(folder: Path, name: str, strategy: str) -> dict[str, Any]:
    """A run of seconds that has a budget, evaluations and a checkpoint every other step."""
    return tree(
        folder / "model",
        folder / name,
        steps=8,
        rollout={"prompts_per_step": 9, "max_new_tokens": 24},
        leash={"beta": None, "target_kl": 0.5},
        plan={"prompts": 4, "responses": 4},
        logging={"checkpoint_every": 2, "samples_per_step": 4},
        distributed={"strategy": strategy, "timeout_s": 30.0},
    )


def what_counts(path: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on an interruption."""
    run = read_run(path)
    for checkpoint in list_checkpoints(path / "checkpoints"):
        verify_checkpoint(checkpoint)
    newest = list_checkpoints(path / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    del state["seconds"]
    return {
        "status": run.status,
        "metrics": numbers(path),
        "responses": [asdict(sample) for sample in run.samples],
        "events": [event for event in run.events if event.kind != "restarted"],
        "state": state,
        "tensors": _tensors(newest),
    }


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """By folder, name and part; which process wrote what all of them hold is left out."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        for name, tensor in load_tensors(file).items():
            key, part = f"{file.parent.name}/{name}", 0
            while f"{key}/{part}" in found:
                part += 1
            found[f"{key}/{part}"] = tensor
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What is not the same to the last bit."""
    found = [key for key in ours if key != "tensors" and ours[key] != theirs[key]]
    mine, other = ours["tensors"], theirs["tensors"]
    if mine.keys() != other.keys():
        return [*found, "names of tensors"]
    return found + [name for name in mine if not torch.equal(mine[name], other[name])]


@dataclass(frozen=True)
class Started:
    """A run under way."""

    processes: list[int]
    """Process ids in the order of the ranks."""
    said: list[Path]
    """What each ended with, in a sentence; empty where it ended well or was killed."""
    began: float
    """When its directory was there, on this process's clock."""


def start(config: dict[str, Any], size: int) -> Started:
    """Fork the processes of a run, and wait for its directory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = Path(config["output"])
    said = [path.with_name(f"{path.name}.{rank}.txt") for rank in range(size)]
    processes = [_forked(config, said[rank], rank, size, port) for rank in range(size)]
    while not path.exists():
        time.sleep(0.005)
    return Started(processes, said, time.monotonic())


def _forked(config: dict[str, Any], said: Path, rank: int, size: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    said.write_text("")
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        os.environ |= dict(zip(names, map(str, (size, rank, rank, "127.0.0.1", port)), strict=True))
        train(parse_config(config, where="the benchmark"))
        status = 0
    except KleashError as error:
        said.write_text(str(error))
    finally:
        os._exit(status)


def wait(run: Started) -> list[int]:
    """The exit status of each process, negative where a signal ended it."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in run.processes]


def to_the_end(config: dict[str, Any], size: int) -> float:
    """A run to its end; its seconds from the making of its directory."""
    run = start(config, size)
    if any(wait(run)):
        raise SystemExit(" ".join(file.read_text() for file in run.said))
    return time.monotonic() - run.began


def kill_one(
    config: dict[str, Any], size: int, *, after: float, victim: int
) -> tuple[str, str] | None:
    """Start a run and kill a process of it; what it held then, and what the other said.

    None: it had ended before.
    """
    run, path = start(config, size), Path(config["output"])
    time.sleep(max(0.0, run.began + after - time.monotonic()))
    os.kill(run.processes[victim], signal.SIGKILL)
    killed = time.monotonic()
    ended = wait(run)
    waited = time.monotonic() - killed
    if ended[victim] != -signal.SIGKILL:
        return None
    metrics = path / "metrics.jsonl"
    lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    saved = [step_of(checkpoint) for checkpoint in list_checkpoints(path / "checkpoints")]
    held = f"{lines} lines, {f'checkpoint {saved[-1]}' if saved else 'no checkpoint'}"
    words = [file.read_text() for rank, file in enumerate(run.said) if rank != victim]
    return held, f"{waited:.1f} s: {words[0].split(':')[0][:60]}" if words else "-"


def main() -> None:
    """Print a row for each kill."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--processes", type=int, default=2, choices=STRATEGIES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    size, right, early = given.processes, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        material(folder / "model", SMALL, 500)
        whole, took = dict[str, dict[str, Any]](), dict[str, float]()
        for strategy in STRATEGIES[size]:
            config = configuration(folder, f"whole-{strategy}", strategy)
            took[strategy] = to_the_end(config, size)
            whole[strategy] = what_counts(Path(config["output"]))
        print("| # | strategy | killed | after, s | it held | the other ended | resumed |")
        print("|---:|---|---:|---:|---|---|---|")
        for number in range(given.first, given.first + given.times):
            draw = random.Random(number)
            strategy = STRATEGIES[size][number % len(STRATEGIES[size])]
            config = configuration(folder, f"killed-{number}", strategy)
            after, victim = draw.random() * 0.97 * took[strategy], draw.randrange(size)
            path = Path(config["output"])
            while (hit := kill_one(config, size, after=after, victim=victim)) is None:
                shutil.rmtree(path)
                after /= 2
            held, said = hit
            if not (path / "run.json").exists() or read_run(path).status != "finished":
                to_the_end(config, size)
            wrong = differences(what_counts(path), whole[strategy])
            right += not wrong
            early += "no checkpoint" in held
            verdict = "bit-identical" if not wrong else f"OTHER: {wrong[:3]}"
            print(
                f"| {number} | {strategy} | {victim} | {after:.1f} | {held} | {said} | {verdict} |",
                flush=True,
            )
    print(f"\n{right} of {given.times} are the uninterrupted run bit for bit; {early} of them were")
    print(f"killed before their first checkpoint; {machine()}")
    raise SystemExit(0 if right == given.times else 1)


if __name__ == "__main__":
    main()
