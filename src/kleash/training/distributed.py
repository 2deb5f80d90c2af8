"""The heavy work of a step shared out among several processes; this process leads.

    generate   each process writes some rows, with the random numbers that are theirs
    score      each reads some rows with policy, reference and critic
    backward   each adds the gradients of some rows; the leader has the sum

Every job begins by sending the leader's weights, and its outcome is that of one process but for the
rounding of matrix products over fewer rows. An error in any process is raised by the leader. What
the other processes do is in `worker`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kleash.algorithms.common import select
from kleash.errors import NonFiniteError, RefusedError, RunError, ScoringError
from kleash.models.policy import Policy
from kleash.rollout.prompts import PromptBatch
from kleash.rollout.sampling import (
    Piece,
    SamplingSpec,
    join_pieces,
    random_numbers,
    require_room,
    write_piece,
)
from kleash.training.process_group import Message, WorkerGroup
from kleash.types import Experience, Rollout, ScoredRollout

SCORED = ("rollout_logprobs", "ref_logprobs", "kl", "entropy", "values", "final_values")
"""What a process returns of the rows it scored."""
T = TypeVar("T")

_REFUSALS: dict[str, type[RefusedError]] = {
    "NonFiniteError": NonFiniteError,
    "ScoringError": ScoringError,
}


@dataclass(frozen=True, eq=False)
class BackwardPass:
    """What the backward passes of some rows say."""

    metrics: list[dict[str, float]]
    """Of each microbatch's loss; they combine to those of the minibatch."""
    ratio_error: float
    """How far a ratio was from 1."""
    weights: Float[Tensor, "batch token"]
    """Prefix weights Π π/π_rollout, in float64."""


class Workers:
    """The other processes, as the leader uses them."""

    def __init__(self, group: WorkerGroup, parameters: Iterable[nn.Parameter]) -> None:
        self._group = group
        self._parameters = list(parameters)

    def generate(
        self, policy: Policy, prompts: PromptBatch, sampling: SamplingSpec, *, microbatch: int
    ) -> Rollout:
        """`sampling.generate`, shared out.

        Raises:
            PromptError, NonFiniteError: as it does.
        """
        require_room(policy, prompts, sampling)
        pieces: list[Piece] = []
        for first in range(0, len(prompts.ids), microbatch):
            rows = slice(first, first + microbatch)
            part = (prompts.ids[rows], prompts.mask[rows])
            pieces += self._write(policy, part, sampling, first=first)
        return join_pieces(policy, prompts, pieces)

    def _write(
        self, policy: Policy, part: tuple[Tensor, Tensor], sampling: SamplingSpec, *, first: int
    ) -> list[Piece]:
        """Every process takes a run of rows; random numbers end where those of one would."""
        (ids, mask), device = part, policy.device
        tensors = {"ids": ids, "mask": mask, "random": random_state(device)}
        self._start(Message("generate", tensors=tensors))
        shares = runs(len(ids), self._group.size)
        piece, messages = self._together(
            lambda: write_piece(policy, ids, mask, sampling, rows=shares[0]),
            rows=[list(range(first + s.start, first + s.stop)) for s in shares],
        )
        pieces = [piece]
        for message in messages:
            if message.tensors:
                got = {name: x.to(device) for name, x in message.tensors.items()}
                pieces.append(Piece(got["ids"], got["logprobs"], message.facts["draws"]))
        for _ in range(max(p.draws for p in pieces) - piece.draws):
            random_numbers(len(ids), device)
        return pieces

    def score(
        self,
        local: Callable[..., ScoredRollout],
        rollout: Rollout,
        scores: Float[Tensor, " batch"],
        facts: Mapping[str, Any],
    ) -> ScoredRollout:
        """Score rows in every process.

        Args:
            local: scores the leader's rows: `local(rollout, scores=…)`.
            rollout: what is read.
            scores: of the reward models, passed through.
            facts: what the others need to know to do the same.
        """
        self._start(Message("score", facts, flat(rollout)))
        shares = strides(rollout, self._group.size)
        mine, messages = self._together(
            lambda: local(select(rollout, shares[0]), scores=scores[shares[0]]),
            rows=[share.tolist() for share in shares],
        )
        parts = [{name: x for name, x in flat(mine).items() if name in SCORED}]
        parts += [dict(message.tensors) for message in messages]
        whole = {
            name: _in_place(first, [part[name] for part in parts if part], shares, rollout)
            for name, first in parts[0].items()
        }
        return ScoredRollout(rollout=rollout, scores=scores, **whole)

    def backward(
        self,
        local: Callable[[Experience], BackwardPass],
        minibatch: Experience,
        facts: Mapping[str, Any],
    ) -> BackwardPass:
        """Gradients of a minibatch, their sum in the leader; arguments as of `score`."""
        self._start(Message("backward", facts, flat(minibatch)))
        shares = strides(minibatch.scored.rollout, self._group.size)
        try:
            mine, messages = self._together(
                lambda: local(select(minibatch, shares[0])),
                rows=[share.tolist() for share in shares],
            )
        finally:
            self._group.add_gradients(self._parameters)
        weights = torch.zeros_like(minibatch.mask, dtype=torch.float64)
        weights[shares[0]] = mine.weights
        metrics, error = list(mine.metrics), mine.ratio_error
        for share, message in zip(shares[1:], messages, strict=True):
            if message.tensors:
                weights[share] = message.tensors["weights"].to(weights.device)
                metrics += message.facts["metrics"]
                error = max(error, message.facts["ratio_error"])
        return BackwardPass(metrics, error, weights)

    def _start(self, message: Message) -> None:
        """Name the job to every process, and give it the weights."""
        self._group.send(message)
        self._group.spread(self._parameters)

    def _together(self, own: Callable[[], T], *, rows: list[list[int]]) -> tuple[T, list[Message]]:
        return together(self._group, own, rows=rows)


