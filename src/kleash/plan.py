"""`kleash plan`: which β gives which KL and which score, before anything is trained.

Reference responses to some prompts are drawn and scored; the closed form does the rest. What was
drawn is kept in plan.json, so that other questions can be asked of it without drawing again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kleash.assembly import assemble
from kleash.beginning import about, draw
from kleash.beta.starting import Start, starting_beta
from kleash.config import Config, ReferenceConfig
from kleash.errors import RewardError, UsageError
from kleash.files import replace_file
from kleash.frontier import PLAN_FILE, Frontier, make_frontier, read_frontier, write_frontier
from kleash.report.planned import HEADERS, plan_page, plus_minus, sentences, table_rows

PAGE_FILE = "plan.html"


@dataclass(frozen=True)
class Question:
    """What is asked of a plan.

    Attributes:
        betas: in score per nat; empty: a ladder of them.
        budgets: KL in nats per response.
        target_kl: the budget of the run that is planned for, if it has one.
    """

    betas: Sequence[float] = ()
    budgets: Sequence[float] = ()
    target_kl: float | None = None


def plan(config: Config, question: Question) -> Frontier:
    """Draw reference responses, score them, and plan.

    Args:
        config: of the run that is planned for; policy and leash are not looked at where a
            reference is named.
        question: which βs and budgets.

    Raises:
        KleashError: something the user can mend; nothing was written.
    """
    config = _at_reference(config)
    torch.manual_seed(config.seed)
    crew = assemble(config)
    drawn = draw(config, crew)
    return _answer(drawn.scores, drawn.prompts, about(config, crew), question)


def replan(file: Path, question: Question) -> Frontier:
    """Ask another question of samples that an earlier plan holds.

    Raises:
        KleashError: the file is no plan, or the question cannot be asked.
    """
    earlier = read_frontier(file)
    return _answer(earlier.scores, earlier.prompts, earlier.about, question)


def starting_point(frontier: Frontier, question: Question) -> Start | None:
    """Where a run with this target would start; None without a target.

    Raises:
        RewardError: scores do not vary within any prompt.
    """
    if question.target_kl is None:
        return None
    try:
        return starting_beta(frontier.scores, question.target_kl)
    except ValueError as error:
        raise RewardError(str(error)) from error


def print_plan(frontier: Frontier, told: Sequence[str], *, console: Console | None = None) -> None:
    """The plan as a table, and what it comes to."""
    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for header in HEADERS[:-1]:
        table.add_column(Text(header), justify="right", no_wrap=True)
    rows = table_rows(frontier, plus_minus)
    for row, cells in rows:
        table.add_row(*(Text(cell) for cell in cells[:-1]), style="" if row.known else "dim")
    console.print(table)
    for row, cells in rows:
        if not row.known:
            console.print(f"not known, KL {cells[1]}: {row.reason}", markup=False, style="dim")
    prompts, responses = frontier.scores.shape
    console.print(
        f"{prompts} prompts × {responses} reference responses; ± 95 %, by bootstrap over prompts",
        style="dim",
        markup=False,
    )
    for sentence in told:
        console.print(sentence, markup=False)


def write_plan(folder: Path, frontier: Frontier, told: Sequence[str], *, title: str) -> Path:
    """Write plan.json and plan.html into a directory; made if missing.

    Returns:
        Path of the page.

    Raises:
        RunError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_frontier(folder / PLAN_FILE, frontier)
    replace_file(folder / PAGE_FILE, plan_page(frontier, title=title, told=told))
    return folder / PAGE_FILE


def told_by(frontier: Frontier, question: Question) -> list[str]:
    """The sentences under the table."""
    return sentences(frontier, question.target_kl, starting_point(frontier, question))


def _answer(
    scores: Float[Tensor, "prompt sample"],
    prompts: Sequence[int],
    what: Mapping[str, Any],
    question: Question,
) -> Frontier:
    budgets = list(question.budgets)
    if question.target_kl is not None and question.target_kl not in budgets:
        budgets.append(question.target_kl)
    try:
        return make_frontier(
            scores, prompts=prompts, about=what, betas=question.betas, budgets=budgets
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _at_reference(config: Config) -> Config:
    """The same run, started from its reference: what a plan needs samples of."""
    if config.reference.path is None:
        return config
    policy = config.policy.model_copy(update={"path": config.reference.path})
    return config.model_copy(update={"policy": policy, "reference": ReferenceConfig()})
