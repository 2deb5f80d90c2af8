"""A language so small that every string can be listed: the oracle of the whole engine.

Vocabulary V with end-of-sequence id 0, strings of at most T tokens; a string ends with 0 or is cut
off at T. A *prefix* is a string of fewer than T words without 0: the states in which a token is
chosen. A model is a table of logits `[prefix, vocab]`; a score is a number per string. Everything
is float64 and by enumeration, differentiable in the logits where it makes sense.

Names of axes beyond those of `kleash.types`: `prefix` (states), `string` (complete strings).
Prefixes and strings are ordered by length, then by tokens; token 0 counts as the smallest.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kleash.types import Head, Rollout, ScoredRollout

EOS = 0
PROMPT_TOKEN = 1


@dataclass(frozen=True)
class World:
    """All strings of at most `max_length` tokens over `vocabulary` ids."""

    vocabulary: int
    max_length: int

    @cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        words = range(1, self.vocabulary)
        return [p for n in range(self.max_length) for p in itertools.product(words, repeat=n)]

    @cached_property
    def strings(self) -> list[tuple[int, ...]]:
        last = range(self.vocabulary)
        short = [(*p, EOS) for p in self.prefixes if len(p) < self.max_length - 1]
        long = [(*p, v) for p in self.prefixes if len(p) == self.max_length - 1 for v in last]
        return short + long

    @cached_property
    def prefix_number(self) -> dict[tuple[int, ...], int]:
        return {p: i for i, p in enumerate(self.prefixes)}

    @cached_property
    def string_number(self) -> dict[tuple[int, ...], int]:
        return {s: i for i, s in enumerate(self.strings)}

    @cached_property
    def rollout(self) -> Rollout:
        """Every string once, in order: weight it by `probabilities` to take expectations."""
        n, width = len(self.strings), self.max_length
        ids = torch.full((n, width), EOS)
        mask = torch.zeros(n, width, dtype=torch.bool)
        for row, string in enumerate(self.strings):
            ids[row, : len(string)] = torch.tensor(string)
            mask[row, : len(string)] = True
        return Rollout(
            prompt_ids=torch.full((n, 1), PROMPT_TOKEN),
            prompt_mask=torch.ones(n, 1, dtype=torch.bool),
            response_ids=ids,
            response_mask=mask,
            ended=torch.tensor([string[-1] == EOS for string in self.strings]),
            prompt_index=torch.zeros(n, dtype=torch.long),
        )

    def rollout_of(self, numbers: Int[Tensor, " batch"], *, group: int | None = None) -> Rollout:
        """The strings of these numbers; `group` consecutive ones share a prompt (None: all)."""
        every, n = self.rollout, len(numbers)
        return Rollout(
            prompt_ids=every.prompt_ids[numbers],
            prompt_mask=every.prompt_mask[numbers],
            response_ids=every.response_ids[numbers],
            response_mask=every.response_mask[numbers],
            ended=every.ended[numbers],
            prompt_index=torch.arange(n) // (n if group is None else group),
        )

    @cached_property
    def _state_of_code(self) -> Int[Tensor, " code"]:
        """State number of a prefix read as a number in base V (no digit is 0); else none."""
        table = torch.full((self.vocabulary**self.max_length,), len(self.prefixes))
        for number, prefix in enumerate(self.prefixes):
            table[sum(v * self.vocabulary**i for i, v in enumerate(reversed(prefix)))] = number
        return table

    def states(
        self, ids: Int[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
    ) -> Int[Tensor, "batch positions"]:
        """State before each token and after the last; `len(prefixes)` where there is none."""
        none = torch.tensor(len(self.prefixes))
        code = torch.zeros(len(ids), dtype=torch.long)
        going = torch.ones(len(ids), dtype=torch.bool)
        columns = [self._state_of_code[code]]
        for t in range(ids.shape[1]):
            going = going & mask[:, t] & (ids[:, t] != EOS) & (t + 1 < self.max_length)
            code = torch.where(going, code * self.vocabulary + ids[:, t], 0)
            columns.append(torch.where(going, self._state_of_code[code], none))
        return torch.stack(columns, -1)

    @cached_property
    def string_states(self) -> Int[Tensor, "string token"]:
        """The state in which each token of each string is chosen; 0 outside the string."""
        at = self.states(self.rollout.response_ids, self.rollout.response_mask)[:, :-1]
        return torch.where(self.mask, at, 0)

    @property
    def mask(self) -> Bool[Tensor, "string token"]:
        return self.rollout.response_mask

    def numbers_of(self, rollout: Rollout) -> Int[Tensor, " batch"]:
        """Which string each row of a rollout is."""
        ends = torch.tensor([[n if over else -1 for over, n in row] for row in self._next])
        last = rollout.response_mask.sum(-1, keepdim=True) - 1
        states = self.states(rollout.response_ids, rollout.response_mask)
        numbers = ends[states.gather(-1, last), rollout.response_ids.gather(-1, last)][:, 0]
        assert (numbers >= 0).all(), "a row is not a complete string"
        return numbers

    def random_logits(self, seed: int, *, scale: float = 1.0) -> Float[Tensor, "prefix vocab"]:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.prefixes), self.vocabulary)
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def random_scores(self, seed: int) -> Float[Tensor, " string"]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(self.strings), generator=generator, dtype=torch.float64)

    # What a table of logits says about every string

    def at_tokens(self, of_state: Float[Tensor, " prefix"]) -> Float[Tensor, "string token"]:
        """A number per state, at each token of each string; 0 outside the string."""
        return torch.where(self.mask, of_state[self.string_states], 0.0)

    def token_logprobs(
        self, logits: Float[Tensor, "prefix vocab"]
    ) -> Float[Tensor, "string token"]:
        table = logits.log_softmax(-1)
        chosen = table[self.string_states, self.rollout.response_ids]
        return torch.where(self.mask, chosen, 0.0)

    def string_logprobs(self, logits: Float[Tensor, "prefix vocab"]) -> Float[Tensor, " string"]:
        return self.token_logprobs(logits).sum(-1)

    def probabilities(self, logits: Float[Tensor, "prefix vocab"]) -> Float[Tensor, " string"]:
        return self.string_logprobs(logits).exp()

    def visits(self, logits: Float[Tensor, "prefix vocab"]) -> Float[Tensor, " prefix"]:
        """d_π: probability that a string passes through each prefix."""
        p = self.probabilities(logits)[:, None] * self.mask
        start = torch.zeros(len(self.prefixes), dtype=torch.float64)
        return start.scatter_add(0, self.string_states.flatten(), p.flatten())

    def state_kl(
        self, logits: Float[Tensor, "prefix vocab"], ref_logits: Float[Tensor, "prefix vocab"]
    ) -> Float[Tensor, " prefix"]:
        """KL(π(·|c)‖π_ref(·|c)) of every prefix c."""
        p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    def state_entropy(self, logits: Float[Tensor, "prefix vocab"]) -> Float[Tensor, " prefix"]:
        p = logits.log_softmax(-1)
        return -(p.exp() * p).sum(-1)

    # Exact numbers of whole models

    def kl(
        self, logits: Float[Tensor, "prefix vocab"], ref_logits: Float[Tensor, "prefix vocab"]
    ) -> Float[Tensor, ""]:
        """KL(π‖π_ref) between the distributions over strings; swap for the other direction."""
        log_p, log_q = self.string_logprobs(logits), self.string_logprobs(ref_logits)
        return (log_p.exp() * (log_p - log_q)).sum()

    def entropy(self, logits: Float[Tensor, "prefix vocab"]) -> Float[Tensor, ""]:
        log_p = self.string_logprobs(logits)
        return -(log_p.exp() * log_p).sum()

    def mean_score(
        self, logits: Float[Tensor, "prefix vocab"], scores: Float[Tensor, " string"]
    ) -> Float[Tensor, ""]:
        return (self.probabilities(logits) * scores).sum()

    def objective(
        self,
        logits: Float[Tensor, "prefix vocab"],
        ref_logits: Float[Tensor, "prefix vocab"],
        scores: Float[Tensor, " string"],
        beta: float,
    ) -> Float[Tensor, ""]:
        """J = E_π[score] − β KL(π‖π_ref)."""
        return self.mean_score(logits, scores) - beta * self.kl(logits, ref_logits)

    # The optimum

    def log_partition(
        self,
        ref_logits: Float[Tensor, "prefix vocab"],
        scores: Float[Tensor, " string"],
        beta: float,
    ) -> Float[Tensor, ""]:
        """log Z = log Σ_y π_ref(y) e^(score(y)/β);  max J = β log Z."""
        return (self.string_logprobs(ref_logits) + scores / beta).logsumexp(0)

    def optimal_probabilities(
        self,
        ref_logits: Float[Tensor, "prefix vocab"],
        scores: Float[Tensor, " string"],
        beta: float,
    ) -> Float[Tensor, " string"]:
        """π*(y) = π_ref(y) e^(score(y)/β) / Z."""
        return (self.string_logprobs(ref_logits) + scores / beta).softmax(0)

    @cached_property
    def _next(self) -> list[list[tuple[bool, int]]]:
        """Per prefix and next token: whether a string ends there, and its number or the state's."""
        return [
            [
                (True, self.string_number[after])
                if (after := (*prefix, v)) in self.string_number
                else (False, self.prefix_number[after])
                for v in range(self.vocabulary)
            ]
            for prefix in self.prefixes
        ]

    def backward(
        self,
        leaves: Float[Tensor, " string"],
        combine: Callable[[int, Float[Tensor, " vocab"]], Float[Tensor, ""]],
    ) -> tuple[Float[Tensor, " prefix"], Float[Tensor, "prefix vocab"]]:
        """Values of all prefixes, longest first, and of what follows each of them.

        value(c) = combine(number of c, [value(c·v) for each token v]), the leaf where c·v ends.
        """
        states: list[Tensor] = [leaves.new_zeros(())] * len(self.prefixes)
        following: list[Tensor] = [leaves.new_zeros(self.vocabulary)] * len(self.prefixes)
        for i in reversed(range(len(self.prefixes))):
            ahead = [leaves[n] if ended else states[n] for ended, n in self._next[i]]
            following[i] = torch.stack(ahead)
            states[i] = combine(i, following[i])
        return torch.stack(states), torch.stack(following)

    def _soft_values(
        self,
        ref_logits: Float[Tensor, "prefix vocab"],
        scores: Float[Tensor, " string"],
        beta: float,
    ) -> tuple[Float[Tensor, " prefix"], Float[Tensor, "prefix vocab"]]:
        table = ref_logits.log_softmax(-1)
        return self.backward(scores, lambda i, q: beta * (table[i] + q / beta).logsumexp(0))

    def optimal_values(
        self,
        ref_logits: Float[Tensor, "prefix vocab"],
        scores: Float[Tensor, " string"],
        beta: float,
    ) -> Float[Tensor, " prefix"]:
        """V*(c) = β log Σ_v π_ref(v|c) e^(V*(cv)/β), the score at a string's end."""
        return self._soft_values(ref_logits, scores, beta)[0]

    def optimal_logits(
        self,
        ref_logits: Float[Tensor, "prefix vocab"],
        scores: Float[Tensor, " string"],
        beta: float,
    ) -> Float[Tensor, "prefix vocab"]:
        """log π*(v|c) = log π_ref(v|c) + (V*(cv) − V*(c))/β: π* as a table."""
        values, following = self._soft_values(ref_logits, scores, beta)
        return ref_logits.log_softmax(-1) + (following - values[:, None]) / beta

    def expected_values(
        self, logits: Float[Tensor, "prefix vocab"], leaves: Float[Tensor, " string"]
    ) -> Float[Tensor, " prefix"]:
        """V(c) = E_π[leaf | c]: the plain expected score of what follows each prefix."""
        p = logits.softmax(-1)
        return self.backward(leaves, lambda i, q: (p[i] * q).sum())[0]

    def optimal_kl(
        self,
        ref_logits: Float[Tensor, "prefix vocab"],
        scores: Float[Tensor, " string"],
        beta: float,
    ) -> float:
        """KL(π*_β‖π_ref)."""
        best = self.optimal_probabilities(ref_logits, scores, beta)
        log_ratio = scores / beta - self.log_partition(ref_logits, scores, beta)
        return float((best * log_ratio).sum())

    def beta_for_kl(
        self,
        ref_logits: Float[Tensor, "prefix vocab"],
        scores: Float[Tensor, " string"],
        target_kl: float,
    ) -> float:
        """β whose optimum spends `target_kl` nats, by bisection: the KL falls as β grows."""
        low, high = 1e-4, 1e4
        for _ in range(200):
            middle = math.sqrt(low * high)
            if self.optimal_kl(ref_logits, scores, middle) > target_kl:
                low = middle
            else:
                high = middle
        return math.sqrt(low * high)

    def best_of_n(
        self, ref_logits: Float[Tensor, "prefix vocab"], scores: Float[Tensor, " string"], n: int
    ) -> Float[Tensor, " string"]:
        """π_n(y) = F(y)^n − F⁻(y)^n, F the distribution of the score; ties share in proportion."""
        p = self.probabilities(ref_logits)
        below = ((scores[None] < scores[:, None]) * p).sum(-1)
        level = ((scores[None] == scores[:, None]) * p).sum(-1)
        return ((below + level) ** n - below**n) * p / level


