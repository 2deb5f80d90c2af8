"""Prompt files to token ids: JSON lines and Parquet, plain text or chat messages.

Everything a file can do wrong is said before a model is run, with the line. Parquet is read by
pyarrow, the reader underneath `datasets`: local, and without a copy in a cache. Left out:
truncation. A prompt that does not fit is an error, for what is cut off would change the task.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pyarrow.lib
import pyarrow.parquet
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kleash.errors import PromptError

Message = dict[str, str]
"""One turn of a conversation: {"role": ..., "content": ...}."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: what its author wrote, and what the policy reads."""

    content: str | list[Message]
    ids: tuple[int, ...]
    index: int
    """Its number in the file: the cluster of every standard error."""
    group: str | None = None
    """An optional label of the author's, to report KL and score by."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts side by side, padded on the left."""

    ids: Int[Tensor, "batch prompt"]
    mask: Bool[Tensor, "batch prompt"]
    index: Int[Tensor, " batch"]


@dataclass(frozen=True)
class PromptCursor:
    """A place in an endless shuffled reading of `size` prompts; the place is data, to be saved.

    Every epoch reads each prompt once, in an order that depends on the seed and the epoch alone.

    Example:
        >>> numbers, later = PromptCursor(size=3, seed=0).take(4)
        >>> sorted(numbers[:3]), later.epoch, later.position
        ([0, 1, 2], 1, 1)
    """

    size: int
    seed: int
    epoch: int = 0
    position: int = 0

    def take(self, count: int) -> tuple[list[int], "PromptCursor"]:
        """The next `count` prompt numbers, and the place after them."""
        if self.size < 1:
            raise ValueError(f"expected at least one prompt to read, got size {self.size}")
        numbers: list[int] = []
        place = self
        while len(numbers) < count:
            some = place._order()[place.position :][: count - len(numbers)]
            numbers += some
            place = replace(place, position=place.position + len(some))
            if place.position == self.size:
                place = replace(place, epoch=place.epoch + 1, position=0)
        return numbers, place

    def _order(self) -> list[int]:
        order = list(range(self.size))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order


def read_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None,
    max_new_tokens: int,
) -> list[Prompt]:
    """Read a prompt file whole; see `iter_prompts`."""
    return list(iter_prompts(path, tokenizer, context=context, max_new_tokens=max_new_tokens))


def iter_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None,
    max_new_tokens: int,
) -> Iterator[Prompt]:
    """Read a prompt file, one prompt after the other, holding no more than a few.

    A row holds `prompt` (text, or a list of messages) or `messages`, and optionally `group`. Text
    is tokenized as the tokenizer does by itself (its BOS included); messages go through its chat
    template with the generation prompt.

    Args:
        path: a .jsonl, .ndjson or .json file of one object per line, or a .parquet file.
        tokenizer: the policy's.
        context: positions the policy has; None: no limit.
        max_new_tokens: room to leave for the response.

    Raises:
        PromptError: if the file is missing, empty or of another kind, or a row cannot be used;
            the row is named.
    """
    file = Path(path)
    if not file.is_file():
        raise PromptError(
            f"expected a prompt file at {str(file)!r}, got none: check the path"
            + ("" if file.is_absolute() else f" (it is looked for in {Path.cwd()})")
        )
    index = -1
    for index, (where, row) in enumerate(file_rows(file)):
        content = prompt_content(row, where)
        yield Prompt(
            content=content,
            ids=encode_prompt(content, tokenizer, where, context, max_new_tokens),
            index=index,
            group=group_of(row),
        )
    if index < 0:
        raise PromptError(
            f"expected prompts in {str(file)!r}, got an empty file: give one row per prompt"
        )


def group_of(row: Mapping[str, Any]) -> str | None:
    """The label of a row, if its author gave one."""
    group = row.get("group")
    return None if group is None else str(group)


def batch_prompts(
    prompts: Sequence[Prompt], *, pad_id: int, device: torch.device | str = "cpu"
) -> PromptBatch:
    """Put prompts side by side, padded on the left; the mask comes from their lengths."""
    width = max(len(p.ids) for p in prompts)
    ids = [[pad_id] * (width - len(p.ids)) + list(p.ids) for p in prompts]
    mask = [[False] * (width - len(p.ids)) + [True] * len(p.ids) for p in prompts]
    return PromptBatch(
        ids=torch.tensor(ids, device=device),
        mask=torch.tensor(mask, device=device),
        index=torch.tensor([p.index for p in prompts], device=device),
    )


