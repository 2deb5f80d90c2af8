"""The names a configuration knows: which sections a key leads through, and what is close to it."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic.fields import FieldInfo

from kleash.config.algorithm import DistillConfig, GRPOConfig, PPOConfig, RLOOConfig
from kleash.config.schema import Config, RewardConfig
from kleash.config.section import Section

Sections = tuple[type[Section], ...]
"""What may stand at a place: one section, several where it is a union, none where it is a value."""

MOVED = {
    ("ppo",): ("algorithm",),
    ("value",): ("algorithm", "value"),
    ("optimizer", "value_lr"): ("algorithm", "value", "lr"),
    ("policy", "dtype"): ("policy", "precision"),
}
"""Keys that had another place in earlier versions."""
_NAMED_FREELY = {"reward_models": RewardConfig}
_VALUES_BY_NAME = {"groups"}


def sections_at(key: Sequence[str]) -> Sections:
    """The sections that may stand at a key.

    Example:
        >>> [section.__name__ for section in sections_at(("leash",))]
        ['LeashConfig']
        >>> sections_at(("steps",))
        ()
    """
    sections: Sections = (Config,)
    parts = list(key)
    while parts:
        name = parts.pop(0)
        if name in _NAMED_FREELY and sections == (Config,):
            sections = (_NAMED_FREELY[name],) if parts else ()
            parts = parts[1:]
        else:
            fields = [s.model_fields[name] for s in sections if name in s.model_fields]
            sections = tuple(dict.fromkeys(inner for f in fields for inner in inner_sections(f)))
    return sections


def field_at(key: Sequence[str]) -> FieldInfo | None:
    """The field of a key; None where there is none, or its name is free."""
    for section in sections_at(key[:-1]):
        if key[-1] in section.model_fields:
            return section.model_fields[key[-1]]
    return None


def inner_sections(field: FieldInfo) -> Sections:
    """The sections that a field can hold.

    Example:
        >>> [section.__name__ for section in inner_sections(Config.model_fields["pretraining"])]
        ['PretrainingConfig']
    """
    if field.annotation is not None and dict in (field.annotation, *_origins(field.annotation)):
        return ()
    return tuple(_sections_in(field.annotation))


def names_free(key: Sequence[str]) -> bool:
    """Whether the names below a key are the user's own."""
    return tuple(key) == ("reward_models",) or (len(key) == 2 and key[-1] in _VALUES_BY_NAME)


def moved_to(key: Sequence[str]) -> str | None:
    """Where a key of an earlier version stands now.

    Example:
        >>> moved_to(("ppo", "epochs"))
        'algorithm.epochs'
    """
    for old, new in MOVED.items():
        if tuple(key[: len(old)]) == old:
            return ".".join((*new, *key[len(old) :]))
    return None


def owner_of(name: str) -> str | None:
    """The one algorithm that knows a key of `algorithm`; None if none or several do."""
    owners = [
        s for s in (PPOConfig, GRPOConfig, RLOOConfig, DistillConfig) if name in s.model_fields
    ]
    return owners[0]().name if len(owners) == 1 else None


def nearest(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """The end of a sentence about an unknown name: the closest known one, or all of them."""
    known = list(names)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f": did you mean {prefix}{close[0]}?"
    return f": known here are {', '.join(prefix + one for one in known)}" if known else ""


def _origins(annotation: Any) -> list[Any]:
    return [getattr(part, "__origin__", part) for part in (annotation, *get_args(annotation))]


def _sections_in(annotation: Any) -> Iterable[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
