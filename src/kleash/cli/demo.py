"""The whole story on the embedded world: build, check, plan, train on and off the leash, audit.

Each part is what the command of its name does. Everything printed of a run is read back from its
directory, so that nothing is said here that the run did not write down.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.console import Console

from kleash.auditing.api import audit
from kleash.auditing.html import write_audit
from kleash.auditing.result import Audit
from kleash.cli.demo_output import (
    Row,
    print_audit,
    print_checks,
    print_frontier,
    print_reached,
    print_rows,
    print_samples,
    row_of,
)
from kleash.cli.plan import PlanRequest, plan, plan_sentences, write_plan
from kleash.config.loading import load_config, parse_config
from kleash.config.recipe_library import recipe_named
from kleash.config.schema import Config
from kleash.errors import RunError
from kleash.playground.build import build_world, with_world
from kleash.preflight.runner import check
from kleash.preflight.runtime_monitor import RuntimeMonitor
from kleash.report.html import write_report
from kleash.storage.plan_file import Frontier
from kleash.storage.run_directory import Run, holds_run, read_run
from kleash.training.loop import train
from kleash.training.state import latest_checkpoint

_RECIPES = {"leashed": "embedded-world", "free": "embedded-world-free"}
_LADDER = (1.0, 0.5, 0.3, 0.2)
"""βs of the plan; one of them is the leashed recipe's."""
_PLANNED = {"plan.prompts": "16", "plan.responses": "64"}
"""Few prompts with many replies to each: enough to know the plan down to the last β."""
_ANSWERS = 2
"""To each held-out request in the audit."""


@dataclass(frozen=True)
class Demo:
    """What the demo found."""

    rows: tuple[Row, Row, Row]
    """Reference, on the leash, off the leash."""
    frontier: Frontier
    """What was planned before training."""
    audit: Audit
    """Of the leashed policy against the reference."""
    pages: tuple[Path, Path, Path]
    """Report, plan and audit."""
    seconds: dict[str, float]


def run_demo(seed: int, output: Path, *, console: Console | None = None) -> Demo:
    """Build a world, train on it twice, and print what became of the two policies.

    Args:
        seed: which world.
        output: directory for the two runs, the audit, and the report.
        console: where to print.

    Raises:
        RunError: the output directory holds an earlier demo.
        PreflightError: a check failed.
    """
    console = console or Console(highlight=False)
    for name in ("leashed", "free"):
        if holds_run(output / name):
            raise RunError(
                f"{str(output / name)!r} already holds a run; give another --output, or move it"
            )
    parts = _Parts(console)
    with parts.next("build", "a world: a help desk, its raters, a reward model that believes them"):
        world = build_world(seed, say=lambda text: console.print(text, markup=False))
    leashed, free = (
        demo_config(name, world=world, seed=seed, output=output / name)
        for name in ("leashed", "free")
    )
    with parts.next("check", "is anything wrong, before it costs a run?"):
        print_checks(console, check(leashed, quick=True))
    with parts.next("plan", "what could be had, from the reference's own replies"):
        request = PlanRequest(betas=_LADDER)
        frontier = plan(leashed, request)
        print_frontier(console, frontier)
        # Into the run's directory, where report and audit look for it.
        sentences = plan_sentences(frontier, request)
        plan_page = write_plan(output / "leashed", frontier, sentences, title="the embedded world")
    with parts.next("leashed", "training on the leash"):
        train(leashed, callbacks=[RuntimeMonitor()])
    with parts.next("free", "training off the leash"):
        train(free, callbacks=[RuntimeMonitor()])
    with parts.next("audit", "on held-out prompts"):
        runs = read_run(output / "leashed"), read_run(output / "free")
        rows = (
            row_of("reference", runs[0], first=True),
            row_of("on the leash", runs[0]),
            row_of("off the leash", runs[1]),
        )
        print_rows(console, rows)
        print_reached(console, frontier, rows[1], beta=leashed.leash.beta)
        print_samples(console, *runs)
        found = _audit(runs[0], output / "audit")
        print_audit(console, found)
    report_page, _ = write_report([run.path for run in runs], into=output)
    pages = (report_page, plan_page, write_audit(found, output / "audit"))
    for name, page in zip(("report", "plan", "audit"), pages, strict=True):
        console.print(f"{name + ':':<8}{page}", markup=False, soft_wrap=True)
    console.print(f"({parts.total:.0f} s in all)", markup=False)
    seconds = {**parts.seconds, "total": parts.total}
    return Demo(rows=rows, frontier=frontier, audit=found, pages=pages, seconds=seconds)


class _Parts:
    """The parts of the story: each has a number, a heading, and takes its time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def next(self, name: str, heading: str) -> Generator[None]:
        """Begin a part; its seconds are kept under its name."""
        began = time.perf_counter()
        self._console.rule(f"{len(self.seconds) + 1}  {heading}")
        yield
        self.seconds[name] = time.perf_counter() - began

    @property
    def total(self) -> float:
        """Seconds since the first part began."""
        return time.perf_counter() - self._began


def demo_config(name: str, *, world: Path, seed: int, output: Path) -> Config:
    """The configuration of one of the demo's two runs, `leashed` or `free`."""
    overrides = {"output": str(output), "seed": str(seed), "world": str(seed), **_PLANNED}
    path = recipe_named(_RECIPES[name]).path
    return with_world(load_config(path, overrides, base=path), world)


def _audit(run: Run, into: Path) -> Audit:
    """The policy of a run against its reference, on held-out questions."""
    config = parse_config(dict(run.config), where=str(run.path))
    checkpoint = cast(Path, latest_checkpoint(run.path / "checkpoints"))
    return audit(
        checkpoint / "policy",
        config.policy.path,
        cast(str, config.prompts.heldout),
        max_new_tokens=config.rollout.max_new_tokens,
        responses_per_prompt=_ANSWERS,
        seed=config.seed,
        keep=20,
        output=into,
    )
