"""A model divided with `bf16` beside the whole one under autocast, for a test to compare."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small_run import settings
from torch.distributed.fsdp import FSDPModule

from kleash.errors import ModelError
from kleash.mesh import Mesh
from kleash.models.fingerprint import weights_sha256
from kleash.models.frozen_weights import shrink_frozen
from kleash.models.policy import Policy, freeze_copy, load_policy, load_reference
from kleash.models.sharding import Sharding, device_mesh, repeated_layers, whole
from kleash.training.assembly import assemble


def _batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 20, (4, 12), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :2] = False
    return ids[:, :5], mask[:, :5], ids[:, 5:], mask[:, 5:]


FOLDER = "SHARDED_BF16_MODELS"
"""The variable that says where the models are: only the first process of several saves one."""


def llama(mesh: Mesh) -> dict[str, Any]:
    """`compare` for layers of plain matrices."""
    return _compared("llama", mesh)


def gpt2(mesh: Mesh) -> dict[str, Any]:
    """`compare` for transposed matrices, biases, and a head that is the embedding."""
    return _compared("gpt2", mesh)


def _compared(kind: str, mesh: Mesh) -> dict[str, Any]:
    return compare(Path(os.environ[FOLDER]) / kind, mesh)


def of_a_run(mesh: Mesh) -> dict[str, Any]:
    """What a configured run gathers, and what it says of a damaged checkpoint and a right one."""
    folder = Path(os.environ[FOLDER])
    changes = {"policy": {"precision": "bf16"}, "distributed": {"strategy": "fsdp"}}
    policy = assemble(settings(folder, folder / "run", **changes), mesh=mesh).policy
    refused = []
    for name, factor in (("damaged", 1.05), ("right", 1.0)):
        tensors = policy.gather_weights(keep=mesh.is_first)
        if tensors:
            next(t for name, t in tensors.items() if name.endswith("down_proj.weight")).mul_(factor)
            policy.save(folder / name, tensors=tensors)
        try:
            policy.verify(folder / name, mesh)
            refused.append(None)
        except ModelError as error:
            refused.append(str(error))
    return {"gathered": _gathered(policy)[0], "refused": refused}


def _gathered(policy: Policy) -> tuple[list[str], list[str]]:
    """Types of the matrices and of the vectors of a layer that is gathered."""
    layer = repeated_layers(policy.model)[0]
    assert isinstance(layer, FSDPModule)
    layer.unshard()
    matrices = sorted({str(p.dtype) for p in layer.parameters() if p.dim() == 2})
    vectors = sorted({str(p.dtype) for p in layer.parameters() if p.dim() < 2})
    layer.reshard()
    return matrices, vectors


def compare(path: Path, mesh: Mesh) -> dict[str, Any]:
    """Types that are gathered and summed, and distances from the whole model under autocast."""
    device = torch.device("cpu")
    sharding = Sharding(device_mesh(device, mesh.size), device, "bf16")
    whole_one = replace(load_policy(path), precision="bf16")
    policy = replace(load_policy(path, sharding=sharding), precision="bf16")
    reference = freeze_copy(policy)
    loaded = load_reference(path, sharding=sharding)
    alone = load_reference(path)
    shrink_frozen(alone.model, "bf16")
    gathered, vectors = _gathered(policy)
    states = policy.hidden_states(*_batch())
    expected = whole_one.hidden_states(*_batch())
    with torch.no_grad():
        held = reference.hidden_states(*_batch())
        held_loaded = replace(loaded, precision="bf16").hidden_states(*_batch())
    # Each process has all rows, so the sum of the gradients is as many times one's.
    (states.square().mean() / mesh.size).backward()
    expected.square().mean().backward()
    ours = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    theirs = {n: p.grad for n, p in whole_one.model.named_parameters() if p.grad is not None}
    apart = 0.0
    for name, gradient in theirs.items():
        mine = whole(ours[name])
        if mine is ours[name]:
            mine = mine.clone()
            mesh.add([mine])
        apart = max(apart, float((mine - gradient).abs().max() / gradient.abs().max()))
    return {
        "gathered": gathered,
        "vectors": vectors,
        "gradients": sorted({str(g.dtype) for g in ours.values()}),
        "states": bool(torch.equal(states, expected)),
        "references": [bool(torch.equal(h, states)) for h in (held, held_loaded)],
        "hashes": [
            weights_sha256(one.model.named_parameters())
            == weights_sha256(alone.model.named_parameters())
            for one in (reference, loaded)
        ],
        "gradients apart": apart,
        "weights": sorted({str(p.dtype) for p in policy.model.parameters()}),
    }
