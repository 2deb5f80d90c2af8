"""float64 that is float64: states of models whose code goes down to float32 in between.

Architectures normalise, rotate and take softmax in float32 whatever they are given, which is more
than half precision needs and less than a float64 audit was asked for.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kleash.models.policy import LanguageModel


class _StayDouble(TorchDispatchMode):
    """Inside, what would become float32 becomes float64."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and given.get("dtype") == torch.float32:
            given["dtype"] = torch.float64
        return func(*args, **given)


def states_of(
    model: LanguageModel,
    part: tuple[Tensor, Tensor, Tensor, Tensor],
    kept: Bool[Tensor, "batch token"],
) -> Float[Tensor, "N hidden"]:
    """Hidden states that predict the kept response tokens, row by row.

    Args:
        model: the model; in float64 it stays there throughout.
        part: prompt ids and mask, response ids and mask.
        kept: tokens whose states are wanted.
    """
    double = model.head.weight.dtype == torch.float64
    with _StayDouble() if double else contextlib.nullcontext():
        return model.hidden_states(*part)[:, :-1][kept]
