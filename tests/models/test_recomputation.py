"""Gradient checkpointing: the same gradient from less memory, and nothing else changed."""

import warnings
from pathlib import Path

import pytest
import small_run
import tiny_models
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kleash.errors import ModelError
from kleash.models.lora import AdapterSpec
from kleash.models.policy import load_policy
from kleash.models.recomputation import enable_recomputation, recomputing
from kleash.models.trunk import trunk_of, trunk_states
from kleash.rollout.prompts import PromptBatch
from kleash.rollout.sampling import SamplingSpec, generate
from kleash.training.loop import train


def gradients(trunk: nn.Module, precision: str) -> tuple[list[torch.Tensor], int, int]:
    """Gradients of the parameters, bytes kept for backward, and forward passes of a layer."""
    layer = next(m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer))
    inner = next(m for m in layer.modules() if "Norm" in type(m).__name__)
    kept, calls = 0, 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.itemsize
        return tensor

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = inner.register_forward_hook(count)
    ids = torch.randint(3, 20, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    parts = (ids[:, :8], mask[:, :8], ids[:, 8:], mask[:, 8:])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = trunk_states(trunk, *parts, precision=precision)
    states.float().square().sum().backward()
    hook.remove()
    found = [p.grad.clone() for p in trunk.parameters() if p.grad is not None]
    trunk.zero_grad(set_to_none=True)
    return found, kept, calls


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("adapter", [None, AdapterSpec(rank=2)])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_the_gradient_is_the_same_and_less_is_kept(
    kind: str, adapter: AdapterSpec | None, precision: str, tmp_path: Path
) -> None:
    policy = load_policy(tiny_models.save_model(tmp_path / kind, kind), adapter=adapter)
    trunk = trunk_of(policy.model)
    expected, all_kept, once = gradients(trunk, precision)
    enable_recomputation(trunk)
    found, kept, twice = gradients(trunk, precision)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (once, twice) == (1, 2)
    assert kept < all_kept / 3
    assert not any(module.training for module in policy.model.modules())


def test_nothing_is_kept_or_computed_twice_without_a_gradient(tmp_path: Path) -> None:
    policy = load_policy(tiny_models.save_model(tmp_path / "llama", "llama"))
    prompts = PromptBatch(
        ids=torch.tensor([[4, 5], [6, 7]]),
        mask=torch.ones(2, 2, dtype=torch.bool),
        index=torch.arange(2),
    )
    torch.manual_seed(0)
    expected = generate(policy, prompts, SamplingSpec(max_new_tokens=8))
    trunk = trunk_of(policy.model)
    enable_recomputation(trunk)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the library's, where a cache is dropped
        found = generate(policy, prompts, SamplingSpec(max_new_tokens=8))
    assert torch.equal(found.response_ids, expected.response_ids)
    with torch.no_grad(), recomputing(trunk):
        assert not any(module.training for module in trunk.modules())
    with recomputing(trunk):
        assert any(module.training for module in trunk.modules())
    assert not any(module.training for module in trunk.modules())


def test_an_architecture_without_such_layers_is_refused() -> None:
    with pytest.raises(ModelError, match=r"expected an architecture with gradient checkpointing"):
        enable_recomputation(nn.Linear(2, 2))


def test_a_run_is_the_same_with_it(tmp_path: Path) -> None:
    texts = small_run.two_words(range(8))
    material = small_run.save_material(tmp_path / "m", prompts=texts, heldout=texts[:2])
    paths = []
    for switch in (False, True):
        changes = {"policy": {"gradient_checkpointing": switch}, "steps": 2}
        paths.append(train(small_run.settings(material, tmp_path / str(switch), **changes)))
    plain, recomputed = (small_run.weights(path) for path in paths)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
