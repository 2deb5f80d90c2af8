"""Pretrained models on real texts, against a Llama written in numpy float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import REAL
from transformers import AutoModelForCausalLM, AutoTokenizer

from kleash.auditing.inputs import Source
from kleash.auditing.model_pair import load_pair
from kleash.auditing.token_records import score_items

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="no real inputs beside the checkout")

TEXTS = ("tinystories_sample.txt", "tinyshakespeare.txt", "grimms_fairy_tales.txt")
PIECES = 4
"""Stretches of a context taken from each text."""


def llama(weights: dict[str, np.ndarray], config, ids: np.ndarray) -> np.ndarray:
    """Log-probabilities [position, vocab] of a Llama, in float64, from its published equations."""
    width, heads = config.hidden_size, config.num_attention_heads
    shared = config.num_key_value_heads
    size, length = width // heads, len(ids)
    half = np.arange(0, size, 2) / size
    theta = config.to_dict().get("rope_theta") or config.rope_parameters["rope_theta"]
    # The frequencies are constants of the model, in float32; all else is float64.
    turns = 1 / (np.float32(theta) ** half.astype(np.float32))
    angle = np.arange(length)[:, None] * turns.astype(np.float64)
    cos, sin = (np.tile(f(angle), 2)[:, None, :] for f in (np.cos, np.sin))

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return gain * x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps)

    def turn(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, -1)
        return x * cos + np.concatenate([-second, first], -1) * sin

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    x = weights["model.embed_tokens.weight"][ids]
    later = np.triu(np.full((length, length), -np.inf), 1)
    for n in range(config.num_hidden_layers):
        w = {k.split(f"layers.{n}.")[1]: v for k, v in weights.items() if f"layers.{n}." in k}
        h = norm(x, w["input_layernorm.weight"])
        q = turn((h @ w["self_attn.q_proj.weight"].T).reshape(length, heads, size))
        k = turn((h @ w["self_attn.k_proj.weight"].T).reshape(length, shared, size))
        v = (h @ w["self_attn.v_proj.weight"].T).reshape(length, shared, size)
        k, v = (np.repeat(one, heads // shared, 1) for one in (k, v))
        weight = softmax(np.einsum("qhd,khd->hqk", q, k) / math.sqrt(size) + later)
        mixed = np.einsum("hqk,khd->qhd", weight, v).reshape(length, width)
        x = x + mixed @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        gate = h @ w["mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (h @ w["mlp.up_proj.weight"].T)
        x = x + inner @ w["mlp.down_proj.weight"].T
    x = norm(x, weights["model.norm.weight"])
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits = x @ head.T
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def copy_of(path: Path, into: Path, how: str) -> Path:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if how == "perturbed":
                parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
            else:
                parameter.copy_(parameter.bfloat16().float())
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(path).save_pretrained(into)
    return into


def parameters(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["perturbed", "bf16"])
@pytest.mark.parametrize("name", ["babyllama-tok105", "stories260K"])
def test_every_token_of_real_texts_in_both_directions(tmp_path, name: str, how: str) -> None:
    path = REAL / "models" / name
    pair = load_pair(copy_of(path, tmp_path / "copy", how), path, dtype="float64")
    sides = [(parameters(m.model), m.model.config) for m in (pair.policy, pair.reference)]
    tokens = 0
    for text in TEXTS:
        items = []
        for item in Source("texts", REAL / "texts" / text).items(pair.policy.tokenizer, 256):
            items.append(item)
            if len(items) == PIECES:
                break
        records = score_items(
            items, pair, first_number=0, temperature=1.0, budget=600, agreement=True
        )
        for item, record in zip(items, records, strict=True):
            ids = np.array([*item.prompt_ids, *item.response_ids])
            p, q = (llama(*side, ids)[:-1] for side in sides)
            np.testing.assert_allclose(record.kl, (np.exp(p) * (p - q)).sum(-1), rtol=0, atol=1e-6)
            reverse = (np.exp(q) * (q - p)).sum(-1)
            np.testing.assert_allclose(record.reverse_kl, reverse, rtol=0, atol=1e-6)
            at = np.arange(len(p)), ids[1:]
            # Records are float32: of a log-probability of −37 they keep 24 bits.
            np.testing.assert_allclose(record.logprobs, p[at], rtol=2**-24, atol=1e-6)
            same = p.argmax(-1) == q.argmax(-1)
            assert (record.same_top == same).mean() > 0.999
            tokens += len(ids) - 1
    assert tokens > 2000
