"""Sources of prompts: every kind reads alike, and what cannot be read is named with its place."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import tiny_models

from kleash.errors import PromptError
from kleash.rollout.prompt_files import source_rows
from kleash.rollout.prompts import read_prompts

ROWS: list[dict[str, Any]] = [
    {"prompt": "w1 w2", "answer": "w3", "group": "a"},
    {"prompt": 'w1, "w2"', "answer": "w4\nw5", "group": "b"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def rows(source: Any) -> list[dict[str, Any]]:
    return [dict(row) for _, row in source_rows(source)]


def write_csv(file: Path) -> Path:
    file.write_text(
        'prompt,answer,group\nw1 w2,w3,a\n"w1, ""w2""","w4\nw5",b\n', encoding="utf-8-sig"
    )
    return file


def test_files_lists_and_data_sets_read_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = datasets.Dataset.from_list(ROWS)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    table.to_parquet(tmp_path / "org" / "name" / "train.parquet")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk("saved")
    table.save_to_disk("one")
    lines = tmp_path / "p.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for source in (
        ROWS,
        lines,
        write_csv(tmp_path / "p.csv"),
        tmp_path / "org" / "name" / "train.parquet",
        "org/name:train",
        "org/name",
        str(tmp_path / "org" / "name") + ":train",
        "saved:train",
        "one",
    ):
        assert rows(source) == ROWS, source
    assert rows("saved:test") == ROWS[1:] == rows("saved:train[1:]") == rows("saved:train[-1:]")
    places = [place for place, _ in source_rows("saved:train")]
    assert places == ["row 1 of 'saved:train'", "row 2 of 'saved:train'"]


def test_a_data_set_of_a_hub_is_asked_for_by_name_and_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str | None]] = []

    def builder(name: str, config: str | None) -> None:
        asked.append((name, config))
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    for source, named in (
        ("org/name:train", ("org/name", None)),
        ("org/name/main:train[:10]", ("org/name", "main")),
        ("name:test", ("name", None)),
    ):
        message = r"data set at .*, got ConnectionError: Couldn't reach it$"
        with pytest.raises(PromptError, match=message):
            rows(source)
        assert asked.pop() == named


def test_texts_and_conversations_in_memory() -> None:
    chat = [{"role": "user", "content": "w1"}]
    tok = tiny_models.tokenizer(chat_template=tiny_models.CHAT_TEMPLATE)
    found = read_prompts(
        ["w1 w2", chat, {"messages": chat, "answer": 3}], tok, context=16, max_new_tokens=4
    )
    assert [p.content for p in found] == ["w1 w2", chat, chat]
    assert [dict(p.columns) for p in found] == [{"answer": None}] * 2 + [{"answer": 3}]
    with pytest.raises(PromptError, match="on row 1 of the prompts given, got int"):
        rows(["w1", 3])
    with pytest.raises(PromptError, match="expected prompts in the list given, got an empty"):
        read_prompts([], tok, context=16, max_new_tokens=4)


def test_columns_are_frozen() -> None:
    (prompt,) = read_prompts(ROWS[:1], tiny_models.tokenizer(), context=16, max_new_tokens=4)
    assert dict(prompt.columns) == {"answer": "w3", "group": "a"}
    with pytest.raises(TypeError):
        prompt.columns["answer"] = "w4"  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        # The end of a line is the end of the text: what is missing is missing there.
        ("a.jsonl", '{"prompt": "w1"\n', "got .* on line 1 of .*at column 16"),
        ("a.jsonl", '{\n  "prompt": "w1"\n}\n', "on line 1 of .* at column 2"),
        ("a.jsonl", '{"prompt": "w1", "n": ' + "1" * 5000 + "}", "on line 1 .*digits"),
        ("a.jsonl", '{"prompt": ' + "[" * 200_000, "on line 1 .*recursion"),
        ("a.jsonl", r'{"prompt": "ok"}' + "\n" + r'{"prompt": "w1 \ud83d"}', r"2 .*'\\ud83d' at"),
        ("a.jsonl", r'{"prompt": "w1", "a": [{"\uDC00": 1}]}', "half of a surrogate pair"),
        ("a.csv", "prompt,answer\nw1\n", "expected 2 cells on line 2 of .*, got 1: quote"),
        ("a.csv", "prompt,prompt\nw1,w2\n", "a name of its own for each column on line 1"),
        ("a.csv", 'prompt\n"w1" w2\n', "comma-separated values on line 1 of .*or the next"),
        ("a.csv", 'prompt\n""\n', "a prompt with text on line 2"),
        ("a.csv", "", "got an empty file"),
        ("a.txt", "w1", r"a \.jsonl, \.csv or \.parquet file, got .* of kind '\.txt'"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    tok = tiny_models.tokenizer()
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts(tmp_path / name, tok, context=16, max_new_tokens=4)
    assert len(str(caught.value)) < 500


def test_data_sets_that_cannot_be_used(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    table.save_to_disk(tmp_path / "one")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("w1\n")
    (tmp_path / "nothing").mkdir()
    for source, message in (
        ("two", "expected one split of .*, got train, test: name one, as in .*two:train"),
        ("two:dev", "among train, test, got 'dev'"),
        ("two:train[0]", r"a part such as \[:100\] .* got '\[0\]'"),
        ("one:train", "with splits .*, got one without: leave out ':train'"),
        ("texts:train", r"tables .* got one of kind 'text'"),
        ("nothing", "expected a data set at .*EmptyDatasetError"),
    ):
        with pytest.raises(PromptError, match=message):
            rows(f"{tmp_path}/{source}")
    with pytest.raises(PromptError, match="a data set of a hub is written org/name:split"):
        rows("org/name")


def test_a_map_is_an_object(tmp_path: Path) -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    column = pyarrow.array([[("city", "Bern")]], type=kind)
    table = pyarrow.table({"prompt": ["w1"], "where": column})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert rows(tmp_path / "p.parquet") == [{"prompt": "w1", "where": {"city": "Bern"}}]
