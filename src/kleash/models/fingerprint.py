"""Which weights a model has: a hash to be written down, and a sum to be compared at every step."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from kleash.models.quantization import scales_of
from kleash.models.sharding import own, total_of, whole

_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


Named = Iterable[tuple[str, Tensor]]


def all_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters, and of those in four bits what makes them numbers."""
    yield from model.named_parameters()
    yield from scales_of(model)


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's weights outside adapters, under the names they would have without one."""
    for name, parameter in all_weights(model):
        if "lora_" not in name and ".modules_to_save." not in name:
            yield name.replace(".base_layer", "").replace(".original_module", ""), parameter


def weights_sha256(weights: Named) -> str:
    """Hash of named weights: names, dtypes, shapes and bytes, whatever their order."""
    digest = hashlib.sha256()
    for name, divided in sorted(weights):
        parameter = whole(divided.detach())
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        raw = parameter.cpu().contiguous().reshape(-1).view(torch.uint8)
        # No copy: the largest matrix may be half a gigabyte.
        digest.update(cast(Any, raw.numpy()))
    return digest.hexdigest()


def weights_sum(weights: Named) -> int:
    """Sum of named weights, their bits read as integers, modulo 2⁶⁴.

    Reads each weight once, where it is, and one number is brought back: a small part of one
    forward pass over a batch. Any one weight that changes changes it, by however little; only
    changes that cancel each other to the last bit do not. The hash sees those too.
    """
    parameters = [parameter for _, parameter in weights]
    if not parameters:
        return 0
    sums = [_sum_of_bits(own(parameter.detach())) for parameter in parameters]
    return int(total_of(torch.stack(sums).sum(), parameters))


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """[] of int64, on the tensor's device."""
    flat = tensor.contiguous().reshape(-1)
    pair = 8 // flat.element_size()
    # Two or four weights at a time need no cast, where they lie so that it can be done.
    if flat.numel() % pair == 0 and flat.storage_offset() % pair == 0:
        return flat.view(torch.int64).sum()
    return flat.view(_WORD[flat.element_size()]).sum(dtype=torch.int64)
