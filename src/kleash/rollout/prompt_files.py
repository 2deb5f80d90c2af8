"""Where prompts come from: rows of JSONL, CSV and Parquet files, of data sets, and of lists.

Each row is a mapping from column names to plain values and comes with its place in words, so that
an error about it says where it stands. A file is read by itself, without a copy in a cache; a
directory of files and a data set of a hub are read by `datasets`. Only tables are read: a builder
that would unpack archives or decode media is refused.
"""

import csv
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow.lib
import pyarrow.parquet

from kleash.errors import PromptError

Row = Mapping[str, Any]
PlacedRows = Iterator[tuple[str, Row]]
Source = str | Path | Sequence[object]
"""A file, a directory, a data set `org/name:split`, or the rows themselves."""

_TABLES = frozenset({"json", "csv", "parquet", "arrow"})
"""Builders of `datasets` that read tables and nothing else."""
_SPLIT = re.compile(r"(.+?):([\w.-]+(?:\[[-\d:]*\])?)")
_HUB = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:/([\w.-]+))?")
_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def source_rows(source: Source) -> PlacedRows:
    """Rows of any source of prompts, each with its place in words.

    Args:
        source: a file (see `file_rows`); a directory of such files, or one that `datasets` saved,
            with `:split` behind it where it has several; `org/name:split` or
            `org/name/config:split` for a data set of a hub; or a list of rows, each an object, a
            text or a list of messages.

    Raises:
        PromptError: there is no such source, it cannot be read, or a row is no object.
    """
    if not isinstance(source, str | Path):
        yield from _given_rows(source)
        return
    path, shown = Path(source), str(source)
    part = _SPLIT.fullmatch(shown)
    name = _HUB.fullmatch(part[1]) if part else None
    if path.is_file():
        yield from file_rows(path)
    elif path.is_dir():
        yield from _dataset_rows(shown, shown, None, None)
    elif part and Path(part[1]).is_dir():
        yield from _dataset_rows(shown, part[1], None, part[2])
    elif part and name and Path(part[1]).suffix not in _FILES:
        yield from _dataset_rows(shown, name[1], name[2], part[2])
    else:
        raise PromptError(
            f"expected a prompt file at {shown!r}, got none: check the path"
            + ("" if path.is_absolute() else f" (it is looked for in {Path.cwd()})")
            + ("" if path.suffix in _FILES else "; a data set of a hub is written org/name:split")
        )


def file_rows(file: Path) -> PlacedRows:
    """Rows of a .jsonl, .csv or .parquet file, each with its place in words.

    Raises:
        PromptError: if the file is of another kind or cannot be read, or a row is no object.
    """
    match file.suffix:
        case ".jsonl" | ".ndjson" | ".json":
            yield from _json_rows(file)
        case ".csv":
            yield from _csv_rows(file)
        case ".parquet":
            yield from _parquet_rows(file)
        case other:
            raise PromptError(
                f"expected a .jsonl, .csv or .parquet file, got {str(file)!r} of kind {other!r}"
            )


def _json_rows(file: Path) -> PlacedRows:
    for number, line in enumerate(_lines(file), start=1):
        where = f"line {number} of {str(file)!r}"
        if not line.strip():
            continue
        try:
            # Without the line's end: else what is missing there is missing from a second line.
            row = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            raise PromptError(
                f"expected one JSON object per line, got {excerpt(line)} on {where}: {error.msg} "
                f"at column {error.colno}"
            ) from error
        except (ValueError, RecursionError) as error:  # a number too long, or lists too deep
            raise PromptError(
                f"expected one JSON object per line, got {excerpt(line)} on {where}: {error}"
            ) from error
        if not isinstance(row, dict):
            raise PromptError(
                f'expected an object like {{"prompt": "..."}} on {where}, got {excerpt(line)}: '
                "write one object on each line, with no list around them"
            )
        # Half of a surrogate pair can stand in JSON as an escape alone.
        if "\\ud" in line.lower():
            _require_whole_characters(cast(object, row), where)
        yield where, cast(dict[str, Any], row)


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            yield from stream
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"expected a prompt file in UTF-8 at {str(file)!r}, got: {error}"
        ) from error


def _csv_rows(file: Path) -> PlacedRows:
    """Every cell is a text; an empty one is an empty text, for CSV knows no null."""
    reader = csv.reader(_lines(file), strict=True)
    where = f"line 1 of {str(file)!r}"
    try:
        names = next(reader, [])
        if len(set(names)) < len(names) or not all(names):
            raise PromptError(
                f"expected a name of its own for each column on {where}, got {excerpt(str(names))}"
            )
        for cells in reader:
            where = f"line {reader.line_num} of {str(file)!r}"
            if not cells:
                continue
            if len(cells) != len(names):
                raise PromptError(
                    f"expected {len(names)} cells on {where}, got {len(cells)}: quote a cell that "
                    "holds a comma or ends a line"
                )
            yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise PromptError(
            f"expected comma-separated values on {where} or the next, got: {error}"
        ) from error


