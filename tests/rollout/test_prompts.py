"""Prompt files: read right, or refused with the line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from kleash.errors import PromptError
from kleash.rollout.prompts import Prompt, PromptCursor, batch_prompts, read_prompts

CHAT = [{"role": "user", "content": "w1 w2"}]


def read(path: Path, **settings: Any) -> list[Prompt]:
    tok = settings.pop("tok", None) or tiny_models.tokenizer()
    return read_prompts(path, tok, **{"context": 16, "max_new_tokens": 4, **settings})


def jsonl(folder: Path, *rows: object) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return file


def test_text_prompts(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"prompt": "w1 w2", "group": "a"}, "", {"prompt": "w3", "group": 7})
    first, second = read(file)
    group = {"group": "a"}
    assert first == Prompt(content="w1 w2", ids=(6, 7), index=0, group="a", columns=group)
    assert second == Prompt("w3", (8,), 1, group="7", columns={"group": 7})
    with_bos = read(file, tok=tiny_models.tokenizer(bos="<s>"))
    assert with_bos[0].ids == (3, 7, 8)


@pytest.mark.parametrize("key", ["prompt", "messages"])
def test_conversations(tmp_path: Path, key: str) -> None:
    tok = tiny_models.tokenizer(bos="<s>", chat_template="<s> " + tiny_models.CHAT_TEMPLATE)
    (prompt,) = read(jsonl(tmp_path, {key: CHAT}), tok=tok)
    assert tok.convert_ids_to_tokens(list(prompt.ids)) == [
        "<s>",
        "<user>",
        "w1",
        "w2",
        "<assistant>",
    ]
    assert prompt.content == CHAT


def test_parquet_says_the_same_as_json_lines(tmp_path: Path) -> None:
    tok = tiny_models.tokenizer(chat_template=tiny_models.CHAT_TEMPLATE)
    rows = [{"prompt": "w1", "group": "a"}, {"prompt": "w2 w3", "group": None}]
    file = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert read(file) == read(jsonl(tmp_path, *rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": CHAT}]), file)
    assert read(file, tok=tok) == read(jsonl(tmp_path, {"messages": CHAT}), tok=tok)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "w1"}\n', encoding="utf-8-sig")
    assert len(read(file)) == 1


def test_a_prompt_may_fill_the_context_less_the_response(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"prompt": " ".join(["w1"] * 12)})
    assert len(read(file)[0].ids) == 12
    assert len(read(file, context=None, max_new_tokens=1000)) == 1
    with pytest.raises(PromptError, match=r"at most 11 tokens on line 1 .*16 less 5.*got 12"):
        read(file, max_new_tokens=5)
    with pytest.raises(PromptError, match=r"context of 16 tokens, got max_new_tokens = 16: lower"):
        read(file, max_new_tokens=16)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected prompts in .*got an empty file"),
        (["", "  "], "got an empty file"),
        ([{"prompt": "w1"}, "{'prompt': 'w2'}"], "got .* on line 2 of .* at column 2"),
        ([{"prompt": "w1"}, "[1]"], r"on line 2 of .*, got '\[1\]'"),
        ([{"text": "w1", "id": 3}], "the key 'prompt' or 'messages' on line 1 .*'text', 'id'"),
        ([{}], "got no key"),
        ([{"prompt": 3}], "to be text or a list of messages .*, got '3'"),
        ([{"prompt": []}], "to be text or a list"),
        ([{"prompt": ["w1"]}], "to be text or a list"),
        ([{"prompt": [{"role": "user"}]}], "whose 'content' is text"),
        ([{"prompt": ""}], "a prompt with text on line 1"),
        ([{"prompt": " \n"}], "a prompt with text on line 1"),
        ([{"prompt": CHAT}], "a chat template for the messages on line 1"),
        ([{"prompt": [*CHAT, {"role": "assistant", "content": "w"}]}], "waits for its answer"),
        ([{"prompt": "w1 <eos>"}], "can be continued on line 1 .*'<eos>'"),
        ([{"prompt": "w1 " * 13}], "at most 12 tokens on line 1"),
        (["x" * 100], r"got 'xxx.*\.\.\.' on line 1"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read(jsonl(tmp_path, *rows))


def test_a_prompt_of_no_tokens_is_refused(tmp_path: Path) -> None:
    tok = tiny_models.tokenizer(chat_template="{{ '' }}")
    with pytest.raises(PromptError, match="at least one token on line 1"):
        read(jsonl(tmp_path, {"prompt": CHAT}), tok=tok)


def test_bos_that_is_eos_is_no_end(tmp_path: Path) -> None:
    tok = tiny_models.tokenizer(bos="<eos>")
    (prompt,) = read(jsonl(tmp_path, {"prompt": "w1"}), tok=tok)
    assert prompt.ids[0] == tok.eos_token_id


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"prompt file at .*nowhere.jsonl', got none"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(PromptError, match=r"looked for in /"):
        read(Path("nowhere.jsonl"))
    for name, content, message in (
        ("prompts.tsv", b"prompt\nw1", r"or \.parquet file, got .* of kind '\.tsv'"),
        ("prompts.jsonl", b'{"prompt": "\xff"}', "in UTF-8 at"),
        ("prompts.parquet", b"not at all", "Parquet file at .* cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PromptError, match=message):
            read(tmp_path / name)


def test_batches_are_padded_on_the_left() -> None:
    prompts = [Prompt("a", (7, 8, 9), 4), Prompt("b", (2,), 6)]
    batch = batch_prompts(prompts, pad_id=2)
    assert batch.ids.tolist() == [[7, 8, 9], [2, 2, 2]]
    # The padding id that is also the prompt's own token is kept there.
    assert batch.mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.index.tolist() == [4, 6]
    assert batch.mask.dtype == torch.bool


@given(
    size=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    counts=st.lists(st.integers(0, 25), min_size=1, max_size=5),
)
def test_the_cursor_reads_every_prompt_once_an_epoch(
    size: int, seed: int, counts: list[int]
) -> None:
    cursor = PromptCursor(size=size, seed=seed)
    read_so_far: list[int] = []
    for count in counts:
        some, after = cursor.take(count)
        # A cursor is data: made again from its fields it goes on in the same way.
        again = PromptCursor(size, seed, cursor.epoch, cursor.position)
        assert again.take(count) == (some, after)
        read_so_far += some
        cursor = after
    whole, _ = PromptCursor(size=size, seed=seed).take(sum(counts))
    assert read_so_far == whole
    for start in range(0, len(whole) - size + 1, size):
        assert Counter(whole[start : start + size]) == Counter(range(size))


def test_the_cursor_shuffles_by_seed_and_epoch() -> None:
    whole, _ = PromptCursor(size=50, seed=1).take(100)
    other, _ = PromptCursor(size=50, seed=2).take(50)
    assert whole[:50] != whole[50:]
    assert whole[:50] != other
    assert whole[:50] != sorted(whole[:50])
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptCursor(size=0, seed=0).take(1)


def test_real_prompts() -> None:
    file = tiny_models.REAL / "prompts" / "story-openings.jsonl"
    if not file.is_file():
        pytest.skip("no real inputs beside the checkout")
    prompts = read(file, context=512, max_new_tokens=48)
    assert len(prompts) == 384
    assert all(p.ids for p in prompts)
