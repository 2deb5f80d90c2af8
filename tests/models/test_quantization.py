"""Four bits: a frozen reference and the base under an adapter are what their codes stand for.

The oracle is the library's own dequantisation, put into a model that plain transformers opened.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kleash.errors import ModelError
from kleash.models.lora import AdapterSpec
from kleash.models.policy import Policy, freeze_copy, load_policy, load_reference
from kleash.models.quantization import SETTINGS, compute_in, is_quantised, require_exact_products

bitsandbytes = pytest.importorskip("bitsandbytes")

KINDS = ("llama", "gpt2", "gemma2")
"""Plain layers, transposed ones, tied weights and a soft cap."""
LORA = AdapterSpec(rank=2, alpha=4)
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
"""Of which the library's product without a gradient, where the CPU has it, takes every layer."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"llama": SIZES, "gemma2": SIZES, "gpt2": {"n_embd": 64}}
    found = {}
    for kind in KINDS:
        given = sizes[kind] if kind != "gpt2" else {}
        found[kind] = tiny_models.save_model(folder / kind, kind, **given)
    return found


def plain_model(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that four bits stand for: each matrix there and back by the library itself."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    functional = bitsandbytes.functional
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings():
            turned = isinstance(module, Conv1D)
            weight = module.weight.data.T.contiguous() if turned else module.weight.data
            codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            back = functional.dequantize_4bit(codes, state)
            assert 1e-3 < (back - weight).abs().max() < 1, name
            module.weight.data = back.T.contiguous() if turned else back
    return model.eval()


def texts() -> Tensor:
    return torch.randint(3, 20, (4, 9), generator=torch.Generator().manual_seed(1))


def logprobs_of(model: Any) -> Tensor:
    return model(input_ids=texts()).logits.float().log_softmax(-1)


def ours(policy: Any) -> Tensor:
    ids = texts()
    mask = torch.ones(4, 8, dtype=torch.bool)
    states = policy.hidden_states(ids[:, :1], mask[:, :1], ids[:, 1:], mask)
    logits = states @ policy.head.weight.T
    if policy.head.softcap is not None:
        logits = policy.head.softcap * torch.tanh(logits / policy.head.softcap)
    return logits.log_softmax(-1)


def adapted(path: Path, seed: int = 5) -> Policy:
    """A policy on a base in four bits, whose adapter is some change."""
    policy = load_policy(path, adapter=LORA, quantization="nf4")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_what_its_codes_stand_for(kind: str, models: dict[str, Path]) -> None:
    expected = logprobs_of(plain_model(models[kind]))
    reference = load_reference(models[kind], quantization="nf4")
    assert is_quantised(reference.model)
    assert reference.head.weight.dtype == torch.float32
    assert (ours(reference) - expected).abs().max() < 1e-5
    full = logprobs_of(AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32))
    assert (ours(reference) - full).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_gets_the_gradient_of_the_plain_model(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    plain_model(models[kind]).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    policy, plain = adapted(models[kind]), load_policy(tmp_path, adapter=LORA)
    for mine, other in zip(policy.parameters(), plain.parameters(), strict=True):
        other.data.copy_(mine.data)
    # Without a gradient first, as a rollout is scored.
    with torch.no_grad():
        before = ours(policy)
    for model in (policy, plain):
        ours(model)[..., 7].sum().backward()
    assert (before - ours(plain)).abs().max() < 1e-5
    for mine, other in zip(policy.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert other.grad.abs().max() > 1e-3
        assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_the_product_without_a_gradient_is_refused(models: dict[str, Path]) -> None:
    policy = load_policy(models["llama"], adapter=LORA, quantization="nf4")
    require_exact_products(policy.model)
    layer = policy.model.model.layers[0].mlp.up_proj
    layer = getattr(layer, "base_layer", layer)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="no gradient"):
        require_exact_products(policy.model)


def test_in_bfloat16_weights_are_rounded_and_then_quantised(models: dict[str, Path]) -> None:
    model = load_reference(models["llama"], dtype="bfloat16", quantization="nf4").model
    expected = logprobs_of(plain_model(models["llama"], torch.bfloat16))
    assert torch.equal(logprobs_of(model), expected)
    compute_in(model, torch.float32)
    assert not torch.equal(logprobs_of(model), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_directory_in_four_bits_opens_as_it_is_or_as_plain_matrices(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    held = AutoModelForCausalLM.from_pretrained(
        models[kind], dtype=torch.float32, quantization_config=settings
    )
    held.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    kept, plain = load_reference(tmp_path, quantization="nf4"), load_policy(tmp_path)
    assert is_quantised(kept.model) and not is_quantised(plain.model)
    expected = logprobs_of(held.dequantize(dtype=torch.float32))
    assert (ours(kept) - expected).abs().max() < 1e-5
    assert (ours(plain) - expected).abs().max() < 1e-5
    # Scales that are quantised themselves make it another model than ours.
    once = load_reference(models[kind], quantization="nf4")
    assert kept.identity().sha256 != once.identity().sha256
    assert (ours(kept) - ours(once)).abs().max() > 1e-3
    plain.save(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_a_directory_of_bfloat16_is_computed_in_float32(
    models: dict[str, Path], tmp_path: Path
) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    held = AutoModelForCausalLM.from_pretrained(
        models["llama"], dtype=torch.bfloat16, quantization_config=settings
    )
    held.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    four, plain = adapted(tmp_path), load_policy(tmp_path, adapter=LORA)
    for mine, other in zip(four.parameters(), plain.parameters(), strict=True):
        other.data.copy_(mine.data)
    for model in (four, plain):
        ours(model)[..., 7].sum().backward()
    assert (ours(four) - ours(plain)).abs().max() < 1e-5
    for mine, other in zip(four.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_a_scale_that_changes_changes_the_fingerprint(models: dict[str, Path]) -> None:
    reference = load_reference(models["llama"], quantization="nf4")
    before, summed = reference.identity().sha256, reference.fingerprint()
    state = reference.model.model.layers[1].mlp.up_proj.weight.quant_state
    state.absmax[3] *= 1.001
    assert reference.identity().sha256 != before and reference.fingerprint() != summed


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_saved_with_the_quantisation_of_its_base(
    models: dict[str, Path], tmp_path: Path
) -> None:
    policy = adapted(models["llama"])
    policy.save(tmp_path)
    expected = ours(policy).detach()
    peft = pytest.importorskip("peft")
    settings = json.loads((tmp_path / SETTINGS).read_text())
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=BitsAndBytesConfig.from_dict(settings)
    )
    for module in opened.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    assert (logprobs_of(opened) - expected).abs().max() < 1e-5
    # As `policy.adapter`, or a side of an audit: merged into what the base stood for.
    merged = load_policy(models["llama"], merge=str(tmp_path))
    assert (ours(merged) - expected).abs().max() < 1e-4
    # The base before it was quantised, under the same adapter, is another model.
    (tmp_path / SETTINGS).unlink()
    other = load_policy(models["llama"], merge=str(tmp_path))
    assert (ours(other) - expected).abs().max() > 1e-2
    restored = adapted(models["llama"], seed=6)
    restored.restore(tmp_path)
    assert torch.equal(ours(restored), expected)


def test_the_adapter_off_is_the_quantised_base(models: dict[str, Path]) -> None:
    policy = adapted(models["llama"])
    reference = freeze_copy(policy)
    assert torch.equal(ours(reference), ours(load_reference(models["llama"], quantization="nf4")))
    assert (ours(policy) - ours(reference)).abs().max() > 1e-2


def test_what_cannot_be_is_refused_in_a_sentence(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models["llama"]
    with pytest.raises(ModelError, match="merge_and_unload"):
        load_policy(path, merge="adapter", quantization="nf4")
    eight = shutil.copytree(path, tmp_path / "eight")
    config = json.loads((eight / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (eight / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="by the whole batch"):
        load_policy(eight)
    broken = tmp_path / "broken"
    policy = adapted(path)
    policy.save(broken)
    for text in ("", "[]", '{"load_in_8bit": true}'):
        (broken / SETTINGS).write_text(text)
        with pytest.raises(ModelError, match="settings of a base in 4 bits"):
            load_policy(path, merge=str(broken))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"kleash\[qlora\]"):
        load_reference(path, quantization="nf4")


def test_a_quantised_head_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["q_proj"]
    )
    held = AutoModelForCausalLM.from_pretrained(
        models["llama"], dtype=torch.float32, quantization_config=settings
    )
    held.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="head in full precision"):
        load_reference(tmp_path, quantization="nf4")