@cache
def _data() -> dict[str, dict[str, Any]]:
    text = (Path(__file__).parent / "data" / "oracle_models.json").read_text(encoding="utf-8")
    return json.loads(text)


def _tensor(model: str, key: str) -> Tensor:
    return torch.tensor(_data()[model][key], dtype=torch.float64)


@dataclass(frozen=True)
class GradientModels:
    """Reference, policy and sampler near each other: where gradients are compared."""

    world: World
    reference: Float[Tensor, "prefix vocab"]
    policy: Float[Tensor, "prefix vocab"]
    sampler: Float[Tensor, "prefix vocab"]


@dataclass(frozen=True)
class ScoredModel:
    """A reference and a score per string: where optima and fixed points are compared."""

    world: World
    reference: Float[Tensor, "prefix vocab"]
    scores: Float[Tensor, " string"]
    beta: float


def gradient_models() -> GradientModels:
    """121 strings; KL(policy‖reference) = 0.302825 nats."""
    reference, policy, sampler = (
        _tensor("gradients", key) for key in ("reference_logits", "policy_logits", "sampler_logits")
    )
    return GradientModels(World(4, 4), reference, policy, sampler)


def fixed_point_model() -> ScoredModel:
    """121 strings, β = 0.3; the optimum spends 3.43931 nats."""
    reference, scores = (_tensor("fixed_points", key) for key in ("reference_logits", "scores"))
    return ScoredModel(World(4, 4), reference, scores, float(_data()["fixed_points"]["beta"]))


