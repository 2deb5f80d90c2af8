"""The state of every random number generator, as tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """The generators of the CPU and of every GPU, by the device's name."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda:{number}"] = state
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Set the generators to what `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name.startswith("cuda:") and torch.cuda.is_available():
            torch.cuda.set_rng_state(state, device=name)
