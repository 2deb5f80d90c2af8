"""An engine with weights of its own that is transformers inside: what vLLM is to a trainer, small.

Faults can be planted in how it takes weights and in how it writes.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kleash.errors import EngineLostError
from kleash.models.policy import Policy
from kleash.rollout.engine import NamedTensors, WritingRequest
from kleash.rollout.engine_output import EngineResponse, rollout_of
from kleash.types import Rollout


class StandInEngine:
    """Holds a copy of a policy's model; `takes` says which parameters a hand-over reaches."""

    def __init__(self, policy: Policy) -> None:
        self.loaded: int | None = None
        self.policy = policy
        self.model = copy.deepcopy(policy.model)
        torch.manual_seed(99)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(std=0.1)
        self.takes: Callable[[str], bool] = lambda name: True
        self.losses = 0
        """How many of the next rollouts break off."""
        self.handed_over: list[list[str]] = []
        self.closed = False

    @property
    def seeded(self) -> bool:
        return True

    @property
    def concurrent(self) -> bool:
        return True

    def restart(self) -> None:
        """As a server that comes back with what it was started with."""
        self.__init__(self.policy)

    def wait_until_back(self) -> None:
        assert self.losses == 0

    def load_weights(self, weights: NamedTensors) -> None:
        own = self.model.state_dict()
        taken = {name: tensor for name, tensor in weights if self.takes(name)}
        self.handed_over.append(sorted(taken))
        with torch.no_grad():
            for name, tensor in taken.items():
                own[name][: len(tensor)].copy_(tensor)

    def text_logprobs(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        laws = self.next_token_logprobs(texts)
        return [
            law.gather(1, torch.tensor(text[1:])[:, None]).squeeze(1)
            for law, text in zip(laws, texts, strict=True)
        ]

    @torch.no_grad()
    def next_token_logprobs(
        self, texts: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[Tensor]:
        words = self.policy.words
        return [
            (self.model(input_ids=torch.tensor([list(text)])).logits[0, :-1, :words].double())
            .div(temperature)
            .log_softmax(-1)
            for text in texts
        ]

    def write(self, request: WritingRequest) -> Rollout:
        if self.losses:
            self.losses -= 1
            self.restart()
            raise EngineLostError("the connection broke")
        written: list[EngineResponse] = []
        prompts = request.prompts
        for ids, mask, seed in zip(prompts.ids, prompts.mask, request.seeds, strict=True):
            written.append(self._one(ids[mask].tolist(), seed, request))
        return rollout_of(
            written,
            request,
            words=self.policy.words,
            stop_ids=self.policy.stop_ids,
            pad_id=self.policy.pad_id,
        )

    def _one(self, prompt: list[int], seed: int, request: WritingRequest) -> EngineResponse:
        generator = torch.Generator().manual_seed(seed % 2**62)
        text, logprobs = list(prompt), []
        while len(text) - len(prompt) < request.sampling.max_new_tokens:
            # One more token, since the law after the last is not asked for.
            (law,) = self.next_token_logprobs(
                [[*text, 0]], temperature=request.sampling.temperature
            )
            token = int(torch.multinomial(law[-1].exp(), 1, generator=generator))
            text.append(token)
            logprobs.append(float(law[-1, token]))
            if token in self.policy.stop_ids:
                break
        return EngineResponse(text[len(prompt) :], logprobs)

    def close(self) -> None:
        self.closed = True
