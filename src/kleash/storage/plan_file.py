"""A plan, written down: plan.json, with the scores it rests on, and what it holds possible.

    schema     "kleash.plan/1"
    about      what was planned for: models, prompts, lengths, seed
    prompts    numbers of the prompts in their file; scores[i][j]: j-th response to prompts[i]
    rows       one per β: beta, kl, score, gain and objective, each {value, low, high}; …
    budgets    one per budget; {budget, known: false, reason} where no β spends it
    groups     where groups of prompts have budgets: the same for each, from its prompts alone

Everything else in it can be had again from the scores. Left out: drawing them.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.errors import RunError
from kleash.kl.planning.frontier import (
    Interval,
    NoRow,
    PlanRow,
    beta_ladder,
    plan_for_betas,
    plan_for_budgets,
)
from kleash.kl.planning.tilting import spread
from kleash.storage.atomic_files import plain_json, replace_file

SCHEMA = "kleash.plan/1"
PLAN_FILE = "plan.json"
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Frontier:
    """What the optimum spends and gains at each β, and the samples that say so."""

    about: Mapping[str, Any]
    prompts: Sequence[int]
    scores: Float[Tensor, "prompt sample"]
    rows: Sequence[PlanRow]
    budgets: Sequence[PlanRow | NoRow]
    groups: Mapping[str, "Frontier"] = field(default_factory=dict[str, "Frontier"])
    """Of the prompts of each group that has a budget of its own; a single prompt plans nothing."""

    @property
    def mean_score(self) -> float:
        """Mean score of the reference."""
        return float(self.scores.double().mean())

    def possible_gain(self, kl: float) -> float | None:
        """Score that the optimum gains at a KL: between the rows known, in proportion to √KL.

        Returns:
            Gain in score; None outside the KL that known rows span.
        """
        known = sorted((row for row in self.rows if row.known), key=lambda row: row.kl.value)
        for below, above in itertools.pairwise(known):
            if below.kl.value <= kl <= above.kl.value:
                start, end = math.sqrt(below.kl.value), math.sqrt(above.kl.value)
                along = (math.sqrt(kl) - start) / (end - start) if end > start else 0.0
                return below.gain.value + along * (above.gain.value - below.gain.value)
        return None

    def efficiency(self, *, score: float, kl: float) -> float | None:
        """Score gained over the reference ÷ score that the plan holds possible at that KL.

        Returns:
            The share; None where the plan is silent.
        """
        possible = self.possible_gain(kl)
        return None if not possible else (score - self.mean_score) / possible


def make_frontier(
    scores: Float[Tensor, "prompt sample"],
    *,
    prompts: Sequence[int],
    about: Mapping[str, Any],
    betas: Sequence[float] = (),
    budgets: Sequence[float] = (),
) -> Frontier:
    """Plan for βs (a ladder of them unless given) and for budgets.

    Raises:
        ValueError: as `plan_for_betas` and `plan_for_budgets` do.
    """
    scores = scores.detach().cpu().double()
    if not betas and spread(scores) > 0:
        betas = beta_ladder(scores)
    return Frontier(
        about=about,
        prompts=list(prompts),
        scores=scores,
        rows=plan_for_betas(scores, betas, confidence=CONFIDENCE),
        budgets=plan_for_budgets(scores, budgets, confidence=CONFIDENCE),
    )


def frontier_json(frontier: Frontier) -> dict[str, Any]:
    """The content of plan.json."""
    groups = {name: _content(group) for name, group in frontier.groups.items()}
    return {
        "schema": SCHEMA,
        "units": {"kl": "nats per response", "beta": "score per nat"},
        "about": dict(frontier.about),
        "confidence": CONFIDENCE,
        **_content(frontier),
        **({"groups": groups} if groups else {}),
    }


def _content(frontier: Frontier) -> dict[str, Any]:
    return {
        "mean_score": frontier.mean_score,
        "spread": spread(frontier.scores),
        "rows": [asdict(row) for row in frontier.rows],
        "budgets": [asdict(row) for row in frontier.budgets],
        "prompts": list(frontier.prompts),
        "scores": frontier.scores.tolist(),
    }


def write_frontier(file: Path, frontier: Frontier) -> None:
    """Write plan.json, whole or not at all.

    Raises:
        RunError: if it cannot be written.
    """
    replace_file(file, plain_json(frontier_json(frontier)) + "\n")


def holds_plan(folder: Path) -> bool:
    """Whether a directory, of a run or of `kleash plan`, holds a plan."""
    return (folder / PLAN_FILE).is_file()


def read_frontier(file: Path) -> Frontier:
    """Read a plan back: equal to the one written.

    Raises:
        RunError: the file cannot be read or is not a plan of this schema.
    """
    try:
        tree = cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))
        if tree["schema"] != SCHEMA:
            raise RunError(
                f"expected a plan of schema {SCHEMA} in {str(file)!r}, got {tree['schema']!r}: "
                "plan again"
            )
        return _frontier(tree)
    except RunError:
        raise
    except FileNotFoundError:
        raise RunError(
            f"expected a plan at {str(file)!r}, got nothing there: check the path, or make one "
            "with `kleash plan CONFIG --output DIRECTORY`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"expected a plan in {str(file)!r}, got a file that cannot be read as one "
            f"({type(error).__name__}: {error}): plan again"
        ) from error


def _frontier(tree: Mapping[str, Any]) -> Frontier:
    return Frontier(
        about=tree.get("about", {}),
        prompts=tree["prompts"],
        scores=torch.tensor(tree["scores"], dtype=torch.float64),
        rows=[_row(row) for row in tree["rows"]],
        budgets=[NoRow(**row) if "budget" in row else _row(row) for row in tree["budgets"]],
        groups={name: _frontier(group) for name, group in tree.get("groups", {}).items()},
    )


def _row(tree: Mapping[str, Any]) -> PlanRow:
    intervals = {f.name for f in fields(PlanRow) if f.type is Interval}
    values: dict[str, Any] = {
        key: Interval(**value) if key in intervals else value for key, value in tree.items()
    }
    return PlanRow(**values)
