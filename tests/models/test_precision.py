"""bf16: one law for policy, reference and sampler, and gradients that float32 weights receive.

The oracle is transformers itself under torch.autocast, and products in float64.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn

from kleash.models.frozen_weights import frozen_copy, shrink_frozen
from kleash.models.lm_head import unrounded_logits
from kleash.models.lora import AdapterSpec
from kleash.models.policy import Policy, freeze_copy, load_policy, load_reference
from kleash.models.precision import computing, for_head, mixed_precision_policy, weights_dtype
from kleash.models.reference_offload import OffloadedReference, anchor_at
from kleash.models.trunk import trunk_of
from kleash.rollout.prompts import PromptBatch
from kleash.rollout.sampling import SamplingSpec, generate
from kleash.rollout.scoring_pass import score

KINDS = ("gpt2", "llama", "gemma2", "cohere")
"""Transposed layers, plain ones, a soft cap and tied weights, a logit scale."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_models.save_model(folder / kind, kind) for kind in KINDS}


def batch(rows: int = 6, width: int = 5) -> PromptBatch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 20, (rows, width), generator=generator)
    lengths = torch.arange(rows) % width + 1
    mask = torch.arange(width) >= width - lengths[:, None]
    return PromptBatch(ids=ids, mask=mask, index=torch.arange(rows))


def read(model: object, prompts: PromptBatch) -> torch.Tensor:
    response = torch.randint(3, 20, (len(prompts.ids), 7), generator=torch.Generator())
    mask = torch.ones_like(response, dtype=torch.bool)
    return model.hidden_states(prompts.ids, prompts.mask, response, mask)


def half(path: Path, *, adapter: AdapterSpec | None = None) -> Policy:
    frozen = adapter is not None and not adapter.modules_to_save
    policy = load_policy(path, dtype=weights_dtype("bf16", frozen=frozen), adapter=adapter)
    return replace(policy, precision="bf16")


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_library_under_autocast(kind: str, models: dict[str, Path]) -> None:
    policy = half(models[kind])
    ids = torch.randint(3, 20, (4, 9))
    mask = torch.ones(4, 9, dtype=torch.bool)
    found = policy.hidden_states(ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = trunk_of(policy.model)(input_ids=ids, use_cache=False)[0][:, 3:]
    assert torch.equal(found, expected)
    exact = replace(policy, precision="float32")
    wide = exact.hidden_states(ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:])
    assert 1e-4 < (found - wide).abs().max() < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_copy_computes_the_same_bits_in_less_memory(
    kind: str, models: dict[str, Path]
) -> None:
    policy, prompts = half(models[kind]), batch()
    copy = freeze_copy(policy)
    loaded = load_reference(models[kind])
    shrink_frozen(loaded.model, "bf16")
    own = replace(loaded, precision="bf16")
    expected = read(policy, prompts)
    for reference in (copy, own, OffloadedReference(own, torch.device("cpu"))):
        assert torch.equal(read(reference, prompts), expected)
    sizes = [sum(p.numel() * p.itemsize for p in m.parameters()) for m in (policy.model, own.model)]
    assert sizes[1] < 0.85 * sizes[0]
    kinds = {name: p.dtype for name, p in copy.model.named_parameters()}
    assert kinds == {name: p.dtype for name, p in own.model.named_parameters()}
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())
    assert not any(p.requires_grad for p in copy.model.parameters())


@pytest.mark.parametrize("adapter", [None, AdapterSpec(rank=2, modules_to_save=("lm_head",))])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_kl_is_zero_at_the_start_and_the_sampler_writes_by_the_scored_law(
    kind: str, adapter: AdapterSpec | None, models: dict[str, Path]
) -> None:
    if kind == "gemma2" and adapter:
        adapter = AdapterSpec(rank=2)
    policy, prompts = half(models[kind], adapter=adapter), batch(24)
    torch.manual_seed(0)
    rollout = generate(policy, prompts, SamplingSpec(max_new_tokens=12))
    scored = score(rollout, policy=policy, reference=freeze_copy(policy), scores=torch.zeros(24))
    assert scored.kl.abs().max() == 0
    assert rollout.sampler_logprobs is not None
    gap = (rollout.sampler_logprobs - scored.rollout_logprobs)[rollout.response_mask]
    assert gap.square().mean().sqrt() < 0.02


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_logits_of_the_sampler_are_not_rounded(
    kind: str, precision: str, models: dict[str, Path]
) -> None:
    policy = load_policy(models[kind], dtype="bfloat16" if "pure" in precision else "float32")
    model, ids = policy.model, torch.randint(3, 20, (3, 8))
    trunk, device = trunk_of(model), torch.device("cpu")
    with torch.no_grad(), computing(device, precision):
        states = trunk(input_ids=ids, use_cache=False)[0].double()
        rounded = model(input_ids=ids, use_cache=False).logits.double()
        with unrounded_logits(model, precision):
            found = model(input_ids=ids, use_cache=False).logits
    head = policy.head
    expected = head.scale * states @ head.weight.double().T
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    assert found.dtype == torch.float32
    scale = expected.abs().max()
    assert (found.double() - expected).abs().max() < 1e-5 * scale
    assert (rounded - expected).abs().max() > 1e-3 * scale
    # The layer is itself again.
    assert "forward" not in vars(model.get_output_embeddings())


def test_gradients_arrive_in_float32_and_a_small_update_is_kept(models: dict[str, Path]) -> None:
    policy = half(models["llama"])
    before = [p.detach().clone() for p in policy.parameters()]
    read(policy, batch()).square().mean().backward()
    reached = [p for p in policy.parameters() if p.grad is not None]
    assert {p.grad.dtype for p in reached} == {torch.float32}
    torch.optim.AdamW(reached, lr=1e-6, weight_decay=0.0).step()
    moved = [(p.detach() - b).abs() for p, b in zip(policy.parameters(), before, strict=True)]
    assert torch.cat([m.flatten() for m in moved]).max() == pytest.approx(1e-6, rel=0.2)


def test_an_adapter_learns_in_float32_on_a_base_in_bfloat16(models: dict[str, Path]) -> None:
    policy = half(models["llama"], adapter=AdapterSpec(rank=2))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    frozen = {p.dtype for p in policy.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_an_anchor_computes_what_the_policy_did(models: dict[str, Path]) -> None:
    policy, prompts = half(models["llama"]), batch()
    expected = read(policy, prompts).detach()
    anchor = anchor_at(policy, 3, like=freeze_copy(policy))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    assert torch.equal(read(anchor, prompts), expected)


def test_float32_changes_nothing(models: dict[str, Path]) -> None:
    policy = load_policy(models["llama"])
    states = torch.randn(2, 3)
    assert for_head(states, "float32") is states
    copy = frozen_copy(policy.model, "float32")
    assert {p.dtype for p in copy.parameters()} == {torch.float32}
    inner = nn.Linear(3, 3)
    with computing(states.device, "pure_bf16"):
        assert inner(states).dtype == torch.float32
    with computing(states.device, "bf16"):
        assert inner(states).dtype == torch.bfloat16


def test_what_fsdp_is_given() -> None:
    half_policy = mixed_precision_policy("bf16")
    assert half_policy.param_dtype == torch.bfloat16
    assert half_policy.reduce_dtype == torch.float32
    assert mixed_precision_policy("float32").param_dtype is None
