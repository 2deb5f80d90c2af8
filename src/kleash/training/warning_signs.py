"""Signs, in a run's own numbers, that it collapsed or exploits its reward model.

A pure function of metrics; nothing is stopped by it (that is what tripwires are for). Each sign
compares a step with the run's first, and must hold at each of the last `STEPS` steps: a single
noisy batch is no sign, nor is something that passed. The bounds are wide on purpose: a warning
that a sound run gets is one that is no longer read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kleash.storage.samples import Sample

Number = float | int | None
Line = Mapping[str, Number]

STEPS = 3
"""For how many steps in a row, up to the last one, a sign must hold."""
LEFT = 0.4
"""Share of the first step's distinct-2 or entropy per token below which it has collapsed."""
LONGER = 3.0
"""Times the first step's length from which on length runs away; shorter than its inverse, too."""
WORST = 3
"""Responses shown beside a sign."""
ERRORS = 3.0
"""Standard errors of a difference of scores from which on it counts."""


@dataclass(frozen=True)
class WarningSign:
    """One sign, and since which step it has held without a break."""

    name: str
    since: int
    sentence: str


def warning_signs(metrics: Sequence[Line], *, known_kl: float | None) -> list[WarningSign]:
    """The signs that hold at the end of a run.

    Args:
        metrics: one line a step, in their order, with the keys of docs/metrics.md; a line without
            `objective/kl_ref` (the reference's held-out evaluation) is no step.
        known_kl: nats per response beyond which the run's plan knows nothing, the log of its
            responses to a prompt; None: there is no plan, and no sign rests on it.

    Returns:
        The signs in a fixed order; none where there are fewer than `STEPS` steps after the first.
    """
    steps = [line for line in metrics if line.get("objective/kl_ref") is not None]
    found = [_heldout_falls(metrics)]
    if len(steps) > STEPS:
        first = steps[0]
        found += [
            None if known_kl is None else _beyond_the_plan(steps, known_kl),
            _collapsed(steps, "rollout/distinct_2", "the variety of word pairs (distinct-2)"),
            _collapsed(steps, "objective/entropy_per_token", "the entropy per token"),
            _since(
                steps,
                lambda line: _outgrown(first, line),
                "length",
                lambda line: (
                    f"responses are {line['rollout/length']:.3g} tokens long, "
                    f"{first['rollout/length']:.3g} at step {first['step']}"
                ),
            ),
        ]
    return [sign for sign in found if sign is not None]


def worst_samples(samples: Iterable[Sample], *, since: int) -> list[dict[str, object]]:
    """The kept responses that went farthest from the reference since a sign began, as plain values.

    Args:
        samples: of the run, with per-token numbers or without.
        since: the first step to look at.

    Returns:
        At most `WORST` of them, the farthest first: step, prompt, response, score, KL in nats.
    """
    known = [
        (sample.kl, sample)
        for sample in samples
        if sample.step >= since and sample.who == "policy" and sample.kl is not None
    ]
    known.sort(key=lambda pair: -pair[0])
    return [
        {
            "step": sample.step,
            "prompt": sample.prompt,
            "response": sample.response,
            "score": sample.score,
            "kl": kl,
        }
        for kl, sample in known[:WORST]
    ]


def _beyond_the_plan(steps: Sequence[Line], known_kl: float) -> WarningSign | None:
    """The score rises significantly while the KL passes what the plan's samples know."""
    first = steps[0]

    def holds(line: Line) -> bool:
        kl = line["objective/kl_ref"]
        return kl is not None and kl > known_kl and _difference(first, line, "objective") > ERRORS

    return _since(
        steps,
        holds,
        "kl_beyond_plan",
        lambda line: (
            f"the score rises while the KL is {line['objective/kl_ref']:.3g} nats per response, "
            f"beyond the {known_kl:.3g} that the plan's samples know"
        ),
    )


def _collapsed(steps: Sequence[Line], key: str, what: str) -> WarningSign | None:
    first = steps[0].get(key)
    if not first:
        return None

    def holds(line: Line) -> bool:
        value = line.get(key)
        return value is not None and value < LEFT * first

    return _since(
        steps,
        holds,
        key.rpartition("/")[2],
        lambda line: f"{what} fell to {line[key]:.3g} from {first:.3g}",
    )


def _outgrown(first: Line, line: Line) -> bool:
    start, now = first.get("rollout/length"), line.get("rollout/length")
    if not start or now is None:
        return False
    return now > LONGER * start or now < start / LONGER


def _heldout_falls(metrics: Sequence[Line]) -> WarningSign | None:
    """The last held-out gold score, or score where there is none, is below the reference's."""
    for key in ("gold", "scores"):
        lines = [line for line in metrics if line.get(f"heldout/{key}") is not None]
        if len(lines) < 2 or lines[0]["step"] != 0:
            continue
        first = lines[0]
        below = [_difference(first, line, "heldout", key) < -ERRORS for line in lines]
        if not below[-1]:
            return None
        start = len(below) - 1
        while below[start - 1]:
            start -= 1
        word = "the second opinion on held-out prompts" if key == "gold" else "the held-out score"
        return WarningSign(
            f"heldout_{key}",
            int(lines[start]["step"] or 0),
            f"{word} is {lines[-1][f'heldout/{key}']:.3g}, the reference's was "
            f"{first[f'heldout/{key}']:.3g}",
        )
    return None


def _difference(first: Line, line: Line, section: str, key: str = "scores") -> float:
    """How much a score rose, in standard errors of the difference; 0 where one is not known."""
    values = [one.get(f"{section}/{key}") for one in (first, line)]
    errors = [one.get(f"{section}/{key}_se") for one in (first, line)]
    (old, new), (old_error, new_error) = values, errors
    if old is None or new is None or old_error is None or new_error is None:
        return 0.0
    error = (old_error**2 + new_error**2) ** 0.5
    return (new - old) / error if error > 0 else 0.0


def _since(
    steps: Sequence[Line],
    holds: Callable[[Line], bool],
    name: str,
    sentence: Callable[[Line], str],
) -> WarningSign | None:
    start = len(steps)
    while start > 1 and holds(steps[start - 1]):
        start -= 1
    if len(steps) - start < STEPS:
        return None
    return WarningSign(name, int(steps[start]["step"] or 0), sentence(steps[-1]))
