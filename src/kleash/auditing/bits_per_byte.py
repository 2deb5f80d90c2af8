"""Two models of different tokens on the same texts: bits per byte, and their difference.

There is no KL without a common vocabulary. What can be compared is how likely each model finds a
whole text, by its own tokens, per byte of that text: a log-ratio on given texts, called that.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch

from kleash.auditing.clustered_moments import ClusteredMoments
from kleash.auditing.float64_states import states_of
from kleash.auditing.inputs import Item, Source, pack
from kleash.auditing.model_pair import ModelPair
from kleash.auditing.options import MAX_NEW_TOKENS, TEMPERATURE, AuditOptions, with_sampling
from kleash.auditing.result import Audit, BitsPerByte
from kleash.auditing.runner import WINDOW
from kleash.auditing.token_records import side_by_side
from kleash.errors import NonFiniteError, PromptError
from kleash.models.policy import Policy
from kleash.rollout.prompts import file_rows
from kleash.scoring import token_scores

STRETCH = 2000
"""Characters of a plain document that count as one text."""

_NAMES = ("policy", "reference", "log_ratio", "bytes", "responses")


def audit_bytes(pair: ModelPair, source: Source, options: AuditOptions) -> Audit:
    """Compare two models by the bits per byte that they need for the same texts.

    Args:
        pair: the models; their tokens need not be the same.
        source: texts.
        options: temperature and batch size are used.

    Raises:
        PromptError: if the file cannot be used.
        NonFiniteError: if a model gives NaN.
    """
    options = with_sampling(
        options, temperature=TEMPERATURE, max_new_tokens=MAX_NEW_TOKENS, chat_template=None
    )
    moments = ClusteredMoments(_NAMES)
    count = 0
    for window in _windows(raw_texts(source.path)):
        ours, theirs = (_bits(model, window, options) for model in (pair.policy, pair.reference))
        rows = [
            (a, b, b - a, float(len(text.encode("utf-8", "surrogatepass"))), 1.0)
            for a, b, text in zip(ours, theirs, window, strict=True)
        ]
        moments.add(torch.tensor(rows, dtype=torch.float64))
        count += len(window)
    return Audit(
        policy=pair.policy.identity(),
        reference=pair.reference.identity(),
        settings={
            "source": "texts",
            "file": source.path.name,
            "file_sha256": source.sha256(),
            "count": count,
            **options.as_settings(),
        },
        parts=[],
        complete=True,
        notes=[
            "Bits per byte of whole texts, each model by its own tokens. The log-ratio says which "
            "model finds these texts likelier; it is no KL and may be negative."
        ],
        bits_per_byte=BitsPerByte(
            policy=moments.ratio("policy", "bytes"),
            reference=moments.ratio("reference", "bytes"),
            log_ratio=moments.ratio("log_ratio", "bytes"),
        ),
    )


def raw_texts(path: Path) -> Iterator[str]:
    """Texts of a file as they stand: rows of `text`, or a document cut into stretches.

    Raises:
        PromptError: if the file is missing, empty or of another kind, or a row has no text.
    """
    if not path.is_file():
        raise PromptError(f"expected a file of texts at {str(path)!r}, got none: check the path")
    texts = _stretches(path) if path.suffix == ".txt" else _rows(path)
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise PromptError(f"expected texts in {str(path)!r}, got an empty file")


def _rows(path: Path) -> Iterator[str]:
    for where, row in file_rows(path):
        text = row.get("text")
        if not isinstance(text, str) or not text:
            raise PromptError(f"expected the key 'text' with a text on {where}, got {text!r}")
        yield text


def _stretches(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            while text := stream.read(STRETCH):
                yield text
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"expected UTF-8 text at {str(path)!r}, got: {error}") from error


def _windows(texts: Iterator[str]) -> Iterator[list[str]]:
    window: list[str] = []
    for text in texts:
        window.append(text)
        if len(window) == WINDOW:
            yield window
            window = []
    if window:
        yield window


def _bits(model: Policy, texts: Sequence[str], options: AuditOptions) -> list[float]:
    """−log₂ p of each text, every token of it scored."""
    items = [item for number, text in enumerate(texts) for item in _items(model, text, number)]
    bits = [0.0] * len(texts)

    def width(item: Item) -> int:
        return len(item.prompt_ids) + len(item.response_ids)

    for batch in pack(items, width, options.batch_tokens):
        for item, nats in zip(
            batch, _nats(model, batch, options.temperature or TEMPERATURE), strict=True
        ):
            bits[item.cluster] += nats / math.log(2)
    return bits


def _items(model: Policy, text: str, number: int) -> Iterator[Item]:
    tokenizer = model.tokenizer
    ids = cast(list[int], tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])
    # Every byte is to be scored, so something must stand before the first token.
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    window = len(ids) if model.context is None else model.context - 1
    for at in range(0, len(ids), max(1, window)):
        yield Item(number, (cast(int, start),), tuple(ids[at : at + window]))


@torch.no_grad()
def _nats(model: Policy, batch: Sequence[Item], temperature: float) -> list[float]:
    part, kept = side_by_side(batch, model.device)
    states = states_of(model, part, kept)
    scores = token_scores(states, model.head, part[2][kept], temperature=temperature)
    assert scores.logprobs is not None
    if bool(scores.logprobs.isnan().any()):
        raise NonFiniteError(f"expected log-probabilities from {model.path!r}, got NaN")
    sums = scores.logprobs.double().cpu().split([len(item.response_ids) for item in batch])
    return [-float(one.sum()) for one in sums]
