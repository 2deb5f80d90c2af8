"""From a score per response to a reward per token, and what may be done to a score before.

A score may be penalised for a missing end and normalised by running statistics; the sum of score
and KL never is, because that would move β without saying so. Left out: clipping of rewards, which
would break the identity that a row sums to the regularised objective.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kleash.types import Beta


def kl_shaped_rewards(
    scores: Float[Tensor, " batch"],
    charge: Float[Tensor, "batch token"],
    beta: Beta,
    mask: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch token"]:
    r"""Spread a response's KL-regularised score over its tokens.

        r_t = −β · charge_t + score · 1[t is the last token of the response]

    so that a row sums to the regularised objective of the response,

        Σ_t r_t = score − β · Σ_t charge_t.

    With charge = k1 = log π − log π_ref this is what the policy maximises in expectation. What
    other placements charge is said in `kleash.kl.placements`.

    Args:
        scores: score of each response.
        charge: KL charged at each token, in nats, positive when the policy has drifted.
        beta: strength of the penalty, in score per nat, for all responses or for each. At 0
            nothing is charged, so that even a NaN in `charge` goes nowhere.
        mask: True on the tokens the policy wrote, end-of-sequence included.

    Returns:
        Rewards, zero outside the response, at least float32. No gradient flows through them.

    Raises:
        ValueError: if `beta` is negative or not finite, or a response has no token to be
            scored on.

    Example:
        >>> kl_shaped_rewards(
        ...     scores=torch.tensor([1.0]),
        ...     charge=torch.tensor([[0.2, 0.4, 9.0]]),
        ...     beta=0.5,
        ...     mask=torch.tensor([[True, True, False]]),
        ... )
        tensor([[-0.1000,  0.8000,  0.0000]])

    References:
        Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, eq. 2,
        https://arxiv.org/abs/1909.08593
    """
    dtype = torch.promote_types(torch.promote_types(scores.dtype, charge.dtype), torch.float32)
    has_token = mask.any(-1)
    if not has_token.all():
        empty = (~has_token).nonzero().flatten().tolist()
        raise ValueError(
            f"every response needs a token for its score to land on, got empty responses {empty}: "
            "leave them out of the rollout"
        )
    score, charged = scores.detach().to(dtype), charge.detach().to(dtype)
    betas = beta_of_each(beta, charged)[:, None]
    penalty = torch.where(mask & (betas > 0), -betas * charged, 0.0)
    # argmax takes the first of equals: the last token kept, wherever the mask begins.
    last = mask.cumsum(-1).argmax(-1, keepdim=True)
    return penalty.scatter_add(-1, last, score[:, None])


def beta_of_each(beta: Beta, like: Float[Tensor, "batch *rest"]) -> Float[Tensor, " batch"]:
    """β of every response, in score per nat, in the type and on the device of other numbers.

    Raises:
        ValueError: if a β is negative or not finite.

    Example:
        >>> beta_of_each(0.5, torch.tensor([3.0, 4.0]))
        tensor([0.5000, 0.5000])
    """
    betas = torch.as_tensor(beta, dtype=torch.float64)
    if not ((betas >= 0) & betas.isfinite()).all():
        raise ValueError(f"beta must be finite and not negative, got {beta}: β = 0 charges nothing")
    return betas.to(like).expand(len(like))


def missing_eos_penalty(
    scores: Float[Tensor, " batch"],
    ended: Bool[Tensor, " batch"],
    penalty: float,
) -> Float[Tensor, " batch"]:
    """Lower the score of responses that the length limit cut off.

        score ← score − penalty · 1[not ended]

    Subtracted, not replaced: among truncated responses the better one stays the better one.

    Args:
        scores: score of each response.
        ended: True where the policy itself ended the response.
        penalty: score taken off; positive.

    Returns:
        Scores after the penalty.

    Raises:
        ValueError: if `penalty` is not a positive number.

    Example:
        >>> missing_eos_penalty(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.25)
        tensor([1.0000, 0.7500])
    """
    if not 0 < penalty < float("inf"):
        raise ValueError(
            f"the missing-EOS penalty must be positive and finite, got {penalty}: "
            "it is subtracted from the score"
        )
    return torch.where(ended, scores, scores - penalty)


@dataclass(frozen=True)
class ScoreStatistics:
    r"""Running mean and spread of all scores seen, as data that a checkpoint can hold.

        mean = Σ x / n        m2 = Σ (x − mean)²        sd = √(m2 / (n − 1))

    Two sets of scores merge exactly, with δ = mean_b − mean_a:

        mean = mean_a + δ · n_b / n        m2 = m2_a + m2_b + δ² · n_a n_b / n

    so that the order and the batches in which scores came do not matter, and large scores lose
    nothing to cancellation. All of it in float64.

    Example:
        >>> seen = ScoreStatistics().update(torch.tensor([1.0, 2.0])).update(torch.tensor([3.0]))
        >>> seen
        ScoreStatistics(count=3, mean=2.0, m2=2.0)
        >>> seen.normalise(torch.tensor([2.0, 4.0]))
        tensor([0., 2.])
        >>> seen.scale(torch.tensor([2.0, 4.0]))
        tensor([2., 4.])

    References:
        Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", 1979, eq. 2.1, http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf
    """

    count: int = 0
    """Scores seen."""
    mean: float = 0.0
    """Their mean."""
    m2: float = 0.0
    """Sum of their squared deviations from the mean."""

    def merge(self, other: "ScoreStatistics") -> "ScoreStatistics":
        """Statistics of both sets of scores together."""
        count = self.count + other.count
        if count == 0:
            return ScoreStatistics()
        delta = other.mean - self.mean
        return ScoreStatistics(
            count=count,
            mean=self.mean + delta * other.count / count,
            m2=self.m2 + other.m2 + delta**2 * self.count * other.count / count,
        )

    def update(self, scores: Float[Tensor, " batch"]) -> "ScoreStatistics":
        """Statistics with a further batch of scores; `self` stays as it is.

        Raises:
            ValueError: if a score is NaN or infinite: one would spoil the statistics for good.
        """
        # One copy to the host per rollout; float64 is not available on every device.
        values = scores.detach().cpu().double()
        if not values.isfinite().all():
            bad = (~values.isfinite()).nonzero().flatten().tolist()
            raise ValueError(
                f"scores must be finite to enter the running statistics, got {values[bad].tolist()}"
                f" for responses {bad}: fix the reward model"
            )
        if values.numel() == 0:
            return ScoreStatistics(self.count, self.mean, self.m2)
        mean = values.mean()
        batch = ScoreStatistics(values.numel(), float(mean), float((values - mean).square().sum()))
        return ScoreStatistics(self.count, self.mean, self.m2).merge(batch)

    @property
    def sd(self) -> float:
        """Sample standard deviation of the scores seen.

        Raises:
            ValueError: if fewer than two scores were seen, or all were equal.
        """
        if self.count < 2:
            raise ValueError(
                f"the sd of scores needs at least 2 scores, got {self.count}: "
                "update the statistics before normalising"
            )
        if self.m2 == 0:
            raise ValueError(
                f"the sd of scores must be positive, got 0: all {self.count} scores equal "
                f"{self.mean}, so the reward model does not distinguish any responses"
            )
        return (self.m2 / (self.count - 1)) ** 0.5

    def normalise(self, scores: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """(score − mean) / sd: units of one sd, zero at the mean; β is then in sd per nat.

        Raises:
            ValueError: if fewer than two scores were seen, or all were equal.
        """
        return (scores - self.mean) / self.sd

    def scale(self, scores: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """score / sd: units of one sd, the zero of the score stays where it was.

        Raises:
            ValueError: if fewer than two scores were seen, or all were equal.
        """
        return scores / self.sd
