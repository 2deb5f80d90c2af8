"""A plan beside what training made of it: `python benchmarks/planning.py recipes/stories.yaml`.

For each target, seed and start a run: `plan` starts β from its plan, `spread` from the spread of
the scores, sd/√(2·target), as any run could, and a number is a β that is taken at its word.
Printed: the first step within 20 % of the target, the first from which the mean of five stays
there, the peak, and over the last third the KL, the score gained over the first step, and what the
plan of `--responses` responses to each prompt holds possible at that KL. A run that is already
there is read, not repeated; `--world` names the world of recipes/embedded-world.yaml.
"""

import argparse
import statistics
from pathlib import Path

from kleash.cli.plan import PlanRequest, plan
from kleash.config.loading import load_config
from kleash.config.schema import Config
from kleash.kl.control.controllers import initial_beta
from kleash.kl.planning.frontier import PlanRow, plan_for_budgets
from kleash.kl.planning.tilting import spread
from kleash.playground.build import with_world
from kleash.storage.plan_file import PLAN_FILE, Frontier, read_frontier, write_frontier
from kleash.storage.run_directory import Run, holds_run, read_run
from kleash.training.loop import train


def main() -> None:
    """Plan, run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--targets", type=float, nargs="+", default=[2.0, 5.0, 10.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--responses", type=int, default=128, help="of the plan of the last column")
    parser.add_argument("--starts", nargs="+", default=["plan"], help="plan, spread, or a β")
    parser.add_argument("--world", type=int, help="of the embedded world")
    parser.add_argument("--output", type=Path, default=Path("runs/planning-benchmark"))
    arguments = parser.parse_args()
    large = _large_plan(arguments)
    print(
        "| target | seed | start | first β | within 20 % at step | to stay from | peak "
        "| KL, last third | gained | plan at that KL | its effective samples |\n|" + "---|" * 11,
        flush=True,
    )
    for target in arguments.targets:
        for seed in arguments.seeds:
            for start in arguments.starts:
                run = _run(arguments, target, seed, start, large)
                print(_line(run, target, seed, start, large), flush=True)


def _large_plan(arguments: argparse.Namespace) -> Frontier:
    """A plan of more samples than a run draws; its scores are those of seed 0's normalisation."""
    file = arguments.output / PLAN_FILE
    if not file.exists():
        sizes = {"plan.responses": arguments.responses, "plan.prompts": arguments.prompts}
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_frontier(file, plan(_config(arguments, sizes), PlanRequest()))
    return read_frontier(file)


def _config(arguments: argparse.Namespace, overrides: dict[str, object]) -> Config:
    texts = {key: str(value) for key, value in overrides.items()}
    if arguments.world is not None:
        texts["world"] = str(arguments.world)
    return with_world(load_config(arguments.recipe, texts, base=arguments.recipe))


def _run(
    arguments: argparse.Namespace, target: float, seed: int, start: str, large: Frontier
) -> Run:
    output = arguments.output / f"target-{target:g}-{start}-seed-{seed}"
    if not (holds_run(output) and read_run(output).status == "finished"):
        leash: dict[str, object] = {"target_kl": target}
        if start == "spread":
            leash["initial_beta"] = initial_beta(target, spread(large.scores))
        elif start != "plan":
            leash["initial_beta"] = float(start)
        config = _config(
            arguments,
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


def _line(run: Run, target: float, seed: int, start: str, large: Frontier) -> str:
    told = run.meta["start"]
    steps = [line for line in run.metrics if "objective/scores" in line]
    third = steps[-len(steps) // 3 :]
    distances = [float(line["objective/kl_ref"] or 0) for line in steps]
    held = statistics.mean(distances[-len(third) :])
    gain = statistics.mean(float(line["objective/scores"] or 0) for line in third)
    gain -= float(steps[0]["objective/scores"] or 0)
    close = [i + 1 for i, kl in enumerate(distances) if abs(kl / target - 1) <= 0.2]
    means = [statistics.mean(distances[i : i + 5]) for i in range(len(distances) - 4)]
    astray = [i + 1 for i, mean in enumerate(means) if abs(mean / target - 1) > 0.2]
    stays = astray[-1] + 1 if astray else 1
    row = plan_for_budgets(large.scores, [held])[0]
    said, samples = "not known", "–"
    if isinstance(row, PlanRow):
        said = f"{row.gain.value:.2f}" + ("" if row.known else ", not known")
        samples = f"{row.effective_samples:.1f}"
    cells = [
        f"{target:g}",
        f"{seed}",
        start if told is None else told["source"],
        f"{float(steps[0]['objective/beta'] or 0):.3g}",
        f"{close[0]}" if close else "–",
        f"{stays}" if stays <= len(means) else "–",
        f"{max(distances) / target:.2f} ×",
        f"{held:.2f} ({held / target - 1:+.1%})",
        f"{gain:+.2f}",
        said,
        samples,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
