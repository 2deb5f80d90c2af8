"""What is saved opens with plain transformers and peft as the policy that was held, or not at all.

The architectures are in `test_architectures.py`; here are the ways a policy begins.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_architectures as tiny
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from trained_adapters import made, save_adapter
from transformers import AutoModelForCausalLM

from kleash.errors import ModelError, RunError
from kleash.models import checkpoint
from kleash.models.lora import AdapterSpec
from kleash.models.policy import Policy, freeze_copy, load_policy

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 3, 4, 1, 12, 13]])
LORA = AdapterSpec(rank=2, alpha=4, targets=("q_proj",))
EMBEDDING = AdapterSpec(rank=2, alpha=4, targets=("q_proj", "embed_tokens"))
HEAD = AdapterSpec(rank=2, alpha=4, targets=("q_proj",), modules_to_save=("lm_head",))
BOTH = AdapterSpec(rank=2, targets=("q_proj",), modules_to_save=("lm_head", "embed_tokens"))
WAYS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, tied": {"tied": True},
    "padded vocabulary": {"rows": 31},
    "an adapter": {"spec": LORA},
    "an adapter on a tied embedding": {"spec": EMBEDDING, "tied": True},
    "a tied head trained whole": {"spec": HEAD, "tied": True},
    "head and embedding trained whole": {"spec": BOTH, "tied": True},
    "a padded vocabulary and an adapter": {"spec": HEAD, "rows": 31},
    "a merged adapter": {"merge": "lora"},
    "an adapter on an adapter": {"merge": "lora", "spec": LORA},
    "an adapter on DoRA": {"merge": "dora", "spec": LORA},
    "an adapter on rsLoRA": {"merge": "rslora", "spec": LORA},
    "an adapter on a saved head, tied": {"merge": "saved", "spec": LORA, "tied": True},
    "tied embedding on an adapter": {"merge": "lora", "spec": EMBEDDING, "tied": True},
    "a tied head trained whole on an adapter": {"merge": "lora", "spec": HEAD, "tied": True},
}


def begin(folder: Path, way: dict[str, Any], **settings: Any) -> Policy:
    base = tiny_models.save_model(
        folder / "base", rows=way.get("rows"), tie_word_embeddings=way.get("tied", False)
    )
    merge = way.get("merge")
    if merge is not None:
        place = "head" if merge == "saved" else "attention"
        settings["merge"] = str(save_adapter(base, folder / "sft", made(merge, place)))
    return load_policy(base, adapter=way.get("spec"), **settings)


def learn(policy: Policy, size: float = 0.1) -> None:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * size)


@pytest.mark.parametrize("way", WAYS)
def test_what_opens_is_what_was_held(way: str, tmp_path: Path) -> None:
    policy = begin(tmp_path, WAYS[way])
    start = tiny.reading(policy.model, IDS)
    reference = freeze_copy(policy)
    words = reference.hidden_states(IDS[:, :2], IDS[:, :2] > 0, IDS[:, 2:], IDS[:, 2:] > 0)
    head = reference.head.weight.clone()
    for step in range(2):
        learn(policy)
        policy.save(tmp_path / str(step))
        held = tiny.reading(policy.model, IDS)
        assert (held - start).abs().max() > 0.05
        opened = tiny.reading(tiny.open_plainly(tmp_path / str(step)), IDS)
        torch.testing.assert_close(opened, held, atol=1e-5, rtol=0)
    again = begin(tmp_path / "again", WAYS[way])
    again.restore(tmp_path / "1")
    assert torch.equal(tiny.reading(again.model, IDS), held)
    # The reference is what the run began with, its head too.
    if policy.adapter is not None:
        assert torch.equal(reference.head.weight, head)
        after = reference.hidden_states(IDS[:, :2], IDS[:, :2] > 0, IDS[:, 2:], IDS[:, 2:] > 0)
        assert torch.equal(after, words)


@pytest.mark.parametrize("way", ["all weights", "an adapter", "an adapter on an adapter"])
def test_half_precision_opens_as_it_was_held(way: str, tmp_path: Path) -> None:
    policy = begin(tmp_path, WAYS[way], dtype="bfloat16")
    learn(policy, 0.01)
    policy.save(tmp_path / "saved")
    if way == "an adapter on an adapter":
        # Every small number of the adapter is in the float32 sum.
        stored = load_file(tmp_path / "saved" / "model.safetensors")
        layer: Any = policy.model.get_submodule("model.layers.0.self_attn.q_proj")
        expected = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        name = "model.layers.0.self_attn.q_proj.weight"
        torch.testing.assert_close(stored[name].double(), expected, atol=1e-6, rtol=0)
        return
    if way == "all weights":
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(opened(input_ids=IDS).logits, policy.model(input_ids=IDS).logits)


def test_an_adapters_base_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.save_model(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    policy = load_policy("base", adapter=LORA, revision=None)
    policy.save("saved")
    made = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert made["base_model_name_or_path"] == str(tmp_path / "base")


def forget_adapter(policy: Policy, folder: Path) -> None:
    """As it was: the new adapter alone, on the raw base."""
    policy.adapter.save_pretrained(folder)


def other_numbers(policy: Policy, folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj" in name)
    save_file(tensors | {name: tensors[name] + 0.1}, file, metadata={"format": "pt"})


def one_less(policy: Policy, folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "q_proj" in name)]
    save_file(tensors, file, metadata={"format": "pt"})


def another_scale(policy: Policy, folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 40}))


def damaged(policy: Policy, folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("way", "harm", "said"),
    [
        ("an adapter on an adapter", forget_adapter, "differ by"),
        ("all weights", other_numbers, r"other numbers for .*q_proj"),
        ("an adapter", other_numbers, r"other numbers for .*q_proj"),
        ("all weights", one_less, r"got none for .*q_proj"),
        ("an adapter", another_scale, r"opened with plain transformers, to be .* differ by"),
        ("all weights", damaged, "expected a checkpoint that opens in"),
    ],
)
def test_a_checkpoint_that_is_another_model_is_an_error(
    way: str, harm: Callable[[Policy, Path], None], said: str, tmp_path: Path
) -> None:
    policy = begin(tmp_path, WAYS[way])
    learn(policy)
    folder = tmp_path / "saved"
    policy.save(folder)
    checkpoint._OPENED.discard(policy.model)
    if harm is forget_adapter:
        folder = tmp_path / "as it was"
    harm(policy, folder)
    with pytest.raises(ModelError, match=said):
        checkpoint.verify_policy(folder, policy.model, words=policy.words, adapter=policy.adapter)


def test_only_the_first_checkpoint_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = begin(tmp_path, WAYS["an adapter"])
    opened: list[Path] = []
    original = checkpoint._open
    monkeypatch.setattr(
        checkpoint, "_open", lambda *a, **k: opened.append(a[0]) or original(*a, **k)
    )
    for step in range(3):
        learn(policy)
        policy.save(tmp_path / str(step))
    assert opened == [tmp_path / "0"]


def test_another_models_checkpoint_is_not_taken(tmp_path: Path) -> None:
    policy = begin(tmp_path, WAYS["an adapter"])
    other = begin(tmp_path / "other", {"spec": AdapterSpec(rank=2, targets=("v_proj",))})
    other.save(tmp_path / "saved")
    with pytest.raises(RunError, match=r"holds another model: weights missing .*q_proj"):
        policy.restore(tmp_path / "saved")
    (tmp_path / "saved" / "adapter_model.safetensors").write_bytes(b"?")
    with pytest.raises(RunError, match="cannot be read"):
        policy.restore(tmp_path / "saved")


def test_saving_draws_no_random_numbers(tmp_path: Path) -> None:
    policy = begin(tmp_path, WAYS["an adapter on an adapter"])
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    policy.save(tmp_path / "saved")
    assert torch.equal(torch.rand(3), expected)
