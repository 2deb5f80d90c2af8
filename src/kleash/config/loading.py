"""Read a configuration from YAML and dotted overrides, validate it, and write it out again.

An override wins over the file. It never drops another key of the file, with one exception, which
is said aloud: there is one kind of leash, so `--leash.beta` on a file with `leash.target_kl` takes
its place. `--section.key none` takes a key of the file away.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from kleash.config.faults import sentences_of
from kleash.config.inputs import resolve_inputs
from kleash.config.keys import field_at, moved_to, names_free, nearest, sections_at
from kleash.config.leash import LEASH_KINDS, LeashConfig
from kleash.config.schema import Config
from kleash.config.section import allows_none, allows_text_none
from kleash.config.sources import Key, Sources, read_yaml
from kleash.errors import ConfigError, UsageError


def load_config(
    path: Path | None,
    overrides: Mapping[str, str],
    *,
    base: Path,
    say: Callable[[str], object] | None = None,
) -> Config:
    """Read a configuration and apply dotted overrides to it.

    Args:
        path: the YAML file, or None to start from `base`.
        overrides: dotted key → value as written on the command line; `-` and `_` are the same.
            `none` takes the file's key away, or switches off what is on by default.
        base: the configuration to start from when no path is given.
        say: gets a sentence for each key of the file that an override takes the place of; None:
            to standard error.

    Returns:
        The validated configuration; relative paths are resolved as `kleash.config.inputs` says.

    Raises:
        ConfigError: the file is missing, is not YAML, does not validate, or names a file that does
            not exist.
        UsageError: an override names a key that does not exist, or has an impossible value.
    """
    file = path or base
    tree, lines = read_yaml(file)
    return _configured(tree, Sources(str(file), lines), overrides, say)


def make_config(
    tree: Mapping[str, Any],
    overrides: Mapping[str, str],
    *,
    say: Callable[[str], object] | None = None,
) -> Config:
    """A configuration from plain values in memory; see `load_config` for everything else.

    Relative paths are relative to the working directory.
    """
    return _configured(copy.deepcopy(dict(tree)), Sources("the configuration"), overrides, say)


def _configured(
    tree: dict[str, Any],
    source: Sources,
    overrides: Mapping[str, str],
    say: Callable[[str], object] | None,
) -> Config:
    """Apply overrides to a tree, resolve its paths and validate it."""
    _write_out(tree)
    named = {key_of_flag(flag): (f"--{flag}", text) for flag, text in overrides.items()}
    sources = replace(source, flags={key: flag for key, (flag, _) in named.items()})
    _replace_leash(tree, sources, say or _to_standard_error)
    for key, (flag, text) in named.items():
        _set(tree, key, text, flag)
    missing = resolve_inputs(tree, sources)
    config = _validated(tree, sources)
    if missing:
        raise ConfigError("; ".join(missing))
    return config


def parse_config(tree: dict[str, Any], *, where: str) -> Config:
    """Validate a tree of plain values; every fault in one message that starts with `where`.

    Raises:
        ConfigError: a key is unknown, missing or has an impossible value.
    """
    return _validated(tree, Sources(where))


def dump_config(config: Config) -> str:
    """Every value in force as YAML: reading it back gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def key_of_flag(flag: str) -> Key:
    """The key that an option names, without its dashes.

    Example:
        >>> key_of_flag("leash.target-kl"), key_of_flag("algorithm")
        (('leash', 'target_kl'), ('algorithm', 'name'))
    """
    key = tuple(flag.replace("-", "_").split("."))
    return ("algorithm", "name") if key == ("algorithm",) else key


def require_option(flag: str) -> None:
    """Refuse an option that no key belongs to.

    Raises:
        UsageError: it names the nearest one.
    """
    key = key_of_flag(flag)
    for depth, name in enumerate(key):
        parents = key[:depth]
        sections = sections_at(parents)
        if names_free(parents):
            continue
        if not sections:
            raise UsageError(f"--{flag}: `{'.'.join(parents)}` is a single value, not a section")
        known = dict.fromkeys(name for section in sections for name in section.model_fields)
        if name not in known:
            moved = moved_to(key)
            prefix = "--" + "".join(f"{parent}." for parent in parents)
            hint = f": it is now --{moved}" if moved else nearest(name, known, prefix=prefix)
            raise UsageError(f"no option --{flag}{hint}")


def _validated(tree: dict[str, Any], sources: Sources) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        sentences, on_command_line = sentences_of(error, sources)
        kind = UsageError if on_command_line else ConfigError
        raise kind("; ".join(sentences)) from None


def _write_out(tree: dict[str, Any]) -> None:
    """The short form of `algorithm` as the section it stands for, so that overrides add to it."""
    if isinstance(tree.get("algorithm"), str):
        tree["algorithm"] = {"name": tree["algorithm"]}


def _replace_leash(tree: dict[str, Any], sources: Sources, say: Callable[[str], object]) -> None:
    """Take out of the file the kind of leash that an override puts another in place of."""
    leash, together = tree.get("leash"), {"target_kl", "groups"}
    named = {key[1] for key in sources.flags if key[0] == "leash" and len(key) > 1}
    kinds = named & {*LEASH_KINDS, *together}
    if not kinds or not isinstance(leash, dict):
        return
    given = cast("dict[str, Any]", leash)
    gone = {*LEASH_KINDS, "groups"} - (together if kinds <= together else set())
    if not kinds & {"target_kl_per_token", *together}:
        # Of a β that is fixed nothing moves, and these keys would be refused.
        gone |= {*LeashConfig(beta=0.0).idle()}
    flags = " and ".join(
        sources.flags["leash", kind] for kind in sorted(kinds) if ("leash", kind) in sources.flags
    )
    for key in [key for key in given if key in gone and key not in named]:
        say(
            f"{sources.of(('leash', key))}: `leash.{key}: {given.pop(key)}` is left out, because "
            f"{flags} takes its place"
        )


def _set(tree: dict[str, Any], key: Key, text: str, flag: str) -> None:
    """Set one key to the value an option gives it, or take it away."""
    require_option(flag.removeprefix("--"))
    *parents, last = key
    for name in parents:
        inner: object = tree.setdefault(name, {})
        if inner is None:
            inner = tree[name] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"{flag}: `{name}` is a single value, not a section")
        tree = cast("dict[str, Any]", inner)
    field = field_at(key)
    if text == "none" and not (field is not None and allows_text_none(field)):
        if field is not None and allows_none(field) and field.default is not None:
            tree[last] = None
        else:
            tree.pop(last, None)
        return
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at character {mark.column + 1}"
        raise UsageError(f"{flag}: cannot read the value {text!r}{where}") from None


def _to_standard_error(sentence: str) -> None:
    print(f"kleash: {sentence}", file=sys.stderr)
