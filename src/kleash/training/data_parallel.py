"""Heavy passes divided by rows among the processes, their small results put together in all.

    generate   neighbouring rows, each with the random numbers it has in one process
    read       as many tokens in every process, or nearly
    rewards    classifiers by rows; callables in the first process alone, for they may have effects

Every process then holds the numbers of the whole batch, those of one process but for the rounding
of matrix products over fewer rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.mesh import Mesh
from kleash.models.batching import balanced_shares
from kleash.models.policy import Policy
from kleash.models.reward_model import NO_COLUMNS, ClassifierReward, Columns, Content, RewardModel
from kleash.rollout.prompts import PromptBatch
from kleash.rollout.sampling import (
    Piece,
    SamplingSpec,
    join_pieces,
    random_numbers,
    require_room,
    write_piece,
)
from kleash.rollout.scoring_pass import row_lengths
from kleash.types import Rollout, ScoredRollout

SCORED = (
    "rollout_logprobs",
    "ref_logprobs",
    "kl",
    "entropy",
    "values",
    "final_values",
    "teacher_kl",
    "teacher_forward_kl",
)
"""What reading a response gives."""


def generate(
    policy: Policy, prompts: PromptBatch, sampling: SamplingSpec, *, microbatch: int, mesh: Mesh
) -> Rollout:
    """`sampling.generate` with the rows divided; the responses are those of one process.

    Raises:
        PromptError, NonFiniteError: as it does.
    """
    require_room(policy, prompts, sampling)
    pieces: list[Piece] = []
    for first in range(0, len(prompts.ids), microbatch):
        ids = prompts.ids[first : first + microbatch]
        mask = prompts.mask[first : first + microbatch]
        pieces.append(_write(policy, (ids, mask), sampling, mesh, first=first))
    return join_pieces(policy, prompts, pieces)


def _write(
    policy: Policy, part: tuple[Tensor, Tensor], sampling: SamplingSpec, mesh: Mesh, *, first: int
) -> Piece:
    """Every process writes a run of rows; its random numbers end where those of one would."""
    (ids, mask), device = part, policy.device
    share = runs(len(ids), mesh.size)[mesh.rank]
    numbers = torch.arange(share.start, share.stop, device=device)
    own = mesh.agree(
        lambda: write_piece(policy, ids, mask, sampling, rows=share) if len(numbers) else None,
        rows=(numbers + first).tolist(),
    )
    sizes = mesh.gather(None if own is None else [own.ids.shape[1], own.draws])
    width, draws = (max(size[i] for size in sizes if size) for i in (0, 1))
    for _ in range(draws - (0 if own is None else own.draws)):
        random_numbers(len(ids), device)
    columns: dict[str, Tensor] = {}
    if own is not None:
        missing = (0, width - own.ids.shape[1])
        columns["ids"] = torch.nn.functional.pad(own.ids, missing, value=policy.pad_id)
        columns["logprobs"] = torch.nn.functional.pad(own.logprobs, missing)
    got = together(columns, numbers, len(ids), mesh)
    return Piece(got["ids"], got["logprobs"], draws)


def runs(count: int, size: int) -> list[slice]:
    """Neighbouring rows for each process, as even as can be; the first ones have the most.

    Example:
        >>> runs(5, 2)
        [slice(0, 3, None), slice(3, 5, None)]
    """
    ends = [-(-count * (rank + 1) // size) for rank in range(size)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def balanced_rows(written: Rollout, size: int) -> list[Int[Tensor, " rows"]]:
    """Rows for each process, with about as many tokens in each."""
    device = written.response_mask.device
    shares = balanced_shares(row_lengths(written), size)
    return [torch.tensor(share, dtype=torch.long, device=device) for share in shares]


def together(
    parts: Mapping[str, Tensor], share: Int[Tensor, " rows"], count: int, mesh: Mesh
) -> dict[str, Tensor]:
    """Columns of the whole batch from the rows of every process.

    Args:
        parts: this process's rows, by name; empty where it has none.
        share: which rows of the batch they are.
        count: rows of the batch.
        mesh: the processes.
    """
    said = mesh.gather({n: [str(x.dtype), list(x.shape[1:])] for n, x in parts.items()})
    whole: dict[str, Tensor] = {}
    for name, (dtype, shape) in next(names for names in said if names).items():
        kind = getattr(torch, dtype.removeprefix("torch."))
        whole[name] = torch.zeros(count, *shape, dtype=kind, device=share.device)
        if name in parts:
            whole[name][share] = parts[name]
    # A number plus zeros is that number, to the last bit.
    mesh.add(list(whole.values()))
    return whole


def scored_columns(scored: ScoredRollout) -> dict[str, Tensor]:
    """What reading gave, by name."""
    found = {field.name: getattr(scored, field.name) for field in fields(scored)}
    return {name: found[name] for name in SCORED if found[name] is not None}


@dataclass(frozen=True)
class SharedReward:
    """A reward model that several processes ask together; all of them have all scores."""

    inner: RewardModel
    mesh: Mesh

    def score(
        self,
        prompts: Sequence[Content],
        responses: Sequence[str],
        columns: Columns = NO_COLUMNS,
    ) -> Float[Tensor, " batch"]:
        """See `RewardModel`."""
        size = self.mesh.size if isinstance(self.inner, ClassifierReward) else 1
        share = runs(len(responses), size)[self.mesh.rank] if self.mesh.rank < size else slice(0, 0)
        rows = range(len(responses))[share]
        part = {name: list(column[share]) for name, column in columns.items()}
        own = self.mesh.agree(
            lambda: self.inner.score(prompts[share], responses[share], part) if rows else None,
            rows=rows,
        )
        parts = {} if own is None else {"scores": own.cpu()}
        numbers = torch.tensor(list(rows), dtype=torch.long)
        return together(parts, numbers, len(responses), self.mesh)["scores"]
