"""Writing files that are whole or not there, and JSON that keeps NaN.

Left out: locking. A run directory has one writer, which `runs` makes sure of.
"""

import contextlib
import errno
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from kleash.errors import RunError

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""JSON has no word for these three, and each is a finding that must survive a file."""


def replace_file(file: Path, text: str) -> None:
    """Write a whole file so that a reader sees the old one or the new one, never half of it.

    Args:
        file: where to; its directory exists.
        text: the content. Lone surrogates are an error: escape them first, as `plain_json` does.

    Raises:
        RunError: if it cannot be written; the old file is untouched then.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write_all(descriptor, text.encode("utf-8"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(file)
    except OSError as error:
        raise cannot_write(file, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def append_whole(file: Path, text: str) -> None:
    """Append to an existing file, all of the text or nothing.

    Raises:
        RunError: if it cannot be written; the file is as it was then.
    """
    try:
        with file.open("r+b", buffering=0) as stream:
            before = stream.seek(0, os.SEEK_END)
            try:
                _write_all(stream.fileno(), text.encode("utf-8"))
            except BaseException:
                # Also on Ctrl-C: half a line must not stay in the way of the next.
                stream.truncate(before)
                raise
    except OSError as error:
        raise cannot_write(file, error) from error


def append_durably(file: Path, text: str) -> None:
    """Append as `append_whole` does, and return only when the disk holds it.

    Raises:
        RunError: if it cannot be written.
    """
    append_whole(file, text)
    try:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    except OSError as error:
        raise cannot_write(file, error) from error


def cannot_write(path: Path, error: OSError) -> RunError:
    """Say in a sentence why a file could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"the disk is full: {str(path)!r} could not be written completely and holds only "
            "what came before; make room and start again"
        )
    return RunError(f"cannot write {str(path)!r}: {error.strerror or error}")


def plain_json(value: Any, *, indent: int | None = None) -> str:
    """Write plain values as ASCII JSON, non-finite numbers as the strings of `NON_FINITE`.

    Raises:
        TypeError: if a value is neither plain nor a container of plain values.

    Example:
        >>> plain_json({"a": [1, float("nan")], "b": "\\ud800"})
        '{"a":[1,"NaN"],"b":"\\\\ud800"}'
    """
    separators = (",", ":") if indent is None else None
    return json.dumps(plain(value), indent=indent, allow_nan=False, separators=separators)


def plain(value: Any) -> Any:
    """Reduce to None, bool, str, int, finite float, list and dict.

    Raises:
        TypeError: if that is not possible.
    """
    # Most of a run's bytes are long lists of plain numbers, which need no further look.
    if isinstance(value, float):
        return _plain_float(value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, list | tuple):
        return _plain_list(cast(Sequence[Any], value))
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _plain_float(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [plain(entry) for entry in cast(Sequence[Any], value)]
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    raise TypeError(f"expected plain values for a file, got {type(value).__name__} {value!r}")


def _plain_list(values: Sequence[Any]) -> list[Any]:
    isfinite, simple = math.isfinite, (str, int)
    return [
        entry
        if type(entry) in simple or (type(entry) is float and isfinite(entry))
        else plain(entry)
        for entry in values
    ]


def _plain_float(number: float) -> float | str:
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def _write_all(descriptor: int, data: bytes) -> None:
    # A disk that fills up may take part of a write before it refuses the rest.
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
