"""One interface to all algorithms: the type of the settings selects `prepare` and `loss`."""

from jaxtyping import Float
from torch import Tensor

from kleash.algorithms import grpo, ppo, rloo
from kleash.algorithms.advantages import group_relative
from kleash.algorithms.grpo import GRPOSettings
from kleash.algorithms.ppo import PPOSettings
from kleash.algorithms.rloo import RLOOSettings
from kleash.types import Beta, Experience, Fresh, Loss, ScoredRollout

Settings = PPOSettings | GRPOSettings | RLOOSettings


def prepare(scored: ScoredRollout, beta: Beta, settings: Settings) -> Experience:
    """Rewards and advantages of a rollout: `ppo.prepare`, `grpo.prepare` or `rloo.prepare`.

    Raises:
        ValueError, NonFiniteError: as theirs.
    """
    match settings:
        case PPOSettings():
            return ppo.prepare(scored, beta, settings)
        case GRPOSettings():
            return grpo.prepare(scored, beta, settings)
        case _:
            return rloo.prepare(scored, beta, settings)


def loss(experience: Experience, fresh: Fresh, settings: Settings, *, tokens: int) -> Loss:
    """The loss of a microbatch: `ppo.loss`, `grpo.loss` or `rloo.loss`.

    Raises:
        ValueError, NonFiniteError: as theirs.
    """
    match settings:
        case PPOSettings():
            return ppo.loss(experience, fresh, settings, tokens=tokens)
        case GRPOSettings():
            return grpo.loss(experience, fresh, settings, tokens=tokens)
        case _:
            return rloo.loss(experience, fresh, settings, tokens=tokens)


def trained_scores(scored: ScoredRollout, settings: Settings) -> Float[Tensor, " batch"]:
    """The scores that rewards begin from, in the units β is a price in.

    GRPO's are in standard deviations from the mean of their group; the others are as they came.
    """
    if isinstance(settings, GRPOSettings):
        prompts = scored.rollout.prompt_index
        return group_relative(scored.scores, prompts, epsilon=settings.epsilon)
    return scored.scores


def price(beta: Beta, settings: Settings) -> Beta | None:
    """β in score per nat; None for GRPO, whose β is in standard deviations of a group per nat."""
    return None if isinstance(settings, GRPOSettings) else beta
