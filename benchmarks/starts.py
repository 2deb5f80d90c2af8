"""Is a plan worth drawing? The same controller from three starts, on the enumerable oracle.

    python benchmarks/starts.py --scales 1 [--seeds 20]

`plan` draws 32 × 32 strings of the reference and starts where `initial_beta.starting_beta` says,
`spread` starts from the spread of the same scores, sd/√(2·target), and `0.15` is a number that is
taken at its word, as `leash.initial_beta` is. Sampled PPO with 512 responses; the KL is the
policy's own, by enumeration. Scores are the oracle's, or squashed by tanh, which saturate.

`first`: iterations until the KL is within 20 % of the target; `stays`: until the mean of five
stays there. Means over seeds; – where a run never got there, which counts as all iterations.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import controlled_plants as plants  # pyright: ignore[reportMissingImports]
import oracles  # pyright: ignore[reportMissingImports]

from kleash.kl.control.controllers import BudgetBeta, initial_beta
from kleash.kl.planning.initial_beta import starting_beta
from kleash.kl.planning.tilting import spread

STARTS, TARGETS = ("plan", "spread", "0.15"), (0.5, 1.0, 2.0)
SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "oracle": lambda scores: scores,
    "squashed": lambda scores: (1.5 * scores).tanh(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| scores | scale | target | start | first β / β* | first | stays | peak |\n"
        + "|---" * 8
        + "|",
        flush=True,
    )
    for name, scale in itertools.product(arguments.scores, arguments.scales):
        began = time.perf_counter()
        model = oracles.fixed_point_model()
        model = replace(model, scores=SCORES[name](model.scores))
        for line in _lines(model, name, scale, arguments.seeds, arguments.iterations):
            print(line, flush=True)
        print(f"({time.perf_counter() - began:.0f} s)", file=sys.stderr)


def _lines(model: Any, name: str, scale: float, seeds: int, iterations: int) -> list[str]:
    cases = list(itertools.product(TARGETS, STARTS, range(seeds)))
    lanes = [plants.Lane(scale, number) for number in range(len(cases))]
    controllers = [_controller(model, scale, *case) for case in cases]
    pace = plants.Pace(iterations, 512, lr=0.01)
    history = plants.closed_loop(plants.SampledPPO(model, lanes, pace), controllers, iterations)
    lines = list[str]()
    for target, start in itertools.product(TARGETS, STARTS):
        exact = scale * model.world.beta_for_kl(model.reference, model.scores, target)
        mine = [i for i, case in enumerate(cases) if case[:2] == (target, start)]
        ratio = statistics.mean(float(history.beta[0, i]) / exact for i in mine)
        off = (history.kl[:, mine] / target - 1).T
        first = [_until(run.abs() <= 0.2) for run in off]
        stays = [_until_always(run.unfold(0, 5, 1).mean(1).abs() <= 0.2) for run in off]
        peak = statistics.median(float(run.max()) + 1 for run in off)
        counts = f"{_mean(first, iterations)} | {_mean(stays, iterations)}"
        lines.append(
            f"| {name} | {scale:g} | {target:g} | {start} | {ratio:.2f} | {counts} | {peak:.2f} × |"
        )
    return lines


def _controller(model: Any, scale: float, target: float, start: str, seed: int) -> Any:
    if start == "0.15":
        return plants.GivenBeta(BudgetBeta(target, 0.15))
    scores = plants.reference_scores(model, plants.Lane(scale, seed))
    if start == "spread":
        return BudgetBeta(target, initial_beta(target, spread(scores)))
    found = starting_beta(scores, target)
    return BudgetBeta(target, found.beta, plant_gain=found.plant_gain)


def _until(there: torch.Tensor) -> int | None:
    """Iterations before the first that is there."""
    return int(there.int().argmax()) if there.any() else None


def _until_always(there: torch.Tensor) -> int | None:
    """Iterations before the first from which all are there."""
    away = (~there).nonzero()
    number = int(away[-1]) + 1 if len(away) else 0
    return number if number < len(there) else None


def _mean(counts: list[int | None], most: int) -> str:
    never = sum(count is None for count in counts)
    mean = statistics.mean(most if count is None else count for count in counts)
    return f"{mean:.1f}" + (f" ({never} never)" if never else "")


if __name__ == "__main__":
    main()
