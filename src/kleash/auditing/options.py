"""What an audit measures and how it samples: one list for Python, the command line and the audit.

Nothing here imports torch, so that `kleash --help` stays quick.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

from kleash.errors import ConfigError, UsageError

AuditDtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
Per = Literal["token", "response"]
SourceKind = Literal["prompts", "texts", "responses"]

TEMPERATURE, MAX_NEW_TOKENS = 1.0, 64
"""Sampling of a policy that belongs to no run."""

IN_MEMORY = "in memory"
"""How a model came to be that was given as an object."""


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Options of an audit. None leaves the choice to what is audited, as each field says."""

    both: bool = False
    """Let the reference answer the prompts as well: KL(π_ref‖π) on its own responses."""
    precision: float | None = None
    """Sample until the headline's interval is mean ± this many nats, or say what it would cost."""
    fail_above: float | None = None
    """Gate: exit 3 if the interval lies above this many nats, 0 if below, 4 if undecided."""
    per: Per = "token"
    """What precision and gate are per."""
    max_new_tokens: int | None = None
    """Length limit of a response; by default that of the checkpoint's run, else 64."""
    responses_per_prompt: int = 1
    """Responses to each prompt; intervals are clustered by prompt."""
    temperature: float | None = None
    """Of sampling and of both models' distributions; by default that of the run, else 1."""
    chat_template: str | None = None
    """Name of one of the policy's chat templates, for prompts that are messages; by default that
    of the checkpoint's run, else the tokenizer's default."""
    seed: int = 0
    """Of sampling."""
    batch_tokens: int = 8192
    """Most tokens read at once, padding included."""
    keep: int = 40
    """Responses and tokens of each kind to show in detail."""
    dtype: AuditDtype = "float32"
    """Of parameters and arithmetic of the models that are opened; auto: each as it is stored."""
    device: str | None = None
    """A torch device; by default that of a model object, else cpu."""
    output: Path | None = None
    """Directory for audit.html, audit.json and the scored responses."""
    resume: bool = False
    """Go on with the audit in that directory."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured; sampling settings are checked by `SamplingSpec`.

        Raises:
            ConfigError: naming the option.
        """
        for name in ("responses_per_prompt", "batch_tokens", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.precision is not None and not 0 < self.precision < float("inf"):
            raise ConfigError(f"expected a precision above 0, got {self.precision}")
        if self.fail_above is not None and not 0 <= self.fail_above < float("inf"):
            raise ConfigError(f"expected fail_above of at least 0, got {self.fail_above}")
        if self.resume and self.output is None:
            raise UsageError("expected the directory to resume, got none: give --output DIR")

    def as_settings(self) -> dict[str, Any]:
        """Those that the numbers depend on, as they stand in audit.json."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("dtype", "device", "output", "resume")
        }


class AuditKeywords(TypedDict, total=False):
    """The fields of `AuditOptions` as keyword arguments."""

    both: bool
    precision: float | None
    fail_above: float | None
    per: Per
    max_new_tokens: int | None
    responses_per_prompt: int
    temperature: float | None
    chat_template: str | None
    seed: int
    batch_tokens: int
    keep: int
    dtype: AuditDtype
    device: str | None
    output: str | Path | None
    resume: bool


def make_options(keywords: Mapping[str, Any]) -> AuditOptions:
    """Options from keyword arguments.

    Raises:
        ConfigError: an option is unknown or cannot be.

    Example:
        >>> make_options({"both": True, "output": "audits/1"}).output.name
        '1'
    """
    known = {field.name for field in fields(AuditOptions)}
    for name in keywords:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            other = "output" if name == "into" else next(iter(close), None)
            hint = (
                f": did you mean {other!r}?" if other else f"; there are {', '.join(sorted(known))}"
            )
            raise ConfigError(f"expected an option of an audit, got {name!r}{hint}")
    values = dict(keywords)
    if isinstance(values.get("output"), str):
        values["output"] = Path(values["output"])
    return AuditOptions(**values)


def one_source(given: Mapping[SourceKind, Any]) -> tuple[SourceKind, Any]:
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


def check_bytewise(kind: SourceKind, options: AuditOptions) -> None:
    """Refuse what a comparison in bits per byte has no use for.

    Raises:
        UsageError: naming the option.
    """
    if kind != "texts":
        raise UsageError("--bytes compares whole texts: give --texts FILE with it")
    if options.chat_template is not None:
        raise UsageError("--bytes reads texts as they are: leave out --chat-template")
    if options.precision is not None or options.fail_above is not None or options.resume:
        raise UsageError("--bytes gives no KL: leave out --precision, --fail-above and --resume")


def with_sampling(
    options: AuditOptions, *, temperature: float, max_new_tokens: int, chat_template: str | None
) -> AuditOptions:
    """The options with sampling settings where none were given."""
    return dataclasses.replace(
        options,
        temperature=temperature if options.temperature is None else options.temperature,
        max_new_tokens=(
            max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
        ),
        chat_template=chat_template if options.chat_template is None else options.chat_template,
    )
