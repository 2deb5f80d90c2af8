"""A kept response with what both models say of its tokens: a line of samples.jsonl.

Per-token numbers have six significant digits; a long response keeps its first tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast

from kleash.errors import RunError
from kleash.storage.atomic_files import NON_FINITE, plain_json

Kind = Literal["worst", "random", "heldout"]
Who = Literal["policy", "reference"]

MAX_TOKENS_PER_SAMPLE = 4096
"""Longer responses keep their first tokens; `tokens_cut` says how many are missing."""
_NUMBERS = ("logprobs", "ref_logprobs", "token_kl", "entropy")
_TOPS = ("policy_top", "reference_top")


@dataclass(frozen=True)
class Likely:
    """What a model thought likely at a token: words with their probabilities, likeliest first."""

    words: Sequence[str]
    probabilities: Sequence[float]


@dataclass(frozen=True)
class Sample:
    """One kept response and what both models say about each of its tokens.

    The per-token lists are empty or as long as `tokens`. For a response of the reference the
    numbers are those of the same pair of models, along the text that the reference wrote.
    """

    step: int
    kind: Kind
    who: Who
    prompt: str
    response: str
    score: float | None
    kl: float | None
    """Σ_t KL(π‖π_ref) along the response, in nats."""
    tokens: Sequence[str] = ()
    logprobs: Sequence[float] = ()
    ref_logprobs: Sequence[float] = ()
    token_kl: Sequence[float] = ()
    entropy: Sequence[float] = ()
    gold: float | None = None
    """What the held-out rubric says, where there is one."""
    tokens_cut: int = 0
    policy_top: Sequence[Likely | None] = ()
    """What the policy thought likely at each token; None where that was not kept."""
    reference_top: Sequence[Likely | None] = ()

    def __post_init__(self) -> None:
        """Refuse per-token lists that do not belong to the tokens."""
        for name in (*_NUMBERS, *_TOPS):
            if (length := len(getattr(self, name))) not in (0, len(self.tokens)):
                raise ValueError(
                    f"{name} must be empty or have one entry per token "
                    f"({len(self.tokens)}), got {length}"
                )


def sample_line(sample: Sample) -> str:
    """A sample as a line of the file."""
    cut = max(0, len(sample.tokens) - MAX_TOKENS_PER_SAMPLE)
    # Six significant digits: what float32 holds, in a third of the bytes.
    short: dict[str, Any] = {
        name: [float(f"{number:.6g}") for number in getattr(sample, name)[:MAX_TOKENS_PER_SAMPLE]]
        for name in _NUMBERS
    }
    short |= {name: list(getattr(sample, name)[:MAX_TOKENS_PER_SAMPLE]) for name in _TOPS}
    kept = replace(
        sample,
        tokens=list(sample.tokens[:MAX_TOKENS_PER_SAMPLE]),
        tokens_cut=sample.tokens_cut + cut,
        **short,
    )
    return plain_json(asdict(kept)) + "\n"


def read_sample(where: str, line: Mapping[str, Any]) -> Sample:
    """One line of the file.

    Raises:
        RunError: it is not what a sample holds; the message says where.
    """
    known: dict[str, Any] = {}
    for field in fields(Sample):
        name = field.name
        if name in line:
            known[name] = _read_sample_field(where, name, line[name])
    try:
        return Sample(**known)
    except (TypeError, ValueError) as error:
        raise RunError(f"{where}: not a sample: {error}") from error


def _read_sample_field(where: str, name: str, value: Any) -> Any:
    choices = {"kind": ("worst", "random", "heldout"), "who": ("policy", "reference")}
    match name:
        case "logprobs" | "ref_logprobs" | "token_kl" | "entropy" if isinstance(value, list):
            numbers_read = [
                entry if type(entry) is float else read_number(where, name, entry)
                for entry in cast(list[Any], value)
            ]
            if None not in numbers_read:
                return numbers_read
        case "policy_top" | "reference_top" if isinstance(value, list):
            return [_read_likely(where, name, entry) for entry in cast(list[Any], value)]
        case "tokens" if isinstance(value, list):
            if all(isinstance(entry, str) for entry in cast(list[Any], value)):
                return cast(list[str], value)
        case "prompt" | "response" if isinstance(value, str):
            return value
        case "kind" | "who" if value in choices[name]:
            return value
        case "step" | "tokens_cut" if isinstance(value, int):
            return value
        case "score" | "kl" | "gold":
            return read_number(where, name, value)
        case _:
            pass
    raise RunError(f"{where}: {name!r} is not what a sample holds: {str(value)[:60]!r}")


def _read_likely(where: str, name: str, value: Any) -> Likely | None:
    if value is None:
        return None
    entry = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    words, masses = entry.get("words"), entry.get("probabilities")
    if (
        isinstance(words, list)
        and isinstance(masses, list)
        and len(cast(list[Any], words)) == len(cast(list[Any], masses))
        and all(isinstance(word, str) for word in cast(list[Any], words))
    ):
        numbers_read = [read_number(where, name, mass) for mass in cast(list[Any], masses)]
        if None not in numbers_read:
            return Likely(cast(list[str], words), cast(list[float], numbers_read))
    raise RunError(
        f"{where}: expected words and probabilities in {name!r}, got {str(value)[:60]!r}"
    )


def read_number(where: str, key: str, value: Any) -> float | int | None:
    """A number as it stands in a file: the names of what JSON lacks become floats.

    Raises:
        RunError: it is something else.
    """
    if isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    if value is None or (type(value) is int and abs(value) < 2**63):
        return value
    # json.loads also understands bare NaN and Infinity, which other writers leave.
    if isinstance(value, float):
        return value
    raise RunError(f"{where}: expected a number for {key!r}, got {str(value)[:60]!r}")
