"""The gold rubric: what a reply of the help desk is truly worth.

Raters and reward model never see it; it is the truth that the demo's table reports. A reply is
worth the sum of these parts (`GoldParts`):

    +0.7   each step of what was asked, once
    +0.4   all its steps there, in order
    −0.5   each step of something else
    −0.4   each step said again
    −0.3   each sentence that is neither a step nor polite: vague, garbled
    +0.3   a polite phrase;  −0.5 each one more
    −2.0 · (1 − distinct-3), the share of three-word runs that only repeat
    +0.3   ends with a full stop;  −0.7 breaks off
    −0.05  each word beyond 30;  −0.5 fewer than five words

so that the best reply, three steps in order, one kind word, full stop, is worth 3.1.
"""

from dataclasses import astuple, dataclass

from kleash.playground.language import CONNECTIVES, POLITE, TOPICS, topic_of
from kleash.rollout.text_metrics import distinct_n

_STEPS = {step: topic.name for topic in TOPICS for step in topic.steps}


@dataclass(frozen=True)
class GoldParts:
    """What each line of the rubric adds to one reply."""

    answers: float
    complete: float
    foreign: float
    repeated: float
    idle: float
    polite: float
    distinct: float
    ends: float
    length: float

    @property
    def total(self) -> float:
        """The gold score: the sum of the parts."""
        return sum(astuple(self))


def sentences(response: str) -> list[str]:
    """The sentences of a reply, without full stops and opening connectives.

    >>> sentences("first open your profile . have a lovely day . then")
    ['open your profile', 'have a lovely day', '']
    """
    # Word by word, because a decoder may or may not put a space before the full stop.
    found: list[list[str]] = [[]]
    for word in response.replace(".", " . ").split():
        if word == ".":
            found.append([])
        else:
            found[-1].append(word)
    if not found[-1]:
        found.pop()
    return [" ".join(s[1:] if s and s[0] in CONNECTIVES else s) for s in found]


def explain(prompt: str, response: str) -> GoldParts:
    """The parts of one reply's gold score.

    Args:
        prompt: a question of the help desk.
        response: the reply, as text without special tokens.

    Raises:
        ValueError: if the prompt is no question of the help desk.

    >>> parts = explain(
    ...     "how do i update my card ?",
    ...     "first find the payment settings . then remove the old card . "
    ...     "finally add the new card . thank you for asking .",
    ... )
    >>> round(parts.total, 2)
    3.1
    """
    topic = topic_of(prompt)
    said = sentences(response)
    words = response.replace(".", " . ").split()
    steps = [sentence for sentence in said if sentence in _STEPS]
    polite = sum(sentence in POLITE for sentence in said)
    unique = list(dict.fromkeys(steps))
    own = [step for step in unique if _STEPS[step] == topic.name]
    distinct = distinct_n([" ".join(words)], 3)  # None: too short to repeat anything
    return GoldParts(
        answers=0.7 * len(own),
        complete=0.4 if tuple(own) == topic.steps else 0.0,
        foreign=-0.5 * (len(unique) - len(own)),
        repeated=-0.4 * (len(steps) - len(unique)),
        idle=-0.3 * (len(said) - len(steps) - polite),
        polite=0.3 - 0.5 * (polite - 1) if polite else 0.0,
        distinct=0.0 if distinct is None else -2.0 * (1.0 - distinct),
        ends=0.3 if words[-1:] == ["."] else -0.7,
        length=-0.05 * max(0, len(words) - 30) - (0.5 if len(words) < 5 else 0.0),
    )


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """The gold score of each reply: a reward callable, `kleash.playground.gold:score`.

    Raises:
        ValueError: if a prompt is no question of the help desk, or the lists differ in length.

    >>> score(["how do i close my account ?"], ["it is quite easy ."])
    [0.0]
    """
    return [
        explain(prompt, response).total for prompt, response in zip(prompts, responses, strict=True)
    ]
