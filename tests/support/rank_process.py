"""One of several processes that make the same run together; it serves as many runs as it is given.

Each line of the standard input is one run:

    {"port": 29501, "rank": 1, "size": 2, "config": "config.yaml", "fault": {"kind": …, "rank": 1}}

and is answered by one line: how it ended. A fault breaks something in one process alone.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kleash.training.loop
from kleash.config.loading import parse_config
from kleash.errors import NonFiniteError
from kleash.training.components import Components
from kleash.training.loop import Trainer, train


def break_something(patch: pytest.MonkeyPatch, fault: dict[str, Any]) -> None:
    """Make this process misbehave."""
    backward, step, calls = Components.backward, Trainer._step, [0]

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

    def not_finite(components: Components, rows: Any, **numbers: Any) -> Any:
        if calls[0]:
            return backward(components, rows, **numbers)
        calls[0] = 1
        backward(components, rows, **numbers)
        raise NonFiniteError("expected a finite loss, got NaN at {place}", response=1, token=2)

    def broken(components: Components, rows: Any, **numbers: Any) -> Any:
        raise RuntimeError("out of memory")

    match fault["kind"]:
        case "not finite":
            patch.setattr(Components, "backward", not_finite)
        case "broken":
            patch.setattr(Components, "backward", broken)
        case "other weights":
            at_step(shifted)
        case "other reference":
            at_step(changed_reference)
        case "killed":
            at_step(lambda trainer: os.kill(os.getpid(), signal.SIGKILL))
        case "asleep":
            at_step(lambda trainer: time.sleep(3600))
        case "asked to stop":
            at_step(lambda trainer: signal.raise_signal(signal.SIGTERM))
        case "no file":
            patch.setattr(kleash.training.startup, "assemble", _no_file)
        case _:
            raise ValueError(fault)


def _no_file(*arguments: Any, **named: Any) -> Any:
    del arguments, named
    raise FileNotFoundError("no such file on this machine")


def serve(given: dict[str, Any]) -> dict[str, Any]:
    """One run; what came of it."""
    os.environ |= {
        "WORLD_SIZE": str(given["size"]),
        "RANK": str(given["rank"]),
        "LOCAL_RANK": str(given["rank"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(given["port"]),
    }
    fault = given.get("fault")
    with pytest.MonkeyPatch.context() as patch:
        if fault and fault["rank"] == given["rank"]:
            break_something(patch, fault)
        tree = yaml.safe_load(Path(given["config"]).read_text(encoding="utf-8"))
        try:
            train(parse_config(tree, where="the test"))
        except (Exception, KeyboardInterrupt) as error:
            return {"error": type(error).__name__, "message": str(error)}
    return {"error": None, "message": ""}


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the run prints is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
