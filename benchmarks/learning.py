"""Does a less noisy KL learn faster? k1, exact and mixed on the enumerable oracle, equal samples.

    python benchmarks/learning.py
    python benchmarks/learning.py --epochs 1 --minibatches 1 --lr 0.03 --iterations 300

Sampled PPO from the reference on the 121 strings of the tests' fixture, every placement with the
same seeds and the same number of samples. The gap is J(π*) − J(π), exactly, by enumeration. The
coefficient of `mixed` is estimated from the step before, as in `kleash train`.
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from oracles import fixed_point_model  # pyright: ignore[reportMissingImports]
from tabular_ascent import Lane, Pace, climb  # pyright: ignore[reportMissingImports]

from kleash.algorithms.ppo import PPOSettings, loss, prepare
from kleash.training.metrics import next_mixing
from kleash.types import Experience, Fresh, Loss, ScoredRollout

PLACEMENTS = ("reward_k1", "exact", "mixed")


class Preparer:
    """`prepare` for several lanes side by side, each with a c of its own where there is one."""

    def __init__(self, settings: PPOSettings, lanes: int) -> None:
        self._settings = [settings] * lanes
        self._turn = itertools.cycle(range(lanes))

    def __call__(self, scored: ScoredRollout, beta: float) -> Experience:
        lane = next(self._turn)
        settings = self._settings[lane]
        experience = prepare(scored, beta, settings)
        mixing = next_mixing(settings, experience, beta)
        self._settings[lane] = replace(settings, mixing=mixing)
        return experience


def gaps(placement: str, beta: float, seeds: int, pace: Pace, marks: list[int]) -> Tensor:
    """J(π*) − J(π), [mark, seed]."""
    model = fixed_point_model()
    world, reference, scores = model.world, model.reference, model.scores
    settings = PPOSettings(
        placement=placement,  # pyright: ignore[reportArgumentType]
        mixing=0.0 if placement == "mixed" else None,
    )
    best = world.objective(world.optimal_logits(reference, scores, beta), reference, scores, beta)
    found: list[Tensor] = []

    def watch(iteration: int, logits: Tensor) -> None:
        if iteration in marks:
            reached = [world.objective(one, reference, scores, beta) for one in logits]
            found.append(best - torch.stack(reached))

    lanes = [Lane(beta, seed) for seed in range(seeds)]
    preparer = Preparer(settings, seeds)

    def learn(batch: Experience, fresh: Fresh, tokens: int) -> Loss:
        return loss(batch, fresh, settings, tokens=tokens)

    climb(model, lanes, preparer, learn, pace, watch)
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--betas", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--rollouts", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.05)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    pace = Pace(
        chosen.iterations,
        rollouts=chosen.rollouts,
        epochs=chosen.epochs,
        minibatches=chosen.minibatches,
        lr=chosen.lr,
        value_lr=chosen.lr,
    )
    marks = [round(chosen.iterations * part / 10) for part in range(1, 11)]
    print(f"{chosen.seeds} seeds; {pace}\n")
    for beta in chosen.betas:
        print(f"| β = {beta:g}, after iteration | " + " | ".join(map(str, marks)) + " |")
        print("|---" * 11 + "|", flush=True)
        base: Tensor | None = None
        for placement in PLACEMENTS:
            found = gaps(placement, beta, chosen.seeds, pace, marks)
            base = found if base is None else base
            cells = [f"{float(x):.4f}" for x in found.mean(1)]
            print(f"| {placement} | " + " | ".join(cells) + " |")
            if found is not base:
                error = (found - base).std(1) / chosen.seeds**0.5
                paired = zip((found - base).mean(1), error, strict=True)
                told = [f"{float(x):+.4f} ± {float(e):.4f}" for x, e in paired]
                print("| – less reward_k1 | " + " | ".join(told) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
