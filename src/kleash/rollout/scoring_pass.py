"""The scoring pass: Rollout → ScoredRollout, and the Fresh numbers of an update.

Policy and reference read the same tokens at the temperature of sampling, and only the response's
tokens reach the vocabulary. Sampling is in `sampling`, whose names are exported
here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kleash.errors import NonFiniteError, ScoringError
from kleash.models import batching
from kleash.models.freed_memory import return_freed_memory_before
from kleash.models.policy import LanguageModel
from kleash.models.value_model import ValueFunction
from kleash.rollout.sampling import SamplingSpec, generate, overridden_settings, response_texts
from kleash.scoring import Quantity, token_scores
from kleash.scoring.divergences import Divergence, Frozen, GradientTime, token_divergences
from kleash.scoring.tiles import Tiles
from kleash.types import Experience, Fresh, Head, Rollout, ScoredRollout

__all__ = [
    "SamplingSpec",
    "TokenScorer",
    "distilled",
    "fresh",
    "generate",
    "microbatches",
    "overridden_settings",
    "response_texts",
    "row_lengths",
    "score",
    "score_and_keep",
]


@runtime_checkable
class TokenScorer(Protocol):
    """The signature of `scoring.dense.token_scores` and of its streaming twin."""

    def __call__(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        *,
        reference: tuple[Tensor, Head] | None = None,
        temperature: float = 1.0,
        want: Sequence[Quantity] = ("logprobs",),
    ) -> Any:
        """Score each target token against the hidden state that predicts it."""
        ...


_NUMBERS: tuple[Quantity, ...] = ("logprobs", "ref_logprobs", "kl", "entropy")


def score(
    rollout: Rollout,
    *,
    policy: LanguageModel,
    reference: LanguageModel,
    scores: Float[Tensor, " batch"],
    value: ValueFunction | None = None,
    temperature: float = 1.0,
    microbatch: batching.Limit = 16,
    keep_ref_hidden: bool = False,
    teacher: LanguageModel | None = None,
    scorer: TokenScorer = token_scores,
) -> ScoredRollout:
    """Score responses with policy, reference and value model.

    log π, log π_ref, exact KL and entropy of every response token, at one temperature; the head is
    applied to response tokens alone, in micro-batches of similar length without idle columns.

    Args:
        rollout: the sampled responses.
        policy: the policy that sampled them.
        reference: the frozen reference.
        scores: score of each response, passed through.
        value: value function, if there is one.
        temperature: that of sampling.
        microbatch: responses read at once, or a budget of tokens; changes memory, not results.
        keep_ref_hidden: keep the hidden states of reference and teacher, for a loss that needs an
            exact divergence.
        teacher: in distillation, whom the student is drawn to; it may be the reference.
        scorer: from hidden states to per-token numbers.

    Raises:
        NonFiniteError: if a log-probability or KL is not finite, naming response and token.
        ScoringError: if a log-probability is above 0 or a KL below it, beyond rounding.
    """
    out: dict[str, Tensor] = {}
    reader = _Reader(policy, reference, value, teacher, scorer, temperature, keep_ref_hidden)
    for rows in microbatches(rollout, microbatch):
        with torch.no_grad():
            read = reader.states(rollout, rows)
            reader.note(out, read, read.scores(reference=read.against, want=_NUMBERS))
    return _scored(rollout, scores, out)


def score_and_keep(
    rollout: Rollout,
    kept: Int[Tensor, " rows"],
    *,
    policy: LanguageModel,
    reference: LanguageModel,
    scores: Float[Tensor, " batch"],
    value: ValueFunction | None = None,
    temperature: float = 1.0,
    microbatch: batching.Limit = 16,
    keep_ref_hidden: bool = False,
    scorer: TokenScorer = token_scores,
) -> tuple[ScoredRollout, Fresh]:
    """`score`, and what `fresh` would say of some of the rows, from one reading of the policy.

    Until the policy is updated both say the same, so that the first update need not read these rows
    again: the graph of their reading is kept for it. That is the memory of their activations, from
    here to the backward pass, so they are read at once, and last.

    Args:
        rollout: the sampled responses.
        kept: the rows whose graph is kept.
        policy, reference, scores, value, temperature, keep_ref_hidden, scorer: as in `score`.
        microbatch: of the other rows, as in `score`.

    Returns:
        The scored rollout, without gradient, and the live numbers of the kept rows, in the order
        given and in all columns; of the latter one backward pass can be made.

    Raises:
        NonFiniteError, ScoringError: as `score`.
    """
    out: dict[str, Tensor] = {}
    reader = _Reader(policy, reference, value, None, scorer, temperature, keep_ref_hidden)
    mask = rollout.response_mask
    others = torch.ones_like(mask[:, 0]).index_fill(0, kept, False).nonzero().flatten()
    lengths = torch.tensor(row_lengths(rollout), device=mask.device)[others]
    for rows in batching.microbatches(lengths.tolist(), microbatch):
        with torch.no_grad():
            read = reader.states(rollout, others[rows])
            reader.note(out, read, read.scores(reference=read.against, want=_NUMBERS))
    with torch.enable_grad():
        read = reader.states(rollout, kept)
        said = reader.note(out, read, read.scores(reference=read.against, want=_NUMBERS))
    live = {
        name: _pad_columns(said[name], mask.shape[1])
        for name in ("logprobs", "values", "kl")
        if name in said
    }
    return _scored(rollout, scores, out), Fresh(**live)


@dataclass(frozen=True)
class _Read:
    """Hidden states of some responses, before their heads."""

    rows: Int[Tensor, " rows"]
    shape: tuple[int, ...]
    """Rows and columns of all responses."""
    part: tuple[Tensor, Tensor, Tensor, Tensor]
    kept: Bool[Tensor, "rows short"]
    hidden: Float[Tensor, "rows short+1 hidden"]
    ref_hidden: Float[Tensor, "rows short+1 hidden"]
    scores: partial[Any]
    """The scorer, given what the policy says of the kept tokens; a reference is still to come."""
    against: tuple[Tensor, Head]
    """The reference's states and head."""


