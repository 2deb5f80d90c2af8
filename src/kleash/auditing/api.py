"""`kleash.audit`: the audit as a function."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kleash.auditing.inputs import Source, SourceKind
from kleash.auditing.model_pair import AuditDtype, ModelPair, check_pair, open_checkpoint
from kleash.auditing.result import Audit, Per
from kleash.auditing.runner import Settings, Watch, audit_pair
from kleash.errors import ConfigError
from kleash.models.policy import Policy

Given = str | Path | Sequence[str]
"""A file, or texts."""


def audit(
    policy: str | Path | Policy,
    reference: str | Path | Policy,
    prompts: Given | None = None,
    *,
    texts: Given | None = None,
    responses: str | Path | None = None,
    both: bool = False,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    responses_per_prompt: int = 1,
    precision: float | None = None,
    fail_above: float | None = None,
    per: Per = "token",
    seed: int = 0,
    batch_tokens: int = 8192,
    keep: int = 40,
    dtype: AuditDtype = "float32",
    device: str = "cpu",
    into: str | Path | None = None,
    resume: bool = False,
    watch: Watch | None = None,
) -> Audit:
    """Measure exactly how far a policy is from a reference, with 95 % intervals.

    Give one of prompts (the policy answers them: KL(π‖π_ref) on its own writing), texts (both
    read them) or responses (rows of prompt and response).

    Args:
        policy: a Hugging Face directory or hub name, a peft adapter, or an open model.
        reference: the same.
        prompts: a prompt file, or prompts.
        texts: a .txt file, a file with rows of `text`, or texts.
        responses: a file with rows of `prompt` and `response`.
        both: let the reference answer the prompts as well: KL(π_ref‖π) on its own writing.
        temperature: of sampling and of both models' distributions.
        max_new_tokens: length limit of a response.
        responses_per_prompt: answers to each prompt; intervals are clustered by prompt.
        precision: stop as soon as the headline's interval, valid at any time, is mean ± this.
        fail_above: threshold of the gate, see `Audit.gate`.
        per: what `precision` and `fail_above` are per, "token" or "response".
        seed: of sampling.
        batch_tokens: most tokens read at once, padding included.
        keep: responses and tokens of each kind to look at closely.
        dtype: of parameters and arithmetic; "auto" as stored.
        device: a torch device.
        into: a directory for the scored responses, so that the audit can be resumed.
        resume: go on with what `into` holds.
        watch: called after each batch.

    Raises:
        ConfigError: if there is not exactly one source, or a setting cannot be.
        ModelError: if a model cannot be used, or the two have different tokens.
        PromptError: if the source cannot be used.
        RunError: if `into` cannot be written, or holds another audit.
    """
    settings = Settings(
        both=both,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        responses_per_prompt=responses_per_prompt,
        seed=seed,
        batch_tokens=batch_tokens,
        precision=precision,
        fail_above=fail_above,
        per=per,
        keep=keep,
    )
    given: dict[SourceKind, Given | None]
    given = {"prompts": prompts, "texts": texts, "responses": responses}
    kind, what = one_source(given)
    pair = ModelPair(
        *(
            m if isinstance(m, Policy) else open_checkpoint(m, dtype=dtype, device=device)
            for m in (policy, reference)
        )
    )
    check_pair(pair)
    with tempfile.TemporaryDirectory() as folder:
        file = _as_file(kind, what, Path(folder))
        room = max_new_tokens if kind == "prompts" else 0
        return audit_pair(
            pair,
            Source(kind, file, room),
            settings,
            into=None if into is None else Path(into),
            resume=resume,
            watch=watch,
        )


def one_source(given: dict[SourceKind, Any]) -> tuple[SourceKind, Any]:
    """The one source that was given.

    Raises:
        ConfigError: if there is none, or more than one.
    """
    found: list[tuple[SourceKind, Any]] = [
        (kind, value) for kind, value in given.items() if value is not None
    ]
    if len(found) != 1:
        names = " and ".join(kind for kind, _ in found) or "none"
        raise ConfigError(f"expected one of prompts, texts and responses, got {names}")
    return found[0]


def _as_file(kind: SourceKind, given: Given, folder: Path) -> Path:
    if isinstance(given, str | Path):
        return Path(given)
    key = "prompt" if kind == "prompts" else "text"
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps({key: text}) + "\n" for text in given), encoding="utf-8")
    return file
