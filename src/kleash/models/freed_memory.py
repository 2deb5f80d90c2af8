"""Freed main memory goes back to the system before large gradients are made.

glibc keeps freed blocks of up to 32 MiB for later ones, and what is kept between blocks in use
cannot be given back at its end. In a backward pass these are the critic's activations and the kept
logits: holes of other sizes than the gradients, which then grow the heap beside them.

Left out: GPUs, whose memory PyTorch manages itself, and C libraries without `malloc_trim`.
"""

import ctypes

from torch import Tensor, nn

WORTH = 64 << 20
"""Fewest bytes of trained weights: the gradients of a small model fit into the holes."""


def return_freed_memory_before(policy: object, *tensors: Tensor) -> None:
    """Have freed memory returned in the backward pass, just before each tensor's own part of it.

    All that was computed after a tensor has been differentiated by then. Numbers do not change;
    pages that were returned are taken anew where they are needed.

    Args:
        policy: its `model` says how large the gradients are; without one nothing happens.
        tensors: results of it; those without gradient are passed over.
    """
    model = getattr(policy, "model", None)
    if not isinstance(model, nn.Module) or not _is_worth(model):
        return
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(_return_before)


def return_freed_memory() -> bool:
    """Give pages that no block lies in back to the system; see `malloc_trim(3)`.

    Returns:
        Whether the C library can.
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
