"""Audits of models that are already open: transformers and PEFT objects with their tokenizers."""

import dataclasses
import typing
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from audit_models import SMALL, change, noise
from tiny_models import save_model, tokenizer
from transformers import AutoModelForCausalLM

import kleash
from kleash.auditing.options import AuditKeywords, AuditOptions, make_options
from kleash.errors import ConfigError, ModelError, UsageError

PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model", attention_dropout=0.0)


@pytest.fixture(scope="module")
def moved(base, tmp_path_factory) -> Path:
    return change(base, tmp_path_factory.mktemp("moved") / "model", noise)


def lora(base: Path, **settings):
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=4, task_type="CAUSAL_LM", lora_dropout=0.5, **settings),
        )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_an_object_is_audited_as_its_directory_is(base, moved) -> None:
    model = AutoModelForCausalLM.from_pretrained(moved).train()
    other = AutoModelForCausalLM.from_pretrained(base)
    expected = kleash.audit(moved, base, PROMPTS, **SMALL)
    for policy, reference in (
        ((model, tokenizer()), base),
        (moved, (other, tokenizer())),
        ((model, tokenizer()), (other, tokenizer())),
    ):
        found = kleash.audit(policy, reference, PROMPTS, **SMALL)
        assert found.kl == expected.kl
    assert "in memory" in found.policy.path and found.policy.sha256 == expected.policy.sha256
    # It is given back in the mode it came in.
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_peft_object_is_read_with_its_adapter(base) -> None:
    model = lora(base, target_modules=["q_proj", "down_proj"])
    rows = [{"prompt": "w1 w2", "response": "w3 w4 w5 w6"}, {"prompt": "w3", "response": "w9"}]
    found = kleash.audit((model, tokenizer()), base, responses=rows, keep=2)
    kls = []
    reference = AutoModelForCausalLM.from_pretrained(base).double().eval()
    model.eval().double()
    for row in rows:
        given = len(tokenizer()(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer()(f"{row['prompt']} {row['response']}")["input_ids"]])
        with torch.no_grad():
            p, q = (
                m(input_ids=ids).logits[0, given - 1 : -1].log_softmax(-1)
                for m in (model, reference)
            )
        kls.append((p.exp() * (p - q)).sum(-1).numpy())
    assert found.kl.per_token.mean == pytest.approx(np.concatenate(kls).mean(), abs=1e-5)
    assert found.kl.per_token.mean > 1e-3
    # The adapter is part of what the model is.
    assert "Both checkpoints hold the same weights." not in found.notes


def test_what_cannot_be_read_is_refused_by_name(base) -> None:
    from peft import PromptTuningConfig, get_peft_model

    with pytest.raises(ModelError, match="an adapter on it: merge it first"):
        kleash.audit((lora(base, target_modules=["lm_head"]), tokenizer()), base, PROMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        )
    with pytest.raises(ModelError, match="learnt states before the text"):
        kleash.audit((tuned, tokenizer()), base, PROMPTS)
    for wrong in ((AutoModelForCausalLM.from_pretrained(base), None), (1, 2)):
        with pytest.raises(ModelError, match=r"a model with its tokenizer as \(model, tokenizer\)"):
            kleash.audit(wrong, base, PROMPTS)
    with pytest.raises(ModelError, match="expected a transformers or PEFT model, got Linear"):
        kleash.audit((torch.nn.Linear(2, 2), tokenizer()), base, PROMPTS)


def test_rows_in_memory_are_those_of_a_file(base, moved, tmp_path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "w1", "group": "a"}\n{"prompt": "w2", "group": "b"}\n')
    rows = [{"prompt": "w1", "group": "a"}, {"prompt": "w2", "group": "b"}]
    from_file, from_rows = (kleash.audit(moved, base, given, **SMALL) for given in (file, rows))
    assert from_file.parts == from_rows.parts and len(from_rows.parts[0].groups) == 2


def test_keywords_are_the_options() -> None:
    options, keywords = typing.get_type_hints(AuditOptions), typing.get_type_hints(AuditKeywords)
    assert options.keys() == keywords.keys()
    for name, kind in options.items():
        # Where a path is wanted, a text may be given as well.
        assert keywords[name] == (str | kind if name == "output" else kind)
    assert make_options({}) == AuditOptions()
    assert all(field.kw_only for field in dataclasses.fields(AuditOptions))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"into": "a"}, "got 'into': did you mean 'output'"),
        ({"max_tokens": 3}, "did you mean 'max_new_tokens'"),
        ({"zzz": 3}, "got 'zzz'; there are batch_tokens, both"),
        ({"resume": True}, "expected the directory to resume"),
        ({"keep": 0}, "keep of at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(given, message, base) -> None:
    with pytest.raises((ConfigError, UsageError), match=message):
        kleash.audit(base, base, PROMPTS, **given)
