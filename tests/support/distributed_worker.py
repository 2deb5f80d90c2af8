"""A process that lends a hand to as many runs as it is told of, one line of JSON each.

    {"port": 29501, "rank": 1, "size": 2, "fault": null}

A fault breaks something in this process alone, for one run.
"""

import json
import os
import sys

import pytest
import torch

import kleash.training.backward
import kleash.training.distributed
from kleash.errors import NonFiniteError


def break_something(patch: pytest.MonkeyPatch, fault: str) -> None:
    """Make this process misbehave."""
    assemble, backward = kleash.training.distributed.assemble, kleash.training.backward.backward

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
            patch.setattr(kleash.training.distributed, "assemble", other_reference)
        case "not finite":
            patch.setattr(kleash.training.backward, "backward", not_finite)
        case "broken":
            patch.setattr(kleash.training.backward, "backward", broken)
        case _:
            raise ValueError(fault)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        told = json.loads(line)
        os.environ |= {
            "WORLD_SIZE": str(told["size"]),
            "RANK": str(told["rank"]),
            "LOCAL_RANK": str(told["rank"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(told["port"]),
        }
        with pytest.MonkeyPatch.context() as patch:
            if told["fault"]:
                break_something(patch, told["fault"])
            kleash.training.distributed.serve_requests()


if __name__ == "__main__":
    main()
