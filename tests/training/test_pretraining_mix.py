"""Pretraining texts: read as every other table is, and refused with their row."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny_models

from kleash.errors import PromptError
from kleash.training.pretraining_mix import read_texts


def read(file: Path, **settings: Any) -> list[list[int]]:
    return read_texts(str(file), tiny_models.tokenizer(), max_tokens=3, **settings)


def test_all_kinds_of_files_read_alike(tmp_path: Path) -> None:
    texts = ["w1 w2 w3 w4", "w5 w6"]
    lines, table, cells = (tmp_path / f"texts.{kind}" for kind in ("jsonl", "parquet", "csv"))
    lines.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), table)
    cells.write_text("text\n" + "\n".join(texts) + "\n")
    for file in (lines, table, cells):
        assert read(file) == [[6, 7, 8], [10, 11]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (r'{"text": "w1 \ud83d w2"}', r"got '\\ud83d' .* half of a surrogate pair"),
        ("[" * 100_000, "one JSON object per line, got .* on line 1 of .*recursion"),
        ("{", "one JSON object per line, got '{' on line 1"),
        ("[1]", r"an object like .* on line 1 .*got '\[1\]'"),
        ('{"texts": "w1"}', "the key 'text' with a text on line 1 of .*, got None"),
        ('{"text": "w1"}', "at least two tokens on line 1"),
        ("", "pretraining texts in .*, got an empty file"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(line)
    with pytest.raises(PromptError, match=said):
        read(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"pretraining texts at .*, got no file: check the path"):
        read(tmp_path / "none.jsonl")
