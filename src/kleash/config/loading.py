"""Read a configuration from YAML and dotted overrides, validate it, and write it out again."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from kleash.config.leash import (
    MOVING,
    WAYS,
    Section,
)
from kleash.config.schema import Config, RewardConfig
from kleash.errors import ConfigError, UsageError


def load_config(path: Path | None, overrides: dict[str, str], *, base: Path) -> Config:
    """Read a configuration and apply dotted overrides to it.

    Args:
        path: the YAML file, or None to start from `base`.
        overrides: dotted key → value as written on the command line; `-` and `_` are the same.
        base: the configuration to start from when no path is given.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not validate.
        UsageError: an override names a key that does not exist.
    """
    tree = _read_yaml(path or base)
    named = {dotted.replace("-", "_"): value for dotted, value in overrides.items()}
    _give_way(tree, set(named))
    for dotted, value in named.items():
        _set(tree, dotted, value)
    return parse_config(tree, where=str(path or base))


def _give_way(tree: dict[str, Any], named: set[str]) -> None:
    """Drop from the file what an override puts another in place of: there is one kind of leash."""
    leash = tree.get("leash")
    together = {"target_kl", "groups"}
    told = {dotted.split(".")[1] for dotted in named if dotted.startswith("leash.")}
    told &= {*WAYS, *together}
    if not told or not isinstance(leash, dict):
        return
    gone = {*WAYS, "groups", *(() if told & {"target_kl_per_token", *together} else MOVING)}
    if told <= together:
        gone -= together
    tree["leash"] = {key: value for key, value in leash.items() if key not in gone}


def parse_config(tree: dict[str, Any], *, where: str) -> Config:
    """Validate a tree of plain values; every fault in one message that starts with `where`.

    Raises:
        ConfigError: a key is unknown, missing or has an impossible value.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(_fault(cast("dict[str, Any]", e)) for e in error.errors())
        raise ConfigError(f"{where}: {faults}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML: reading it back gives an equal configuration."""
    tree = config.model_dump(mode="json", exclude_unset=False)
    return yaml.safe_dump(_without_none(tree), sort_keys=False, allow_unicode=True)


def with_world(config: Config, directory: Path) -> Config:
    """Put the directory of the embedded world where the configuration says `{world}`."""
    text = dump_config(config).replace("{world}", str(directory))
    return parse_config(yaml.safe_load(text), where="the embedded world's configuration")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}: check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory: give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"{path} is not YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} should hold keys and values, got {type(tree).__name__}")
    return cast("dict[str, Any]", tree)


def _set(tree: dict[str, Any], dotted: str, text: str) -> None:
    """Set one dotted key, checking each name on the way against the sections' fields."""
    section: type[BaseModel] | None = Config
    *parents, last = dotted.split(".")
    for depth, name in enumerate([*parents, last]):
        if section is not None and name not in section.model_fields:
            prefix = "".join(f"{parent}." for parent in parents[:depth])
            hint = _nearest(name, list(section.model_fields), prefix="--" + prefix)
            raise UsageError(f"no option --{dotted}{hint}")
        section = _section_of(section, name)
    for name in parents:
        inner: object = tree.setdefault(name, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--{dotted}: `{name}` is a single value, not a section")
        tree = cast("dict[str, Any]", inner)
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--{dotted}: cannot read the value {text!r}") from None


def _section_of(section: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """The section a field holds, or None where names are free (`reward_models`) or it is a leaf."""
    if section is None or name not in section.model_fields:
        return RewardConfig if section is None else None
    annotation = section.model_fields[name].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, Section) and name != _FREE:
            return candidate
    return None


_FREE = "reward_models"


def _fault(error: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] | None = Config
        for name in location[:-1]:
            section = _section_of(section, name)
        names = list(section.model_fields) if section else []
        return f"unknown key `{dotted}`{_nearest(location[-1], names)}"
    if error["type"] == "missing":
        return f"`{dotted}` is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not location:  # of the whole: it names its keys itself
        return message
    return f"`{dotted}`: {message[0].lower()}{message[1:]}" + (
        f", got {error['input']!r}" if not isinstance(error["input"], dict) else ""
    )


def _nearest(name: str, names: list[str], *, prefix: str = "") -> str:
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f": did you mean {prefix}{close[0]}?"
    return f": known here are {', '.join(prefix + known for known in names)}" if names else ""


def _without_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        items = cast("dict[str, Any]", tree).items()
        return {key: _without_none(value) for key, value in items if value is not None}
    return tree
