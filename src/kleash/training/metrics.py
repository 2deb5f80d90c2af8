"""What one step says about itself: named numbers from a scored rollout and its experience.

Every key is defined, with its formula and unit, in `docs/metrics.md`. Three uses of the KL, three
numbers: the KL *charged* in the rewards, by the placement's own estimate (`objective/charge` holds
β times it), the KL *controlled*, and the KL *reported* (`objective/kl_ref`: exact, never clamped,
with its standard error; `objective/non_score_reward` holds −β times it).
"""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kleash.algorithms import dispatch
from kleash.algorithms.advantages import gae
from kleash.algorithms.dispatch import Settings
from kleash.algorithms.ppo import PPOSettings
from kleash.algorithms.rewards import beta_of_each
from kleash.algorithms.sampler_correction import correction_numbers
from kleash.errors import ScoringError
from kleash.kl.control_variate import kl_excess, mixing_coefficient
from kleash.kl.placements import charges
from kleash.kl.sampler_gap import sampler_gap
from kleash.kl.statistics import Estimate, clustered_mean, clustered_ratio, response_kl, variance_of
from kleash.masked import masked_mean
from kleash.rollout.text_metrics import distinct_n
from kleash.types import Beta, Experience, ScoredRollout

Number = float | int | None

_ACCOUNTING_TOLERANCE = 1e-5
"""How far the accounting identity may be off, relative to the size of its terms."""


def objective_measures(scored: ScoredRollout, *, beta: Beta | None) -> dict[str, Number]:
    """KL, entropy, score and objective of a rollout, per response, with standard errors.

    Standard errors are clustered by prompt; None where there is only one prompt. `beta` is None
    where it is not in score per nat (GRPO's is in spreads of a group): there is no objective then.
    """
    rollout = scored.rollout
    mask, clusters = rollout.response_mask, rollout.prompt_index
    spent = response_kl(scored.kl, mask).double()
    exact = clustered_mean(spent, clusters)
    k1 = clustered_mean(response_kl(scored.rollout_logprobs - scored.ref_logprobs, mask), clusters)
    scores = clustered_mean(scored.scores, clusters)
    measures: dict[str, Number] = {
        **with_error("objective/kl_ref", exact),
        **with_error("objective/kl_ref_k1", k1),
        **with_error("objective/scores", scores),
        "objective/kl_ref_per_token": float(masked_mean(scored.kl, mask)),
        "objective/entropy": float(response_kl(scored.entropy, mask).double().mean()),
        "objective/entropy_per_token": float(masked_mean(scored.entropy, mask)),
    }
    if beta is not None:
        price = float((beta_of_each(beta, spent) * spent).mean())
        measures["objective/non_score_reward"] = -price
        measures["objective/rlhf_reward"] = scores.mean - price
    return measures


def rollout_measures(scored: ScoredRollout, responses: Sequence[str]) -> dict[str, Number]:
    """Length, endings and variety."""
    rollout = scored.rollout
    mask = rollout.response_mask
    return {
        "rollout/length": float(mask.sum(-1).double().mean()),
        "rollout/eos_fraction": float(rollout.ended.double().mean()),
        "rollout/distinct_2": distinct_n(responses, 2),
    }


def sampler_measures(
    scored: ScoredRollout, settings: Settings, *, floor: float | None
) -> dict[str, Number]:
    """The KL between sampler and trainer both ways, and what its correction has to do.

    Args:
        scored: the rollout; nothing is measured where its engine gave no log-probabilities.
        settings: the numbers of the algorithm, the correction among them.
        floor: the KL per token before the run's first update; None: this is that rollout.
    """
    rollout = scored.rollout
    if rollout.sampler_logprobs is None:
        return {}
    laws = (scored.rollout_logprobs, rollout.sampler_logprobs, rollout.response_mask)
    gap = sampler_gap(*laws, rollout.prompt_index)
    measures = {
        **with_error("rollout/kl_sampler", gap.per_response),
        **with_error("rollout/kl_sampler_per_token", gap.per_token),
        **with_error("rollout/kl_sampler_reverse_per_token", gap.reverse_per_token),
        "rollout/kl_sampler_floor": gap.per_token.mean if floor is None else floor,
    }
    if settings.correction != "none":
        numbers = correction_numbers(settings.correction, *laws, clip=settings.correction_clip)
        measures |= {f"rollout/correction_{name}": x for name, x in numbers.items()}
    return measures


def distill_measures(scored: ScoredRollout) -> dict[str, Number]:
    """How far student and teacher are apart on the student's responses, in nats per response.

    Both directions, exact, with standard errors clustered by prompt, and the reverse KL per token;
    nothing where nothing is distilled.
    """
    if scored.teacher_kl is None or scored.teacher_forward_kl is None:
        return {}
    mask, clusters = scored.rollout.response_mask, scored.rollout.prompt_index
    reverse = response_kl(scored.teacher_kl, mask)
    forward = response_kl(scored.teacher_forward_kl, mask)
    lengths = mask.sum(-1).double()
    return {
        **with_error("distill/reverse_kl", clustered_mean(reverse, clusters)),
        **with_error("distill/forward_kl", clustered_mean(forward, clusters)),
        **with_error("distill/reverse_kl_per_token", clustered_ratio(reverse, lengths, clusters)),
    }


