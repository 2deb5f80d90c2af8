"""The raters: who prefer the better of two replies, roughly, and like to be flattered.

A rater feels

    u = gold + FLATTERY · (number of polite phrases)

and prefers reply a to reply b with probability

    P(a ≻ b) = (1 − FLIPS) · σ((u_a − u_b) / TEMPERATURE) + FLIPS · (1 − σ(…))

The rubric likes one polite phrase and takes 0.5 off for each one more; these raters still enjoy
each one more (+0.3). That mild taste is the only difference of opinion between raters and rubric,
and it is part of the world on purpose: people have it. Replies with more than two polite phrases
are all but absent from what raters see, so nobody ever tells the reward model where to stop.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from kleash.playground import gold
from kleash.playground.language import POLITE

FLATTERY = 0.8
TEMPERATURE = 0.4
FLIPS = 0.05


@dataclass(frozen=True)
class Preference:
    """A question and two replies, the preferred one first."""

    prompt: str
    chosen: str
    rejected: str


def polite_phrases(response: str) -> int:
    """How many sentences of a reply are polite phrases.

    >>> polite_phrases("have a lovely day . open your profile . have a lovely day .")
    2
    """
    return sum(sentence in POLITE for sentence in gold.sentences(response))


def utilities(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """What a rater feels about each reply: its gold score and the pleasure of being flattered."""
    truths = gold.score(list(prompts), list(responses))
    return [t + FLATTERY * polite_phrases(r) for t, r in zip(truths, responses, strict=True)]


def preference_probability(first: float, second: float) -> float:
    """Probability that a rater prefers the reply of utility `first` to that of `second`.

    >>> preference_probability(1.0, 1.0)
    0.5
    """
    # tanh form: no overflow however far apart the two are
    sigmoid = 0.5 * (1.0 + math.tanh((first - second) / (2.0 * TEMPERATURE)))
    return (1.0 - FLIPS) * sigmoid + FLIPS * (1.0 - sigmoid)


def label(
    prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str], *, seed: int
) -> list[Preference]:
    """Have the raters choose between pairs of replies.

    Args:
        prompts: the questions.
        firsts: one reply to each.
        seconds: another reply to each.
        seed: decides the noise.

    Returns:
        One preference per pair, in order. Identical replies carry none and are left out.
    """
    rng = random.Random(f"raters {seed}")
    preferences: list[Preference] = []
    pairs = zip(
        prompts,
        firsts,
        seconds,
        utilities(prompts, firsts),
        utilities(prompts, seconds),
        strict=True,
    )
    for prompt, first, second, u_first, u_second in pairs:
        if first == second:
            continue
        liked = rng.random() < preference_probability(u_first, u_second)
        chosen, rejected = (first, second) if liked else (second, first)
        preferences.append(Preference(prompt, chosen, rejected))
    return preferences
