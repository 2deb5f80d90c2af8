"""The stories recipe over seeds, on and off the leash: `python benchmarks/stories.py --seeds 3`.

Runs `recipes/stories.yaml` (and, with --free, `recipes/stories-free.yaml`), then prints what the
last third of each run holds. Needs the optional folder of real inputs beside the
checkout. Seeds run
one after another; a run that is already there is read, not repeated.
"""

import argparse
import statistics
from pathlib import Path

from kleash.config.loading import load_config
from kleash.storage.run_directory import Run, holds_run, read_run
from kleash.training.loop import train

RECIPES = Path(__file__).parent.parent / "recipes"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", type=float, nargs="+", default=[5.0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--placement", default="reward_k1")
    parser.add_argument("--free", action="store_true", help="also the runs without a leash")
    parser.add_argument("--output", type=Path, default=Path("runs/stories-benchmark"))
    arguments = parser.parse_args()
    rows: list[tuple[str, Run, float | None]] = []
    for target in arguments.targets:
        for seed in range(arguments.seeds):
            name = f"target-{target:g}-{arguments.placement}-seed-{seed}"
            overrides = {
                "leash.target_kl": str(target),
                "leash.placement": arguments.placement,
                "seed": str(seed),
                "steps": str(arguments.steps),
            }
            run = _run("stories.yaml", overrides, arguments.output / name)
            rows.append((name, run, target))
    if arguments.free:
        for seed in range(arguments.seeds):
            run = _run("stories-free.yaml", {"seed": str(seed)}, arguments.output / f"free-{seed}")
            rows.append((f"free-seed-{seed}", run, None))
    _print(rows)


def _run(recipe: str, overrides: dict[str, str], output: Path) -> Run:
    path = RECIPES / recipe
    if not (holds_run(output) and read_run(output).status == "finished"):
        train(load_config(path, {**overrides, "output": str(output)}, base=path))
    return read_run(output)


def _print(rows: list[tuple[str, Run, float | None]]) -> None:
    print(
        "| run | KL, last third | against target | score gained, reference sd | held-out gain, sd |"
        " peak KL | within 20 % from step | distinct-2 first → last |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, run, target in rows:
        steps = [line for line in run.metrics if "objective/scores" in line]
        third = steps[-len(steps) // 3 :]
        distances = [float(line["objective/kl_ref"] or 0) for line in steps]
        held = statistics.mean(distances[-len(third) :])
        gain = statistics.mean(float(line["objective/scores"] or 0) for line in third)
        gain -= float(steps[0]["objective/scores"] or 0)
        close = [i + 1 for i, kl in enumerate(distances) if target and abs(kl / target - 1) <= 0.2]
        against = f"{held / target - 1:+.1%}" if target else "–"
        first, last = (float(steps[i]["rollout/distinct_2"] or 0) for i in (0, -1))
        print(
            f"| {name} | {held:.2f} | {against} | {gain:+.2f} | {_heldout_gain(run):+.2f} |"
            f" {max(distances):.2f} | {close[0] if close else '–'} | {first:.2f} → {last:.2f} |"
        )


def _heldout_gain(run: Run) -> float:
    """Gain on held-out prompts in standard deviations of the reference's scores there."""
    evaluations = [line for line in run.metrics if "heldout/scores" in line]
    first, last = evaluations[0], evaluations[-1]
    # The s.e. is clustered by prompt; the spread of single scores is that of the recipe's
    # normalisation: raw = mean + sd · normalised, read off two numbers of the same step.
    steps = [line for line in run.metrics if "objective/scores" in line]
    a, b = steps[0], steps[-1]
    sd = (float(b["reward/total"] or 0) - float(a["reward/total"] or 0)) / (
        float(b["objective/scores"] or 0) - float(a["objective/scores"] or 0)
    )
    return (float(last["heldout/scores"] or 0) - float(first["heldout/scores"] or 0)) / sd


if __name__ == "__main__":
    main()
