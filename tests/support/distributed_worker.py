"""A process that serves as many runs as it is given, one line of JSON each.

    {"port": 29501, "rank": 1, "size": 2, "fault": null}

A fault breaks something in this process alone, for one run.
"""

import json
import os
import sys

import pytest
import torch

import kleash.training.worker
from kleash.errors import NonFiniteError
from kleash.training.components import Components


def break_something(patch: pytest.MonkeyPatch, fault: str) -> None:
    """Make this process misbehave."""
    assemble, backward = kleash.training.worker.assemble, Components.backward

    def other_reference(config):
        components = assemble(config)
        with torch.no_grad():
            next(components.reference.model.parameters()).add_(1)
        return components

    def not_finite(components, rows, **numbers):
        del components, rows, numbers
        raise NonFiniteError("expected a finite loss, got NaN at {place}", response=1, token=2)

    def broken(components, rows, **numbers):
        backward(components, rows, **numbers)
        raise RuntimeError("out of memory")

    match fault:
        case "other reference":
            patch.setattr(kleash.training.worker, "assemble", other_reference)
        case "not finite":
            patch.setattr(Components, "backward", not_finite)
        case "broken":
            patch.setattr(Components, "backward", broken)
        case _:
            raise ValueError(fault)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        given = json.loads(line)
        os.environ |= {
            "WORLD_SIZE": str(given["size"]),
            "RANK": str(given["rank"]),
            "LOCAL_RANK": str(given["rank"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(given["port"]),
        }
        with pytest.MonkeyPatch.context() as patch:
            if given["fault"]:
                break_something(patch, given["fault"])
            kleash.training.worker.serve_requests()


if __name__ == "__main__":
    main()
