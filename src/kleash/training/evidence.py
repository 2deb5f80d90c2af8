"""A step while it is made, and what is kept of one that was refused: tensors and JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kleash.errors import RefusedError
from kleash.models.reward_model import text_of
from kleash.storage.atomic_directories import save_tensors, write_directory
from kleash.storage.atomic_files import plain_json
from kleash.training.responses import Responses
from kleash.training.snapshot import Undo
from kleash.types import Rollout, ScoredRollout


@dataclass
class PendingStep:
    """A step while it is made: how to undo it, and what it has seen, should it be refused."""

    step: int
    undo: Undo
    responses: Responses | None = None
    scores: Tensor | None = None
    scored: ScoredRollout | None = None
    within_bounds: bool = False
    """The policy that wrote the responses has been measured, and nothing was wrong with it."""
    updating: bool = False
    """Weights may have moved when an error comes."""
    following: Rollout | None = None
    """The rollout of the step after this one, where it is written ahead."""


def keep_evidence(
    final: Path, error: RefusedError, pending: PendingStep, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """The batch as tensors, its texts and the offender as JSON; nothing that could execute."""

    def write(directory: Path) -> None:
        save_tensors(directory / "batch.safetensors", _tensors_of(pending))
        record = _record_of(error, pending, tokenizer)
        (directory / "refusal.json").write_text(plain_json(record, indent=1), encoding="utf-8")

    write_directory(final, write, what="the refused batch")
    return final


def _tensors_of(pending: PendingStep) -> dict[str, Tensor]:
    """What is known of the batch; numbers that a step did not come to are missing."""
    rollout = None if pending.responses is None else pending.responses.rollout
    sources = {
        rollout: ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "ended"),
        pending.scored: ("rollout_logprobs", "ref_logprobs", "kl", "entropy", "values"),
    }
    found = {
        name: getattr(source, name) for source, names in sources.items() if source for name in names
    }
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    return tensors if pending.scores is None else {**tensors, "scores": pending.scores}


def _record_of(
    error: RefusedError, pending: PendingStep, tokenizer: PreTrainedTokenizerBase
) -> dict[str, object]:
    record: dict[str, object] = {
        "step": pending.step,
        "wire": error.wire,
        "sentence": str(error),
        "response": error.response,
        "token": error.token,
    }
    if pending.responses is None:
        return record
    written, row = pending.responses, error.response
    record |= {
        "prompts": [text_of(prompt) for prompt in written.prompts],
        "responses": written.texts,
    }
    if row is not None:
        record |= {"offender": written.texts[row]}
    if row is not None and error.token is not None:
        ids = cast("list[int]", written.rollout.response_ids[row].tolist())
        names = tokenizer.convert_ids_to_tokens(ids)
        record |= {"offending_token": names[error.token]}
    return record