@dataclass(frozen=True)
class _Reader:
    """Who reads a rollout, and how."""

    policy: LanguageModel
    reference: LanguageModel
    value: ValueFunction | None
    teacher: LanguageModel | None
    scorer: TokenScorer
    temperature: float
    keep_ref_hidden: bool

    def states(self, rollout: Rollout, rows: Int[Tensor, " rows"]) -> _Read:
        """The states of some responses, read at once."""
        part, kept = _trim(rollout, rollout.response_mask, rows)
        # In the order in which a process without rows reads divided models: each gathers weights.
        hidden = self.policy.hidden_states(*part)
        ref_hidden = self.reference.hidden_states(*part)
        states, head = hidden[:, :-1][kept], self.policy.head
        return _Read(
            rows=rows,
            shape=tuple(rollout.response_mask.shape),
            part=part,
            kept=kept,
            hidden=hidden,
            ref_hidden=ref_hidden,
            scores=partial(self.scorer, states, head, part[2][kept], temperature=self.temperature),
            against=(ref_hidden[:, :-1][kept], self.reference.head),
        )

    def note(
        self, out: dict[str, Tensor], read: _Read, got: Any
    ) -> dict[str, Float[Tensor, "rows *short"]]:
        """What the models say, with gradients where they were recorded.

        The numbers without them go into `out`, tensors of the whole batch by name; `got` are those
        of the scorer.
        """
        part, kept, hidden, ref_hidden = read.part, read.kept, read.hidden, read.ref_hidden
        return_freed_memory_before(self.policy, got.logprobs, hidden)
        said = {name: _spread(getattr(got, name), kept) for name in _NUMBERS}
        states = {"ref_hidden": ref_hidden} if self.keep_ref_hidden else {}
        if self.teacher is not None:
            shared = self.teacher is self.reference
            own = ref_hidden if shared else self.teacher.hidden_states(*part)
            to_teacher = own[:, :-1][kept], self.teacher.head
            both = read.scores(reference=to_teacher, want=("kl", "reverse_kl"))
            said["teacher_kl"] = _spread(both.kl, kept)
            said["teacher_forward_kl"] = _spread(both.reverse_kl, kept)
            if self.keep_ref_hidden:
                states["teacher_hidden"] = own
        if self.value is not None:
            values = self.value.state_values(*part, _states_of(part[3], hidden))
            said["values"] = torch.where(kept, values[:, :-1], 0.0)
            last = values.detach().gather(1, kept.sum(dim=1, keepdim=True))
            said["final_values"] = last.squeeze(1)
        for name, numbers in said.items():
            _write_rows(out, name, read.rows, numbers.detach(), read.shape)
        for name, hidden_states in states.items():
            _write_states(out, name, read.rows, hidden_states, kept)
        return said


