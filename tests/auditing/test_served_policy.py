"""Auditing what vLLM serves, on the real engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from real_vllm import NEEDS_VLLM
from transformers import AutoModelForCausalLM

from kleash.auditing.api import audit
from kleash.auditing.inputs import Item
from kleash.auditing.model_sources import opened_pair
from kleash.auditing.served_policy import ServedModel
from kleash.auditing.token_records import score_items

pytestmark = NEEDS_VLLM

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference in float32, a policy near it, and that policy as it is served: in bfloat16."""
    made = tmp_path_factory.mktemp("models")
    tok = tiny_models.tokenizer()
    tiny_models.save_model(made / "reference", tok=tok, rows=len(tok) + 7, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(made / "reference")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    for name, dtype in (("policy", torch.float32), ("served", torch.bfloat16)):
        model.to(dtype).save_pretrained(made / name)
        tok.save_pretrained(made / name)
    lines = [json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(16)]
    (made / "prompts.jsonl").write_text("\n".join(lines))
    texts = [
        json.dumps({"text": " ".join(f"w{(3 * i + j * j) % 20}" for j in range(24))})
        for i in range(24)
    ]
    (made / "texts.jsonl").write_text("\n".join(texts))
    return made


def test_what_is_served_is_as_far_as_transformers_says(folder: Path) -> None:
    """In bfloat16 both round, each in its own places: the means agree within their interval."""
    reference = str(folder / "reference")
    for given in (
        {"texts": folder / "texts.jsonl"},
        {"prompts": folder / "prompts.jsonl", "max_new_tokens": 24, "responses_per_prompt": 8},
    ):
        served = audit(f"vllm:{folder / 'served'}", reference, **given)
        plain = audit(str(folder / "served"), reference, dtype="auto", **given)
        assert (served.policy.how, served.policy.dtype) == ("as vLLM computes it", "bfloat16")
        a, b = (found.parts[0].measures["kl"].per_token for found in (served, plain))
        assert a.half_width is not None and b.half_width is not None
        assert abs(a.mean - b.mean) < a.half_width + b.half_width
        # The same texts: what is left is the difference of two roundings.
        assert "prompts" in given or abs(a.mean - b.mean) < 0.05 * a.mean


def test_served_and_trained_are_apart_by_rounding_alone(folder: Path) -> None:
    served, trained = f"vllm:{folder / 'served'}", str(folder / "served")
    found = audit(served, trained, texts=folder / "texts.jsonl", dtype="auto")
    kl = found.parts[0].measures["kl"].per_token
    assert 0 < kl.mean < 1e-3
    assert "Both checkpoints hold the same weights." in found.notes


def test_every_kl_is_that_of_float64(folder: Path) -> None:
    """The oracle: vLLM's own laws against the reference in float64, summed over all words."""
    path = f"vllm:{folder / 'served'}"
    with opened_pair(path, str(folder / "reference"), dtype="float32", device=None) as pair:
        assert isinstance(pair.policy.model, ServedModel)
        items = [
            Item(
                prompt_ids=(4, 5 + i),
                response_ids=tuple(range(6, 20 + i % 3)),
                ended=False,
                cluster=i,
                group=None,
            )
            for i in range(6)
        ]
        records = score_items(
            items, pair, first_number=0, temperature=1.0, budget=60, agreement=False
        )
        exact = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float64)
        words = pair.policy.words
        for item, record in zip(items, records, strict=True):
            text = [*item.prompt_ids, *item.response_ids]
            (law,) = pair.policy.model.engine.next_token_logprobs([text])
            with torch.no_grad():
                logits = exact(input_ids=torch.tensor([text])).logits[0, :-1, :words]
            ref = logits.log_softmax(-1)
            kl = (law.exp() * (law - ref)).sum(-1)[len(item.prompt_ids) - 1 :]
            torch.testing.assert_close(
                torch.from_numpy(record.kl.copy()).double(), kl, atol=1e-4, rtol=0
            )
            assert float(kl.max()) > 1e-2
