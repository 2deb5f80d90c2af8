"""The batch that all checks share: drawn, scored and judged as training would, once.

Beside it lie a few of its texts as the model itself reads them: alone, unpadded, through its own
`forward` with its own positions and head. That path shares nothing with the one that training
takes, so where the two disagree, training is wrong. And because the policy starts at its
reference, where every KL is 0 whatever is summed, the batch is also scored against `Tilted`: the
policy with a bias on its words, from which it has a KL at every token.
"""

import contextlib
import random
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kleash.config.schema import Config
from kleash.models.lm_head import apply_head, as_scored
from kleash.models.policy import LanguageModel, Policy, Reference
from kleash.models.reference_offload import FrozenReference, underlying
from kleash.models.sharding import states_of as model_states
from kleash.models.trunk import trunk_of
from kleash.training.components import Components
from kleash.training.responses import JudgedResponses
from kleash.types import Head, Rollout, ScoredRollout

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 0.03, torch.bfloat16: 0.2}
"""Nats by which a token's log-probability may differ between two ways to compute it."""


MICROBATCH = 16
"""Responses of the batch that are scored at once."""


@dataclass(frozen=True, eq=False)
class Tilted:
    """A language model with other words in favour: it reads alike and differs at every token."""

    model: LanguageModel

    @property
    def head(self) -> Head:
        """The head with a bias that goes up and down with the word's number."""
        head = self.model.head
        numbers = torch.arange(head.weight.shape[0], device=head.weight.device)
        tilt = torch.cos(numbers.float()).to(head.weight.dtype) / head.scale
        return replace(head, bias=tilt if head.bias is None else head.bias + tilt)

    def hidden_states(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        response_ids: Int[Tensor, "batch token"],
        response_mask: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "batch token+1 hidden"]:
        """See `LanguageModel`."""
        return self.model.hidden_states(prompt_ids, prompt_mask, response_ids, response_mask)


@dataclass(frozen=True, eq=False)
class Text:
    """One prompt and response as the model reads them by itself."""

    row: int
    """Its place in the batch."""
    prompt: Int[Tensor, " prompt"]
    response: Int[Tensor, " token"]
    states: Float[Tensor, "position hidden"]
    """Of the whole text; state `prompt − 1` predicts the first token of the response."""
    logits: Float[Tensor, "token vocab"]
    """The model's own, for each token of the response."""

    def logprobs(self, temperature: float, words: int) -> Float[Tensor, "token vocab"]:
        """log-probabilities of every word at every token of the response."""
        return (self.logits[:, :words].double() / temperature).log_softmax(-1)

    def of_response(self, shift: int = 0) -> Float[Tensor, "token hidden"]:
        """States that predict the response's tokens, or those `shift` positions away."""
        first = len(self.prompt) - 1 + shift
        return self.states[max(first, 0) : first + len(self.response)]


@dataclass(frozen=True, eq=False)
class Trial:
    """One batch, drawn from the very objects that training will use."""

    config: Config
    components: Components
    written: JudgedResponses
    scored: ScoredRollout
    tilted: ScoredRollout
    """The same batch against `Tilted`."""
    texts: tuple[Text, ...]
    at_start: bool
    """Whether no update has been made yet."""
    sampler_floor: float | None = None
    """KL of sampler against trainer before the first update, in nats per token, where known."""

    @property
    def tolerance(self) -> float:
        """Nats by which a log-probability may differ by rounding alone."""
        return _TOLERANCE[self.components.policy.compute_dtype]

    def score(self, rollout: Rollout, reference: LanguageModel) -> ScoredRollout:
        """Score texts as the loop does, against any reference; their scores do not matter."""
        scores = self.written.raw_scores[: len(rollout.response_ids)]
        return self.components.score(rollout, scores, microbatch=MICROBATCH, reference=reference)

    @property
    def rollout(self) -> Rollout:
        """What was written."""
        return self.written.rollout


@dataclass(frozen=True)
class Size:
    """How much is drawn: more finds fainter faults."""

    prompts: int
    responses_per_prompt: int
    texts: int


QUICK = Size(prompts=24, responses_per_prompt=2, texts=4)
WHOLE = Size(prompts=64, responses_per_prompt=4, texts=8)