def file_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a .jsonl or .parquet file, each with its place in words.

    Raises:
        PromptError: if the file is of another kind or cannot be read, or a row is no object.
    """
    match file.suffix:
        case ".jsonl" | ".ndjson" | ".json":
            yield from _json_rows(file)
        case ".parquet":
            yield from _parquet_rows(file)
        case other:
            raise PromptError(
                f"expected a .jsonl or .parquet prompt file, got {str(file)!r} of kind {other!r}"
            )


def _json_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(_lines(file), start=1):
        where = f"line {number} of {str(file)!r}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(
                f"expected one JSON object per line, got {_excerpt(line)} on {where}: {error.msg} "
                f"at column {error.colno}"
            ) from error
        if not isinstance(row, dict):
            raise PromptError(
                f'expected an object like {{"prompt": "..."}} on {where}, got {_excerpt(line)}: '
                "write one object on each line, with no list around them"
            )
        yield where, cast(dict[str, Any], row)


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            yield from stream
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"expected a prompt file in UTF-8 at {str(file)!r}, got: {error}"
        ) from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.lib.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise PromptError(
            f"expected a Parquet file at {str(file)!r}, got one that cannot be read: {reason}"
        ) from error
    for number, row in enumerate(table.to_pylist(), start=1):
        # A column that others fill is None here: the same as a key that is not there.
        yield f"row {number} of {str(file)!r}", {k: v for k, v in row.items() if v is not None}


def prompt_content(row: Mapping[str, Any], where: str) -> str | list[Message]:
    """The prompt of a row: text, or messages that wait for their answer.

    Raises:
        PromptError: if there is none, or it is anything else.
    """
    value = row.get("prompt", row.get("messages"))
    if value is None:
        keys = ", ".join(repr(key) for key in row) or "no key"
        raise PromptError(f"expected the key 'prompt' or 'messages' on {where}, got {keys}")
    if isinstance(value, str):
        if not value.strip():
            raise PromptError(f"expected a prompt with text on {where}, got {value!r}")
        return value
    messages = _messages(value)
    if messages is None:
        raise PromptError(
            "expected 'prompt' to be text or a list of messages with 'role' and 'content' "
            f"on {where}, got {_excerpt(repr(value))}"
        )
    if messages[-1]["role"] == "assistant":
        raise PromptError(
            f"expected a conversation that waits for its answer on {where}, got one that ends with "
            "the assistant's message: remove it"
        )
    return messages


def _messages(value: object) -> list[Message] | None:
    """The value as messages; None if it is anything else."""
    if not isinstance(value, list) or not value:
        return None
    messages: list[Message] = []
    for item in cast(list[Any], value):
        role = item.get("role") if isinstance(item, dict) else None
        content = item.get("content") if isinstance(item, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": role, "content": content})
    return messages


def encode_prompt(
    content: str | list[Message],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    context: int | None,
    max_new_tokens: int,
) -> tuple[int, ...]:
    """What a model reads of a prompt; `where` is its place, for the error.

    Raises:
        PromptError: if it is empty, ends itself, needs a chat template that is not there, or
            leaves no room for `max_new_tokens` in the context.
    """
    if isinstance(content, str):
        ids = cast(list[int], tokenizer(content)["input_ids"])
    elif tokenizer.chat_template is None:
        raise PromptError(
            f"expected a tokenizer with a chat template for the messages on {where}, got one "
            "without: write the prompt as text, or take a chat model"
        )
    else:
        text = cast(
            str,
            tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=True),
        )
        # The template writes its own special tokens; the tokenizer must not add them again.
        ids = cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise PromptError(f"expected a prompt of at least one token on {where}, got none")
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and isinstance(content, str):
        raise PromptError(
            f"expected a prompt that can be continued on {where}, got one that ends with the "
            f"end-of-sequence token {tokenizer.eos_token!r}: remove it, or stop the tokenizer from "
            "adding it"
        )
    if context is not None and max_new_tokens >= context:
        raise PromptError(
            f"expected responses shorter than the context of {context} tokens, got max_new_tokens "
            f"= {max_new_tokens}: lower it, to leave room for the prompt on {where} too"
        )
    if context is not None and len(ids) + max_new_tokens > context:
        raise PromptError(
            f"expected a prompt of at most {context - max_new_tokens} tokens on {where} (context "
            f"{context} less {max_new_tokens} new tokens), got {len(ids)}: shorten it or lower "
            "max_new_tokens"
        )
    return tuple(ids)


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
