"""What an audit has found so far, on disk: a header that says which audit, then a line per batch.

A line is whole and synced before the next batch begins, so whatever stops the audit costs one
batch. Batches come in an order that the header determines, so a resumed audit reads the lines it
has and goes on where they end.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from kleash.auditing.token_records import Record, from_line, to_line
from kleash.errors import RunError
from kleash.storage.atomic_files import (
    append_durably,
    cannot_write,
    plain,
    plain_json,
    replace_file,
)

Key = tuple[str, int, int]
"""Which batch: who wrote, which window, which batch of it."""

NAME = "responses.jsonl"


class PartFile:
    """The results of one audit, being written."""

    def __init__(self, file: Path, saved: Iterator[str]) -> None:
        """Use `create` or `resume`."""
        self._file = file
        self._saved = saved

    @classmethod
    def create(cls, folder: Path, header: Mapping[str, Any]) -> "PartFile":
        """Begin in a new or empty directory.

        Raises:
            RunError: if the directory already holds an audit or cannot be written to.
        """
        file = folder / NAME
        if file.exists():
            raise RunError(
                f"{str(folder)!r} already holds an audit: continue it with --resume, or give "
                "another directory"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        replace_file(file, plain_json(header) + "\n")
        return cls(file, iter(()))

    @classmethod
    def resume(cls, folder: Path, header: Mapping[str, Any]) -> "PartFile":
        """Go on with what is there; begin if there is nothing.

        Raises:
            RunError: if the directory holds another audit; the first difference is named.
        """
        file = folder / NAME
        if file.exists():
            _cut_torn_line(file)
            if file.stat().st_size == 0:
                file.unlink()
        if not file.exists():
            return cls.create(folder, header)
        saved = _lines(file)
        before = _parse(file, next(saved, ""))
        now = cast(dict[str, Any], plain(header))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise RunError(
                    f"expected the audit in {str(folder)!r} to be this one, got {name} = "
                    f"{before.get(name)!r} there and {now.get(name)!r} here: give the same "
                    "arguments, or another directory"
                )
        return cls(file, saved)

    def take(self, key: Key) -> list[Record] | None:
        """The records of this batch if they are there; ask in order.

        Raises:
            RunError: if another batch stands in its place.
        """
        line = next(self._saved, None)
        if line is None:
            return None
        found = _parse(self._file, line)
        if found.get("batch") != list(key) or not isinstance(found.get("records"), list):
            raise RunError(
                f"expected batch {list(key)} in {str(self._file)!r}, got "
                f"{found.get('batch')!r}: the file was changed; begin again elsewhere"
            )
        return [from_line(one) for one in found["records"]]

    def append(self, key: Key, records: Sequence[Record]) -> None:
        """Add a batch; it is on the disk when this returns.

        Raises:
            RunError: if it cannot be written; nothing of it remains then.
        """
        line = {"batch": key, "records": [to_line(record) for record in records]}
        append_durably(self._file, plain_json(line) + "\n")


def _parse(file: Path, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RunError(f"{str(file)!r} holds a line that is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{str(file)!r} holds a line that is no object: {line[:60]!r}")
    return cast(dict[str, Any], value)


def _lines(file: Path) -> Iterator[str]:
    with file.open(encoding="ascii") as stream:
        yield from stream


def _cut_torn_line(file: Path) -> None:
    """Remove what a kill left of a line that was being written."""
    try:
        with file.open("r+b") as stream:
            end = stream.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - (1 << 16))
                stream.seek(start)
                found = stream.read(end - start).rfind(b"\n")
                if found >= 0:
                    stream.truncate(start + found + 1)
                    return
                end = start
            stream.truncate(0)
    except OSError as error:
        raise cannot_write(file, error) from error
