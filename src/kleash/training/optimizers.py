"""AdamW in four kinds: float32 or 8-bit moments, weights rounded to nearest or by chance.

    bytes a weight        float32 weights    bfloat16 weights
    adamw                 4 + 4 + 8          2 + 2 + 4          weight + gradient + moments
    adamw_8bit            4 + 4 + 2          2 + 2 + 2

The 8-bit moments are torchao's: blocks of 256 numbers share a scale, which costs 1/64 of a byte
more each (`moment_bytes`); tensors of fewer than 4096 numbers, or of no multiple of 256, keep
theirs in full.
"""

import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kleash.errors import ConfigError
from kleash.models.sharding import own, own_part

OptimizerName = Literal["adamw", "adamw_8bit"]
Rounding = Literal["nearest", "stochastic"]
_BLOCK, _SMALLEST = 256, 4096
"""torchao's: numbers that share a scale, and numbers of the smallest tensor with 8-bit moments."""


def make_optimizer(
    groups: Iterable[Mapping[str, Any]],
    *,
    name: OptimizerName = "adamw",
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    rounding: Rounding = "nearest",
) -> torch.optim.Optimizer:
    """The optimiser of a run.

    Args:
        groups: parameters, each group with `lr` and `peak_lr`.
        name: which.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        rounding: of bfloat16 weights after an update.

    Raises:
        ConfigError: `adamw_8bit` without torchao.
    """
    made = [dict(group) for group in groups]
    settings: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    if name == "adamw_8bit":
        # torchao wants its rate in a tensor, so that a step need not be compiled again.
        made = [{**group, "lr": torch.tensor(float(group["lr"]))} for group in made]
        by_chance = rounding == "stochastic"
        return _adamw_8bit()(made, bf16_stochastic_round=by_chance, **settings)
    if rounding == "stochastic":
        return StochasticAdamW(made, **settings)
    if any(_mixed(group["params"]) for group in made):
        # Divided weights beside whole ones cannot be updated in one call.
        return torch.optim.AdamW(made, foreach=False, **settings)
    # One pass over the weights, and no temporaries as large as they are.
    return torch.optim.AdamW(made, fused=True, **settings)


def _mixed(parameters: Iterable[Tensor]) -> bool:
    """Whether some are divided among processes and some are not."""
    return len({isinstance(parameter, DTensor) for parameter in parameters}) > 1


def moment_bytes(parameters: Iterable[Tensor], name: OptimizerName) -> int:
    """Bytes of both moments, which exist from the first update on.

        adamw       2 · n · (bytes of a weight)
        adamw_8bit  2 · (n + 4 · n/256 + 1024): codes, scales, and a table of 256 numbers;
                    as adamw for fewer than 4096 numbers, or no multiple of 256

    Args:
        parameters: those that are trained, as far as this process holds them.
        name: of the optimiser.
    """
    return sum(
        2 * (p.numel() + 4 * p.numel() // _BLOCK + 1024)
        if name == "adamw_8bit" and p.numel() >= _SMALLEST and p.numel() % _BLOCK == 0
        else 2 * p.numel() * p.element_size()
        for p in parameters
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group `factor` times its `peak_lr`."""
    for group in optimizer.param_groups:
        rate = group["peak_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights that loses no update on average.

        m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
        w ← R(w (1 − η λ) − η m̂ / (√v̂ + ε))

    in float32, where R rounds to one of the two neighbours in bfloat16, to each with the
    probability that makes the mean right: E[R(x)] = x. The moments are kept so too. Random numbers
    are a function of the count of steps and of the tensor's place alone: a resumed run draws the
    same, and so do processes that hold the same weights.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        """The arguments are those of `torch.optim.AdamW`."""
        defaults = {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)
        return loss

    def _update(self, parameter: Tensor, group: Mapping[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        count = int(state["step"])
        generator = torch.Generator(parameter.device)
        generator.manual_seed((count << 24) + place)
        # Of a divided weight each process updates its slice.
        weight, means, squares = (
            own(t) for t in (parameter, state["exp_avg"], state["exp_avg_sq"])
        )
        (first, second), gradient = group["betas"], own(cast(Tensor, parameter.grad)).float()
        mean = means.float().lerp_(gradient, 1 - first)
        square = squares.float().lerp_(gradient.square(), 1 - second)
        scale = (square / (1 - second**count)).sqrt_().add_(group["eps"])
        new = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
        new.addcdiv_(mean, scale, value=-group["lr"] / (1 - first**count))
        for held, wanted in ((weight, new), (means, mean), (squares, square)):
            rounds = held.dtype == torch.bfloat16
            held.copy_(round_by_chance(wanted, generator, of=parameter) if rounds else wanted)


def round_by_chance(x: Tensor, generator: torch.Generator, *, of: Tensor | None = None) -> Tensor:
    """Round float32 to bfloat16 so that the mean is right.

    The 16 bits that bfloat16 lacks are a number of [0, 1) in units of the last bit that it has: a
    uniform random number of the same 16 bits is added, and what then lies below is cut off.

    Args:
        x: finite float32 numbers.
        generator: on the same device.
        of: the weight that x is this process's slice of: numbers are drawn for all of it, so that
            a slice is rounded as it is in one process. None: x is whole.

    Example:
        >>> x = torch.full((10_000,), 1 + 2**-9)  # a quarter of the way to the next number
        >>> up = round_by_chance(x, torch.Generator().manual_seed(0)) > 1
        >>> 0.23 < float(up.float().mean()) < 0.27
        True
    """
    bits, shape = x.contiguous().view(torch.int32), x.shape if of is None else of.shape
    noise = torch.randint(1 << 16, shape, generator=generator, device=x.device, dtype=torch.int32)
    noise = noise if of is None else own_part(of, noise)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def _adamw_8bit() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchao's, about its kernels for GPUs
            return cast(Any, importlib.import_module("torchao.optim")).AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "expected the package torchao for optimizer.name: adamw_8bit, got none installed: "
            "pip install 'kleash[8bit]'"
        ) from error


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """The optimiser's parameters, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"]]