def _scored(
    rollout: Rollout, scores: Float[Tensor, " batch"], out: dict[str, Tensor]
) -> ScoredRollout:
    """What was written, checked."""
    _check(out["logprobs"], out["ref_logprobs"], out["kl"])
    return ScoredRollout(
        rollout=rollout,
        rollout_logprobs=out["logprobs"],
        ref_logprobs=out["ref_logprobs"],
        kl=out["kl"],
        entropy=out["entropy"],
        scores=scores,
        values=out.get("values"),
        final_values=out.get("final_values"),
        ref_hidden=out.get("ref_hidden"),
        teacher_kl=out.get("teacher_kl"),
        teacher_forward_kl=out.get("teacher_forward_kl"),
        teacher_hidden=out.get("teacher_hidden"),
    )


def fresh(
    experience: Experience,
    *,
    policy: LanguageModel,
    value: ValueFunction | None = None,
    reference: LanguageModel | None = None,
    temperature: float = 1.0,
    want: Sequence[Quantity] = ("logprobs",),
    scorer: TokenScorer = token_scores,
) -> Fresh:
    """Read a (micro-)batch again with the models as they are now; gradients flow.

    Only tokens of the losses (`experience.mask`) are computed; columns beyond the longest are not.

    Args:
        experience: the rows to read.
        policy: the policy.
        value: the value function, if it learns.
        reference: needed for "kl"; its hidden states are taken from the experience if kept there
            and computed again if not.
        temperature: that of sampling.
        want: "logprobs", and "kl" where the loss has a pathwise term.
        scorer: from hidden states to per-token numbers.

    Raises:
        ValueError: if "kl" is wanted without a reference.
        NonFiniteError: if a number is not finite, naming response and token.
    """
    rollout, scored = experience.scored.rollout, experience.scored
    rows = torch.arange(len(experience.mask), device=experience.mask.device)
    part, kept = _trim(rollout, experience.mask, rows)
    hidden = policy.hidden_states(*part)
    with_reference = None
    if "kl" in want:
        if reference is None:
            raise ValueError("expected a reference for the exact KL, got None")
        ref_hidden = _reference_states(scored.ref_hidden, reference, part)
        with_reference = (ref_hidden[kept], reference.head)
    got = scorer(
        hidden[:, :-1][kept],
        policy.head,
        part[2][kept],
        reference=with_reference,
        temperature=temperature,
        want=tuple(want),
    )
    return_freed_memory_before(policy, got.logprobs, hidden)
    width = experience.mask.shape[1]
    logprobs = _pad_columns(_spread(got.logprobs, kept), width)
    kl = None if with_reference is None else _pad_columns(_spread(got.kl, kept), width)
    values = None
    if value is not None:
        states = value.state_values(*part, _states_of(part[3], hidden))[:, :-1]
        values = _pad_columns(torch.where(kept, states, 0.0), width)
    _check_finite(logprobs, scored.ref_logprobs, kl)
    return Fresh(logprobs=logprobs, values=values, kl=kl)


