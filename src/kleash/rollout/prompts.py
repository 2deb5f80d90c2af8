"""Prompts as token ids: plain text or chat messages, from files, data sets or lists.

Everything that a row can do wrong is said before a model is run, with its place. Where rows come
from is in `prompt_files`. Left out: truncation. A prompt that does not fit is an error, for what is
cut off would change the task.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kleash.errors import PromptError
from kleash.models.chat_templates import Message, checked_arguments, checked_tools, render_chat
from kleash.rollout.prompt_files import Source, excerpt, file_rows, source_rows

__all__ = [
    "Message",
    "Prompt",
    "PromptBatch",
    "PromptCursor",
    "batch_prompts",
    "columns_of",
    "columns_of_row",
    "encode_prompt",
    "file_rows",
    "group_of",
    "iter_prompts",
    "prompt_content",
    "read_prompts",
]


@dataclass(frozen=True)
class Prompt:
    """One prompt: what its author wrote, and what the policy reads."""

    content: str | list[Message]
    ids: tuple[int, ...]
    index: int
    """Its number in the file: the cluster of every standard error."""
    group: str | None = None
    """An optional label of the author's, to report KL and score by."""
    columns: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What its row holds beside the prompt (a gold answer, tools, …): it reaches the reward."""


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
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None,
    max_new_tokens: int,
    chat_template: str | None = None,
) -> list[Prompt]:
    """Read prompts whole; see `iter_prompts`. A column that some rows lack is None in those."""
    prompts = list(
        iter_prompts(
            source,
            tokenizer,
            context=context,
            max_new_tokens=max_new_tokens,
            chat_template=chat_template,
        )
    )
    empty = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return [
        replace(prompt, columns=MappingProxyType({**empty, **prompt.columns})) for prompt in prompts
    ]


def iter_prompts(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None,
    max_new_tokens: int,
    chat_template: str | None = None,
) -> Iterator[Prompt]:
    """Read prompts, one after the other, holding no more than a few.

    A row holds `prompt` (text, or a list of messages) or `messages`, and optionally `group`. Text
    is tokenized as the tokenizer does by itself (its BOS included); messages go through its chat
    template with the generation prompt, and with the row's `tools` and `chat_template_kwargs` (each
    as such or as JSON text). All columns but the prompt's own are kept for the reward.

    Args:
        source: see `prompt_files.source_rows`.
        tokenizer: the policy's.
        context: positions the policy has; None: no limit.
        max_new_tokens: room to leave for the response.
        chat_template: name of one of the tokenizer's templates; None: its default.

    Raises:
        PromptError: if the source is missing, empty or of another kind, or a row cannot be used;
            the row is named.
    """
    index = -1
    for index, (where, row) in enumerate(source_rows(source)):
        content = prompt_content(row, where)
        columns = columns_of_row(row, where)
        yield Prompt(
            content=content,
            ids=encode_prompt(
                content,
                tokenizer,
                where,
                context,
                max_new_tokens,
                columns=columns,
                chat_template=chat_template,
            ),
            index=index,
            group=group_of(row),
            columns=columns,
        )
    if index < 0:
        named = repr(str(source)) if isinstance(source, str | Path) else "the list given"
        raise PromptError(
            f"expected prompts in {named}, got an empty file: give one row per prompt"
        )


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """What the rows of prompts hold beside the prompt, column by column, one value per prompt.

    Example:
        >>> columns_of([Prompt("1 + 1 =", (3,), 0, columns={"answer": "2"}), Prompt("?", (4,), 1)])
        {'answer': ['2', None]}
    """
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def group_of(row: Mapping[str, Any]) -> str | None:
    """The label of a row, if its author gave one."""
    group = row.get("group")
    return None if group is None or group == "" else str(group)


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


def prompt_content(row: Mapping[str, Any], where: str) -> str | list[Message]:
    """The prompt of a row: text, or messages that wait for their answer.

    Where a row has both, `prompt` is the prompt and `messages` a column like any other.

    Raises:
        PromptError: if there is none, or it is anything else.
    """
    key = _prompt_key(row)
    if key is None:
        keys = ", ".join(repr(name) for name, value in row.items() if value is not None)
        raise PromptError(
            f"expected the key 'prompt' or 'messages' on {where}, got {keys or 'no key'}"
        )
    value = row[key]
    if isinstance(value, str) and key == "prompt":
        if not value.strip():
            raise PromptError(f"expected a prompt with text on {where}, got {value!r}")
        return value
    if not isinstance(value, list) or not value:
        what = "'prompt' to be text or" if key == "prompt" else "'messages' to be"
        raise PromptError(
            f"expected {what} a list of messages with 'role' and 'content' on {where}, got "
            f"{excerpt(repr(value))}"
        )
    messages = [
        _message(item, f"message {number} on {where}")
        for number, item in enumerate(cast(list[Any], value))
    ]
    if messages[-1]["role"] == "assistant" and not _is_continued(row):
        raise PromptError(
            f"expected a conversation that waits for its answer on {where}, got one that ends with "
            "the assistant's message: remove it, or have it continued by "
            '"chat_template_kwargs": {"continue_final_message": true}'
        )
    return messages


def _prompt_key(row: Mapping[str, Any]) -> str | None:
    return next((key for key in ("prompt", "messages") if row.get(key) is not None), None)


def _message(item: object, where: str) -> Message:
    """One message with all that it carries; a key that is null is one that is not there.

    Calls of tools are content enough: their message may leave `content` out, which is null then.
    """
    given = cast(Message, item) if isinstance(item, dict) else {}
    message = {name: value for name, value in given.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise PromptError(
            "expected 'prompt' to be text or a list of messages with 'role' and 'content', got "
            f"{excerpt(repr(item))} as {where}"
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": None}
    if isinstance(content, str):
        return message
    parts = cast(list[Any], content) if isinstance(content, list) else []
    if parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return message
    raise PromptError(
        "expected a list of messages whose 'content' is text, parts of type 'text', or null beside "
        f"'tool_calls', got {excerpt(repr(content))} in {where}"
    )


def columns_of_row(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """All columns but the prompt's own; what the chat template reads is checked and parsed."""
    prompt = _prompt_key(row)
    columns = {name: value for name, value in row.items() if name != prompt}
    for name in ("tools", "chat_template_kwargs"):
        if isinstance(value := columns.get(name), str):
            columns[name] = _parsed(value, name, where)
    return MappingProxyType(columns)


