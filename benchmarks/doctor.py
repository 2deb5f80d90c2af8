"""A thousand clean training steps: the doctor must say nothing. `python benchmarks/doctor.py`

Real runs of tiny random models, on and off the leash, in which the policy leaves its reference by
several nats. Printed: the steps, the largest KL, and how often the doctor spoke.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import fault_types  # pyright: ignore[reportMissingImports]

from kleash.storage.run_directory import read_run
from kleash.training.loop import train

RUNS = (
    ("llama", {"target_kl": 3.0}, 1.0),
    ("gpt2", {"beta": 0.05}, 0.7),
    ("gemma2", {"beta": 0.0}, 1.0),
)
"""Architecture, leash and temperature."""


class Count(logging.Handler):
    """Counts what the doctor says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1002)
    parser.add_argument("--responses", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count = Count()
    logging.getLogger("kleash").addHandler(count)
    total = 0
    for kind, leash, temperature in RUNS:
        began, before = time.perf_counter(), len(count.messages)
        steps = arguments.steps // len(RUNS)
        largest = run(kind, leash, temperature, steps, arguments.responses)
        total += steps
        print(
            f"{kind}, leash {leash}, temperature {temperature:g}: {steps} steps, largest KL "
            f"{largest:.1f} nats per response, doctor spoke {len(count.messages) - before} times "
            f"({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
    print(f"{total} steps, the doctor spoke {len(count.messages)} times")
    for message in count.messages[:5]:
        print(f"  {message}")


def run(
    kind: str, leash: dict[str, float], temperature: float, steps: int, responses: int
) -> float:
    """One clean run; the largest KL of its steps."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        material = fault_types.material(Path(folder), kind)
        world = fault_types.clean(material, kind, patch, Path(folder))
        world.tree |= {"steps": steps, "leash": leash, "optimizer": {"lr": 1e-3}}
        world.tree["rollout"] |= {"prompts_per_step": responses, "temperature": temperature}
        run = read_run(train(world.config()))
        return max(float(line["objective/kl_ref"] or 0) for line in run.metrics[1:])


if __name__ == "__main__":
    main()