def draw(config: Config, components: Components, size: Size) -> Trial:
    """Write, judge and score a batch; models and random numbers stay as they were.

    Raises:
        KleashError: what stops it would stop the first step of training too.
    """
    order = random.Random(config.seed)
    chosen = order.sample(components.prompts, min(size.prompts, len(components.prompts)))
    written = components.judge(
        components.write(
            chosen,
            responses_per_prompt=size.responses_per_prompt,
            microbatch=config.rollout.microbatch_size,
        )
    )
    scored = components.score(written.rollout, written.raw_scores, microbatch=MICROBATCH)
    return examine(config, components, written, scored, texts=size.texts, at_start=True)


def examine(
    config: Config,
    components: Components,
    written: JudgedResponses,
    scored: ScoredRollout,
    *,
    texts: int,
    at_start: bool,
    sampler_floor: float | None = None,
) -> Trial:
    """Make a trial of a batch that is there already."""
    tilted = components.score(
        written.rollout,
        written.raw_scores,
        microbatch=MICROBATCH,
        reference=Tilted(components.policy),
    )
    return Trial(
        config=config,
        components=components,
        written=written,
        scored=scored,
        tilted=tilted,
        texts=tuple(
            _text(components.policy, written.rollout, row) for row in _rows(written.rollout, texts)
        ),
        at_start=at_start,
        sampler_floor=sampler_floor,
    )


def rollout_of(
    prompt: Int[Tensor, " prompt"],
    response: Int[Tensor, " token"],
    *,
    left: int = 0,
    right: int = 0,
    fill: int = 0,
) -> Rollout:
    """One text as a batch of its own, with padding of `fill` on either side."""
    pads = (prompt.new_full((left,), fill), prompt.new_full((right,), fill))
    no, yes = torch.zeros_like, torch.ones_like
    return Rollout(
        prompt_ids=torch.cat([pads[0], prompt])[None],
        prompt_mask=torch.cat([no(pads[0]), yes(prompt)]).bool()[None],
        response_ids=torch.cat([response, pads[1]])[None],
        response_mask=torch.cat([yes(response), no(pads[1])]).bool()[None],
        ended=torch.ones(1, dtype=torch.bool, device=prompt.device),
        prompt_index=torch.zeros(1, dtype=torch.long, device=prompt.device),
    )


@torch.no_grad()
def states_of(
    model: LanguageModel, text: Text, *, left: int = 0, right: int = 0, fill: int = 0
) -> Float[Tensor, "token hidden"]:
    """States of a text's response as training reads it, padded on either side."""
    alone = rollout_of(text.prompt, text.response, left=left, right=right, fill=fill)
    states = model.hidden_states(
        alone.prompt_ids, alone.prompt_mask, alone.response_ids, alone.response_mask
    )
    return states[0, : len(text.response)]


@torch.no_grad()
def logprobs_at(
    head: Head, states: Float[Tensor, "token hidden"], targets: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """log π of some tokens from their states, densely and in float64, at temperature 1."""
    table = apply_head(head, states)[:, : head.words].double().log_softmax(-1)
    return table.gather(1, targets[:, None]).squeeze(1)


@torch.no_grad()
def own_reading(
    owner: Policy | Reference, prompt: Int[Tensor, " prompt"], response: Int[Tensor, " token"]
) -> tuple[Float[Tensor, "position hidden"], Float[Tensor, "token vocab"]]:
    """States of a text and logits of its response, as the model computes them by itself."""
    model, precision = owner.model, owner.precision
    ids = torch.cat([prompt, response])[None]
    with as_scored(model, precision):
        states = model_states(model, trunk_of(model), {"input_ids": ids, "use_cache": False})[0]
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return states, logits[len(prompt) - 1 : -1].float()


@torch.no_grad()
def reference_logits(model: FrozenReference, text: Text) -> Float[Tensor, "token vocab"]:
    """The reference's own logits of a response."""
    reference = underlying(model)
    off = (
        contextlib.nullcontext()
        if reference.adapter is None
        else reference.adapter.disable_adapter()
    )
    with off:
        return own_reading(reference, text.prompt, text.response)[1]


def _rows(rollout: Rollout, count: int) -> list[int]:
    """Rows from the shortest prompt to the longest: padding must have something to do."""
    order = rollout.prompt_mask.sum(-1).argsort(stable=True).tolist()
    if len(order) <= count:
        return order
    step = (len(order) - 1) / max(count - 1, 1)
    return [order[round(step * number)] for number in range(count)]


def _text(policy: Policy, rollout: Rollout, row: int) -> Text:
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
    response = rollout.response_ids[row][rollout.response_mask[row]]
    states, logits = own_reading(policy, prompt, response)
    return Text(row=row, prompt=prompt, response=response, states=states, logits=logits)
