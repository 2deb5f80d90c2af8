"""A language model divided among processes by FSDP2: each holds a slice of every weight.

    decoder layers       gathered when they are read, given up again at once
    all other weights    (embedding, last norm, head) gathered for a pass, given up by `release`

With `bf16` the matrices of the layers are gathered in bfloat16; their vectors (norms, biases),
which autocast does not round or which are small, lie whole in every process. The others are
gathered in their own type, for the head's product is in it: what one process computes.

Embedding and head are one group, for they are often one matrix; the streaming pass needs the whole
head, and has it from the pass's own gathering. Gradients are sums over the processes, because the
losses divide by the tokens of the whole minibatch.

A model starts on the meta device: it is divided while it holds nothing, and each process reads its
slices from the safetensors files. Where names in the files are not the model's own (weights that
an architecture joins, an adapter that is merged), each process reads the whole model into main
memory first and keeps its slice.
"""

import contextlib
import copy
import ctypes
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kleash.models.precision import Precision, mixed_precision_policy

READ = "kleash_read"
"""The method by which a divided model reads: its hooks gather what it needs."""
_MMAP_THRESHOLD, _RETURNED_FROM = -3, 1 << 21
"""glibc's name for the setting, and bytes: most matrices are larger, most activations smaller."""
_ROUNDED = "kleash_rounded"
"""Marks a layer whose products are in bfloat16."""


def device_mesh(device: torch.device, size: int) -> DeviceMesh:
    """All processes in one dimension."""
    if device.type == "cpu":
        _return_freed_blocks()
    return init_device_mesh(device.type, (size,))


def _return_freed_blocks() -> None:
    """Have what was gathered go back to the system when it is freed.

    glibc raises the size from which it does so up to 32 MiB, by what was freed before; smaller
    blocks leave holes in the heap, and a process with half of a model took as much as one with all
    of it. Other C libraries have no such setting. A size that the environment gives stays.
    """
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is not None and not _heap_is_set():
        setting(_MMAP_THRESHOLD, _RETURNED_FROM)


def _heap_is_set() -> bool:
    """Whether the environment says from which size on freed blocks are returned."""
    tunable = "glibc.malloc.mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    return tunable or bool(os.environ.get("MALLOC_MMAP_THRESHOLD_"))


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is divided."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, mesh: DeviceMesh, *, precision: Precision = "float32") -> None:
    """Divide a model in place, its weights too where it holds any.

    Args:
        model: the model; every repeated layer in it is gathered by itself.
        mesh: the processes.
        precision: in which it computes; with `bf16` its layers do so whoever calls them, for a
            matrix that was gathered in bfloat16 can be multiplied by nothing else.
    """
    policy = mixed_precision_policy(precision)
    for layer in repeated_layers(model):
        kept = {p for p in layer.parameters() if p.dim() < 2} if precision == "bf16" else None
        fully_shard(
            layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=kept
        )
        if precision == "bf16":
            autocast = torch.autocast(mesh.device_type, dtype=torch.bfloat16)
            layer.forward = autocast(layer.forward)
            setattr(layer, _ROUNDED, True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A sum in itself, and not a product with 1 before one, which gloo does not know.
            module.set_force_sum_reduction_for_comms(True)
    setattr(model, READ, MethodType(_read, model))
    register_fsdp_forward_method(model, READ)


def layers_are_rounded(model: nn.Module) -> bool:
    """Whether the layers of a divided model compute in bfloat16 whatever type their slices have."""
    return any(hasattr(module, _ROUNDED) for module in model.modules())


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the members of the outermost lists of alike modules that have weights."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child):
                found.extend(layer for layer in child if any(True for _ in layer.parameters()))
            else:
                look(child)

    look(model)
    return found


def states_of(model: nn.Module, trunk: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states of a trunk; of a divided model through the method that gathers its weights."""
    if isinstance(model, FSDPModule):
        return getattr(model, READ)(trunk, dict(inputs))
    return trunk(**inputs)[0]


def _read(model: nn.Module, trunk: nn.Module, inputs: dict[str, Any]) -> Tensor:
    del model
    return trunk(**inputs)[0]


def gather_ends(model: nn.Module) -> None:
    """Make the weights outside the layers whole, if they are not; every process has to call it."""
    if isinstance(model, FSDPModule):
        model.unshard()


def release(model: nn.Module) -> None:
    """Give up what was gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Generator[None]:
    """Every process holds the whole model for a while, and reads without the others.

    Writing a response reads the model once for each token; gathered once for all of them, and with
    no need to wait for the others' responses, it was the faster way (docs/distributed.md).
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    divided = [module for module in model.modules() if isinstance(module, FSDPModule)]
    layers = divided[1:]
    for module in divided:
        module.unshard()
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
        for module in divided:
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A weight without division; every process has to call it for the same one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """The part of a weight that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_of(number: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The sum of a number over the processes, if the tensors it is of are divided among several."""
    mesh = next((t.device_mesh for t in tensors if isinstance(t, DTensor)), None)
    if mesh is not None:
        dist.all_reduce(number, group=mesh.get_group())
    return number


def own_part(target: Tensor, source: Any) -> Tensor:
    """The part of a whole tensor, or of one in a safetensors file, that a weight holds here.

    Args:
        target: the weight, divided or whole.
        source: anything that slices give tensors of.
    """
    if not isinstance(target, DTensor):
        return source[...]
    shape, offset = compute_local_shape_and_global_offset(
        target.shape, target.device_mesh, target.placements
    )
    return source[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def blueprint(model: nn.Module) -> nn.Module:
    """A model of the same structure without weights, which can be copied and divided.

    Buffers that no file holds (rotary frequencies) stay what they are.
    """
    memo: dict[int, Any] = {}
    for tensor in model.parameters():
        memo[id(tensor)] = nn.Parameter(
            torch.empty_like(tensor, device="meta"), tensor.requires_grad
        )
    return copy.deepcopy(model, memo)


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give a divided model memory for the slices that lie on the meta device.

    Buffers, and weights that are real already, keep their numbers.
    """
    known = {name: own(t).detach().clone() for name, t in tensors_of(model) if not t.is_meta}
    model.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in tensors_of(model):
            if name in known:
                own(tensor).copy_(known[name])


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@dataclass(frozen=True, eq=False)
class Sharding:
    """How models are divided, and the structure of the policy for copies of it."""

    mesh: DeviceMesh
    device: torch.device
    precision: Precision = "float32"
    """In which they compute."""
