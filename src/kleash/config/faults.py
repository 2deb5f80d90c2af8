"""What is wrong with a configuration, in sentences that name key, place and remedy."""

from collections.abc import Iterator
from typing import Any, cast

from pydantic import ValidationError

from kleash.config.keys import moved_to, names_free, nearest, owner_of, sections_at
from kleash.config.section import SettingError
from kleash.config.sources import Key, Sources


def sentences_of(error: ValidationError, sources: Sources) -> tuple[list[str], bool]:
    """One sentence for each fault, with the place that it comes from.

    Returns:
        The sentences, and whether all of what they speak of was set on the command line.
    """
    places: dict[str, list[str]] = {}
    on_command_line = True
    for keys, sentence in _faults(error):
        on_command_line = on_command_line and any(sources.is_flag(key) for key in keys)
        for place in dict.fromkeys(sources.of(key) for key in keys):
            places.setdefault(sentence, []).append(place)
    return [
        f"{' and '.join(found)}: {sentence}" for sentence, found in places.items()
    ], on_command_line


def _faults(error: ValidationError) -> Iterator[tuple[list[Key], str]]:
    """The keys and the sentence of each fault; those of the branches of a union are one."""
    grouped: dict[Key, list[dict[str, Any]]] = {}
    for fault in error.errors():
        key = _key_of(tuple(str(part) for part in fault["loc"]))
        grouped.setdefault(key, []).append(cast("dict[str, Any]", fault))
    for key, faults in grouped.items():
        raised = faults[0].get("ctx", {}).get("error")
        if isinstance(raised, SettingError) and raised.keys:
            inner = [(*key, *name.split(".")) for name in raised.keys]
            yield inner, _in_section(key, str(raised))
        else:
            yield [_place_of(key, faults[0])], _sentence(key, faults)


def _key_of(location: Key) -> Key:
    """The key at a location, which also names branches of unions."""
    key: Key = ()
    for position, part in enumerate(location):
        if position == 1 and key == ("algorithm",) and part in ("ppo", "grpo", "rloo", "distill"):
            continue
        is_name = part.isdigit() or names_free(key) or bool(sections_at(key)) or not key
        if not is_name:
            continue
        key = (*key, part)
    return key


def _place_of(key: Key, fault: dict[str, Any]) -> Key:
    """The key that is wrong: where no algorithm has the name given, that is the name."""
    return (*key, "name") if fault["type"] == "union_tag_invalid" else key


def _in_section(key: Key, sentence: str) -> str:
    return f"in `{'.'.join(key)}`: {sentence}" if key else sentence


def _sentence(key: Key, faults: list[dict[str, Any]]) -> str:
    dotted = ".".join(key)
    kind = faults[0]["type"]
    if kind == "extra_forbidden":
        return _unknown(key)
    if kind == "missing":
        return f"`{dotted}` is missing"
    said = dict.fromkeys(_without_prefix(fault["msg"]) for fault in faults)
    value: object = faults[0]["input"]
    if kind == "union_tag_invalid":
        value, context = cast("dict[str, Any]", value)["name"], faults[0]["ctx"]
        return f"`{dotted}`: expected one of {context['expected_tags']}, got {value!r}"
    if kind in ("model_type", "dict_type", "dataclass_type"):
        return f"`{dotted}`: expected a section of keys and their values, got {value!r}"
    if kind == "too_short":
        return f"`{dotted}`: expected one entry or more, got none"
    got = "" if isinstance(value, dict) else f", got {value!r}"
    return f"`{dotted}`: {' or '.join(said)}{got}"


def _without_prefix(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _unknown(key: Key) -> str:
    dotted, parents = ".".join(key), key[:-1]
    moved = moved_to(key)
    if moved is not None:
        return f"`{dotted}` is now `{moved}`: write it there"
    owner = owner_of(key[1]) if key[0] == "algorithm" and len(key) > 1 else None
    if owner is not None:
        return f"`{dotted}` is for `algorithm: {owner}` alone: leave it out, or take {owner}"
    known = dict.fromkeys(name for s in sections_at(parents) for name in s.model_fields)
    return f"unknown key `{dotted}`{nearest(key[len(key) - 1], known)}"
