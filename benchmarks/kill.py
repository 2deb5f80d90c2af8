"""Kill a run at random moments, resume it, and compare it with the run that was left in peace.

    python benchmarks/kill.py --kills 50
    python benchmarks/kill.py --kills 50 --rollbacks

A small run on the embedded world's questions and reward model, with a moving β, held-out
evaluation and a checkpoint every other step. Each trial starts it anew, kills it (SIGKILL) within a
phase drawn in turn (rollout, scoring, update, saving) of a random step, after a random share of
the time that this phase takes; some are killed once more while they resume. Then the run is
resumed to its end. Metrics (times left out), kept responses, and every tensor of the last
checkpoint (policy, critic, moments, random numbers) must equal those of the uninterrupted run bit
for bit. Children are forked from one process that has loaded the libraries.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kleash.rollout.scoring_pass
import kleash.training.loop
import kleash.training.recovery
from kleash.config.loading import load_config, parse_config
from kleash.config.recipe_library import FOLDER
from kleash.config.schema import Config
from kleash.playground.build import build_world, with_world
from kleash.storage.atomic_directories import load_tensors, verify_checkpoint
from kleash.storage.run_directory import holds_run, read_run
from kleash.training.state import latest_checkpoint

PHASES = {
    "rollout": (kleash.training.loop, "write_answers"),
    "scoring": (kleash.rollout.scoring_pass, "score"),
    "update": (kleash.training.loop, "update"),
    "saving": (kleash.training.recovery, "save_run_state"),
    "refusing": (kleash.training.loop, "refuse"),
}
STEPS = 6


def configuration(world: Path, output: Path, bound: float | None = None) -> Config:
    """A run of seconds that has everything: budget, running statistics, evaluation, saving."""
    path = FOLDER / "embedded-world.yaml"
    overrides = {
        "output": str(output),
        "steps": str(STEPS),
        "rollout.prompts_per_step": "8",
        "rollout.max_new_tokens": "12",
        "score_normalisation": "running",
        "heldout.every": "3",
        "heldout.responses_per_prompt": "1",
        "logging.checkpoint_every": "2",
    }
    config = with_world(load_config(path, overrides, base=path), world)
    tree = config.model_dump(exclude_none=True)
    tree["leash"] |= {"beta": None, "target_kl": 2.0, "placement": "mixed"}
    tree["value"] |= {"kind": "trunk_detached", "path": None}
    if bound is not None:
        wires = {"stop_kl": bound, "then": "rollback", "beta_factor": 4, "max_rollbacks": 20}
        tree["tripwires"] |= wires
        tree["leash"] |= {"beta": 0.01, "target_kl": None}
        tree["logging"] |= {"checkpoint_every": 1, "keep": 4}
    return parse_config(tree, where="the benchmark")


def in_child(run: Callable[[], object]) -> int:
    """Run in a forked process, silently; its exit status (negative: the signal that killed it)."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        run()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def timed(durations: Path) -> None:
    """Write down how long each phase takes."""
    for phase, (module, name) in PHASES.items():
        inner = getattr(module, name)

        def outer(*args: Any, _phase: str = phase, _inner: Any = inner, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return _inner(*args, **kwargs)
            finally:
                with durations.open("a") as stream:
                    stream.write(json.dumps([_phase, time.perf_counter() - began]) + "\n")

        setattr(module, name, outer)


def doomed(phase: str, visit: int, delay: float) -> None:
    """Kill this process `delay` seconds into the given visit of a phase."""
    module, name = PHASES[phase]
    inner = getattr(module, name)
    visits = 0

    def outer(*args: Any, **kwargs: Any) -> Any:
        nonlocal visits
        visits += 1
        if visits == visit:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return inner(*args, **kwargs)

    setattr(module, name, outer)


def what_counts(path: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on an interruption."""
    run = read_run(path)
    newest = latest_checkpoint(path / "checkpoints")
    assert newest is not None
    verify_checkpoint(newest)
    tensors = {
        f"{file.parent.name}/{file.stem}/{name}": tensor
        for file in sorted(newest.rglob("*.safetensors"))
        for name, tensor in load_tensors(file).items()
    }
    state = json.loads((newest / "state.json").read_text())
    state.pop("seconds")
    clock = ("seconds", "tokens_per_second")
    return {
        "status": run.status,
        "metrics": [
            {k: v for k, v in line.items() if k not in clock and not k.startswith("time/")}
            for line in run.metrics
        ],
        "samples": [asdict(sample) for sample in run.samples],
        "events": run.events,
        "state": state,
        "best": run.meta.get("best_checkpoint"),
        "checkpoints": sorted(path.name for path in (path / "checkpoints").iterdir()),
        "tensors": tensors,
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What is not the same to the last bit."""
    found = [key for key in ours if key != "tensors" and ours[key] != theirs[key]]
    mine, other = ours["tensors"], theirs["tensors"]
    if mine.keys() != other.keys():
        return [*found, "names of tensors"]
    return found + [name for name in mine if not torch.equal(mine[name], other[name])]


def trial(number: int, config: Config, expected: dict[str, Any], took: dict[str, float]) -> str:
    """One killing or two, and the comparison; what happened in a line."""
    draw, path = random.Random(number), Path(config.output)
    done: list[str] = []
    for again in range(2 if draw.random() < 0.3 else 1):
        phase = list(took)[(number + again) % len(took)]
        visit = draw.randint(1, {"saving": 2, "refusing": 1}.get(phase, 4))
        delay = draw.random() * took[phase]

        def fatal(phase: str = phase, visit: int = visit, delay: float = delay) -> None:
            doomed(phase, visit, delay)
            kleash.training.loop.train(config)

        status = in_child(fatal)
        done.append(f"{phase} {visit} +{1000 * delay:.0f} ms")
        if status != -signal.SIGKILL:
            done.append(f"not hit (exit {status})")
            break
    half = read_run(path) if holds_run(path) and (path / "run.json").exists() else None
    if half is None or half.status != "finished":
        status = in_child(lambda: kleash.training.loop.train(config))
        if status:
            return f"FAILED  {', '.join(done)}: resuming ended with {status}"
    wrong = differences(what_counts(path), expected)
    shutil.rmtree(path)
    return f"{'same' if not wrong else 'OTHER ' + str(wrong[:4])}  {', '.join(done)}"


def a_bound(world: Path, folder: Path) -> float:
    """A KL that the run without a bound passes in its last steps."""
    free = configuration(world, folder / "free", bound=1e9)
    assert in_child(lambda: kleash.training.loop.train(free)) == 0
    kls = [line["objective/kl_ref"] or 0.0 for line in read_run(free.output).metrics[1:]]
    return (max(kls[:-2]) + max(kls)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a run, resume it, compare.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--rollbacks", action="store_true", help="with a bound on the KL")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = build_world(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bound = a_bound(world, folder) if arguments.rollbacks else None
        whole = configuration(world, folder / "whole", bound)

        def undisturbed() -> None:
            timed(folder / "durations")
            kleash.training.loop.train(whole)

        assert in_child(undisturbed) == 0
        expected = what_counts(folder / "whole")
        events = ", ".join(f"{event.kind} at step {event.step}" for event in expected["events"])
        lines = [json.loads(line) for line in (folder / "durations").read_text().splitlines()]
        took = {phase: max(t for p, t in lines if p == phase) for phase in dict(lines)}
        spent = ", ".join(f"{phase} {1000 * t:.0f} ms" for phase, t in took.items())
        print(f"{platform.machine()}, one thread; {STEPS} steps; longest of each phase: {spent}")
        print(f"events: {events or 'none'}")
        good = hits = 0
        for number in range(arguments.first, arguments.first + arguments.kills):
            config = configuration(world, folder / f"trial-{number}", bound)
            line = trial(number, config, expected, took)
            good += line.startswith("same")
            hits += "not hit" not in line
            print(f"{number:4d}  {line}", flush=True)
        print(f"{good}/{arguments.kills} bit for bit the uninterrupted run; {hits} killed in time")


if __name__ == "__main__":
    main()
