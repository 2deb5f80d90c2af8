"""Now and then a rollout is read once more, with both laws over the whole vocabulary."""

from kleash.rollout.vocabulary_gap import vocabulary_gap
from kleash.training.components import Components
from kleash.training.metrics import Number
from kleash.types import ScoredRollout


def vocabulary_measures(components: Components, scored: ScoredRollout) -> dict[str, Number]:
    """Both directions of the sampler's KL, exact, in the states of a few responses.

    Call it before the update: the weights must be those that wrote.
    """
    engine = components.engine
    forward, reverse = vocabulary_gap(
        scored.rollout,
        components.policy,
        temperature=components.sampling.temperature,
        engine_laws=None if engine is None else engine.next_token_logprobs,
    )
    return {
        "rollout/kl_sampler_exact_per_token": forward,
        "rollout/kl_sampler_exact_reverse_per_token": reverse,
    }