class TabularModel(torch.nn.Module):
    """A table of logits behind the engine's interface of a language model.

    The hidden state is the one-hot vector of the prefix, the head's weight is the table: their
    product is the row of logits. One more state, after the end, has all-zero logits. Prompts are
    ignored.
    """

    def __init__(self, world: World, logits: Float[Tensor, "prefix vocab"]) -> None:
        super().__init__()
        self.world = world
        self.logits = torch.nn.Parameter(logits.detach().clone())

    @property
    def head(self) -> Head:
        """Live: gradients reach `self.logits`."""
        end = self.logits.new_zeros(1, self.logits.shape[1])
        return Head(weight=torch.cat([self.logits, end]).T)

    def hidden_states(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        response_ids: Int[Tensor, "batch token"],
        response_mask: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "batch positions hidden"]:
        """One-hot states: `[:, t]` chooses token t, index `length` follows the last token."""
        states = self.world.states(response_ids, response_mask)
        width = len(self.world.prefixes) + 1
        return torch.nn.functional.one_hot(states, width).to(self.logits.dtype)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator, *, group: int | None = None) -> Rollout:
        """Draw n strings; `group` consecutive ones count as answers to one prompt."""
        p = self.world.probabilities(self.logits.double())
        drawn = torch.multinomial(p, n, replacement=True, generator=generator)
        return self.world.rollout_of(drawn, group=group)


def scored_rollout(
    world: World,
    rollout: Rollout,
    *,
    policy: Float[Tensor, "prefix vocab"],
    reference: Float[Tensor, "prefix vocab"],
    scores: Float[Tensor, " string"],
    values: Float[Tensor, " prefix"] | None = None,
) -> ScoredRollout:
    """What the engine must find when it scores `rollout`, from the tables."""
    row = world.numbers_of(rollout)
    policy, reference = policy.detach(), reference.detach()
    return ScoredRollout(
        rollout=rollout,
        rollout_logprobs=world.token_logprobs(policy)[row],
        ref_logprobs=world.token_logprobs(reference)[row],
        kl=world.at_tokens(world.state_kl(policy, reference))[row],
        entropy=world.at_tokens(world.state_entropy(policy))[row],
        scores=scores[row],
        values=None if values is None else world.at_tokens(values)[row],
    )
