"""Whatever a command prints: no number is cut, on narrow and wide terminals and in a pipe."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from audit_models import SMALL, change, noise, write_prompts
from rich.console import Console

from kleash.auditing.api import audit
from kleash.auditing.console import AuditDisplay, print_audit
from kleash.auditing.result import Audit
from kleash.auditing.runner import Progress
from kleash.cli.demo_output import Row, print_frontier, print_rows
from kleash.cli.plan import PlanRequest, plan_sentences, print_plan
from kleash.preflight.console import print_report
from kleash.preflight.findings import Finding, Report
from kleash.report.svg_chart import format_number, format_with_error
from kleash.storage.plan_file import Frontier, make_frontier, write_frontier
from kleash.training.callbacks import StartEvent, StepEvent
from kleash.training.progress import TrainingDisplay

WIDTHS = [60, 80, 120]


@pytest.fixture(scope="module")
def frontier() -> Frontier:
    scores = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * 3 + 1234
    plan = make_frontier(
        scores, prompts=list(range(16)), about={}, betas=[12.3, 0.2, 0.01], budgets=[0.1, 9.0]
    )
    group = make_frontier(scores, prompts=list(range(16)), about={}, budgets=[0.3])
    plan.groups["a group with a name that is long"] = group
    return plan


def printed(width: int, show: Callable[[Console], object], *, terminal: bool = False) -> str:
    """What is printed, its lines no longer than the terminal."""
    stream = io.StringIO()
    show(Console(file=stream, width=width, highlight=False, force_terminal=terminal,
                 color_system=None))  # fmt: skip
    text = stream.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    return " ".join(text.split())


def in_plan(frontier: Frontier) -> list[str]:
    """Every interval of the plan's table, as it must be read."""
    return [
        format_with_error(
            one.value, max(one.high - one.value, one.value - one.low)
        ) if one.low != one.high else format_number(one.value)
        for row in frontier.rows
        for one in (row.beta, row.kl, row.score)
    ]  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_plan(frontier: Frontier, width: int) -> None:
    told = plan_sentences(frontier, PlanRequest(target_kl=1.0))
    text = printed(width, lambda console: print_plan(frontier, told, console=console))
    for value in in_plan(frontier):
        assert value in text
    for row in frontier.rows:
        assert f" {row.effective_samples:.1f} " in text
    for heading in ("KL*, nats", "E*[score]", "objective", "eff. n", "best of", "its score"):
        assert heading in text
    assert "a group with a name that is long" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_demo(frontier: Frontier, width: int) -> None:
    text = printed(width, lambda console: print_frontier(console, frontier))
    assert "effective samples" in text and "known" in text
    rows = tuple(
        Row(name, (1234.56, 0.12), (-0.5, 0.03), (12.34, 0.56), 0.91)
        for name in ("reference", "on the leash", "off the leash")
    )
    text = printed(width, lambda console: print_rows(console, rows))
    for value in ("+1234.56 ± 0.12", "-0.50 ± 0.03", "12.34 ± 0.56", "0.91", "off the leash"):
        assert text.count(value) >= (1 if value == "off the leash" else 3)


@pytest.mark.parametrize("width", WIDTHS)
def test_check(width: int) -> None:
    measured = "KL 0.123456 nats per token, [0.1, 0.2], at most 1.5e-07 of 12,345 tokens"
    findings = (
        Finding("logprobs.a_long_name_of_a_check", "ok", measured, "0", "", ""),
        Finding("reward.other", "fail", measured, "below 0.000123", "A cause [x].", "Fix it."),
        Finding("prompts.none", "skipped", "", "", "nothing to look at", ""),
    )
    text = printed(width, lambda console: print_report(Report(findings, 1.0), console))
    for number in re.findall(r"[\d.,e-]*\d", measured):
        assert text.count(number) >= 3
    assert "0.000123" in text and "A cause [x]." in text and "nothing to look at" in text


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    folder = tmp_path_factory.mktemp("audit")
    tiny_models.save_model(folder / "base")
    moved = change(folder / "base", folder / "moved", noise)
    prompts = write_prompts(folder / "prompts.jsonl")
    return audit(moved, folder / "base", prompts, both=True, **SMALL)


@pytest.mark.parametrize("width", WIDTHS)
def test_audit(audited: Audit, width: int) -> None:
    text = printed(width, lambda console: print_audit(console, audited))
    assert "KL(policy ‖ reference)" in text and "per response" in text
    for part in audited.parts:
        for name, measure in part.measures.items():
            cells = [measure.per_token] if name == "same_top" else list(vars(measure).values())
            for one in cells:
                assert format_with_error(one.mean, one.half_width) in text


@pytest.mark.parametrize("width", WIDTHS)
def test_audit_as_it_goes(audited: Audit, width: int) -> None:
    one, stream = audited.kl.per_token, io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    with AuditDisplay(console) as display:
        display.show(Progress(by="policy", done=3, total=40, headline=one))
    assert one.half_width is not None
    shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).split())
    assert "3/40" in shown and "…" not in shown
    assert f"KL {format_with_error(one.mean, one.half_width)}" in shown


METRICS = {
    "step": 12, "objective/scores": -1234.5678, "objective/kl_ref": 1234.5678,
    "objective/kl_ref_se": 123.456, "objective/beta": 0.00012346, "tokens_per_second": 123456.0,
}  # fmt: skip
NUMBERS = ("-1234.568", "1234.57±123.46", "of 5 nats", "β 0.0001235", "123456 tok/s")


@pytest.mark.parametrize("width", WIDTHS)
def test_train_on_a_terminal(width: int) -> None:
    def show(console: Console) -> None:
        with TrainingDisplay(300, title="train", console=console) as display:
            display.target_kl = 5.0
            display.on_start(StartEvent(Path("run"), 11, 300, []))
            display.on_step(StepEvent(12, METRICS))

    stream = io.StringIO()
    show(Console(file=stream, width=width, force_terminal=True, color_system=None))
    last = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).split())
    assert "12/300" in last and "…" not in last
    assert all(number in last for number in NUMBERS)


def test_train_in_a_pipe_is_a_line_for_each_step() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    with TrainingDisplay(300, title="train", console=console) as display:
        display.target_kl = 5.0
        start = ["β starts at 0.1811: " + "a reason " * 20]
        display.on_start(StartEvent(Path("run"), 11, 300, start))
        display.on_step(StepEvent(12, METRICS))
    said, line = stream.getvalue().splitlines()
    assert said.endswith("a reason ") and line.startswith("train 12/300  score ")
    assert all(number in line for number in NUMBERS)


@pytest.mark.parametrize("columns", [None, 60])
def test_commands_in_a_pipe(frontier: Frontier, tmp_path: Path, columns: int | None) -> None:
    """The programs themselves, with and without COLUMNS."""
    write_frontier(tmp_path / "plan.json", frontier)
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    if columns is not None:
        environment["COLUMNS"] = str(columns)

    def said(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "kleash", *arguments],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        assert "…" not in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= (columns or 80)
        return " ".join(result.stdout.split())

    text = said("plan", "--scores", str(tmp_path / "plan.json"), "--beta", "12.3,0.2,0.01")
    assert all(value in text for value in in_plan(frontier))
    text = said("kl", "0.123456,0.4,0.476544", "0.3,0.3,0.4")
    for number in ("0.1235", "0.4765", "-0.1096", "+0.0834", "KL(p‖q) = "):
        assert number in text
