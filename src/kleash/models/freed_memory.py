"""Freed main memory goes back to the system before a trunk's gradients are made.

glibc keeps freed blocks of up to 32 MiB for later ones, and what is kept between blocks in use
cannot be given back at its end. Of a backward pass that is what the head and the critic have freed:
kept logits and activations, in holes of other sizes than the gradients, which then grow the heap.

Left out: GPUs, whose memory PyTorch manages itself, and C libraries without `malloc_trim`.
"""

import contextlib
import ctypes
from collections.abc import Generator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kleash.models.trunk import trunk_of

WORTH = 64 << 20
"""Fewest bytes of trained weights: those of a small model fit into the holes."""


@contextlib.contextmanager
def freed_memory_returned(policy: object) -> Generator[None]:
    """Within, a trunk's states have a gradient on whose arrival freed memory is returned.

    By then the head's backward pass is over, and that of all that was read after the trunk. Numbers
    do not change; pages that were returned are taken anew where they are needed.

    Args:
        policy: its `model` is a transformers model on a CPU; of anything else nothing changes.
    """
    model = getattr(policy, "model", None)
    if not isinstance(model, PreTrainedModel) or not _is_worth(model):
        yield
        return

    def watch(_: nn.Module, given: Any, said: Any) -> None:
        states: Tensor = said[0]
        if states.requires_grad:
            states.register_hook(_return_before)

    handle = trunk_of(model).register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def return_freed_memory() -> bool:
    """Give pages that no block lies in back to the system; see `malloc_trim(3)`.

    Returns:
        Whether the C library could.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


def _return_before(_: Tensor) -> None:
    return_freed_memory()


def _is_worth(model: nn.Module) -> bool:
    trained = [p for p in model.parameters() if p.requires_grad and p.device.type == "cpu"]
    return sum(p.numel() * p.element_size() for p in trained) >= WORTH
