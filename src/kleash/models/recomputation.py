"""Gradient checkpointing: keep each layer's input, and compute the layer again for its gradient.

Of a trunk of L layers the forward pass then keeps L inputs instead of everything in between, for
one more forward pass in the update. Gradients are the same. Writing and scoring keep nothing for a
gradient anyway, and are left alone.
"""

import contextlib
from collections.abc import Generator
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from kleash.errors import ModelError


def enable_recomputation(trunk: nn.Module) -> None:
    """Let a trunk's layers be computed again for their gradients.

    Raises:
        ModelError: its class has no layers that can be.
    """
    layers = _layers(trunk)
    if not layers:
        raise ModelError(
            f"expected an architecture with gradient checkpointing, got {type(trunk).__name__} "
            "without: leave policy.gradient_checkpointing out, and lower "
            "algorithm.microbatch_size instead"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        # Layers have no dropout here, so there is no random state to put back.
        cast(Any, layer)._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )


@contextlib.contextmanager
def recomputing(trunk: nn.Module) -> Generator[None]:
    """Within, layers for which it was enabled keep their inputs alone, where gradients are wanted.

    The library checkpoints only layers in training mode, which ours never are; nothing else in
    them asks for the mode, once dropout is off.
    """
    layers = [layer for layer in _layers(trunk) if layer.gradient_checkpointing]
    if not layers or not torch.is_grad_enabled():
        yield
        return
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _layers(trunk: nn.Module) -> list[GradientCheckpointingLayer]:
    return [m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer)]