def distilled(
    experience: Experience,
    *,
    policy: LanguageModel,
    teacher: LanguageModel,
    divergence: Divergence,
    reference: LanguageModel | None = None,
    temperature: float = 1.0,
    tiles: Tiles | None = None,
    gradient: GradientTime = "backward",
) -> Fresh:
    """`fresh` for distillation: the divergence from the teacher; gradients reach the student.

    One walk over the vocabulary, also where the KL to a reference is wanted beside it.

    Args:
        experience: the rows to read; hidden states that it kept are not computed again.
        policy: the student.
        teacher: whom it is drawn to.
        divergence: which divergence of the two.
        reference: of the leash, where its exact KL is in the loss too; else None.
        temperature: that of sampling.
        tiles: how to walk over the vocabulary.
        gradient: `forward` where the loss is the mean over tokens; see `token_divergences`.

    Raises:
        NonFiniteError: if a log-probability or KL is not finite, naming response and token.
    """
    rollout, scored = experience.scored.rollout, experience.scored
    rows = torch.arange(len(experience.mask), device=experience.mask.device)
    part, kept = _trim(rollout, experience.mask, rows)
    hidden = policy.hidden_states(*part)[:, :-1][kept]
    states = _reference_states(scored.teacher_hidden, teacher, part)[kept]
    frozen = [Frozen(states, teacher.head, divergence)]
    if reference is not None:
        states = _reference_states(scored.ref_hidden, reference, part)[kept]
        frozen.append(Frozen(states, reference.head, "reverse_kl"))
    found = token_divergences(
        hidden,
        policy.head,
        part[2][kept],
        frozen,
        temperature=temperature,
        tiles=tiles,
        gradient=gradient,
    )
    return_freed_memory_before(policy, found.logprobs, hidden)
    width = experience.mask.shape[1]
    logprobs = _pad_columns(_spread(found.logprobs, kept), width)
    divergences = [_pad_columns(_spread(each, kept), width) for each in found.divergences]
    kl = divergences[1] if reference is not None else None
    _check_finite(logprobs, scored.ref_logprobs, kl)
    return Fresh(logprobs=logprobs, kl=kl, divergence=divergences[0])


def microbatches(rollout: Rollout, limit: batching.Limit) -> list[Int[Tensor, " rows"]]:
    """Row numbers in groups of similar length, as `batching.microbatches` says."""
    device = rollout.response_mask.device
    groups = batching.microbatches(row_lengths(rollout), limit)
    return [torch.tensor(group, device=device) for group in groups]


def row_lengths(rollout: Rollout) -> list[int]:
    """Tokens of each prompt with its response."""
    lengths = rollout.prompt_mask.sum(dim=1) + rollout.response_mask.sum(dim=1)
    return cast("list[int]", lengths.tolist())


def _trim(
    rollout: Rollout, mask: Bool[Tensor, "batch token"], rows: Int[Tensor, " rows"]
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Bool[Tensor, "rows short"]]:
    """Rows without the columns that all of them leave unused; and which tokens to compute."""
    prompt_mask, kept = rollout.prompt_mask[rows], mask[rows]
    first = int(prompt_mask.long().argmax(dim=1).min())
    columns = torch.arange(1, kept.shape[1] + 1, device=kept.device)
    width = max(1, int((kept * columns).max()))
    part = (
        rollout.prompt_ids[rows, first:],
        prompt_mask[:, first:],
        rollout.response_ids[rows, :width],
        rollout.response_mask[rows, :width],
    )
    return part, kept[:, :width]


