"""What every section of a configuration is: checked keys, none of which does nothing.

A key that has no effect beside the others of its section is *idle*: giving it is an error, and it
is left out where a configuration is written, so that what is written is what is in force.
"""

from collections.abc import Callable
from enum import Enum
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from kleash.models.batching import Limit, TokenBudget

Checked = TypeVar("Checked", bound="Section")


class SettingError(ValueError):
    """A contradiction between keys, which it names so that a message can say where they stand."""

    def __init__(self, message: str, *keys: str):
        """Keep a sentence and the keys it speaks of.

        Args:
            message: the sentence.
            keys: dotted, relative to the section that raises it.
        """
        super().__init__(message)
        self.keys = keys


class InputKind(Enum):
    """What a text in a configuration names; see `kleash.config.inputs` for where it is sought."""

    FILE = "file"
    """A file that must exist."""
    MODEL = "model"
    """A directory, or else a name on the hub."""
    CALLABLE = "callable"
    """`module:function`."""


class Section(BaseModel):
    """Keys with defaults; unknown and idle ones are errors, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def idle(self) -> dict[str, str]:
        """Keys without effect beside the others here, each with its reason: "… is for …"."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _none_in_words(cls, tree: Any) -> Any:
        """`none` is no value, as the documentation prints it, where a key may be without one."""
        if not isinstance(tree, dict):
            return tree
        items = cast("dict[Any, Any]", tree).items()
        return {key: None if _says_none(cls, key, value) else value for key, value in items}

    @model_validator(mode="after")
    def _no_idle_key(self: Checked) -> Checked:
        given = {
            key: why
            for key, why in self.idle().items()
            if key in self.model_fields_set and getattr(self, key) is not None
        }
        if given:
            sentences = [f"`{key}` {why}" for key, why in given.items()]
            raise SettingError("; ".join(sentences) + ": leave it out", *given)
        return self

    @model_serializer(mode="wrap")
    def _in_force(self, handler: Callable[[Any], Any]) -> dict[str, Any]:
        idle, fields = self.idle(), type(self).model_fields
        return {
            key: value
            for key, value in cast("dict[str, Any]", handler(self)).items()
            if key not in idle and not (value is None and fields[key].default is None)
        }


def allows_none(field: FieldInfo) -> bool:
    """Whether a key may be without a value, and `none` is not one of its values."""
    options = _options(field.annotation)
    return type(None) in options and "none" not in options


def allows_text_none(field: FieldInfo) -> bool:
    """Whether `none` is one of a key's values."""
    return "none" in _options(field.annotation)


def _says_none(section: type[BaseModel], key: object, value: object) -> bool:
    if value != "none" or key not in section.model_fields:
        return False
    return allows_none(section.model_fields[str(key)])


def _options(annotation: Any) -> set[Any]:
    """The types of a union and the values of its literals."""
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*(_options(part) for part in get_args(annotation)))
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    origin = get_origin(annotation)
    return {annotation if origin is None else origin}


def microbatch_limit(size: int, tokens: int | None) -> Limit:
    """The limit that two keys say together: a budget of tokens where there is one."""
    return size if tokens is None else TokenBudget(tokens)


def idle_microbatch_size(tokens: int | None) -> dict[str, str]:
    """See `Section.idle`: what does nothing beside a budget of tokens."""
    if tokens is None:
        return {}
    return {"microbatch_size": "does nothing beside `microbatch_tokens`"}
