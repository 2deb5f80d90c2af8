"""Stochastic rounding of a divided weight beside the whole one, for a test to compare."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from kleash.mesh import Mesh
from kleash.models.sharding import device_mesh, own, own_part, whole
from kleash.training.optimizers import make_optimizer


def update(mesh: Mesh) -> dict[str, Any]:
    """Two steps of both; whether they end at the same bits, and whether chance had a part in it."""
    torch.manual_seed(0)
    one = nn.Linear(6, 5, dtype=torch.bfloat16)
    many = nn.Linear(6, 5, dtype=torch.bfloat16)
    many.load_state_dict(one.state_dict())
    fully_shard(many, mesh=device_mesh(torch.device("cpu"), mesh.size))
    before = [p.detach().clone() for p in one.parameters()]
    for layer in (one, many):
        torch.manual_seed(1)
        groups = [{"params": list(layer.parameters()), "lr": 1e-3, "peak_lr": 1e-3}]
        optimizer = make_optimizer(groups, rounding="stochastic")
        for _ in range(2):
            for parameter in layer.parameters():
                gradient = torch.randn(parameter.shape, dtype=torch.bfloat16)
                parameter.grad = torch.zeros_like(parameter)
                own(parameter.grad).copy_(own_part(parameter, gradient))
            optimizer.step()
    pairs = list(zip(one.parameters(), many.parameters(), strict=True))
    return {
        "equal": [bool(torch.equal(p, whole(q.detach()))) for p, q in pairs],
        "moved": [bool((p != b).any()) for p, b in zip(one.parameters(), before, strict=True)],
        "held": [own(q).numel() for _, q in pairs],
    }