def _parquet_rows(file: Path) -> PlacedRows:
    try:
        table = pyarrow.parquet.read_table(file)
        rows = table.to_pylist(maps_as_pydicts="strict")
    except (OSError, ValueError, KeyError, pyarrow.lib.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise PromptError(
            f"expected a Parquet file at {str(file)!r}, got one that cannot be read: {reason}"
        ) from error
    yield from _arrow_rows(rows, str(file))


def _arrow_rows(rows: Iterable[Mapping[str, Any]], source: str) -> PlacedRows:
    """Rows of a table; what only other rows fill is null in it, and leaves no trace here."""
    for number, row in enumerate(rows, start=1):
        yield (
            f"row {number} of {source!r}",
            {name: _without_nulls(value) for name, value in row.items()},
        )


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        fields = cast(dict[str, object], value)
        return {k: _without_nulls(v) for k, v in fields.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in cast(list[object], value)]
    return value


def _dataset_rows(shown: str, name: str, subset: str | None, split: str | None) -> PlacedRows:
    """Rows of a data set that the library `datasets` opens."""
    # Loaded where it is used: it takes a second, and most runs read a file.
    datasets = importlib.import_module("datasets")
    try:
        if _was_saved(Path(name)):
            opened = datasets.load_from_disk(name)
        else:
            builder = datasets.load_dataset_builder(name, subset)
            kind = type(builder).__module__.rpartition(".")[2]
            if kind not in _TABLES:
                raise PromptError(
                    f"expected a data set of tables (JSON, CSV, Parquet, Arrow) at {shown!r}, got "
                    f"one of kind {kind!r}: convert it to one of those"
                )
            builder.download_and_prepare()
            opened = builder.as_dataset()
        rows = _one_split(opened, datasets.DatasetDict, shown, split)
        yield from _arrow_rows(rows, shown)
    except PromptError:
        raise
    except Exception as error:  # Networks, caches and files: each raises errors of its own.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PromptError(
            f"expected a data set at {shown!r}, got {type(error).__name__}: {reason}"
        ) from error


def _one_split(opened: Any, several: type, shown: str, split: str | None) -> Iterable[Any]:
    """The split that is asked for, or the only one; `train[:100]` is a part of one."""
    splits = dict(opened) if isinstance(opened, several) else {}
    name, _, part = (split or "").partition("[")
    if not splits and split is not None:
        raise PromptError(
            f"expected a data set with splits for {shown!r}, got one without: leave out ':{split}'"
        )
    if splits and split is None and len(splits) > 1:
        raise PromptError(
            f"expected one split of {shown!r}, got {', '.join(splits)}: name one, as in "
            f"{shown}:{next(iter(splits))}"
        )
    if split is not None and name not in splits:
        raise PromptError(f"expected a split of {shown!r} among {', '.join(splits)}, got {name!r}")
    rows = splits[name] if split is not None else next(iter(splits.values()), opened)
    if not part:
        return rows
    bounds = re.fullmatch(r"(-?\d*):(-?\d*)\]", part)
    if bounds is None:
        raise PromptError(f"expected a part such as [:100] of {shown!r}, got '[{part}'")
    first, last = (int(bound) if bound else None for bound in bounds.groups())
    return rows.select(range(*slice(first, last).indices(len(rows))))


def _was_saved(directory: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((directory / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _given_rows(rows: Sequence[object]) -> PlacedRows:
    """Rows that stand in memory: objects, texts, or lists of messages."""
    for number, row in enumerate(rows):
        where = f"row {number} of the prompts given"
        _require_whole_characters(row, where)
        match row:
            case str() | list():
                yield where, {"prompt": cast(object, row)}
            case Mapping():
                yield where, cast(Row, row)
            case _:
                raise PromptError(
                    f"expected a text, a list of messages or an object on {where}, got "
                    f"{type(row).__name__}"
                )


def _require_whole_characters(value: object, where: str) -> None:
    r"""Refuse half of a surrogate pair (`\ud83d` alone), which is no character of any text."""
    if isinstance(value, str):
        half = re.search("[\ud800-\udfff]", value)
        if half is not None:
            raise PromptError(
                f"expected text on {where}, got {half.group()!r} at character {half.start()} of "
                f"{excerpt(value)}: it is half of a surrogate pair, and no character by itself"
            )
    elif isinstance(value, Mapping):
        for name, item in cast(Mapping[object, object], value).items():
            _require_whole_characters(name, where)
            _require_whole_characters(item, where)
    elif isinstance(value, list | tuple):
        for item in cast(Sequence[object], value):
            _require_whole_characters(item, where)


def excerpt(text: str) -> str:
    """The beginning of a text, as Python would write it: printable, on one line."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