def together(
    group: WorkerGroup, own: Callable[[], T], *, rows: list[list[int]] | None = None
) -> tuple[T, list[Message]]:
    """The leader's own share, and the answers of the others; whoever failed, all are heard first.

    Args:
        group: everyone.
        own: what the leader does.
        rows: which responses of the batch each process has, for the errors that name one.
    """
    failure: Exception | None = None
    mine: T | None = None
    try:
        mine = own()
    except Exception as error:
        failure = error
        if isinstance(error, RefusedError) and rows is not None:
            error.among(rows[0])
    messages = group.answers()
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages, start=1):
        if message.name in _REFUSALS:
            place = {key: message.facts[key] for key in ("response", "token")}
            refused = _REFUSALS[message.name](message.facts["message"], **place)
            if rows is not None:
                refused.among(rows[rank])
            raise refused
        if message.name != "done":
            raise RunError(f"process {rank} of {group.size} failed: {message.facts['message']}")
    assert mine is not None
    return mine, messages


def runs(count: int, size: int) -> list[slice]:
    """Neighbouring rows for each process, as even as can be; the leader has one at least."""
    ends = [-(-count * (rank + 1) // size) for rank in range(size)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def strides(written: Rollout, size: int) -> list[Tensor]:
    """Rows for each process, every one long and short responses alike."""
    length = written.prompt_mask.sum(dim=1) + written.response_mask.sum(dim=1)
    order = length.argsort(descending=True, stable=True)
    return [order[rank::size] for rank in range(size)]


def _in_place(like: Tensor, parts: list[Tensor], shares: list[Tensor], written: Rollout) -> Tensor:
    """The numbers of all processes in the order of the batch."""
    whole = like.new_zeros(len(written.response_ids), *like.shape[1:])
    for share, part in zip(shares, parts, strict=False):
        whole[share] = part.to(whole.device)
    return whole


def flat(data: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a dataclass and of those it holds, by dotted names."""
    found: dict[str, Tensor] = {}
    for field in fields(data):
        value = getattr(data, field.name)
        if isinstance(value, Tensor):
            found[prefix + field.name] = value
        elif is_dataclass(value):
            found |= flat(value, f"{prefix}{field.name}.")
    return found


def rollout_of(tensors: Mapping[str, Tensor], prefix: str = "") -> Rollout:
    """A rollout from `flat`."""
    return Rollout(**{f.name: tensors.get(prefix + f.name) for f in fields(Rollout)})  # pyright: ignore[reportArgumentType]


def experience_of(tensors: Mapping[str, Tensor]) -> Experience:
    """An experience from `flat`."""
    scored: dict[str, Any] = {
        f.name: tensors.get(f"scored.{f.name}") for f in fields(ScoredRollout)
    }
    scored["rollout"] = rollout_of(tensors, "scored.rollout.")
    own: dict[str, Any] = {f.name: tensors.get(f.name) for f in fields(Experience)}
    own["scored"] = ScoredRollout(**scored)
    return Experience(**own)


def random_state(device: torch.device) -> Tensor:
    """The random generator of a device."""
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the random generator of a device."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
