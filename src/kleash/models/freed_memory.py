"""Freed main memory goes back to the system before large gradients are made.

glibc keeps freed blocks of up to 32 MiB for later ones, and what is kept between blocks in use
cannot be given back at its end. In a backward pass these are the critic's activations and the kept
logits: holes of other sizes than the gradients, which then grow the heap beside them.

Left out: GPUs, whose memory PyTorch manages itself, and C libraries without `malloc_trim`.
"""

import ctypes

from jaxtyping import Float
from torch import Tensor, nn

WIDE = 512
"""Least width of states: of a narrower model the products take so little time that taking the pages
of its logits anew would show."""


def return_freed_memory_before(
    policy: object, logprobs: Float[Tensor, " N"], states: Float[Tensor, "*rows hidden"]
) -> None:
    """Have freed memory returned in the backward pass, before the head's part and the trunk's.

    All that was computed after a tensor has been differentiated by then. Numbers do not change;
    pages that were returned are taken anew where they are needed. Nothing happens where the logits
    take more memory than the trained weights: then the peak is before the gradients.

    Args:
        policy: its `model` and `words` say how large gradients and logits are; without them nothing
            happens.
        logprobs: what its head said.
        states: what its trunk said.
    """
    model, words = getattr(policy, "model", None), getattr(policy, "words", 0)
    if not isinstance(model, nn.Module) or states.shape[-1] < WIDE:
        return
    trained = [p for p in model.parameters() if p.requires_grad and p.device.type == "cpu"]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    if gradients < logprobs.numel() * words * logprobs.element_size():
        return
    for tensor in (logprobs, states):
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
