"""What is known of a refused step, written into the run directory as tensors and JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from kleash.errors import RefusedError
from kleash.models.reward_model import text_of
from kleash.storage.atomic_directories import (
    save_tensors,
    write_directory,
)
from kleash.storage.atomic_files import plain_json
from kleash.training.components import Components
from kleash.training.evaluation import Answers
from kleash.training.snapshot import (
    Undo,
)
from kleash.training.state import (
    TrainingState,
)
from kleash.types import ScoredRollout


@dataclass
class Attempt:
    """A step while it is made: how to undo it, and what it has seen, should it be refused."""

    step: int
    undo: Undo
    answers: Answers | None = None
    scores: Tensor | None = None
    scored: ScoredRollout | None = None
    within_bounds: bool = False
    """The policy that wrote the answers has been measured, and nothing was wrong with it."""
    updating: bool = False
    """Weights may have moved when an error comes."""


def keep_evidence(
    folder: Path,
    error: RefusedError,
    attempt: Attempt,
    components: Components,
    state: TrainingState,
) -> Path:
    """The batch as tensors, its texts and the offender as JSON; nothing that could execute."""
    final = folder / f"step-{attempt.step:06d}-{state.rollbacks}"

    def write(directory: Path) -> None:
        save_tensors(directory / "batch.safetensors", _tensors_of(attempt))
        record = _record_of(error, attempt, components)
        (directory / "refusal.json").write_text(plain_json(record, indent=1), encoding="utf-8")

    write_directory(final, write, what="the refused batch")
    return final


def _tensors_of(attempt: Attempt) -> dict[str, Tensor]:
    """What is known of the batch; numbers that a step did not come to are missing."""
    rollout = None if attempt.answers is None else attempt.answers.rollout
    sources = {
        rollout: ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "ended"),
        attempt.scored: ("rollout_logprobs", "ref_logprobs", "kl", "entropy", "values"),
    }
    found = {
        name: getattr(source, name) for source, names in sources.items() if source for name in names
    }
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    return tensors if attempt.scores is None else {**tensors, "scores": attempt.scores}


def _record_of(error: RefusedError, attempt: Attempt, components: Components) -> dict[str, object]:
    record: dict[str, object] = {
        "step": attempt.step,
        "wire": error.wire,
        "sentence": str(error),
        "response": error.response,
        "token": error.token,
    }
    if attempt.answers is None:
        return record
    answers, row = attempt.answers, error.response
    record |= {
        "prompts": [text_of(prompt) for prompt in answers.prompts],
        "responses": answers.responses,
    }
    if row is not None:
        record |= {"offender": answers.responses[row]}
    if row is not None and error.token is not None:
        written = cast("list[int]", answers.rollout.response_ids[row].tolist())
        names = components.policy.tokenizer.convert_ids_to_tokens(written)
        record |= {"offending_token": names[error.token]}
    return record
