"""Where each value of a configuration came from: a line of its YAML file, or the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kleash.errors import ConfigError

Key = tuple[str, ...]
"""A dotted key, in its parts; numbers of a list are parts too."""


@dataclass(frozen=True)
class Sources:
    """The place of every value."""

    file: str
    """The YAML file, or what else the tree of values came from."""
    lines: Mapping[Key, int] = field(default_factory=dict[Key, int])
    """Line of each key in the file, counted from 1."""
    flags: Mapping[Key, str] = field(default_factory=dict[Key, str])
    """The option that set a key on the command line."""

    def of(self, key: Sequence[str]) -> str:
        """The place of a key, or of the innermost section around it that has one.

        Example:
            >>> lines, flags = {("leash",): 3}, {("leash", "beta"): "--leash.beta"}
            >>> sources = Sources("run.yaml", lines, flags)
            >>> sources.of(("leash", "beta")), sources.of(("leash", "groups")), sources.of(("x",))
            ('--leash.beta', 'run.yaml, line 3', 'run.yaml')
        """
        for length in range(len(key), 0, -1):
            inner = tuple(key[:length])
            if inner in self.flags:
                return self.flags[inner]
            if inner in self.lines:
                return f"{self.file}, line {self.lines[inner]}"
        return self.file

    def is_flag(self, key: Sequence[str]) -> bool:
        """Whether a key was set on the command line."""
        return any(tuple(key[:length]) in self.flags for length in range(1, len(key) + 1))


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    """The keys and values of a file, and the line of each key.

    Raises:
        ConfigError: the file is missing, is not YAML, holds no keys, or holds one twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}: check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory: give a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(_not_yaml(path, error)) from None
    if not isinstance(root, yaml.MappingNode) or not isinstance(tree, dict):
        raise ConfigError(f"{path} should hold keys and values, got {type(tree).__name__}")
    lines: dict[Key, int] = {}
    _collect(root, (), lines, path)
    return tree, lines


def _not_yaml(path: Path, error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{path} is not YAML: {' '.join(str(error).split())}"
    mark = error.problem_mark
    return f"{path}, line {mark.line + 1}, column {mark.column + 1}: not YAML: {error.problem}"


def _collect(node: yaml.Node, key: Key, lines: dict[Key, int], path: Path) -> None:
    """Note the line of every key and list element below a node."""
    if isinstance(node, yaml.SequenceNode):
        for number, element in enumerate(node.value):
            lines[(*key, str(number))] = element.start_mark.line + 1
            _collect(element, (*key, str(number)), lines, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        inner, line = (*key, str(name.value)), name.start_mark.line + 1
        if inner in lines:
            raise ConfigError(
                f"{path}, line {line}: `{'.'.join(inner)}` is there already, in line "
                f"{lines[inner]}: leave one of them out"
            )
        lines[inner] = line
        _collect(value, inner, lines, path)
