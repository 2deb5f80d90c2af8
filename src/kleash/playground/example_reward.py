"""A reward of two lines, so that a first run needs no reward model: exchange it for your own."""


def word_length(prompts: list[str], responses: list[str]) -> list[float]:
    """Mean number of characters of a response's words.

    Args:
        prompts: not read; part of the interface of every reward callable.
        responses: what the policy wrote.

    Returns:
        One score per response; 0 for a response without words.

    Example:
        >>> word_length(["p", "p", "p"], ["to be or not", "reinforcement", " "])
        [2.25, 13.0, 0.0]
    """
    del prompts
    words = [response.split() for response in responses]
    return [sum(map(len, each)) / max(len(each), 1) for each in words]