def _parsed(text: str, name: str, where: str) -> object:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"expected {name!r} as JSON on {where}, got {excerpt(text)}: {error}"
        ) from error


def _is_continued(row: Mapping[str, Any]) -> bool:
    arguments = row.get("chat_template_kwargs")
    if isinstance(arguments, str):
        return "continue_final_message" in arguments
    return isinstance(arguments, dict) and bool(
        cast(dict[str, Any], arguments).get("continue_final_message")
    )


def encode_prompt(
    content: str | list[Message],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    context: int | None,
    max_new_tokens: int,
    columns: Mapping[str, Any] = MappingProxyType({}),
    chat_template: str | None = None,
) -> tuple[int, ...]:
    """What a model reads of a prompt; `where` is its place, for the error.

    Args:
        content: the text or the messages.
        tokenizer: the model's.
        where: as in `line 3 of 'prompts.jsonl'`.
        context: positions the model has; None: no limit.
        max_new_tokens: room to leave.
        columns: of its row; `tools` and `chat_template_kwargs` go to the chat template.
        chat_template: name of one of the tokenizer's templates; None: its default.

    Raises:
        PromptError: if it is empty, ends itself, needs a chat template that is not there, does not
            fit the one that is, or leaves no room for `max_new_tokens` in the context.
    """
    if isinstance(content, str):
        ids = cast(list[int], tokenizer(content)["input_ids"])
    else:
        text = _chat_text(content, tokenizer, where, columns, chat_template)
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


def _chat_text(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    columns: Mapping[str, Any],
    chat_template: str | None,
) -> str:
    place = f"on {where}"
    try:
        arguments: dict[str, Any] = {"add_generation_prompt": True}
        if (given := columns.get("chat_template_kwargs")) is not None:
            arguments |= checked_arguments(given, place)
        if arguments.get("continue_final_message"):
            arguments["add_generation_prompt"] = False
        return render_chat(
            tokenizer,
            messages,
            place=place,
            tools=checked_tools(columns.get("tools"), place),
            arguments=arguments,
            template=chat_template,
        )
    except ValueError as error:
        raise PromptError(str(error)) from error
