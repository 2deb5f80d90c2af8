"""How does the time of a PPO iteration grow with responses, length, vocabulary and width?

    python benchmarks/growth.py --axis responses length vocabulary width

One axis at a time over 16 ×, in powers of two, the others at a small base: 8 responses of 8 tokens,
1,024 words, width 64, two layers; for the vocabulary 32 tokens and from 16,384 words, so that it is
most of the work. `kleash.train` with its defaults, random weights, no response ends early.
CPU-seconds on one thread, medians of the steps after the first; an iteration writes, scores and
updates once.

The exponent is the slope of a least-squares line on log-log paper, `last` that of the last doubling
alone, where what does not grow weighs least. `of work` is the slope over the last two doublings
against the products of an iteration (`products_of`) in the place of the axis: time ∝ work^e. A
width's matrices grow as its square, and so does their work.
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
from iteration import PROMPT_TOKENS, Passes, Shape
from iteration_worker import build, kleash_config

from kleash.config.loading import parse_config

FACTORS = (1, 2, 4, 8, 16)
LAYERS, INNER = 2, 4
"""Decoder layers, and the width of their inner part in widths."""


@dataclass(frozen=True)
class Size:
    """What an iteration works on."""

    responses: int = 8
    length: int = 8
    vocabulary: int = 1024
    width: int = 64


BASES = {"vocabulary": Size(length=32, vocabulary=16_384)}
"""Where an axis begins, and what the others are meanwhile, where that is not `Size()`."""


def products_of(size: Size) -> int:
    """Multiplications of an iteration: parameters times the tokens that use them.

        trunk  L · (4 + 3 · 4) · D²   of every token: written, judged, scored by policy and
                                      reference, twice backward
        head   V · D                  of every token of a response: written, scored by both, twice
                                      backward
        value  2 · D² + 2 · D         of every token of a response: forward, twice backward

    Left out: attention's own products, which grow as the square of the length, and passes over the
    weights (gradients, AdamW), of which there are as many as parameters.
    """
    written = size.responses * size.length
    read = written + size.responses * PROMPT_TOKENS
    trunk = LAYERS * (4 + 3 * INNER) * size.width**2
    head, value = size.vocabulary * size.width, 2 * size.width**2 + 2 * size.width
    return 6 * read * trunk + 5 * written * head + 3 * written * value


def seconds_of(size: Size, rounds: int) -> float:
    """CPU-seconds of an iteration."""
    shape = Shape(
        kind="llama",
        vocabulary=size.vocabulary,
        batch=size.responses,
        sizes={
            "hidden_size": size.width,
            "intermediate_size": INNER * size.width,
            "num_hidden_layers": LAYERS,
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
        tree = kleash_config(folder, shape, "ppo", Passes(1), own_value_model=False)
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
    print("| axis | " + " | ".join(f"× {factor}" for factor in FACTORS), end="")
    print(" | exponent | last | of work |\n" + "|---" * (len(FACTORS) + 4) + "|", flush=True)
    for axis in given.axis:
        base = BASES.get(axis, Size())
        sizes = [replace(base, **{axis: getattr(base, axis) * factor}) for factor in FACTORS]
        seconds = [seconds_of(size, given.rounds) for size in sizes]
        found = {getattr(size, axis): taken for size, taken in zip(sizes, seconds, strict=True)}
        if given.json:
            print(json.dumps({axis: found}), file=sys.stderr)
        logs = [math.log(second) for second in seconds]
        fit = statistics.linear_regression([math.log(one) for one in found], logs)
        last = logs[-1] - logs[-2]
        work = statistics.linear_regression(
            [math.log(products_of(size)) for size in sizes[-3:]], logs[-3:]
        )
        cells = [f"{second:.3f}" for second in seconds]
        cells += [f"{one:.2f}" for one in (fit.slope, last / math.log(2), work.slope)]
        print(f"| {axis}, from {min(found):,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
