"""Chat prompts: whole rows through chat templates, as transformers itself hands them over."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny_models
from chat_families import CALL, FAMILIES, ROWS, TOOLS, byte_tokenizer

from kleash.errors import PromptError
from kleash.models.reward_model import ClassifierReward
from kleash.rollout.prompts import Prompt, columns_of, read_prompts

CHAT = [{"role": "user", "content": "Rain?"}]


def read(source: Any, tok: Any, **settings: Any) -> list[Prompt]:
    return read_prompts(source, tok, context=None, max_new_tokens=4, **settings)


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "prompts.parquet"
    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    pyarrow.parquet.write_table(table, file)
    return file


def whole_row(row: dict[str, Any], tok: Any) -> list[int]:
    """The library's own way, which the tokens must equal."""
    return tok.apply_chat_template(
        row["messages"],
        tools=row.get("tools"),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **(row.get("chat_template_kwargs") or {}),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_ids_are_those_of_the_whole_row(tmp_path: Path, family: str, write: Any) -> None:
    tok = byte_tokenizer(FAMILIES[family])
    prompts = read(write(tmp_path, ROWS), tok)
    assert [list(prompt.ids) for prompt in prompts] == [whole_row(row, tok) for row in ROWS]
    texts = [tok.decode(prompt.ids) for prompt in prompts]
    assert "Weather of a city." in texts[0] and "Zürich" in texts[1] and "weather" in texts[1]
    assert [text.count("<s>") for text in texts] == [FAMILIES[family].count("bos_token")] * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_judge_is_handed_the_whole_row_of_a_file(tmp_path: Path, family: str, write: Any) -> None:
    tok = byte_tokenizer(FAMILIES[family])
    sizes = {"max_position_embeddings": 2048}
    judge = ClassifierReward(tiny_models.save_classifier(tmp_path / "judge", tok=tok, **sizes))
    prompts = read(write(tmp_path, ROWS), tok)
    asked, columns = [prompt.content for prompt in prompts], columns_of(prompts)
    seen: list[list[int]] = []
    encode = judge.encode
    judge.encode = lambda *given: seen.append(encode(*given)) or seen[-1]  # pyright: ignore
    judge.score(asked, ["Yes."] * 3, columns)
    for ids, row in zip(seen, ROWS, strict=True):
        turns = [*row["messages"], {"role": "assistant", "content": "Yes."}]
        further = row.get("chat_template_kwargs") or {}
        expected = tok.apply_chat_template(
            turns, tools=row.get("tools"), return_dict=False, **further
        )
        assert ids == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_all_sources_read_alike(tmp_path: Path, family: str) -> None:
    tok = byte_tokenizer(FAMILIES[family])
    as_text = [
        {k: json.dumps(v) if k in ("tools", "chat_template_kwargs") else v for k, v in row.items()}
        for row in ROWS
    ]
    nulls = [{"prompt": None, **row} for row in ROWS]
    bare = json.loads(json.dumps(ROWS))
    del bare[1]["messages"][1]["content"]
    expected = read(jsonl(tmp_path, ROWS), tok)
    for rows in (ROWS, as_text, nulls, bare):
        for source in (rows, jsonl(tmp_path, rows), parquet(tmp_path, rows)):
            found = read(source, tok)
            assert [p.ids for p in found] == [p.ids for p in expected]
            assert [p.content for p in found] == [p.content for p in expected]
            assert [p.columns["tools"] for p in found] == [TOOLS, TOOLS, None]
            assert [p.columns["answer"] for p in found] == [None, "no", "yes"]


def test_what_only_other_calls_fill_is_not_in_a_table(tmp_path: Path) -> None:
    tok = byte_tokenizer(FAMILIES["chatml"])
    rows = [
        {"messages": [*CHAT, {"role": "assistant", "tool_calls": [call]}, *CHAT]}
        for call in (
            {"function": {"name": "weather", "arguments": {"city": "Bern"}}},
            {"function": {"name": "date", "arguments": {"day": 3}}},
        )
    ]
    found = read(parquet(tmp_path, rows), tok)
    assert [list(p.ids) for p in found] == [whole_row(row, tok) for row in rows]
    assert '"arguments": {"city": "Bern"}' in tok.decode(found[0].ids)


def test_an_argument_of_the_template_is_heard() -> None:
    tok = byte_tokenizer(FAMILIES["chatml"])
    plain, silent = read([{**ROWS[0], "chat_template_kwargs": None}, ROWS[0]], tok)
    assert tok.decode(silent.ids) == tok.decode(plain.ids) + "<think></think>"


def test_a_conversation_may_be_continued() -> None:
    tok = byte_tokenizer(FAMILIES["chatml"])
    begun = [*CHAT, {"role": "assistant", "content": "It will"}]
    with pytest.raises(PromptError, match=r"ends with the assistant's .*continue_final_message"):
        read([begun], tok)
    row = {"messages": begun, "chat_template_kwargs": {"continue_final_message": True}}
    (prompt,) = read([row], tok)
    assert tok.decode(prompt.ids).endswith("<|im_start|>assistant\nIt will")


NAMED = {"plain": "{{ messages[0].content }}", "loud": "{{ messages[0].content | upper }}"}


def test_named_templates() -> None:
    tok = byte_tokenizer(NAMED)
    with pytest.raises(PromptError, match=r"default chat .* on row 0 .*'loud', 'plain': choose"):
        read([CHAT], tok)
    (prompt,) = read([CHAT], tok, chat_template="loud")
    assert tok.decode(prompt.ids) == "RAIN?"
    with pytest.raises(PromptError, match=r"chat template 'quiet' .*, got those named 'loud'"):
        read([CHAT], tok, chat_template="quiet")
    with pytest.raises(PromptError, match="with a single template: leave the name out"):
        read([CHAT], byte_tokenizer("{{ 1 }}"), chat_template="loud")
    # Where the tokenizer has one for tools it is taken for rows with tools.
    tok = byte_tokenizer({"default": "plain", "tool_use": "with tools"})
    texts = [tok.decode(p.ids) for p in read([CHAT, {"messages": CHAT, "tools": TOOLS}], tok)]
    assert texts == ["plain", "with tools"]


SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = [{"type": "text", "text": "Rain?"}]


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        ("brackets", {"messages": [SYSTEM, *CHAT]}, "line 1 of .*got: System role not supported"),
        (
            "headers",
            {"messages": [*CHAT, {"role": "assistant", "tool_calls": [CALL, CALL]}, *CHAT]},
            "got: This model only supports single tool-calls",
        ),
        ("{{ messages[0].content + 1 }}", {"messages": CHAT}, "takes on line 1 .*concatenate"),
        ("{% for %}", {"messages": CHAT}, "takes on line 1 of .*Expected an expression"),
        ("{{ messages[0].content }}", {"prompt": [{"role": "user", "content": PARTS}]}, "parts"),
        ("chatml", {"messages": CHAT, "tools": {"a": 1}}, "'tools' to be a list of JSON schemas"),
        ("chatml", {"messages": CHAT, "tools": "[{"}, "'tools' as JSON on line 1"),
        ("chatml", {"messages": CHAT, "chat_template_kwargs": [1]}, "kwargs' to be an object"),
        ("chatml", {"messages": CHAT, "chat_template_kwargs": {"tokenize": 1}}, "got 'tokenize'"),
        ("chatml", {"messages": [{"role": "user", "content": None}]}, "'content' is text, parts"),
        ("chatml", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of type"),
        ("chatml", {"messages": "Rain?"}, "'messages' to be a list of messages .*'Rain"),
    ],
)
def test_conversations_that_cannot_be_used(
    tmp_path: Path, template: str, row: dict[str, Any], message: str
) -> None:
    tok = byte_tokenizer(FAMILIES.get(template, template))
    with pytest.raises(PromptError, match=message) as caught:
        read(jsonl(tmp_path, [row]), tok)
    assert "line 1 of" in str(caught.value) and "\n" not in str(caught.value)
