"""Weights that never move: in half the memory where that changes no number."""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kleash.models.precision import Precision
from kleash.models.sharding import Sharding, materialise, own, release, shard, tensors_of
from kleash.models.trunk import start, trunk_of


def frozen_copy(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """A copy that no optimiser moves, smaller where that changes none of its numbers.

    With `bf16` the matrices of the trunk's linear layers are kept as bfloat16: that is what they
    are rounded to before every product anyway, so the copy computes what the model does, bit for
    bit, in half the memory. Embedding, norms and head stay in float32.
    """
    memo: dict[int, Any] = {}
    if precision == "bf16":
        for weight in _linear_weights(trunk_of(model)):
            memo[id(weight)] = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
    return copy.deepcopy(model, memo).requires_grad_(False)


@torch.no_grad()
def divided_copy(
    sharding: Sharding, structure: nn.Module, source: PreTrainedModel
) -> PreTrainedModel:
    """`frozen_copy` of a divided model, divided in the same way.

    Args:
        sharding: among whom.
        structure: the `blueprint` from before the model was divided.
        source: the model.
    """
    release(source)
    copied = cast(PreTrainedModel, copy.deepcopy(structure).requires_grad_(False))
    shrink_frozen(copied, sharding.precision)
    shard(copied, sharding.mesh, precision=sharding.precision)
    materialise(copied, sharding.device)
    theirs = dict(tensors_of(source))
    for name, tensor in tensors_of(copied):
        own(tensor).copy_(own(theirs[name]))
    start(copied, sharding.device)
    return copied


def shrink_frozen(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """What `frozen_copy` does to a copy, to a model itself that was loaded and is frozen."""
    if precision == "bf16":
        for weight in _linear_weights(trunk_of(model)):
            weight.data = weight.data.bfloat16()
    return model.requires_grad_(False)


def _linear_weights(trunk: nn.Module) -> list[nn.Parameter]:
    """Matrices of linear layers, in float32; an adapter's are not among them."""
    return [
        weight
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "lora_" not in name
        for weight in [cast(nn.Parameter, module.weight)]
        if weight.dtype == torch.float32
    ]
