"""One interface to all algorithms: the type of the settings selects `prepare` and `loss`."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from kleash.algorithms import distill, grpo, ppo, rloo
from kleash.algorithms.advantages import group_relative
from kleash.algorithms.distill import DistillSettings
from kleash.algorithms.grpo import GRPOSettings
from kleash.algorithms.ppo import PPOSettings
from kleash.algorithms.rloo import RLOOSettings
from kleash.types import Beta, Experience, Fresh, Loss, ScoredRollout

Settings = PPOSettings | GRPOSettings | RLOOSettings | DistillSettings


@runtime_checkable
class Algorithm(Protocol):
    """What each algorithm's module has; see `ppo`, `grpo`, `rloo`, `distill`."""

    def prepare(self, scored: ScoredRollout, beta: Beta, settings: Any, /) -> Experience:
        """Rewards and advantages of a rollout."""
        ...

    def loss(self, experience: Experience, fresh: Fresh, settings: Any, /, *, tokens: int) -> Loss:
        """The loss of a microbatch, divided by the tokens of its whole minibatch."""
        ...


def algorithm_of(settings: Settings) -> Algorithm:
    """The module whose `prepare` and `loss` take these settings."""
    match settings:
        case PPOSettings():
            return ppo
        case GRPOSettings():
            return grpo
        case DistillSettings():
            return distill
        case _:
            return rloo


def trained_scores(scored: ScoredRollout, settings: Settings) -> Float[Tensor, " batch"]:
    """The scores that rewards begin from, in the units β is a price in.

    GRPO's are in standard deviations from the mean of their group; the others are as they came.
    """
    if isinstance(settings, GRPOSettings):
        prompts = scored.rollout.prompt_index
        return group_relative(scored.scores, prompts, epsilon=settings.epsilon)
    return scored.scores


def price(beta: Beta, settings: Settings) -> Beta | None:
    """β in score per nat; None where it is in something else per nat.

    GRPO's is in standard deviations of a group, that of distillation in nats of divergence.
    """
    return None if isinstance(settings, GRPOSettings | DistillSettings) else beta
