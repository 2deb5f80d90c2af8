"""Kill −9 of one process at random moments, then resume: is it the uninterrupted run, bit for bit?

    python benchmarks/kill.py                      20 kills of one of two processes, fsdp and ddp
    python benchmarks/kill.py --processes 1        of the only one
    python benchmarks/kill.py --times 5 --first 15 trials 15 to 19

Every run is started by `torchrun` with one thread a process. Moment and victim are drawn from the
trial's number; the moment lies between the making of the run directory and the end of the run that
was left in peace. Compared are the metrics but for times, the kept responses, the events but for
restarts, and every tensor of the last checkpoint, which must also be whole by its manifest.
Exits 1 if one run is another one.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from several import SMALL, descendants, machine, material, numbers, start, tree

from kleash.storage.atomic_directories import list_checkpoints, load_tensors, verify_checkpoint
from kleash.storage.run_directory import read_run

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
        "tensors": {
            f"{file.parent.name}/{file.stem}/{name}": tensor
            for file in sorted(newest.rglob("*.safetensors"))
            for name, tensor in load_tensors(file).items()
        },
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What is not the same to the last bit."""
    found = [key for key in ours if key != "tensors" and ours[key] != theirs[key]]
    mine, other = ours["tensors"], theirs["tensors"]
    if mine.keys() != other.keys():
        return [*found, "names of tensors"]
    return found + [name for name in mine if not torch.equal(mine[name], other[name])]


def ended(config: dict[str, Any], size: int) -> None:
    """A run to its end."""
    process = start(config, size)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"a process failed:\n{said}")


def seconds_of(config: dict[str, Any], size: int) -> float:
    """How long a run takes from the making of its directory to its end."""
    process = start(config, size)
    reader = threading.Thread(target=_drain, args=(process, []))
    reader.start()
    began = _await_directory(process, Path(config["output"]))
    if process.wait():
        raise SystemExit("the run that was left in peace failed")
    reader.join()
    return time.monotonic() - began


def kill_one(config: dict[str, Any], size: int, *, after: float, victim: int) -> tuple[str, str]:
    """Start a run and kill a process of it; what it held then, and what the others said."""
    process, said, path = start(config, size), list[str](), Path(config["output"])
    reader = threading.Thread(target=_drain, args=(process, said))
    reader.start()
    _await_directory(process, path)
    time.sleep(after)
    for pid in [pid for pid in descendants(process.pid) if _rank_of(pid) == victim][:1]:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    process.wait()
    waited = time.monotonic() - killed
    reader.join()
    metrics = path / "metrics.jsonl"
    lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    saved = [int(p.name[5:]) for p in list_checkpoints(path / "checkpoints")]
    held = f"{lines} lines, checkpoint {saved[-1] if saved else 'none'}"
    ours = [line.strip() for line in said if line.startswith("kleash: ")]
    return held, f"{waited:.1f} s: {(ours or ['the launcher alone'])[0][:64]}"


def _drain(process: subprocess.Popen[str], said: list[str]) -> None:
    said.extend(process.stderr or ())


def _await_directory(process: subprocess.Popen[str], path: Path) -> float:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    return time.monotonic()


def _rank_of(pid: int) -> int | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
    return ranks[0] if ranks else None


def main() -> None:
    """Print a row for each kill."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--processes", type=int, default=2, choices=STRATEGIES)
    given = parser.parse_args()
    size, right, early = given.processes, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        material(folder / "model", SMALL, 500)
        whole, took = dict[str, dict[str, Any]](), dict[str, float]()
        for strategy in STRATEGIES[size]:
            config = configuration(folder, f"whole-{strategy}", strategy)
            took[strategy] = seconds_of(config, size)
            whole[strategy] = what_counts(Path(config["output"]))
        print("| # | strategy | killed | after, s | it held | the others ended | resumed |")
        print("|---:|---|---:|---:|---|---|---|")
        for number in range(given.first, given.first + given.times):
            draw = random.Random(number)
            strategy = STRATEGIES[size][number % len(STRATEGIES[size])]
            config = configuration(folder, f"killed-{number}", strategy)
            after, victim = draw.random() * 0.97 * took[strategy], draw.randrange(size)
            held, said = kill_one(config, size, after=after, victim=victim)
            path = Path(config["output"])
            if not (path / "run.json").exists() or read_run(path).status != "finished":
                ended(config, size)
            wrong = differences(what_counts(path), whole[strategy])
            right += not wrong
            early += "none" in held
            told = "bit-identical" if not wrong else f"OTHER: {wrong[:3]}"
            print(
                f"| {number} | {strategy} | {victim} | {after:.1f} | {held} | {said} | {told} |",
                flush=True,
            )
    print(f"\n{right} of {given.times} are the uninterrupted run bit for bit; {early} of them were")
    print(f"killed before their first checkpoint; {machine()}")
    raise SystemExit(0 if right == given.times else 1)


if __name__ == "__main__":
    main()
