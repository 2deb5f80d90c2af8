"""Training against a reference that lacks an added token: both are read over what both have."""

from pathlib import Path

import pytest
import torch
from small_run import save_material, settings, two_words
from tiny_models import save_model, tokenizer
from transformers import AutoModelForCausalLM

from kleash.errors import PromptError
from kleash.training.assembly import assemble
from kleash.training.loop import train


def with_pad(base: Path, folder: Path) -> Path:
    """The base with one [PAD] added and the matrix resized."""
    model, tok = AutoModelForCausalLM.from_pretrained(base), tokenizer()
    tok.add_special_tokens({"pad_token": "[PAD]"})
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tok), mean_resizing=False)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def test_a_policy_with_an_added_pad_trains_against_its_base(tmp_path: Path) -> None:
    material = save_material(tmp_path, prompts=two_words(range(8)), heldout=two_words(range(4)))
    base = save_model(tmp_path / "base")
    policy = with_pad(base, tmp_path / "policy")
    config = settings(
        material, tmp_path / "run", policy={"path": str(policy)}, reference={"path": str(base)},
        steps=1,
    )  # fmt: skip
    components = assemble(config)
    assert (components.policy.words, components.reference.head.words) == (25, 25)
    train(config, argv=[])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1"}\n{"prompt": "w1 [PAD]"}\n')
    with pytest.raises(PromptError, match=r"on prompt 2 of .*got '\[PAD\]' \(id 25, of 25\)"):
        assemble(config)
