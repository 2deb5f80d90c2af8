"""VADER sentiment as a reward: the plain-Python reward of recipe `stories`.

Needs the extra `kleash[stories]`. Nothing is downloaded: the lexicon comes with the package.
"""

from functools import cache
from typing import TYPE_CHECKING

from kleash.errors import RewardError

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _analyser() -> "SentimentIntensityAnalyzer":
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise RewardError(
            "the reward kleash.playground.vader needs vaderSentiment: pip install 'kleash[stories]'"
        ) from None
    return SentimentIntensityAnalyzer()


def compound(prompts: list[str], responses: list[str]) -> list[float]:
    """VADER's `compound` score of each response, between −1 (sad) and 1 (happy).

    Args:
        prompts: not read; part of the interface of every reward callable.
        responses: what the policy wrote.

    Returns:
        One score per response.

    Raises:
        RewardError: vaderSentiment is not installed.
    """
    del prompts
    return [_analyser().polarity_scores(response)["compound"] for response in responses]
