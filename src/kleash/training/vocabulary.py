"""Now and then a rollout is read once more, with both laws over the whole vocabulary."""

from kleash.models.policy import Policy
from kleash.rollout.engine import SeparateEngine
from kleash.rollout.vocabulary_gap import vocabulary_gap
from kleash.training.metrics import Number
from kleash.types import Rollout


def vocabulary_measures(
    rollout: Rollout, policy: Policy, *, temperature: float, engine: SeparateEngine | None
) -> dict[str, Number]:
    """Both directions of the sampler's KL, exact, in the states of a few responses.

    Call it before the update: the weights must be those that wrote.
    """
    forward, reverse = vocabulary_gap(
        rollout,
        policy,
        temperature=temperature,
        engine_laws=None if engine is None else engine.next_token_logprobs,
    )
    return {
        "rollout/kl_sampler_exact_per_token": forward,
        "rollout/kl_sampler_exact_reverse_per_token": reverse,
    }
