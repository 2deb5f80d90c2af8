"""Runs on four bits: QLoRA from its first step to its resumption, and a quantised reference.

The oracle is plain transformers on the matrices that the library's own dequantisation gives.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny_models
import torch
from small_run import numbers, policy_weights, save_material, two_words
from torch import Tensor, nn
from training_hooks import interrupt_after
from transformers import AutoModelForCausalLM, PreTrainedModel

import kleash
from kleash.errors import ModelError
from kleash.models.quantization import is_quantised
from kleash.preflight.checks.objective import inert_options
from kleash.preflight.checks.reference import quantization
from kleash.preflight.probe_batch import QUICK, draw
from kleash.storage.run_directory import read_run
from kleash.training.assembly import assemble
from kleash.training.interruption import RunInterrupted
from kleash.training.loop import train
from kleash.training.quantization_floor import quantization_floor
from kleash.training.state import latest_checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes")
# peft asks transformers for a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

QLORA: dict[str, Any] = {"policy": {"lora": {"rank": 2}, "quantization": "nf4"}}
REFERENCE: dict[str, Any] = {"reference": {"quantization": "nf4"}}
QUICKLY: dict[str, Any] = {
    "algorithm": {"name": "rloo", "minibatches": 1, "epochs": 1},
    "rollout": {"prompts_per_step": 4, "responses_per_prompt": 2, "max_new_tokens": 5},
    "optimizer": {"lr": 1e-2},
    "prompts": {"heldout": None},
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    save_material(folder, prompts=two_words(range(8)), heldout=[])
    tiny_models.save_model(folder / "policy", hidden_size=64, intermediate_size=96)
    return folder


def settings(material: Path, output: Path, layer: dict[str, Any], **changes: Any) -> Any:
    return small_run.settings(material, output, {**QUICKLY, **changes}, **layer)


def plain(path: Path, *, quantised: bool) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    functional = bitsandbytes.functional
    for module in model.model.modules() if quantised else ():
        if isinstance(module, nn.Linear):
            codes, state = functional.quantize_4bit(module.weight.data, quant_type="nf4")
            module.weight.data = functional.dequantize_4bit(codes, state)
    return model.eval()


@torch.no_grad()
def kl_of_response(ours: Any, theirs: Any, prompt: Tensor, response: Tensor) -> float:
    """Σ_t KL over the whole vocabulary, of one unpadded text."""
    ids, first = torch.cat([prompt, response])[None], len(prompt) - 1
    p, q = (model(input_ids=ids).logits[0, first:-1].double().log_softmax(-1)
            for model in (ours, theirs))  # fmt: skip
    return float((p.exp() * (p - q)).sum())


@pytest.fixture(scope="module")
def qlora(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(settings(material, tmp_path_factory.mktemp("runs") / "whole", QLORA))


def test_qlora_begins_at_its_reference_and_learns(qlora: Path, material: Path) -> None:
    run = read_run(qlora)
    assert run.meta["quantization"] == {"policy": "nf4", "reference": "nf4", "kl_floor": 0.0}
    assert run.metrics[0]["objective/kl_ref"] == 0
    assert run.metrics[-1]["objective/kl_ref"] > 1e-3


def test_an_interrupted_qlora_run_comes_to_the_same_bits(
    qlora: Path, material: Path, tmp_path: Path
) -> None:
    config = settings(material, tmp_path / "run", QLORA)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises((RunInterrupted, KeyboardInterrupt)):
            train(config)
    train(config)
    assert numbers(tmp_path / "run") == numbers(qlora)
    ours, theirs = policy_weights(tmp_path / "run"), policy_weights(qlora)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_audit_reads_the_adapter_on_the_base_that_it_was_trained_on(
    qlora: Path, material: Path
) -> None:
    """peft around the plain matrices of four bits, against the full base."""
    peft = pytest.importorskip("peft")
    checkpoint = latest_checkpoint(qlora / "checkpoints")
    assert checkpoint is not None
    base = plain(material / "policy", quantised=True)
    ours = peft.PeftModel.from_pretrained(base, str(checkpoint / "policy"))
    full = plain(material / "policy", quantised=False)
    ids = torch.arange(6, 14)
    expected = kl_of_response(ours, full, ids[:1], ids[1:]) / 7
    text = " ".join(f"w{i - 5}" for i in ids.tolist())
    found = kleash.audit(checkpoint / "policy", material / "policy", texts=[text])
    assert found.kl.per_token.mean == pytest.approx(expected, rel=1e-4)
    # Of the base before the adapter, by its prefix.
    expected = kl_of_response(plain(material / "policy", quantised=True), full, ids[:1], ids[1:])
    found = kleash.audit(f"nf4:{material / 'policy'}", material / "policy", texts=[text])
    assert found.kl.per_token.mean == pytest.approx(expected / 7, rel=1e-4)
    with pytest.raises(ModelError, match="without the prefix"):
        kleash.audit(f"nf4:{checkpoint / 'policy'}", material / "policy", texts=[text])


def test_the_code_of_its_card_opens_it(qlora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = latest_checkpoint(qlora / "checkpoints")
    assert checkpoint is not None
    folder = checkpoint / "policy"
    monkeypatch.chdir(folder)
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    found: dict[str, Any] = {}
    exec(code, found)
    assert is_quantised(found["model"])
    saved, held = policy_weights(qlora), dict(found["model"].named_parameters())
    for name, tensor in saved.items():
        assert torch.equal(held[name.replace(".weight", ".default.weight")], tensor)


def test_the_floor_is_what_the_whole_vocabulary_says(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run", REFERENCE)
    trial = draw(config, assemble(config), QUICK)
    ours = plain(material / "policy", quantised=False)
    theirs = plain(material / "policy", quantised=True)
    rollout = trial.rollout
    sums = [
        kl_of_response(ours, theirs, prompt[given], response[written])
        for prompt, given, response, written in zip(
            rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask,
            strict=True,
        )
    ]  # fmt: skip
    mask = rollout.response_mask
    found = quantization_floor(trial.scored.kl, mask, rollout.prompt_index)
    assert found.per_response.mean == pytest.approx(sum(sums) / len(sums), rel=1e-4)
    assert found.per_token.mean == pytest.approx(sum(sums) / int(mask.sum()), rel=1e-4)
    assert found.per_token.mean > 1e-3
    finding = quantization(trial)
    assert finding.verdict == "ok"
    assert f"{found.per_token.mean:.3g} nats per token" in finding.measured
    assert f"{found.per_response.mean:.3g} ± " in finding.measured
    assert not inert_options(trial)


def test_a_run_records_its_floor_and_warns_of_a_target_within_it(
    material: Path, tmp_path: Path
) -> None:
    config = settings(material, tmp_path / "run", REFERENCE, steps=1)
    run = read_run(train(config))
    floor = run.meta["quantization"]["kl_floor"]
    assert floor["per_response"]["mean"] == pytest.approx(run.metrics[-1]["objective/kl_ref"])
    assert floor["per_response"]["mean"] > 1e-3
    assert json.dumps(run.meta["quantization"]["reference"]) == '"nf4"'
    target = {"leash": {"beta": None, "target_kl": 1e-3}}
    tight = settings(material, tmp_path / "tight", {**REFERENCE, **target})
    finding = quantization(draw(tight, assemble(tight), QUICK))
    assert finding.verdict == "warn" and "most of the budget" in finding.cause


def test_where_there_is_no_floor_the_check_says_why(material: Path, tmp_path: Path) -> None:
    both = settings(material, tmp_path / "both", QLORA)
    finding = quantization(draw(both, assemble(both), QUICK))
    assert finding.verdict == "ok" and "kleash audit nf4:" in finding.measured
    path = {"path": str(material / "policy"), "reference_differs": True, "quantization": "nf4"}
    other = settings(material, tmp_path / "other", {"reference": path})
    assert (
        "not that of quantisation alone" in quantization(draw(other, assemble(other), QUICK)).cause
    )
    neither = settings(material, tmp_path / "neither", {})
    assert quantization(draw(neither, assemble(neither), QUICK)).verdict == "skipped"