def accounting_residual(
    experience: Experience, scores: Tensor, charge: Tensor, *, beta: Beta
) -> float:
    """|mean(Σ_t rewards_t) − (mean(score) − mean(β · Σ_t charge_t))|: zero but for rounding.

    `scores` are those the algorithm trains on, `charge` is what the placement says is penalised
    per token; both computed apart from the rewards.
    """
    kept = experience.mask.any(-1)
    rewards = response_kl(experience.rewards, experience.mask)[kept].double()
    penalised = response_kl(charge, experience.mask).double()
    penalised = (beta_of_each(beta, penalised) * penalised)[kept]
    objective = scores[kept].double() - penalised
    return float((rewards.mean() - objective.mean()).abs())


def with_error(key: str, estimate: Estimate) -> dict[str, Number]:
    """A mean under its key, and its standard error beside it."""
    return {key: estimate.mean, f"{key}_se": estimate.standard_error}


def first_ratio_error(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> float:
    """max |π_now/π_rollout − 1| over kept tokens: 0 but for rounding before the first update."""
    ratio = torch.where(mask, (logprobs - rollout_logprobs).expm1(), 0.0)
    return float(ratio.abs().max())


def score_variance(scored: ScoredRollout) -> float | None:
    """Variance of the scores, within prompts where there are several responses to each."""
    return variance_of(scored.scores, scored.rollout.prompt_index)


def charge_measures(settings: Settings, experience: Experience, beta: Beta) -> dict[str, Number]:
    """What the rewards of a rollout were made of, each a mean over the responses trained on.

    `trained_reward` is read off the rewards; `trained_scores − charge` must equal it to
    `objective/accounting_residual`. All three in the units that β is a price in.
    """
    kept = experience.mask.any(-1)
    scores = dispatch.trained_scores(experience.scored, settings)[kept].double()
    charge = response_kl(_charge(settings, experience, beta), experience.mask).double()
    rewards = response_kl(experience.rewards, experience.mask)[kept].double()
    return {
        "objective/trained_scores": float(scores.mean()),
        "objective/charge": float((beta_of_each(beta, charge) * charge)[kept].mean()),
        "objective/trained_reward": float(rewards.mean()),
    }


def account(settings: Settings, experience: Experience, beta: Beta) -> float:
    """The accounting identity, from the placement's charges computed apart from the rewards."""
    scores = dispatch.trained_scores(experience.scored, settings)
    charge = _charge(settings, experience, beta)
    residual = accounting_residual(experience, scores, charge, beta=beta)
    size = 1 + float(experience.rewards.abs().sum(-1).max())
    if residual > _ACCOUNTING_TOLERANCE * size:
        raise ScoringError(
            f"the rewards do not add up to score − β·KL: off by {residual:.3g}; this is a fault "
            "of kleash, please report it with the run directory"
        )
    return residual


def _charge(settings: Settings, experience: Experience, beta: Beta) -> Tensor:
    """[batch, token] what the placement takes off the rewards, before β; 0 where β is."""
    scored = experience.scored
    if not beta_of_each(beta, scored.scores).any():
        return torch.zeros_like(scored.kl)
    return charges(
        settings.placement,
        logprobs=scored.rollout_logprobs,
        ref_logprobs=scored.ref_logprobs,
        kl=scored.kl,
        mask=scored.rollout.response_mask,
        mixing=settings.mixing,
    )


LARGEST_MIXING = 1.0
"""Bound on |c|. Near the reference the best c is far below 0, but only for the first gradient: with
several updates to a rollout the charges stay what they were while the differentiable KL, then of
negative weight, moves, and would drive the policy away (`benchmarks/learning.py`)."""


def next_mixing(settings: Settings, experience: Experience, beta: Beta) -> float | None:
    """c of the next step's `mixed`, from this step's responses: independent of those it mixes."""
    if not isinstance(settings, PPOSettings) or settings.mixing is None:
        return None
    scored, mask = experience.scored, experience.mask
    excess = kl_excess(
        scored.rollout_logprobs, scored.ref_logprobs, scored.kl, mask, decay=settings.lam
    )
    excess = beta_of_each(beta, excess)[:, None] * excess  # in score: each response at its price
    # The advantages of c = 0, before whitening: those in use less what c added to them.
    assert scored.values is not None
    plain, _ = gae(
        experience.rewards,
        scored.values,
        scored.rollout.response_mask,
        gamma=settings.gamma,
        lam=settings.lam,
    )
    best = mixing_coefficient(plain - settings.mixing * excess, excess, mask, beta=1.0)
    return min(max(best, -LARGEST_MIXING), LARGEST_MIXING)


def reward_measures(parts: Mapping[str, Tensor], total: Tensor) -> dict[str, Number]:
    """Each reward model's mean score, and that of their weighted sum, before normalisation."""
    means = {f"reward/{name}": float(part.mean()) for name, part in parts.items()}
    return {**means, "reward/total": float(total.mean())}


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, Number] = {}

    @contextmanager
    def measure(self, key: str) -> Generator[None]:
        """Time what happens inside."""
        start = time.perf_counter()
        yield
        self.seconds[key] = time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._start
