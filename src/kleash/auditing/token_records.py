"""One response and what both models say of each of its tokens; how it is made, and how it is kept.

A record is all that the audit remembers of a response. Its numbers are float32, kept exactly.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kleash.auditing.float64_states import states_of
from kleash.auditing.inputs import Item, pack
from kleash.errors import NonFiniteError, RunError
from kleash.models.policy import LanguageModel
from kleash.scoring import Quantity, token_scores

By = Literal["policy", "reference", "text", "given"]
"""Who wrote what is scored: a model on its own, neither (a text), or "given" as a response."""


@runtime_checkable
class TwoModels(Protocol):
    """Two models that read the same tokens."""

    @property
    def policy(self) -> LanguageModel:
        """The one that moved."""
        ...

    @property
    def reference(self) -> LanguageModel:
        """The one it moved from."""
        ...


@dataclass(frozen=True, eq=False)
class Record:
    """A response with its scores, in nats."""

    number: int
    """Its place among all responses of its kind."""
    cluster: int
    group: str | None
    ended: bool
    prompt_ids: Int[np.ndarray, " prompt"]
    ids: Int[np.ndarray, " token"]
    kl: Float[np.ndarray, " token"]
    reverse_kl: Float[np.ndarray, " token"]
    logprobs: Float[np.ndarray, " token"]
    ref_logprobs: Float[np.ndarray, " token"]
    entropy: Float[np.ndarray, " token"]
    ref_entropy: Float[np.ndarray, " token"]
    same_top: UInt8[np.ndarray, " agreed"]
    """1 at tokens where both find the same word likeliest; empty where it was not asked."""


_SCORES: tuple[Quantity, ...] = (
    "kl",
    "reverse_kl",
    "logprobs",
    "ref_logprobs",
    "entropy",
    "ref_entropy",
)
_DTYPES = {"prompt_ids": "<i4", "ids": "<i4", "same_top": "u1", **dict.fromkeys(_SCORES, "<f4")}


def score_items(
    items: Sequence[Item],
    both: TwoModels,
    *,
    first_number: int,
    temperature: float,
    budget: int,
    agreement: bool,
) -> list[Record]:
    """Score responses with both models, in batches of similar length.

    Args:
        items: what to score; every one has response tokens.
        both: the two models.
        first_number: number of the first item; records are numbered in the order of items.
        temperature: divides both models' logits.
        budget: most tokens in a batch, padding included.
        agreement: also find each model's likeliest word.

    Raises:
        NonFiniteError: if a model gives NaN.
    """
    records: dict[int, Record] = {}
    numbered = list(enumerate(items, start=first_number))
    for batch in pack(numbered, lambda one: _length(one[1]), budget):
        for record in _score_batch(batch, both, temperature, agreement):
            records[record.number] = record
    return [records[number] for number, _ in numbered]


def to_line(record: Record) -> dict[str, Any]:
    """A record as plain values; arrays as base64 of their little-endian bytes."""
    line: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name in _DTYPES:
            raw = np.ascontiguousarray(value, dtype=_DTYPES[field.name]).tobytes()
            value = base64.b64encode(raw).decode("ascii")
        line[field.name] = value
    return line


def from_line(line: Mapping[str, Any]) -> Record:
    """Read what `to_line` wrote.

    Raises:
        RunError: if it is something else.
    """
    try:
        values: dict[str, Any] = {
            field.name: np.frombuffer(
                base64.b64decode(line[field.name], validate=True), dtype=_DTYPES[field.name]
            )
            if field.name in _DTYPES
            else line[field.name]
            for field in fields(Record)
        }
        return Record(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"expected a scored response, got something else: {error!r}") from error


def _length(item: Item) -> int:
    return len(item.prompt_ids) + len(item.response_ids)


@torch.no_grad()
def _score_batch(
    batch: Sequence[tuple[int, Item]],
    both: TwoModels,
    temperature: float,
    agreement: bool,
) -> list[Record]:
    part, kept = side_by_side([item for _, item in batch], both.policy.head.weight.device)
    states = states_of(both.policy, part, kept)
    ref_states = states_of(both.reference, part, kept)
    targets = part[2][kept]
    scores = token_scores(
        states,
        both.policy.head,
        targets,
        reference=(ref_states, both.reference.head),
        temperature=temperature,
        want=(*_SCORES, "same_top") if agreement else _SCORES,
    )
    columns = {name: getattr(scores, name).float().cpu() for name in _SCORES}
    _refuse_nan(columns, batch)
    found = scores.same_top
    same = torch.zeros(0, dtype=torch.uint8) if found is None else found.to(torch.uint8).cpu()
    records: list[Record] = []
    at = 0
    for number, item in batch:
        span = slice(at, at := at + len(item.response_ids))
        records.append(
            Record(
                number=number,
                cluster=item.cluster,
                group=item.group,
                ended=item.ended,
                prompt_ids=np.asarray(item.prompt_ids, dtype="<i4"),
                ids=np.asarray(item.response_ids, dtype="<i4"),
                same_top=same[span].numpy(),
                **{name: column[span].numpy() for name, column in columns.items()},
            )
        )
    return records


def side_by_side(
    items: Sequence[Item], device: torch.device | str
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Bool[Tensor, "batch token"]]:
    """Items as [left-padded prompt | right-padded response], and which tokens are real."""
    before = max(len(item.prompt_ids) for item in items)
    after = max(len(item.response_ids) for item in items)
    prompts = torch.zeros(len(items), before, dtype=torch.long)
    responses = torch.zeros(len(items), after, dtype=torch.long)
    for row, item in enumerate(items):
        prompts[row, before - len(item.prompt_ids) :] = torch.tensor(item.prompt_ids)
        responses[row, : len(item.response_ids)] = torch.tensor(item.response_ids)
    given = torch.tensor([len(item.prompt_ids) for item in items])[:, None]
    written = torch.tensor([len(item.response_ids) for item in items])[:, None]
    prompt_mask = torch.arange(before) >= before - given
    mask = torch.arange(after) < written
    part = (prompts, prompt_mask, responses, mask)
    a, b, c, d = (one.to(device) for one in part)
    return (a, b, c, d), d


def _refuse_nan(columns: Mapping[str, Tensor], batch: Sequence[tuple[int, Item]]) -> None:
    """An infinite KL is a finding; a NaN is a broken model."""
    for name, column in columns.items():
        bad = column.isnan()
        if bool(bad.any()):
            lengths = torch.tensor([len(item.response_ids) for _, item in batch]).cumsum(0)
            row = int(torch.searchsorted(lengths, int(bad.nonzero()[0]), right=True))
            raise NonFiniteError(
                f"expected numbers from both models, got NaN for {name} of response "
                f"{batch[row][0]}: a checkpoint is broken, or overflows in its dtype"
            )
