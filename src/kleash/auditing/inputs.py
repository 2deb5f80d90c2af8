"""What is read: prompts to be answered, texts, or given responses, one after the other.

Every source becomes a stream of `Item`s: tokens to condition on, and tokens to be scored (none yet
where a model is to write them). Nothing here holds more than a window of them.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from transformers import PreTrainedTokenizerBase

from kleash.auditing.options import SourceKind
from kleash.errors import PromptError
from kleash.rollout.prompts import (
    columns_of_row,
    encode_prompt,
    file_rows,
    group_of,
    iter_prompts,
    prompt_content,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """Tokens to condition on, and tokens to score."""

    cluster: int
    """Number of the prompt or text in its file: the unit of every interval."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] = ()
    group: str | None = None
    ended: bool = False
    """Whether the writer itself ended the response."""


@dataclass(frozen=True)
class Source:
    """A file, and how to read it."""

    kind: SourceKind
    path: Path
    max_new_tokens: int = 0
    """Tokens to leave for a response; of prompts alone."""
    chat_template: str | None = None
    """Name of the tokenizer's template for messages; None: its default."""

    def items(self, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Iterator[Item]:
        """Read the file from its beginning.

        Raises:
            PromptError: if the file is missing, empty or of another kind, or a row cannot be
                used; the row is named.
        """
        if not self.path.is_file():
            raise PromptError(
                f"expected a file of {self.kind} at {str(self.path)!r}, got none: check the path"
            )
        match self.kind:
            case "prompts":
                prompts = iter_prompts(
                    self.path,
                    tokenizer,
                    context=context,
                    max_new_tokens=self.max_new_tokens,
                    chat_template=self.chat_template,
                )
                found = (Item(one.index, one.ids, group=one.group) for one in prompts)
            case "texts":
                found = _texts(self.path, tokenizer, context)
            case "responses":
                found = _responses(self.path, tokenizer, context, self.chat_template)
        first = next(found, None)
        if first is None:
            raise PromptError(f"expected {self.kind} in {str(self.path)!r}, got an empty file")
        return itertools.chain([first], found)

    def sha256(self) -> str:
        """Fingerprint of the file."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Stretches of about `size` items; a cluster is never in two of them."""
    window: list[Item] = []
    for _, cluster in itertools.groupby(items, key=lambda item: item.cluster):
        window.extend(cluster)
        if len(window) >= size:
            yield window
            window = []
    if window:
        yield window


def pack(items: Sequence[T], width: Callable[[T], int], budget: int) -> list[list[T]]:
    """Batches of items of similar length, longest first, each within a budget of padded tokens.

    An item longer than the budget is a batch of its own.

    Args:
        items: what to pack.
        width: tokens of an item.
        budget: most tokens in a batch, padding included.

    Example:
        >>> pack([3, 9, 2, 8, 3], lambda item: item, 18)
        [[9, 8], [3, 3, 2]]
    """
    batches: list[list[T]] = []
    for item in sorted(items, key=width, reverse=True):
        if batches and width(batches[-1][0]) * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def _texts(path: Path, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Iterator[Item]:
    """Whole texts: the first token (its BOS, if the tokenizer adds one) is given, not scored."""
    if path.suffix == ".txt":
        yield from _document(path, tokenizer, context)
        return
    for index, (where, row) in enumerate(file_rows(path)):
        text = row.get("text")
        if not isinstance(text, str):
            raise PromptError(f"expected the key 'text' with a text on {where}, got {text!r}")
        ids = _ids(tokenizer, text)
        if len(ids) < 2:
            raise PromptError(
                f"expected a text of at least two tokens on {where}, got {len(ids)}: the first "
                "is given and not scored"
            )
        for piece in _pieces(ids, tokenizer, context):
            yield Item(index, piece[:1], piece[1:], group_of(row))


def _document(
    path: Path, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> Iterator[Item]:
    """A plain text file is one document, cut into stretches that count as a text each."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"expected UTF-8 text at {str(path)!r}, got: {error}") from error
    for index, piece in enumerate(_pieces(_ids(tokenizer, text), tokenizer, context)):
        yield Item(index, piece[:1], piece[1:])


def _pieces(
    ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, context: int | None
) -> Iterator[tuple[int, ...]]:
    """Cut a text to the context; every piece begins with BOS where the text does."""
    width = len(ids) if context is None else context
    bos = ids[:1] if ids[:1] == (tokenizer.bos_token_id,) else ()
    rest = ids[len(bos) :]
    step = max(1, width - len(bos))
    for start in range(0, len(rest), step):
        piece = (*bos, *rest[start : start + step])
        if len(piece) > 1:
            yield piece


def _responses(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    chat_template: str | None,
) -> Iterator[Item]:
    """Rows of prompt and response; rows of the same prompt are one cluster where they adjoin."""
    cluster, before = -1, None
    for where, row in file_rows(path):
        content = prompt_content(row, where)
        response = row.get("response")
        if not isinstance(response, str) or not response:
            raise PromptError(
                f"expected the key 'response' with a text on {where}, got {response!r}"
            )
        ids = cast(list[int], tokenizer(response, add_special_tokens=False)["input_ids"])
        if not ids:
            raise PromptError(f"expected a response of at least one token on {where}, got none")
        prompt = encode_prompt(
            content,
            tokenizer,
            where,
            context,
            len(ids),
            columns=columns_of_row(row, where),
            chat_template=chat_template,
        )
        if content != before:
            cluster, before = cluster + 1, content
        yield Item(cluster, prompt, tuple(ids), group_of(row))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    # A text longer than the context is cut later; the tokenizer need not warn of it.
    ids = cast(list[int], tokenizer(text, verbose=False)["input_ids"])
    # A tokenizer may end what it encodes; a stop token there is no part of the text.
    if (
        len(ids) > 1
        and ids[-1] == tokenizer.eos_token_id
        and not text.endswith(str(tokenizer.eos_token))
    ):
        ids = ids[:-1]
    return tuple(ids)
