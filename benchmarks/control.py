"""How fast and how well controllers of β hold a KL budget, side by side on the same runs.

    python benchmarks/control.py [--plants lagging exact ppo512 ppo32] [--starts plan] [--all]

Targets 0.1, 0.5, 1 and 2 nats, scores ×0.01, ×1 and ×100, on the enumerable oracle of the tests:
moving along the closed form with a lag, climbing the exact gradient, and by the engine's own PPO.
Three starts: a plan of 32 × 32 strings, as a run makes it; β from the spread of the scores, which
anyone can have; and a fixed 0.15 whatever the scores, Ziegler's. The exact β*, never moved, is what
a plant does without any controller. `settling` is the first iteration from which the running mean
of ten stays within 10 % of the target; every figure is of the true KL. `--all` prints every run.
"""

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import controlled_plants as plants  # pyright: ignore[reportMissingImports]
import oracles  # pyright: ignore[reportMissingImports]

from kleash.kl.control.controllers import (
    AdaptiveBeta,
    BetaController,
    BudgetBeta,
    FixedBeta,
    initial_beta,
)
from kleash.kl.planning.initial_beta import Start, starting_beta

TARGETS, SCALES = (0.1, 0.5, 1.0, 2.0), (0.01, 1.0, 100.0)
CONTROLLERS = ("budget", "ziegler paper", "ziegler code", "fixed β*")
STARTS = ("plan", "score sd", "0.15")
ITERATIONS = {"lagging": 150, "exact": 150, "ppo512": 150, "ppo32": 300}


@dataclass(frozen=True)
class Run:
    controller: str
    start: str
    target: float
    scale: float
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--plants", nargs="+", default=list(ITERATIONS), choices=list(ITERATIONS))
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--seeds", type=int, default=1, help="runs of each target and scale")
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = oracles.fixed_point_model()
    exact = {t: model.world.beta_for_kl(model.reference, model.scores, t) for t in TARGETS}
    runs = [
        Run(controller, start, target, scale, seed)
        for controller in CONTROLLERS
        for start in arguments.starts
        for target, scale, seed in itertools.product(TARGETS, SCALES, range(arguments.seeds))
        if controller != "fixed β*" or start == arguments.starts[0]
    ]
    for name in arguments.plants:
        began = time.perf_counter()
        lanes = [plants.Lane(run.scale, seed) for seed, run in enumerate(runs)]
        controllers = [
            _controller(run, exact[run.target] * run.scale, model, lane)
            for run, lane in zip(runs, lanes, strict=True)
        ]
        history = plants.closed_loop(_plant(name, model, lanes), controllers, ITERATIONS[name])
        courses = {
            run: plants.course(
                history.kl[:, i],
                history.beta[:, i],
                target=run.target,
                exact_beta=exact[run.target] * run.scale,
            )
            for i, run in enumerate(runs)
        }
        _print(name, courses, everything=arguments.all)
        print(f"         ({len(runs)} runs in {time.perf_counter() - began:.0f} s)", flush=True)


def _controller(run: Run, exact: float, model: Any, lane: Any) -> BetaController:
    if run.controller == "fixed β*":
        return FixedBeta(exact)
    start = _start(run, model, lane)
    match run.controller:
        case "budget":
            budget = BudgetBeta(run.target, start.beta, plant_gain=start.plant_gain)
            return plants.GivenBeta(budget) if start.source == "given" else budget
        case "ziegler paper":
            return AdaptiveBeta(run.target, start.beta, gain="paper")
        case _:
            return AdaptiveBeta(run.target, start.beta, gain="code")


def _start(run: Run, model: Any, lane: Any) -> Start:
    match run.start:
        case "plan":
            return starting_beta(plants.reference_scores(model, lane), run.target)
        case "score sd":
            sd = plants.score_sd(model) * run.scale
            return Start(initial_beta(run.target, sd), "spread")
        case _:
            return Start(0.15, "given")


def _plant(name: str, model: Any, lanes: list[Any]) -> Any:
    match name:
        case "lagging":
            return plants.Lagging(model, lanes, rate=0.1, noise=0.05)
        case "exact":
            return plants.ExactGradient(model, lanes)
        case _:
            responses = int(name.removeprefix("ppo"))
            pace = plants.Pace(ITERATIONS[name], responses, lr=0.01)
            return plants.SampledPPO(model, lanes, pace)


def _print(name: str, courses: dict[Run, Any], *, everything: bool) -> None:
    print(f"\n{name}: the worst run counts; in brackets the median\n")
    print("| start | controller | settling | peak | end | after ⅓ | β, last ⅓ | last β |")
    print("|---" * 8 + "|")
    for start, controller in dict.fromkeys((run.start, run.controller) for run in courses):
        chosen = {
            r: c for r, c in courses.items() if (r.start, r.controller) == (start, controller)
        }
        cells = ["–" if controller == "fixed β*" else start, controller]
        settling = [c.settling for c in chosen.values()]
        cells.append(f"{max(settling)} ({statistics.median(settling):.0f})")
        for key in ("overshoot", "end", "after_third", "beta", "last_beta"):
            values = [getattr(c, key) for c in chosen.values()]
            sizes = values if key == "overshoot" else [abs(value) for value in values]
            cells.append(f"{max(sizes):.1%} ({statistics.median(sizes):.1%})")
        print(f"| {' | '.join(cells)} |")
        for run, c in chosen.items() if everything else ():
            print(
                f"    target {run.target:<4g} scores ×{run.scale:<5g} settling {c.settling:3d}  "
                f"overshoot {c.overshoot:+.2f}  end {c.end:+.3f}  last ⅔ {c.after_third:+.3f}  "
                f"β {c.beta:+.3f} {c.last_beta:+.3f}"
            )
    _print_settling(courses)


def _print_settling(courses: dict[Run, Any]) -> None:
    """Mean settling by target: the exact β*, the budget, Ziegler twice and their ratios to it."""
    print("\n| start | target | fixed β* | budget | Ziegler, paper | Ziegler, code | ratios |")
    print("|---" * 7 + "|")
    for start, target in itertools.product(dict.fromkeys(r.start for r in courses), TARGETS):
        fixed, budget, paper, code = (
            statistics.mean(
                c.settling
                for r, c in courses.items()
                if (r.controller, r.target) == (who, target)
                and (r.start == start or who == "fixed β*")
            )
            for who in ("fixed β*", "budget", "ziegler paper", "ziegler code")
        )
        print(
            f"| {start} | {target:g} | {fixed:.1f} | {budget:.1f} | {paper:.1f} | {code:.1f} "
            f"| {paper / budget:.1f}, {code / budget:.1f} |"
        )


if __name__ == "__main__":
    main()
