"""A copy of everything a step may change, so that a refused step can be undone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kleash.models.sharding import own
from kleash.training.optimizers import trained_parameters
from kleash.training.random_state import random_states, restore_random_states


@dataclass(frozen=True)
class Undo:
    """What a step needs in order to be undone."""

    random: Mapping[str, Tensor]
    weights: Sequence[Tensor] | None
    """In main memory, in the order of the optimiser's parameters; None: not kept. Of a divided
    weight it is this process's part."""
    moments: Sequence[Mapping[str, Tensor]] = ()


def remember(optimizer: torch.optim.Optimizer, *, weights: bool, reuse: Undo | None = None) -> Undo:
    """The random generators before a step and, if wanted, all that learns.

    Args:
        optimizer: of all that is trained.
        weights: also keep the parameters and the optimiser's moments, in main memory.
        reuse: what was remembered before and is needed no more: its memory is written over.
    """
    if not weights:
        return Undo(random_states(), None)
    parameters = trained_parameters(optimizer)
    old = Undo({}, None) if reuse is None else reuse
    places = old.weights or [None] * len(parameters)
    moments = [
        {name: _kept(tensor, into.get(name)) for name, tensor in optimizer.state.get(p, {}).items()}
        for p, into in zip(parameters, old.moments or [{}] * len(parameters), strict=True)
    ]
    copies = [_kept(p, into) for p, into in zip(parameters, places, strict=True)]
    return Undo(random_states(), copies, moments)


@torch.no_grad()
def put_back(optimizer: torch.optim.Optimizer, undo: Undo) -> None:
    """Everything as it was when it was remembered; gradients are dropped."""
    restore_random_states(undo.random)
    optimizer.zero_grad(set_to_none=True)
    if undo.weights is None:
        return
    for parameter, weights, moments in zip(
        trained_parameters(optimizer), undo.weights, undo.moments, strict=True
    ):
        own(parameter).copy_(weights)
        if not moments:
            optimizer.state.pop(parameter, None)
        for name, tensor in moments.items():
            own(optimizer.state[parameter][name]).copy_(tensor)


def weights_are_finite(parameters: Sequence[Tensor]) -> bool:
    """Whether no weight is NaN or infinite; of divided ones, no part that this process holds."""
    return all(bool(own(parameter).isfinite().all()) for parameter in parameters)


def _kept(tensor: Tensor, into: Tensor | None) -> Tensor:
    held = own(tensor.detach())
    return held.to("cpu", copy=True) if into is None else into.copy_(held)
