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