def _reference_states(
    stored: Tensor | None, reference: LanguageModel, part: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Float[Tensor, "batch token hidden"]:
    if stored is not None:
        return stored[:, : part[2].shape[1]]
    with torch.no_grad():
        return reference.hidden_states(*part)[:, :-1]


def _states_of(
    mask: Bool[Tensor, "batch token"], hidden: Float[Tensor, "batch token+1 hidden"]
) -> Float[Tensor, "batch token+1 hidden"]:
    """Hidden states up to the one after the last token; 0 beyond, so that nothing there matters."""
    inside = torch.nn.functional.pad(mask, (1, 0), value=True)
    return torch.where(inside[..., None], hidden, 0.0)


def _spread(
    numbers: Float[Tensor, " N"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    """Put the numbers of selected tokens back in their places; 0 elsewhere."""
    return numbers.new_zeros(mask.shape).masked_scatter(mask, numbers)


def _pad_columns(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=0.0)


def _write_rows(
    out: dict[str, Tensor], name: str, rows: Tensor, part: Tensor, shape: tuple[int, ...]
) -> None:
    """Write the rows of a micro-batch into the tensor of the whole batch."""
    if name not in out:
        out[name] = part.new_zeros(shape[: part.dim()])
    if part.dim() == 1:
        out[name][rows] = part
    else:
        out[name][rows, : part.shape[1]] = part


def _write_states(
    out: dict[str, Tensor], name: str, rows: Tensor, hidden: Tensor, kept: Tensor
) -> None:
    """Hidden states of the kept tokens of a micro-batch; 0 elsewhere."""
    zeroed = torch.where(kept[..., None], hidden[:, :-1], 0.0)
    if name not in out:
        # Of the batch's width, which micro-batches are cut short of.
        out[name] = zeroed.new_zeros((*out["kl"].shape, hidden.shape[-1]))
    _write_rows(out, name, rows, zeroed, ())


def _check(
    logprobs: Float[Tensor, "batch token"],
    ref_logprobs: Float[Tensor, "batch token"],
    kl: Float[Tensor, "batch token"],
) -> None:
    """Refuse numbers that no pair of distributions can have; outside a response all are 0."""
    _check_finite(logprobs, ref_logprobs, kl)
    faults = (
        ("a log-probability of at most 0", logprobs > 1e-6),
        ("a reference log-probability of at most 0", ref_logprobs > 1e-6),
        # Rounding of two float32 log-normalisers; the exact KL is not below 0.
        ("a KL of at least 0", kl < -1e-5),
    )
    for expected, fault in faults:
        if bool(fault.any()):
            said, row, token = _at(fault, logprobs, ref_logprobs, kl)
            raise ScoringError(f"expected {expected}, got {said}", response=row, token=token)


def _check_finite(
    logprobs: Float[Tensor, "batch token"],
    ref_logprobs: Float[Tensor, "batch token"],
    kl: Float[Tensor, "batch token"] | None,
) -> None:
    fault = ~(logprobs.isfinite() & ref_logprobs.isfinite())
    if kl is not None:
        fault = fault | ~kl.isfinite()
    if bool(fault.any()):
        said, row, token = _at(fault, logprobs, ref_logprobs, kl)
        raise NonFiniteError(
            f"expected finite numbers, got {said}: the policy has diverged or a model gives a "
            "token no probability; lower the learning rate, or check both models",
            response=row,
            token=token,
        )


def _at(
    fault: Tensor, logprobs: Tensor, ref_logprobs: Tensor, kl: Tensor | None
) -> tuple[str, int, int]:
    """What both models say at the first place where a fault is, and that place."""
    row, column = (int(i) for i in fault.nonzero()[0])
    said = f"log π = {logprobs[row, column]:.6g}, log π_ref = {ref_logprobs[row, column]:.6g}"
    if kl is not None:
        said += f", KL = {kl[row, column]:.6g}"
    return f"{{place}}: {said}", row, column
