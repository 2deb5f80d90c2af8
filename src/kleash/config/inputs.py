"""Where the relative paths and modules of a configuration are sought.

A path or module that a YAML file names is sought beside that file first, and then in the working
directory. One on the command line is sought in the working directory alone. What is found beside
the file is put in as an absolute path, so that the run's own `config.yaml` names the same thing
from anywhere; what is found in the working directory stays as it was written.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from kleash.config.keys import field_at, names_free, sections_at
from kleash.config.section import InputKind
from kleash.config.sources import Key, Sources

_WORLD = "{world}"
IN_MEMORY = "(in memory)"
"""What stands in a configuration for rows that were given from Python."""


def resolve_inputs(tree: dict[str, Any], sources: Sources) -> list[str]:
    """Put what is found beside the YAML file in the place of its relative name.

    Args:
        tree: values as read, changed in place; what is no text is left to validation.
        sources: the file, and which keys the command line set.

    Returns:
        A sentence for each file, and each directory whose path begins with a dot, that is in none
        of the places; it says where it was sought.
    """
    beside, missing = Path(sources.file).parent, list[str]()
    for key, holder, kind in list(_inputs(tree, ())):
        text = holder[key[-1]]
        if not isinstance(text, str) or text in ("", IN_MEMORY) or _WORLD in text:
            continue
        if Path(text).is_absolute():
            continue
        folders = [Path()] if sources.is_flag(key) else _different(beside)
        module, _, function = text.partition(":")
        name = _file_of(module) if kind is InputKind.CALLABLE else text
        found = next((folder for folder in folders if (folder / name).exists()), None)
        if found not in (None, Path()):
            path = _absolute(found / name)
            holder[key[-1]] = f"{path}:{function}" if kind is InputKind.CALLABLE else path
        elif found is None and _must_exist(text, kind):
            sought = " or ".join(_absolute(folder / name) for folder in folders)
            missing.append(
                f"{sources.of(key)}: `{'.'.join(key)}`: expected {sought} to exist, got nothing "
                f"there for {text!r}: check the path"
            )
    return missing


def _must_exist(text: str, kind: InputKind) -> bool:
    """Whether a name can only be that of something on the disk."""
    return kind is InputKind.FILE or (kind is InputKind.MODEL and text.startswith("."))


def _inputs(tree: dict[str, Any], key: Key) -> Iterator[tuple[Key, dict[str, Any], InputKind]]:
    """Every text of a tree that names an input: its key, the mapping that holds it, its kind."""
    for name, value in tree.items():
        inner = (*key, name)
        if isinstance(value, dict) and (sections_at(inner) or names_free(inner)):
            yield from _inputs(cast("dict[str, Any]", value), inner)
        field = field_at(inner)
        for kind in [] if field is None else field.metadata:
            if isinstance(kind, InputKind):
                yield inner, tree, kind


def _different(folder: Path) -> list[Path]:
    """The folder of the file and the working directory, once if they are the same."""
    return [Path()] if folder.resolve() == Path().resolve() else [folder, Path()]


def _file_of(module: str) -> str:
    """The file of a module, relative to where it is imported from."""
    return module if module.endswith(".py") else f"{module.replace('.', '/')}.py"


def _absolute(path: Path) -> str:
    """Without following links, which keep their own names."""
    return os.path.abspath(path)  # noqa: PTH100
