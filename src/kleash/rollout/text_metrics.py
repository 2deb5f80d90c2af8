"""What can be said of texts without a model: how much they repeat themselves."""

from collections.abc import Sequence


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams of words ÷ all n-grams, within each text, averaged over texts that have any.

    1 means that no text repeats itself; None if no text has n words.

    Example:
        >>> distinct_n(["a b a b", "one two three"], 2)
        0.8333333333333333
    """
    shares: list[float] = []
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else None
