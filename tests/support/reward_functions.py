"""Reward functions that tests name in a configuration."""


def of_no_use(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0] * (len(responses) - 1)


def not_a_number(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0] * (len(responses) - 1) + [float("nan")]


def raises(prompts: list[str], responses: list[str]) -> list[float]:
    raise ZeroDivisionError("no such response")


def even(prompts: list[str], responses: list[str]) -> list[float]:
    """Nearly normal scores, so that a plan of a few samples knows."""
    return [float(sum(word[-1] in "02468" for word in r.split())) for r in responses]


def flat(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0] * len(responses)


def answers_right(
    completions: list[str], answer: list[str], **columns: list[object]
) -> list[float]:
    """A verifiable reward as TRL's are written: 1 for the gold answer anywhere in the response."""
    assert {"completion_ids", "completions_with_special_tokens", "group"} <= columns.keys()
    return [float(gold in text.split()) for text, gold in zip(completions, answer, strict=True)]


async def answers_right_each(prompt: str, completion: str, answer: str) -> float:
    """The same, a response at a time, as one would ask a judge behind an API."""
    return float(answer in completion.split())


def needs_gold(prompts: list[str], responses: list[str], gold_answer: list[str]) -> list[float]:
    return [0.0 for _ in responses]
