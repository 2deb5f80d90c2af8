"""The whole story on the embedded world: build, train on and off the leash, compare, report.

Everything printed is read back from the run directories, so that nothing is said here that the
runs did not write down.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kleash.config import Config, load_config, with_world
from kleash.errors import RunError
from kleash.playground.build import build_world
from kleash.report.page import write_report
from kleash.runs import Run, Sample, holds_run, read_run
from kleash.train import train

RECIPES = Path(__file__).parent / "playground" / "recipes"
_SAMPLE_PROMPTS = 2


@dataclass(frozen=True)
class Row:
    """One policy on the held-out prompts."""

    name: str
    proxy: tuple[float, float]
    """Reward-model score, which training sees, and its standard error."""
    gold: tuple[float, float]
    """Score of the rubric, which nobody trains on, and its standard error."""
    kl: tuple[float, float]
    """Exact KL to the reference in nats per response, and its standard error."""
    distinct_2: float


@dataclass(frozen=True)
class Demo:
    """What the demo found."""

    rows: tuple[Row, Row, Row]
    """Reference, on the leash, off the leash."""
    page: Path
    seconds: dict[str, float]


def run_demo(seed: int, output: Path, *, console: Console | None = None) -> Demo:
    """Build a world, train on it twice, and print what became of the two policies.

    Args:
        seed: which world.
        output: directory for the two runs and their report.
        console: where to print.

    Raises:
        RunError: the output directory holds an earlier demo.
    """
    console = console or Console(highlight=False)
    started = time.perf_counter()
    for name in ("leashed", "free"):
        if holds_run(output / name):
            raise RunError(
                f"{str(output / name)!r} already holds a run; give another --output, or move it"
            )
    seconds: dict[str, float] = {}
    console.rule("1  a world: a help desk, its raters, a reward model that believes them")
    world = build_world(seed, say=lambda text: console.print(text, markup=False))
    seconds["build"] = time.perf_counter() - started
    for number, name in enumerate(("leashed", "free"), start=2):
        began = time.perf_counter()
        console.rule(f"{number}  training {'on' if name == 'leashed' else 'off'} the leash")
        train(demo_config(name, world=world, seed=seed, output=output / name))
        seconds[name] = time.perf_counter() - began
    leashed, free = read_run(output / "leashed"), read_run(output / "free")
    rows = (
        _row("reference", leashed, first=True),
        _row("on the leash", leashed),
        _row("off the leash", free),
    )
    console.rule("4  on prompts nobody trained on")
    _print_rows(console, rows)
    _print_samples(console, leashed, free)
    page, _ = write_report([output / "leashed", output / "free"], into=output)
    seconds["total"] = time.perf_counter() - started
    console.print(f"report: {page}   ({seconds['total']:.0f} s in all)", markup=False)
    return Demo(rows=rows, page=page, seconds=seconds)


def demo_config(name: str, *, world: Path, seed: int, output: Path) -> Config:
    """The configuration of one of the demo's two runs, `leashed` or `free`."""
    overrides = {"output": str(output), "seed": str(seed), "world": str(seed)}
    path = RECIPES / f"{name}.yaml"
    return with_world(load_config(path, overrides, base=path), world)


def _row(name: str, run: Run, *, first: bool = False) -> Row:
    """The first or the last held-out evaluation of a run."""
    evaluations = [line for line in run.metrics if "heldout/gold" in line]
    line = evaluations[0 if first else -1]

    def pair(key: str) -> tuple[float, float]:
        return float(line[key] or 0), float(line[f"{key}_se"] or 0)

    return Row(
        name=name,
        proxy=pair("heldout/scores"),
        gold=pair("heldout/gold"),
        kl=pair("heldout/kl_ref"),
        distinct_2=float(line["heldout/distinct_2"] or 0),
    )


def _print_rows(console: Console, rows: tuple[Row, ...]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("policy")
    for header in ("proxy score", "gold score", "KL, nats/response", "distinct-2"):
        table.add_column(header, justify="right")
    for row in rows:
        cells = [f"{mean:+.2f} ± {error:.2f}" for mean, error in (row.proxy, row.gold)]
        distance, error = row.kl
        table.add_row(row.name, *cells, f"{distance:.2f} ± {error:.2f}", f"{row.distinct_2:.2f}")
    console.print(table)
    console.print("± one standard error, clustered by prompt", style="dim")


def _print_samples(console: Console, leashed: Run, free: Run) -> None:
    def replies(run: Run, *, last: bool) -> dict[str, Sample]:
        heldout = [sample for sample in run.samples if sample.kind == "heldout"]
        step = max(s.step for s in heldout) if last else min(s.step for s in heldout)
        return {sample.prompt: sample for sample in heldout if sample.step == step}

    told = {
        "reference": replies(leashed, last=False),
        "on the leash": replies(leashed, last=True),
        "off the leash": replies(free, last=True),
    }
    for prompt in list(told["reference"])[:_SAMPLE_PROMPTS]:
        console.print(f"\n{prompt}", style="bold", markup=False)
        for name, samples in told.items():
            sample = samples[prompt]
            gold = "" if sample.gold is None else f"  (gold {sample.gold:+.1f})"
            console.print(
                f"  {name:<14}{sample.response.strip()}{gold}", markup=False, soft_wrap=True
            )
    console.print()
