"""A plan beside what training made of it: `python benchmarks/planning.py recipes/stories.yaml`.

For each target a run that starts β from its plan and, with --spread, one that starts from the
spread of the scores, sd/√(2·target), as any run could. Printed: the first step within 20 % of the
target, the peak, and over the last third the KL, the score gained over the first step, and what
the plan of `--responses` responses to each prompt holds possible at that KL. A run that is already
there is read, not repeated.
"""

import argparse
import statistics
from pathlib import Path

from kleash.beta.planning import PlanRow, plan_for_budgets
from kleash.beta.tilting import spread
from kleash.cli import _build_world  # pyright: ignore[reportPrivateUsage]
from kleash.config import Config, load_config
from kleash.frontier import PLAN_FILE, Frontier, read_frontier, write_frontier
from kleash.plan import Question, plan
from kleash.runs import Run, holds_run, read_run
from kleash.train import train


def main() -> None:
    """Plan, run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--targets", type=float, nargs="+", default=[2.0, 5.0, 10.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--responses", type=int, default=128, help="of the plan of the last column")
    parser.add_argument("--spread", action="store_true", help="also from the spread of the scores")
    parser.add_argument("--output", type=Path, default=Path("runs/planning-benchmark"))
    arguments = parser.parse_args()
    large = _large_plan(arguments)
    print(
        "| target | seed | start | first β | within 20 % at step | peak | KL, last third | gained "
        "| plan at that KL | its effective samples |\n|" + "---|" * 10,
        flush=True,
    )
    for target in arguments.targets:
        for seed in arguments.seeds:
            for start in ("plan", "spread") if arguments.spread else ("plan",):
                run = _run(arguments, target, seed, start, large)
                print(_line(run, target, seed, large), flush=True)


def _large_plan(arguments: argparse.Namespace) -> Frontier:
    """A plan of more samples than a run draws; its scores are those of seed 0's normalisation."""
    file = arguments.output / PLAN_FILE
    if not file.exists():
        sizes = {"plan.responses": arguments.responses, "plan.prompts": arguments.prompts}
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_frontier(file, plan(_config(arguments.recipe, sizes), Question()))
    return read_frontier(file)


def _config(recipe: Path, overrides: dict[str, object]) -> Config:
    texts = {key: str(value) for key, value in overrides.items()}
    return _build_world(load_config(recipe, texts, base=recipe))


def _run(
    arguments: argparse.Namespace, target: float, seed: int, start: str, large: Frontier
) -> Run:
    output = arguments.output / f"target-{target:g}-{start}-seed-{seed}"
    if not (holds_run(output) and read_run(output).status == "finished"):
        leash: dict[str, object] = {"target_kl": target}
        if start == "spread":
            leash["initial_beta"] = spread(large.scores) / (2 * target) ** 0.5
        config = _config(
            arguments.recipe,
            {
                "leash": leash,
                "seed": seed,
                "steps": arguments.steps,
                "heldout.responses_per_prompt": 1,
                "output": output,
            },
        )
        train(config)
    return read_run(output)


def _line(run: Run, target: float, seed: int, large: Frontier) -> str:
    steps = [line for line in run.metrics if "objective/scores" in line]
    third = steps[-len(steps) // 3 :]
    distances = [float(line["objective/kl_ref"] or 0) for line in steps]
    held = statistics.mean(distances[-len(third) :])
    gain = statistics.mean(float(line["objective/scores"] or 0) for line in third)
    gain -= float(steps[0]["objective/scores"] or 0)
    close = [i + 1 for i, kl in enumerate(distances) if abs(kl / target - 1) <= 0.2]
    row = plan_for_budgets(large.scores, [held])[0]
    said, samples = "not known", "–"
    if isinstance(row, PlanRow):
        said = f"{row.gain.value:.2f}" + ("" if row.known else ", not known")
        samples = f"{row.effective_samples:.1f}"
    start = run.meta["start"]
    return (
        f"| {target:g} | {seed} | {'spread, told' if start is None else start['source']} "
        f"| {float(steps[0]['objective/beta'] or 0):.3g} | {close[0] if close else '–'} "
        f"| {max(distances) / target:.2f} × | {held:.2f} ({held / target - 1:+.1%}) | {gain:+.2f} "
        f"| {said} | {samples} |"
    )


if __name__ == "__main__":
    main()
