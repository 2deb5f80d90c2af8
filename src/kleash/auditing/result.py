"""The result of an audit, as data: versioned, to JSON and back, for notebooks and data frames.

Units: nats, per token or per response as named; a KL is positive when the policy has drifted.
`docs/audit.md` describes every field of the JSON.
"""

import html
import json
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from kleash.auditing.confidence_intervals import ConfidenceInterval, Decision
from kleash.auditing.options import Per
from kleash.auditing.run_context import CheckpointInRun
from kleash.auditing.token_records import By
from kleash.errors import RunError
from kleash.models.policy import Identity
from kleash.report.svg_chart import format_number
from kleash.rollout.top_tokens import TopTokens
from kleash.storage.atomic_files import NON_FINITE, plain_json

SCHEMA = "kleash.audit/1"

Verdict = Literal["identical", "not resolvable", "resolved"]

EXIT_CODES: dict[Decision, int] = {"below": 0, "above": 3, "undecided": 4}
"""Exit code of the release gate."""


@dataclass(frozen=True)
class Measure:
    """A quantity per token and per response."""

    per_token: ConfidenceInterval
    per_response: ConfidenceInterval


@dataclass(frozen=True)
class Share:
    """The KL within a part of the tokens: a position, a class, a group of prompts."""

    name: str
    start: float
    """First position of the bin; the number in its list for what is no position."""
    kl: ConfidenceInterval
    """Nats per token of this part."""
    tokens: int
    share: float
    """Of all KL."""


@dataclass(frozen=True)
class Tail:
    """Whether a few responses carry the mean."""

    index: float | None
    """Hill's tail index; below 2 there is no variance, and the intervals promise too much."""
    largest_share: float
    """Of all KL, in the one response that has most."""
    heavy: bool


@dataclass(frozen=True)
class AuditedResponse:
    """A response in detail. Lists have one entry per token."""

    number: int
    kind: Literal["worst", "random"]
    by: By
    group: str | None
    prompt: str
    response: str
    kl: float
    """Nats per response, in the direction of the part's headline."""
    tokens: list[str]
    token_kl: list[float]
    reverse_kl: list[float]
    logprobs: list[float]
    ref_logprobs: list[float]
    entropy: list[float]
    ref_entropy: list[float]
    policy_top: list[TopTokens]
    reference_top: list[TopTokens]


@dataclass(frozen=True)
class WorstToken:
    """A token at which the two models disagree most."""

    number: int
    """Number of its response."""
    position: int
    token: str
    before: str
    after: str
    kl: float
    logprob: float
    ref_logprob: float
    policy_top: TopTokens
    reference_top: TopTokens


@dataclass(frozen=True)
class Part:
    """Everything about the responses of one writer."""

    by: By
    responses: int
    prompts: int
    tokens: int
    headline: str
    """Key of the KL these responses were drawn for: "kl", or "reverse_kl" of the reference's."""
    measures: dict[str, Measure]
    perplexity: dict[str, ConfidenceInterval]
    """Of given texts, by "policy" and "reference"."""
    percentiles: dict[str, float]
    """Of KL per token: "50", "90", "99" to 1 %, "max" exact."""
    histogram: list[tuple[float, int]]
    """Lower end (log₁₀ nats) and number of tokens; what is below the first is in its bin."""
    positions: list[Share]
    classes: list[Share]
    groups: list[Share]
    tail: Tail
    floor: float
    """KL per token of a model to itself, read in a batch and alone: what rounding makes."""
    verdict: Verdict
    samples: list[AuditedResponse] = field(default_factory=list[AuditedResponse])
    worst_tokens: list[WorstToken] = field(default_factory=list[WorstToken])
    gained: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """Ids whose probability grew most from reference to policy, and by how much a token."""
    lost: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    mass_tokens: int = 0
    """Number of tokens, of random responses, that `gained` and `lost` are means over."""


@dataclass(frozen=True)
class Precision:
    """What `precision` asked for and got."""

    asked: float
    per: Per
    reached: bool
    half_width: float | None
    prompts_needed: int | None
    """How many prompts it would take, if they vary as those seen do."""


@dataclass(frozen=True)
class Gate:
    """The release gate."""

    threshold: float
    per: Per
    decision: Decision
    exit_code: int


