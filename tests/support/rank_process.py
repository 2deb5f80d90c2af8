"""Starts the processes that make a run together: for each run new ones, forked from this one.

Each line of the standard input is one job:

    {"port": 29501, "size": 2, "config": "config.yaml", "fault": {"kind": …, "rank": 1}}

and is answered by one line: how it ended in each process. A fault breaks something in one process
alone. A job may also name a function of a test module, `"call": "module:function"`, which is given
the mesh, and whose result is the answer.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kleash.training.startup
import kleash.training.state
from kleash.config.loading import parse_config
from kleash.errors import NonFiniteError
from kleash.mesh import joined
from kleash.preflight.runner import require_sound
from kleash.preflight.runtime_monitor import RuntimeMonitor
from kleash.storage.run_directory import RunWriter
from kleash.training.components import Components
from kleash.training.loop import Trainer, train


def break_something(patch: pytest.MonkeyPatch, fault: dict[str, Any]) -> None:
    """Make this process misbehave."""
    loss, step, calls = Components.loss, Trainer._step, [0]

    def at_step(act: Any) -> None:
        def acted_on(trainer: Trainer, pending: Any) -> Any:
            if pending.step == fault.get("step", 2) and not calls[0]:
                calls[0] = 1
                act(trainer)
            return step(trainer, pending)

        patch.setattr(Trainer, "_step", acted_on)

    def shifted(trainer: Trainer) -> None:
        with torch.no_grad():
            next(iter(trainer.session.components.policy.parameters())).add_(1e-3)

    def changed_reference(trainer: Trainer) -> None:
        with torch.no_grad():
            next(trainer.session.components.reference.model.parameters()).add_(1)

    def not_finite(components: Components, part: Any, **numbers: Any) -> Any:
        found = loss(components, part, **numbers)
        if calls[0]:
            return found
        calls[0] = 1
        raise NonFiniteError("expected a finite loss, got NaN at {place}", response=0, token=2)

    match fault["kind"]:
        case "not finite":
            patch.setattr(Components, "loss", not_finite)
        case "broken":
            patch.setattr(Components, "loss", _out_of_memory)
        case "other weights":
            at_step(shifted)
        case "other reference":
            at_step(changed_reference)
        case "killed":
            at_step(lambda trainer: os.kill(os.getpid(), signal.SIGKILL))
        case "killed at":
            _killed_at(patch, fault["place"])
        case "killed after":
            _killed_after(fault["seconds"])
        case "asleep":
            at_step(lambda trainer: time.sleep(3600))
        case "asked to stop":
            at_step(lambda trainer: signal.raise_signal(signal.SIGTERM))
        case "other files":
            assemble = kleash.training.startup.assemble

            def other(*arguments: Any, **named: Any) -> Any:
                components = assemble(*arguments, **named)
                with torch.no_grad():
                    next(components.reference.model.parameters()).add_(1)
                return components

            patch.setattr(kleash.training.startup, "assemble", other)
        case "no file":
            patch.setattr(kleash.training.startup, "assemble", _no_file)
        case _:
            raise ValueError(fault)


def _killed_after(seconds: float) -> None:
    end = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    end.daemon = True
    end.start()


def _killed_at(patch: pytest.MonkeyPatch, place: str) -> None:
    """SIGKILL at one of the places where a run holds no checkpoint yet."""
    owner, name, when = {
        "making the directory": (RunWriter, "_write_meta", "before"),
        "before the first line": (Trainer, "_start", "before"),
        "after the first line": (Trainer, "_write_down", "after"),
        "in the first checkpoint": (kleash.training.state, "save_moments", "before"),
    }[place]
    inner = getattr(owner, name)

    def fatal(*arguments: Any, **named: Any) -> Any:
        if when == "after":
            inner(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(owner, name, fatal)


def _out_of_memory(*arguments: Any, **named: Any) -> Any:
    del arguments, named
    raise RuntimeError("out of memory")


def _no_file(*arguments: Any, **named: Any) -> Any:
    del arguments, named
    raise FileNotFoundError("no such file on this machine")


def serve(given: dict[str, Any], rank: int) -> dict[str, Any]:
    """One process of a job; what came of it."""
    os.environ |= {
        "WORLD_SIZE": str(given["size"]),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(given["port"]),
    }
    fault = given.get("fault")
    with pytest.MonkeyPatch.context() as patch:
        if fault and fault["rank"] == rank:
            break_something(patch, fault)
        try:
            if "call" in given:
                module, name = given["call"].split(":")
                with joined(60) as mesh:
                    return {
                        "error": None,
                        "result": getattr(importlib.import_module(module), name)(mesh),
                    }
            tree = yaml.safe_load(Path(given["config"]).read_text(encoding="utf-8"))
            config = parse_config(tree, where="the test")
            if given.get("checked"):
                Trainer(config, callbacks=[RuntimeMonitor()], preflight=require_sound).fit()
            else:
                train(config)
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("RANKS_SHOW"):
                traceback.print_exc()
            return {"error": type(error).__name__, "message": str(error)}
    return {"error": None, "message": ""}


def forked(given: dict[str, Any], rank: int) -> tuple[int, int]:
    """A new process with a job; its id and where its answer comes."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    status = 1
    try:
        os.close(reading)
        with os.fdopen(writing, "w") as answer:
            answer.write(json.dumps(serve(given, rank)))
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the runs print is no answer
    for line in sys.stdin:
        given = json.loads(line)
        started = [forked(given, rank) for rank in range(given["size"])]
        # A process that sleeps keeps its answer to itself: it is ended when the others are through.
        fault = given.get("fault") or {}
        order = sorted(range(given["size"]), key=lambda rank: rank == fault.get("rank"))
        ended: dict[int, Any] = {}
        for rank in order:
            process, reading = started[rank]
            if fault.get("kind") == "asleep" and rank == fault["rank"]:
                os.kill(process, signal.SIGKILL)
            with os.fdopen(reading) as stream:
                text = stream.read()
            _, status = os.waitpid(process, 0)
            if status and os.environ.get("RANKS_SHOW"):
                print("rank", rank, "ended with status", status, file=sys.stderr)
            ended[rank] = json.loads(text) if text else None
        print(json.dumps([ended[rank] for rank in sorted(ended)]), file=answers, flush=True)


if __name__ == "__main__":
    main()
