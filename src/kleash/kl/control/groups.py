"""One leash for every response, or one for each group of prompts that has a budget of its own.

    leash = Leash({"code": BudgetBeta(2.0, 0.3), OTHERS: BudgetBeta(6.0, 0.1)})
    states = leash.init()                         a `BetaState` for each group
    betas = betas_of(states, groups)              β of each response
    states = leash.update(states, readings)       a group that was not read stays as it is

Without groups all responses are in `OTHERS`: the same structure with a single entry.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.kl.control.state import BetaController, BetaState, Measurement, raise_beta

OTHERS = "others"
"""Prompts without a budget of their own; without groups, all of them."""

States = Mapping[str, BetaState]
"""What the controller of each group remembers, by the group's name."""


@dataclass(frozen=True)
class Leash:
    """A controller for each group, independent of the others.

    Example:
        >>> from kleash.kl.control.controllers import AdaptiveBeta
        >>> leash = Leash({"code": AdaptiveBeta(2.0, 0.1), OTHERS: AdaptiveBeta(6.0, 0.1)})
        >>> states = leash.update(leash.init(), {"code": Measurement(4.0, 0.1, 64)})
        >>> [round(state.beta, 6) for state in states.values()]
        [0.102, 0.1]
    """

    controllers: Mapping[str, BetaController]

    def init(self) -> dict[str, BetaState]:
        """States before training."""
        return {name: controller.init() for name, controller in self.controllers.items()}

    def update(self, states: States, readings: Mapping[str, Measurement]) -> dict[str, BetaState]:
        """States after one more reading of the groups that were read."""
        return {
            name: self.controllers[name].update(state, readings[name])
            if name in readings
            else state
            for name, state in states.items()
        }


def group_of(label: str | None, named: Collection[str]) -> str:
    """The group whose controller a prompt with this label has.

    Example:
        >>> group_of("code", {"code"}), group_of("chat", {"code"}), group_of(None, {"code"})
        ('code', 'others', 'others')
    """
    return label if label is not None and label in named else OTHERS


def betas_of(states: States, groups: Sequence[str]) -> Float[Tensor, " batch"]:
    """β of each response, in score per nat, from the group it belongs to; in float64."""
    return torch.tensor([states[group].beta for group in groups], dtype=torch.float64)


def rows_by_group(groups: Sequence[str]) -> dict[str, list[int]]:
    """Which responses belong to each group; groups without any are missing.

    Example:
        >>> rows_by_group(["b", "a", "b"])
        {'b': [0, 2], 'a': [1]}
    """
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return rows


def key_of(key: str, group: str, states: Collection[str]) -> str:
    """Where a group's number is written: `key/<group>`, or `key` where there is one leash for all.

    Example:
        >>> key_of("objective/kl_ref", "code", ["code", OTHERS])
        'objective/kl_ref/code'
        >>> key_of("objective/kl_ref", OTHERS, [OTHERS])
        'objective/kl_ref'
    """
    return f"{key}/{group}" if is_grouped(states) else key


def is_grouped(states: Collection[str]) -> bool:
    """Whether there is more than the one leash for all."""
    return set(states) != {OTHERS}


def raise_betas(states: States, factor: float) -> dict[str, BetaState]:
    """Every group's β multiplied; see `raise_beta`.

    Raises:
        ValueError: if `factor` is not positive and finite.
    """
    return {name: raise_beta(state, factor) for name, state in states.items()}
