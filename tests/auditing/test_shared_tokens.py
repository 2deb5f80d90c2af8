"""Audits of models whose tokens or end tokens differ, against plain transformers in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from audit_models import SMALL, change, noise, write_prompts, write_texts
from tiny_models import save_model, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from kleash.auditing.api import audit
from kleash.errors import ModelError, PromptError

WORDS = 25
"""Tokens of the tests' tokenizer."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="module")
def padded(base, tmp_path_factory) -> Path:
    """A fine-tuned model to which one [PAD] was added, and whose matrix was resized."""
    folder = change(base, tmp_path_factory.mktemp("padded") / "model", noise)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tok = tokenizer()
    tok.add_special_tokens({"pad_token": "[PAD]"})
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tok), mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[WORDS:].normal_(std=0.3)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def kl_by_hand(policy: Path, reference: Path, ids: list[int]) -> np.ndarray:
    """KL per token over the first WORDS ids, by transformers in float64."""
    tables = []
    for path in (policy, reference):
        model = AutoModelForCausalLM.from_pretrained(path).double().eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1, :WORDS]
        tables.append(logits.double().log_softmax(-1))
    return (tables[0].exp() * (tables[0] - tables[1])).sum(-1).numpy()


def test_one_added_pad_token_is_left_out(base, padded, prompts, tmp_path) -> None:
    texts = write_texts(tmp_path / "texts.jsonl")
    tok = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    expected = np.concatenate([kl_by_hand(padded, base, tok(row)["input_ids"]) for row in rows])
    found = audit(padded, base, texts=texts, keep=4, dtype="float64")
    assert found.kl.per_token.mean == pytest.approx(expected.mean(), abs=1e-6)
    (note,) = [one for one in found.notes if "[PAD]" in one]
    assert "1 of the tokens" in note and "over the 25 shared tokens" in note
    for one in (audit(padded, base, prompts, **SMALL), audit(base, padded, prompts, **SMALL)):
        assert one.kl.per_token.mean > 0 and any("[PAD]" in note for note in one.notes)


def test_the_mass_that_is_left_out_is_said(base, padded, prompts) -> None:
    found = audit(padded, base, prompts, **SMALL, seed=3)
    (note,) = [one for one in found.notes if "[PAD]" in one]
    said = float(note.split("gives the others ")[1].split(" ")[0])
    model = AutoModelForCausalLM.from_pretrained(padded)
    tok = AutoTokenizer.from_pretrained(padded)
    masses = []
    for sample in found.parts[0].samples:
        prompt, ids = tok(sample.prompt)["input_ids"], tok(sample.response)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits
        masses.append(logits[0, len(prompt) - 1 : -1].softmax(-1)[:, WORDS:].sum(-1).mean().item())
    assert min(masses) < said < max(masses)


def test_each_model_ends_with_its_own_token(base, prompts, tmp_path) -> None:
    chat = change(base, tmp_path / "chat", noise)
    tok = tokenizer()
    tok.eos_token = "<assistant>"
    tok.save_pretrained(chat)
    (chat / "generation_config.json").write_text('{"eos_token_id": 4}')
    found = audit(chat, base, prompts, both=True, max_new_tokens=12, keep=40)
    assert any("each ends its responses with its own" in note for note in found.notes)
    by = {
        part.by: {s.tokens[-1].strip() for s in part.samples if len(s.tokens) < 12}
        for part in found.parts
    }
    assert by["policy"] == {"<assistant>"} and by["reference"] == {"<eos>"}


def test_a_token_without_a_row_is_refused_where_it_occurs(base, tmp_path) -> None:
    other = change(base, tmp_path / "other", noise)
    tok = tokenizer()
    tok.add_tokens(["<image>"], special_tokens=True)
    tok.save_pretrained(other)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "w1 w2 w3"}\n')
    assert audit(other, other, texts=texts, keep=1).parts[0].verdict == "identical"
    texts.write_text('{"text": "w1 w2 w3"}\n{"text": "w1 <image> w3"}\n')
    with pytest.raises(PromptError, match=r"on row 2 of .*got '<image>' \(id 25, of 25\)"):
        audit(other, other, texts=texts, keep=1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "<image>"}\n')
    with pytest.raises(PromptError, match="row 1"):
        audit(other, base, prompts, **SMALL)


def test_an_end_token_the_other_lacks_is_refused_for_its_own_responses(base, tmp_path) -> None:
    chat = change(base, tmp_path / "chat", noise)
    model, tok = AutoModelForCausalLM.from_pretrained(chat), tokenizer()
    tok.add_special_tokens({"eos_token": "<end>"})
    model.resize_token_embeddings(len(tok), mean_resizing=False)
    model.save_pretrained(chat)
    tok.save_pretrained(chat)
    with pytest.raises(ModelError, match="end its responses with a token that both models have"):
        audit(chat, base, ["w1"], **SMALL)
    with pytest.raises(ModelError, match="'<end>'"):
        audit(base, chat, ["w1"], both=True, **SMALL)
    assert audit(chat, base, texts=["w1 w2 w3"], keep=1).kl.per_token.mean > 0


def test_a_doubled_bos_is_named(tmp_path) -> None:
    folder = save_model(tmp_path / "a", tok=tokenizer(bos="<s>"))
    moved = tmp_path / "b"
    save_model(moved, tok=tokenizer(bos="<s>"), seed=1)
    for kind, given in (
        ("prompts", ["<s> w1", "w2", "<s> w3"]),
        ("texts", ["<s> w1 w2", "w2 w3", "<s> w3 w4"]),
        ("responses", [{"prompt": f"{b}w1", "response": "w2"} for b in ("<s> ", "", "<s> ")]),
    ):
        found = audit(moved, folder, **{kind: given}, **SMALL)
        (note,) = [one for one in found.notes if "doubled BOS" in one]
        assert note.startswith(f"2 of 3 {kind} begin with a doubled BOS: the text has '<s>'")
    assert not any("BOS" in n for n in audit(moved, folder, ["w1", "w2"], **SMALL).notes)
