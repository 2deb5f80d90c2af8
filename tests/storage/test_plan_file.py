"""plan.json: what is read is what was written, and between rows the plan is the closed form's."""

import json
import math
from pathlib import Path

import pytest
import torch

from kleash.errors import RunError
from kleash.kl.planning.frontier import NoRow, PlanRow
from kleash.storage.plan_file import (
    PLAN_FILE,
    Frontier,
    frontier_json,
    holds_plan,
    make_frontier,
    read_frontier,
    write_frontier,
)


@pytest.fixture(scope="module")
def frontier() -> Frontier:
    """Normal scores, for which KL* = 1/(2β²) and the gain is √(2·KL*)."""
    generator = torch.Generator().manual_seed(0)
    scores = 5 + torch.randn(200, 256, generator=generator)
    return make_frontier(
        scores, prompts=list(range(200)), about={"seed": 0}, budgets=[0.5, 2.0, 40.0]
    )


def test_a_plan_read_is_the_plan_written(frontier: Frontier, tmp_path: Path) -> None:
    assert not holds_plan(tmp_path)
    write_frontier(tmp_path / PLAN_FILE, frontier)
    assert holds_plan(tmp_path)
    read = read_frontier(tmp_path / PLAN_FILE)
    assert read.rows == frontier.rows and read.budgets == frontier.budgets
    assert torch.equal(read.scores, frontier.scores)
    assert (read.prompts, dict(read.about)) == (frontier.prompts, dict(frontier.about))
    tree = json.loads((tmp_path / PLAN_FILE).read_text())
    assert tree["schema"] == "kleash.plan/1" and tree["budgets"][2]["known"] is False
    assert frontier_json(read) == frontier_json(frontier)
    kinds = [type(row) for row in read.budgets]
    assert kinds == [PlanRow, PlanRow, NoRow]


@pytest.mark.parametrize("kl", [0.05, 0.3, 0.7, 1.0])
def test_the_gain_held_possible_is_that_of_the_closed_form(frontier: Frontier, kl: float) -> None:
    assert frontier.possible_gain(kl) == pytest.approx(math.sqrt(2 * kl), rel=0.05)
    half = frontier.efficiency(score=5 + math.sqrt(2 * kl) / 2, kl=kl)
    assert half == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("kl", [0.0, 1e-3, 30.0])
def test_where_the_plan_is_silent_there_is_no_efficiency(frontier: Frontier, kl: float) -> None:
    assert frontier.possible_gain(kl) is None
    assert frontier.efficiency(score=6.0, kl=kl) is None


def test_scores_that_never_vary_plan_no_row_and_say_so() -> None:
    flat = make_frontier(torch.ones(3, 4), prompts=[0, 1, 2], about={}, budgets=[1.0])
    assert flat.rows == []
    assert isinstance(flat.budgets[0], NoRow) and "do not vary" in flat.budgets[0].reason
    assert flat.efficiency(score=2.0, kl=0.5) is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{}", "cannot be read as one"),
        ("[1", "cannot be read as one"),
        ('{"schema": "kleash.plan/9"}', "expected a plan of schema kleash.plan/1"),
        ('{"schema": "kleash.plan/1", "about": {}}', "KeyError"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / PLAN_FILE).write_text(text)
    with pytest.raises(RunError, match=sentence):
        read_frontier(tmp_path / PLAN_FILE)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected a plan at .* got nothing there"):
        read_frontier(tmp_path / PLAN_FILE)
