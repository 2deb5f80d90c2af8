"""`kleash plan`: which β gives which KL and which score, before anything is trained.

Reference responses to some prompts are drawn and scored; the closed form does the rest. What was
drawn is kept in plan.json, so that other budgets can be planned for without drawing again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from kleash.config.leash import LeashConfig
from kleash.config.schema import Config
from kleash.errors import RewardError, UsageError
from kleash.kl.control.groups import OTHERS
from kleash.kl.planning.initial_beta import Start, starting_beta
from kleash.report.plan_page import HEADERS, plan_page, plus_minus, start_sentence, table_rows
from kleash.report.terminal import TableColumn, print_table
from kleash.storage.atomic_files import replace_file
from kleash.storage.plan_file import (
    PLAN_FILE,
    Frontier,
    make_frontier,
    read_frontier,
    write_frontier,
)
from kleash.training.assembly import assemble
from kleash.training.calibration import about, draw, frontier_of, group_targets

PAGE_FILE = "plan.html"


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is made for.

    Attributes:
        betas: in score per nat; empty: a ladder of them.
        budgets: KL in nats per response.
        target_kl: the budget of the run that is planned for, in nats per response.
        target_kl_per_token: the same in nats per token.
    """

    betas: Sequence[float] = ()
    budgets: Sequence[float] = ()
    target_kl: float | None = None
    target_kl_per_token: float | None = None

    def target(self, frontier: Frontier) -> float | None:
        """The budget in nats per response: per token, of a response as long as the reference's."""
        if self.target_kl_per_token is None:
            return self.target_kl
        return self.target_kl_per_token * frontier.about["response_length"]


def plan_request(
    leash: LeashConfig, *, betas: Sequence[float] = (), budgets: Sequence[float] = ()
) -> PlanRequest:
    """What a run with this leash needs of a plan; groups are always planned one by one."""
    if leash.groups is not None:
        return PlanRequest(betas, budgets)
    return PlanRequest(betas, budgets, leash.target_kl, leash.target_kl_per_token)


def plan(config: Config, request: PlanRequest) -> Frontier:
    """Draw reference responses, score them, and plan.

    Args:
        config: of the run that is planned for; where a reference is named,
            policy and leash are not used.
        request: which βs and budgets.

    Raises:
        KleashError: something the user can fix; nothing was written.
    """
    if config.algorithm.name == "distill":
        raise UsageError(
            "expected a run with rewards to plan for, got `algorithm: distill`, whose strength no "
            "score decides: there is nothing to plan"
        )
    if config.reference.path is not None:
        # Started from its reference, whose samples a plan needs.
        tree = config.model_dump()
        tree["policy"]["path"] = config.reference.path
        tree["reference"] = {}
        # Validated again, which decides where the reference of this other policy is kept.
        config = Config.model_validate(tree)
    torch.manual_seed(config.seed)
    components = assemble(config)
    drawn = draw(config, components)
    try:
        return frontier_of(
            drawn,
            about=about(config, components.reference.identity(), drawn),
            targets=group_targets(config.leash, drawn.length),
            betas=request.betas,
            budgets=request.budgets,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def replan(file: Path, request: PlanRequest) -> Frontier:
    """Plan for another request from the samples of an earlier plan.

    Raises:
        KleashError: the file is no plan, or the request cannot be met.
    """
    earlier = read_frontier(file)
    try:
        again = make_frontier(
            earlier.scores,
            prompts=earlier.prompts,
            about=earlier.about,
            betas=request.betas,
            budgets=request.budgets,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return replace(again, groups=earlier.groups)


def starting_point(frontier: Frontier, request: PlanRequest) -> Start | None:
    """Where a run with this target would start; None without a target.

    Raises:
        RewardError: scores do not vary within any prompt.
    """
    target = request.target(frontier)
    return None if target is None else _start(frontier, target)


def _start(frontier: Frontier, target: float) -> Start:
    try:
        return starting_beta(frontier.scores, target)
    except ValueError as error:
        raise RewardError(str(error)) from error


def print_plan(
    frontier: Frontier, sentences: Sequence[str], *, console: Console | None = None
) -> None:
    """The plan as a table, and what it comes to."""
    console = console or Console(highlight=False)
    rows = table_rows(frontier, plus_minus)
    styles = ["" if row.known else "dim" for row, _ in rows]
    columns = [TableColumn(header) for header in HEADERS[:-1]]
    # A budget that the plan does not know has no β: its KL says which row it is.
    print_table(console, columns, [cells[:-1] for _, cells in rows], styles=styles, repeated=2)
    if frontier.groups:
        console.print()
        _print_groups(console, frontier.groups)
    for row, cells in rows:
        if not row.known:
            console.print(f"not known, KL {cells[1]}: {row.reason}", markup=False, style="dim")
    prompts, responses = frontier.scores.shape
    console.print(
        f"{prompts} prompts × {responses} reference responses; ± 95 %, by bootstrap over prompts",
        style="dim",
        markup=False,
    )
    for sentence in sentences:
        console.print(sentence, markup=False)


def _group_sentences(frontier: Frontier) -> list[str]:
    sentences: list[str] = []
    for name, target in frontier.about.get("groups", {}).items():
        asked = f"leash.{'target_kl' if name == OTHERS else f'groups.{name}'} {target:g}"
        group = frontier.groups.get(name)
        sentences.append(
            f"for {asked} nothing is planned: the group has a single prompt, a plan needs 2 or more"
            if group is None
            else start_sentence(asked, _start(group, target))
        )
    return sentences


def _print_groups(console: Console, groups: Mapping[str, Frontier]) -> None:
    """The budget of each group, from its own prompts."""
    columns = [TableColumn("group", "name"), *map(TableColumn, ("prompts", *HEADERS[:5]))]
    rows: list[tuple[str, ...]] = []
    styles: list[str] = []
    for name, group in groups.items():
        row, cells = table_rows(replace(group, rows=[]), plus_minus)[0]
        rows.append((name, str(len(group.prompts)), *cells[:5]))
        styles.append("" if row.known else "dim")
    print_table(console, columns, rows, styles=styles)


def write_plan(folder: Path, frontier: Frontier, sentences: Sequence[str], *, title: str) -> Path:
    """Write plan.json and plan.html into a directory; made if missing.

    Returns:
        Path of the page.

    Raises:
        RunError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_frontier(folder / PLAN_FILE, frontier)
    replace_file(folder / PAGE_FILE, plan_page(frontier, title=title, sentences=sentences))
    return folder / PAGE_FILE


def plan_sentences(frontier: Frontier, request: PlanRequest) -> list[str]:
    """The sentences under the table: the reference, and where β starts for what is asked."""
    sentences = [f"the reference scores {frontier.mean_score:.3f} on average"]
    target = request.target(frontier)
    if request.target_kl_per_token is not None:
        sentences.append(
            f"leash.target_kl_per_token {request.target_kl_per_token:g} is {target:.4g} nats per "
            f"response, of {frontier.about['response_length']:.1f} tokens as the reference writes "
            "them"
        )
    if target is not None:
        per_token = request.target_kl_per_token is not None
        asked = f"{target:.4g} nats per response" if per_token else f"leash.target_kl {target:g}"
        sentences.append(start_sentence(asked, _start(frontier, target)))
    return sentences + _group_sentences(frontier)
