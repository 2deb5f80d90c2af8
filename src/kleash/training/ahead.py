"""One step ahead: the next rollout is written while the policy learns from the present one.

    step k     learns from rollout k  |  rollout k + 1 is written by the weights before that update
    step k + 1 scores rollout k + 1 with the weights after it, and corrects for the difference

The request, its seeds included, is made before the update begins, and the writer has weights of its
own: what is written does not depend on which of the two is faster. The writer has finished before
the step has, so a checkpoint holds the whole next rollout. Left out: more than one step.
"""

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from kleash.rollout.engine import RolloutEngine, writing_request
from kleash.rollout.hand_over import hand_over
from kleash.rollout.policy_copy import PolicyCopy
from kleash.rollout.prompts import batch_prompts
from kleash.training.evidence import PendingStep
from kleash.training.session import Session
from kleash.types import Rollout


@dataclass(frozen=True, eq=False)
class Following:
    """The rollout of the next step, while it is being written."""

    future: Future[Rollout] | None
    """None: nothing is written ahead."""

    def rollout(self, pending: PendingStep) -> Rollout | None:
        """What was written; the update must be over.

        Raises:
            EngineError, NonFiniteError: the writer failed; the rollout at fault is not the one that
                the step learnt from, which is no evidence then.
        """
        if self.future is None:
            return None
        if self.future.exception() is not None:
            pending.responses, pending.scores, pending.scored = None, None, None
        return self.future.result()


@contextmanager
def writing_ahead(session: Session) -> Generator[Following]:
    """Write the next rollout beside what happens inside; it is finished at the end.

    Raises:
        EngineError: the engine did not take the policy's weights.
    """
    config, components, state = session.config, session.components, session.state
    if not config.rollout.ahead or state.step + 1 == config.steps:
        yield Following(None)
        return
    count = config.rollout.prompts_per_step
    # The step has not moved the cursor yet: the prompts after its own.
    numbers, _ = state.cursor.take(count)[1].take(count)
    rows = [
        components.prompts[number]
        for number in numbers
        for _ in range(config.rollout.responses_per_prompt)
    ]
    engine = _engine(session)
    request = writing_request(
        engine,
        batch_prompts(rows, pad_id=components.policy.pad_id, device=components.policy.device),
        components.sampling,
        microbatch=config.responses_per_step,
    )
    with ThreadPoolExecutor(1, thread_name_prefix="kleash-ahead") as pool:
        yield Following(pool.submit(engine.write, request))


def _engine(session: Session) -> RolloutEngine:
    """What writes beside the update, with the weights before it."""
    components = session.components
    if components.engine is not None:
        hand_over(components.engine, components.policy, mesh=components.mesh)
        return components.engine
    if session.policy_copy is None:
        session.policy_copy = PolicyCopy(components.policy)
    session.policy_copy.take_weights(components.policy)
    return session.policy_copy
