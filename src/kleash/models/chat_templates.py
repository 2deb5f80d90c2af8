"""Chat templates: conversations to text, the same way for the policy and for reward models.

A template reads whole messages (tool calls and names included), the tools that the conversation
may use, and further arguments, as `apply_chat_template` of transformers passes them. Templates
come with a model and messages with a file: what either of them gets wrong is one sentence that
names the place of the prompt. Nothing here tokenizes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""One turn of a conversation: `role`, `content`, and what else its template reads."""

_PASSED_BY_US = frozenset(
    {
        "conversation",
        "tools",
        "chat_template",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
    }
)
"""Arguments of `apply_chat_template` that a prompt cannot set for itself."""


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    place: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> str:
    """The text of a conversation, written by the tokenizer's chat template.

    Args:
        tokenizer: its template writes the text, special tokens included.
        messages: the turns.
        place: where the conversation stands, for the error: `on line 3 of 'prompts.jsonl'`.
        tools: JSON schemas of the functions that the model may call.
        arguments: further arguments of `apply_chat_template` and of the template.
        template: name of one of the tokenizer's templates; None: its default.

    Raises:
        ValueError: there is no such template, it raises, or it writes a list of parts as Python
            would, brackets and all.
    """
    _require_template(tokenizer, template, place)

    turns = [dict(message) for message in messages]
    try:
        text = cast(
            str,
            tokenizer.apply_chat_template(
                cast(Any, turns),
                tokenize=False,
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=template,
                **(arguments or {}),
            ),
        )
    except Exception as error:  # A template is a program: anything can come.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"expected messages that the chat template takes {place}, got: {reason}: change the "
            "messages, or the template"
        ) from error
    for number, turn in enumerate(turns):
        content = turn.get("content")
        if isinstance(content, list) and str(cast(list[Any], content)) in text:
            raise ValueError(
                f"expected a chat template that reads parts of content {place}, got one that "
                f"writes the list of message {number} as it stands: give its content as one text"
            )
    return text


def _require_template(tokenizer: PreTrainedTokenizerBase, name: str | None, place: str) -> None:
    known = cast("str | dict[str, str] | None", tokenizer.chat_template)
    if known is None:
        raise ValueError(
            f"expected a tokenizer with a chat template for the messages {place}, got one "
            "without: write the prompt as text, or take a chat model"
        )
    if isinstance(known, str):
        if name is not None:
            raise ValueError(
                f"expected a tokenizer with named chat templates for `chat_template: {name}` "
                f"{place}, got one with a single template: leave the name out"
            )
        return
    names = ", ".join(repr(key) for key in sorted(known))
    if name is None and "default" not in known:
        raise ValueError(
            f"expected a default chat template for the messages {place}, got only those named "
            f"{names}: choose one by its name (`prompts.chat_template`; of a judge, its own "
            "`chat_template`)"
        )
    if name is not None and name not in known:
        raise ValueError(
            f"expected the chat template {name!r} for the messages {place}, got those named {names}"
        )


def checked_arguments(value: object, place: str) -> dict[str, Any]:
    """Arguments for a chat template that a prompt brings (`chat_template_kwargs`).

    Raises:
        ValueError: they are no mapping from names, or set what is not the prompt's to set.
    """
    if not isinstance(value, dict):
        raise ValueError(
            f"expected 'chat_template_kwargs' to be an object {place}, got {type(value).__name__}"
        )
    arguments = cast(dict[str, Any], value)
    taken = sorted(_PASSED_BY_US & arguments.keys())
    if taken:
        raise ValueError(
            f"expected 'chat_template_kwargs' for the template alone {place}, got "
            f"{', '.join(map(repr, taken))}: leave that out"
        )
    return arguments


def checked_tools(value: object, place: str) -> list[dict[str, Any]] | None:
    """The functions that a prompt offers to the model (`tools`).

    Raises:
        ValueError: they are no list of objects.
    """
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(t, dict) for t in cast(list[Any], value)):
        return cast(list[dict[str, Any]], value)
    raise ValueError(
        f"expected 'tools' to be a list of JSON schemas {place}, got {str(value)[:60]!r}"
    )


def with_answer(
    messages: Sequence[Mapping[str, Any]], answer: str, *, continued: bool
) -> list[Message]:
    """A conversation with the assistant's answer: as a new turn, or at the end of its last one.

    Example:
        >>> with_answer([{"role": "assistant", "content": "1, "}], "2", continued=True)
        [{'role': 'assistant', 'content': '1, 2'}]
    """
    turns = [dict(message) for message in messages]
    if not continued:
        return [*turns, {"role": "assistant", "content": answer}]
    return [*turns[:-1], {**turns[-1], "content": content_text(turns[-1]) + answer}]


def content_text(message: Mapping[str, Any]) -> str:
    """The text of a message; parts are joined, and a message without content has none.

    Example:
        >>> content_text({"content": [{"type": "text", "text": "Hello"}]})
        'Hello'
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content or ())
