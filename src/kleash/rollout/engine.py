"""What writes the responses: a protocol with two sides, and the engine that needs nothing else.

    transformers   the policy itself, by `generate`: its weights are the live ones
    vLLM           in this process (`vllm_engine`) or a server of its own (`vllm_server`): it holds
                   weights of its own, handed over after every update and verified (`hand_over`)

An engine writes; it never scores. The trainer scores every token again, and the difference between
the two, KL(sampler‖policy), is measured on each rollout from `Rollout.sampler_logprobs`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.models.policy import Policy
from kleash.rollout.prompts import PromptBatch
from kleash.rollout.sampling import SamplingSpec
from kleash.types import Rollout

EngineName = Literal["hf", "vllm"]
NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class WritingRequest:
    """Responses to write: everything that decides them but the weights."""

    prompts: PromptBatch
    """Padded on the left; a row for each response."""
    sampling: SamplingSpec
    """The temperature is the only setting that reaches the sampler."""
    seeds: tuple[int, ...]
    """One for each response, for engines that take them; empty for those that draw from torch's
    global generator as they write."""
    microbatch: int
    """Responses written at once, for engines that do not arrange their batches themselves."""


@runtime_checkable
class RolloutEngine(Protocol):
    """What writes responses."""

    @property
    def seeded(self) -> bool:
        """Whether each response has a seed of its own; see `WritingRequest.seeds`."""
        ...

    def write(self, request: WritingRequest) -> Rollout:
        """One response to each row of the prompts, with `sampler_logprobs`.

        A response ends with the first stop token that it contains, which counts, or at the length
        limit. It is whole or there is none: an engine that fails in the middle raises.

        Raises:
            EngineError: the engine did not answer, or answered with something else; an
                `EngineLostError` where it may be asked again.
            PromptError, NonFiniteError: as `sampling.generate`.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds; it writes nothing any more. Twice does no harm."""
        ...


@runtime_checkable
class SeparateEngine(RolloutEngine, Protocol):
    """An engine with weights of its own, which are those of the policy only after a hand-over.

    One call at a time.
    """

    loaded: int | None
    """`weights_sum` of the policy whose weights were handed over last and verified; None: of none.
    Set by `hand_over.hand_over`."""

    @property
    def concurrent(self) -> bool:
        """Whether `write` may run in another thread while the trainer updates.

        True of a server. An engine in this process shares torch's global generator with the
        trainer (it puts back what it uses), and what both draw would depend on their timing.
        """
        ...

    def wait_until_back(self) -> None:
        """After an `EngineLostError`: wait until it answers again, as long as it may take.

        Raises:
            EngineError: it does not.
        """
        ...

    def load_weights(self, weights: NamedTensors) -> None:
        """Take these weights, by the names of a checkpoint; those not named stay as they are.

        Raises:
            EngineError: the engine did not take them.
        """
        ...

    def text_logprobs(self, texts: Sequence[Sequence[int]]) -> list[Float[Tensor, " token"]]:
        """log-probability of each token of each text but the first, in nats, at temperature 1.

        Raises:
            EngineError: the engine did not answer, or answered with something else.
        """
        ...

    def next_token_logprobs(
        self, texts: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[Float[Tensor, "token vocab"]]:
        """log-probability of every word after each token of each text but its last, in float64.

        Row t of a text is the law of its token t + 1 as the engine computes it, in nats.

        Raises:
            EngineError: the engine did not answer, or answered with something else.
        """
        ...


@dataclass(frozen=True, eq=False)
class TransformersEngine:
    """The policy writes by itself; there is nothing to hand over and nothing to close."""

    policy: Policy
    generate: Callable[..., Rollout]
    """`sampling.generate`, or the same shared out among processes."""

    @property
    def seeded(self) -> bool:
        """It draws from torch's global generator."""
        return False

    def write(self, request: WritingRequest) -> Rollout:
        """See `RolloutEngine`."""
        return self.generate(
            self.policy, request.prompts, request.sampling, microbatch=request.microbatch
        )

    def close(self) -> None:
        """See `RolloutEngine`."""


def writing_request(
    engine: RolloutEngine, prompts: PromptBatch, sampling: SamplingSpec, *, microbatch: int
) -> WritingRequest:
    """A request whose seeds, where the engine takes any, come from torch's global generator.

    So the state of that generator, which a checkpoint keeps, decides every response of either kind
    of engine; and with the request made, nothing random is left to the time of writing.
    """
    rows = len(prompts.ids) if engine.seeded else 0
    seeds = torch.randint(2**62, (rows,), device="cpu").tolist() if rows else []
    return WritingRequest(prompts, sampling, tuple(seeds), microbatch)
