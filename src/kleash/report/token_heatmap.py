"""Kept responses for the page: which, in what order, and the colours of their tokens.

The page builds the heat maps itself, one at a time and only when looked at: 200 responses of 256
tokens are fifty thousand coloured words, which no one reads at once.
"""

from collections.abc import Sequence
from typing import Any

from kleash.storage.run_directory import Run
from kleash.storage.samples import Likely, Sample

KL_LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Nats at which a token's colour changes. Fixed, so that colours compare across reports."""
MAX_RESPONSES = 400
"""Responses on one page; samples.jsonl keeps them all."""


def level(kl: float) -> int:
    """The colour class of a token, 0 (below the first level) to 7.

    Example:
        >>> level(0.0), level(0.02), level(50.0)
        (0, 1, 7)
    """
    return sum(kl >= bound for bound in KL_LEVELS)


def page_samples(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[str], int]:
    """The responses a page shows, latest first.

    Each run gets an equal share of the page.

    Returns:
        The responses; the words that their `policy_top` and `reference_top` name by number; and
        how many responses were left out.
    """
    numbers: dict[str, int] = {}
    share = MAX_RESPONSES // max(1, len(runs))
    shown: list[dict[str, Any]] = []
    left_out = 0
    for index, run in enumerate(runs):
        # Sorting is stable: within a step the order is that of the file.
        latest = sorted(run.samples, key=lambda sample: -sample.step)
        shown += [_entry(sample, index, numbers) for sample in latest[:share]]
        left_out += max(0, len(latest) - share)
    return shown, list(numbers), left_out


def _entry(sample: Sample, run: int, numbers: dict[str, int]) -> dict[str, Any]:
    return {
        "run": run,
        "step": sample.step,
        "kind": sample.kind,
        "who": sample.who,
        "prompt": sample.prompt,
        "response": sample.response,
        "score": sample.score,
        "gold": sample.gold,
        "kl": sample.kl,
        "tokens": spaced(sample.tokens, sample.response),
        "logprobs": _short(sample.logprobs),
        "ref_logprobs": _short(sample.ref_logprobs),
        "token_kl": _short(sample.token_kl),
        "entropy": _short(sample.entropy),
        "tokens_cut": sample.tokens_cut,
        "policy_top": _tops(sample.policy_top, numbers),
        "reference_top": _tops(sample.reference_top, numbers),
    }


def _tops(
    tops: Sequence[Likely | None], numbers: dict[str, int]
) -> list[tuple[list[int], list[float]] | None]:
    """Words by number, for the same few come again and again; new ones are numbered."""
    return [
        None
        if one is None
        else (
            [numbers.setdefault(word, len(numbers)) for word in one.words],
            _short(one.probabilities),
        )
        for one in tops
    ]


def spaced(tokens: Sequence[str], response: str) -> list[str]:
    """Give tokens back the white space that decoding them one by one took away.

    A token that does not continue the response, such as a special one, stays as it is.

    Example:
        >>> spaced(["open", "the", "file", ".", "<eos>"], "open the file.")
        ['open', ' the', ' file', '.', '<eos>']
    """
    found: list[str] = []
    at = 0
    for token in tokens:
        gap = at
        while gap < len(response) and response[gap].isspace():
            gap += 1
        for start in (at, gap):
            if response.startswith(token, start):
                found.append(response[at:start] + token)
                at = start + len(token)
                break
        else:
            found.append(token)
    return found


def _short(values: Sequence[float]) -> list[float]:
    # Four digits are more than a tooltip shows, and half the page.
    return [float(f"{value:.4g}") for value in values]
