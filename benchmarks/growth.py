"""How does the time of a PPO iteration grow with responses, length, vocabulary and width?

    python benchmarks/growth.py --axis responses length vocabulary width

One axis at a time over 16 ×, in powers of two, the others at a small base: 8 responses of 8 tokens,
1,024 words, width 64, two layers. `kleash.train` with its defaults, random weights, no response
ends early. CPU-seconds on one thread, medians of the steps after the first; an iteration writes,
scores and updates once. The exponent is the slope of a least-squares line on log-log paper, `last`
that of the last doubling alone, where what does not grow weighs least.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from iteration import Shape
from iteration_worker import build, kleash_config

from kleash.config.loading import parse_config

FACTORS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Size:
    """What an iteration works on."""

    responses: int = 8
    length: int = 8
    vocabulary: int = 1024
    width: int = 64


def seconds_of(size: Size, rounds: int) -> float:
    """CPU-seconds of an iteration."""
    shape = Shape(
        kind="llama",
        vocabulary=size.vocabulary,
        batch=size.responses,
        sizes={
            "hidden_size": size.width,
            "intermediate_size": 4 * size.width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    )
    loop: Any = importlib.import_module("kleash.training.loop")
    startup: Any = importlib.import_module("kleash.training.startup")
    taken: list[float] = []
    step, assemble = loop.Trainer._step, startup.assemble

    def timed_step(*given: Any, **named: Any) -> Any:
        began = time.process_time()
        found = step(*given, **named)
        taken.append(time.process_time() - began)
        return found

    def without_stop(*given: Any, **named: Any) -> Any:
        made = assemble(*given, **named)
        return replace(made, policy=replace(made.policy, stop_ids=(size.vocabulary,)))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, shape)
        tree = kleash_config(folder, shape, "ppo", 1, own_value_model=False)
        tree["rollout"]["max_new_tokens"] = size.length
        tree["steps"] = rounds + 1
        loop.Trainer._step, startup.assemble = timed_step, without_stop
        try:
            # Without the preflight, which refuses a policy that never ends a response.
            loop.train(parse_config(tree, where="benchmark"))
        finally:
            loop.Trainer._step, startup.assemble = step, assemble
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    axes = list(vars(Size()))
    parser.add_argument("--axis", nargs="+", choices=axes, default=axes)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| axis | " + " | ".join(f"× {factor}" for factor in FACTORS) + " | exponent | last |")
    print("|---" * (len(FACTORS) + 3) + "|", flush=True)
    for axis in given.axis:
        sizes = [getattr(Size(), axis) * factor for factor in FACTORS]
        seconds = [seconds_of(replace(Size(), **{axis: one}), given.rounds) for one in sizes]
        if given.json:
            print(json.dumps({axis: dict(zip(sizes, seconds, strict=True))}), file=sys.stderr)
        logs = [math.log(second) for second in seconds]
        fit = statistics.linear_regression([math.log(one) for one in sizes], logs)
        last = (logs[-1] - logs[-2]) / math.log(2)
        cells = " | ".join(f"{second:.3f}" for second in seconds)
        print(f"| {axis}, from {sizes[0]:,} | {cells} | {fit.slope:.2f} | {last:.2f} |", flush=True)


if __name__ == "__main__":
    main()
