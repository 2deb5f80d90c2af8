"""How fast and how well controllers of β hold a KL budget, side by side on the same runs.

    python benchmarks/control.py [--plants lagging exact ppo512 ppo32] [--all]

Targets 0.1, 0.5, 1 and 2 nats, scores ×0.01, ×1 and ×100, on the enumerable oracle of the tests:
moving along the closed form with a lag, climbing the exact gradient, and by the engine's own PPO.
Two starts: β from the spread of the scores, which anyone can have, and a fixed 0.15 whatever the
scores, Ziegler's. `settling` is the first iteration from which the running mean of ten stays
within 10 % of the target; `--all` prints every run.
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

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import oracles  # pyright: ignore[reportMissingImports]
import plants  # pyright: ignore[reportMissingImports]

from kleash.beta.controllers import (
    AdaptiveBeta,
    BetaController,
    BudgetBeta,
    FixedBeta,
    initial_beta,
)

TARGETS, SCALES = (0.1, 0.5, 1.0, 2.0), (0.01, 1.0, 100.0)
CONTROLLERS = ("budget", "ziegler paper", "ziegler code", "fixed β*")
STARTS = ("score sd", "0.15")
ITERATIONS = {"lagging": 150, "exact": 150, "ppo512": 150, "ppo32": 300}


@dataclass(frozen=True)
class Run:
    controller: str
    start: str
    target: float
    scale: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--plants", nargs="+", default=list(ITERATIONS), choices=list(ITERATIONS))
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = oracles.fixed_point_model()
    exact = {t: model.world.beta_for_kl(model.reference, model.scores, t) for t in TARGETS}
    sd = plants.score_sd(model)
    runs = [
        Run(*run)
        for run in itertools.product(CONTROLLERS, STARTS, TARGETS, SCALES)
        if run[0] != "fixed β*" or run[1] == "score sd"
    ]
    print(
        "plant    start     controller      settling median (max)  overshoot max (median)"
        "  |end|  |last ⅔|  |β/β* − 1|    worst of the targets × scales"
    )
    for name in arguments.plants:
        began = time.perf_counter()
        lanes = [plants.Lane(run.scale, seed) for seed, run in enumerate(runs)]
        controllers = [_controller(run, exact[run.target] * run.scale, sd) for run in runs]
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


def _controller(run: Run, exact: float, sd: float) -> BetaController:
    start = 0.15 if run.start == "0.15" else initial_beta(run.target, sd * run.scale)
    match run.controller:
        case "budget":
            return BudgetBeta(run.target, start)
        case "ziegler paper":
            return AdaptiveBeta(run.target, start, gain="paper")
        case "ziegler code":
            return AdaptiveBeta(run.target, start, gain="code")
        case _:
            return FixedBeta(exact)


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
    for start, controller in itertools.product(STARTS, CONTROLLERS):
        chosen = {
            r: c for r, c in courses.items() if (r.start, r.controller) == (start, controller)
        }
        if not chosen:
            continue
        several = list(chosen.values())
        settling = [c.settling for c in several]
        peaks = [c.overshoot for c in several]
        worst = [
            max(abs(getattr(c, key)) for c in several) for key in ("end", "after_third", "beta")
        ]
        print(
            f"{name:8} {start:9} {controller:14}  {statistics.median(settling):8.0f} "
            f"({max(settling):3d})         {max(peaks):+8.2f} ({statistics.median(peaks):+.2f})"
            f"       {worst[0]:7.3f} {worst[1]:7.3f}  {worst[2]:7.3f}"
        )
        for run, c in chosen.items() if everything else ():
            print(
                f"    target {run.target:<4g} scores ×{run.scale:<5g} settling {c.settling:3d}  "
                f"overshoot {c.overshoot:+.2f}  end {c.end:+.3f}  last ⅔ {c.after_third:+.3f}  "
                f"β {c.beta:+.3f}"
            )


if __name__ == "__main__":
    main()