@dataclass(frozen=True)
class BitsPerByte:
    """Two models of different tokens on the same texts."""

    policy: ConfidenceInterval
    """−log₂ of the text's probability, per byte of UTF-8."""
    reference: ConfidenceInterval
    log_ratio: ConfidenceInterval
    """Reference less policy: bits per byte by which the policy finds the texts likelier."""


@dataclass(frozen=True)
class Audit:
    """How far the policy is from the reference, where, and how sure that is."""

    policy: Identity
    reference: Identity
    settings: dict[str, Any]
    parts: list[Part]
    complete: bool
    notes: list[str] = field(default_factory=list[str])
    precision: Precision | None = None
    gate: Gate | None = None
    bits_per_byte: BitsPerByte | None = None
    token_texts: dict[str, str] = field(default_factory=dict[str, str])
    """Texts of the ids that are named in the parts."""
    standing: CheckpointInRun | None = None
    """Where the policy stands in the run that it is a checkpoint of."""
    schema: str = SCHEMA

    @property
    def kl(self) -> Measure:
        """The headline: the KL that the first part's responses were drawn for.

        Raises:
            ValueError: if the two have different tokens and so no KL.
        """
        if not self.parts:
            raise ValueError("models of different tokens have no KL; see bits_per_byte")
        return self.parts[0].measures[self.parts[0].headline]

    def to_json(self) -> str:
        """The audit as strict JSON; non-finite numbers are "NaN", "Infinity", "-Infinity"."""
        return plain_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Audit":
        """Read what `to_json` wrote.

        Raises:
            RunError: if it is not an audit of this version.
        """
        try:
            data = json.loads(text)
            if data.get("schema") != SCHEMA:
                raise RunError(f"expected an audit of {SCHEMA!r}, got {data.get('schema')!r}")
            return cast(Audit, _build(cls, data))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"expected the JSON of an audit, got something else: {error}") from error

    def rows(self) -> list[dict[str, Any]]:
        """Every measure with its interval, one row for each, as plain values."""
        found: list[dict[str, Any]] = []
        for part in self.parts:
            for name, measure in part.measures.items():
                for per, one in (("token", measure.per_token), ("response", measure.per_response)):
                    found.append({"by": part.by, "quantity": name, "per": per, **asdict(one)})
        if self.bits_per_byte is not None:
            for name, one in vars(self.bits_per_byte).items():
                found.append({"by": "text", "quantity": name, "per": "byte", **asdict(one)})
        return found

    def to_pandas(self) -> Any:
        """`rows` as a pandas data frame."""
        import pandas

        return pandas.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        cells = [
            f"<tr><td>{html.escape(row['by'])}</td><td>{html.escape(row['quantity'])}</td>"
            f"<td>{row['per']}</td><td>{format_number(row['mean'])}</td>"
            f"<td>{_range(row['low'], row['high'])}</td><td>{row['n']}</td></tr>"
            for row in self.rows()
        ]
        title = f"{self.policy.path} against {self.reference.path}"
        if not self.complete:
            title += " (not complete)"
        return (
            f"<table><caption>{html.escape(title)}</caption><tr><th>written by</th><th>quantity"
            "</th><th>per</th><th>mean</th><th>95 %</th><th>n</th></tr>"
            + "".join(cells)
            + "</table>"
        )


def _range(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "—"
    return f"{format_number(low)} … {format_number(high)}"


def _build(kind: Any, value: Any) -> Any:
    """Turn plain JSON values back into what the annotation says."""
    origin = get_origin(kind)
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise TypeError(f"expected an object for {kind}, got {type(value).__name__}")
        hints, mapping = get_type_hints(kind), cast(Mapping[str, Any], value)
        known = {one.name: one for one in fields(kind) if one.name in mapping}
        return cast(Any, kind)(**{name: _build(hints[name], mapping[name]) for name in known})
    if origin is list:
        return [_build(get_args(kind)[0], entry) for entry in value]
    if origin is tuple:
        return tuple(_build(k, entry) for k, entry in zip(get_args(kind), value, strict=True))
    if origin is dict:
        return {name: _build(get_args(kind)[1], entry) for name, entry in value.items()}
    if origin in (Union, types.UnionType):
        kinds = [one for one in get_args(kind) if one is not type(None)]
        return None if value is None else _build(kinds[0], value)
    if kind is float:
        return NON_FINITE[value] if isinstance(value, str) else float(value)
    return value
