"""A step on N devices: bytes on each, bytes on the network, and seconds from measured pieces.

    learning    6 P FLOPs a token and epoch (8 P with gradient checkpointing), 2 P of them forward
    scoring     2 P a token for each model that reads
    writing     2 P a token, but at least the weights read once for each token of a batch
    network     ddp    2 (N − 1)/N · gradients, each optimiser step
                fsdp   (N − 1)/N · weights for each forward and each backward pass, and
                       (N − 1)/N · gradients in float32 for each backward pass; once to write

for P parameters. Seconds are these numbers over the rates of this machine: a matrix product and a
copy of memory are timed here, the network's rate is given. No overlap of computing and sending is
assumed, and no waiting either: a bound to plan by, not a promise.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import torch
from transformers import PretrainedConfig

from kleash.models.precision import Precision
from kleash.preflight.memory import (
    Memory,
    ModelSize,
    Strategy,
    Workload,
    gathered_bytes,
    model_size,
    predict,
)


@dataclass(frozen=True)
class Step:
    """How many responses a step has, and how often they are read."""

    responses: int
    epochs: int
    minibatches: int


@dataclass(frozen=True)
class Rates:
    """What one device does in a second."""

    flops: float
    """Of a matrix product in the type that is computed in."""
    memory: float
    """Bytes read."""
    network: float
    """Bytes sent to other devices."""
    device: str = "cpu"
    """Which kind it is."""


@dataclass(frozen=True)
class Prediction:
    """One way to share a run among devices."""

    strategy: Strategy
    world_size: int
    memory: Memory
    sent: int
    """Bytes that each device sends in a step."""
    computing: float
    """Seconds of a step."""
    writing: float
    sending: float

    @property
    def seconds(self) -> float:
        """Of a whole step."""
        return self.computing + self.writing + self.sending


def predictions(
    model_config: PretrainedConfig, load: Workload, step: Step, *, world_size: int, rates: Rates
) -> list[Prediction]:
    """Every way to share a run among so many devices; one device has one way.

    Raises:
        ValueError: fewer than one device, or fewer responses than devices.
    """
    if not 1 <= world_size <= step.responses:
        raise ValueError(
            f"expected from 1 to {step.responses} devices, as many as a step has responses, got "
            f"{world_size}"
        )
    ways: tuple[Strategy, ...] = ("none",) if world_size == 1 else ("ddp", "fsdp")
    size, share = model_size(model_config, load), ceil(step.responses / world_size)
    minibatch = ceil(share / step.minibatches)
    own = replace(
        load,
        update_rows=min(load.update_rows, minibatch),
        microbatches=ceil(minibatch / max(1, load.update_rows)),
        rollout_rows=min(load.rollout_rows, share),
    )
    return [
        Prediction(
            strategy=way,
            world_size=world_size,
            memory=predict(model_config, own, strategy=way, world_size=world_size),
            sent=bytes_sent(size, own, step, strategy=way, world_size=world_size),
            computing=_flops(size, own, step, share) / rates.flops,
            writing=_writing(size, own, share, rates),
            sending=bytes_sent(size, own, step, strategy=way, world_size=world_size)
            / rates.network,
        )
        for way in ways
    ]


def bytes_sent(
    size: ModelSize, load: Workload, step: Step, *, strategy: Strategy, world_size: int
) -> int:
    """Bytes that each device sends in a step; see the top of this file."""
    if world_size == 1 or strategy == "none":
        return 0
    others = (world_size - 1) / world_size
    models = 2 if load.critic else 1
    updates = step.epochs * step.minibatches
    if strategy == "ddp":
        return int(models * updates * 2 * others * size.trainable_bytes)
    share = ceil(step.responses / world_size)
    weights = gathered_bytes(size, load)
    readings = ceil(share / max(1, load.rollout_rows)) * (models + 1)
    passes = updates * ceil(share / step.minibatches / max(1, load.update_rows)) * models
    return int(others * (weights * (1 + readings + 2 * passes) + 4 * size.trainable * passes))


def measure_rates(device: torch.device, precision: Precision, *, network: float) -> Rates:
    """Time a matrix product and a copy on a device; the network's bytes a second are given."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    width = 8192 if device.type == "cuda" else 1024
    left = torch.ones(width, width, dtype=dtype, device=device)
    seconds = _best(lambda: left @ left, device)
    whole = torch.ones(1 << (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    copying = _best(whole.clone, device)
    return Rates(2 * width**3 / seconds, 2 * whole.numel() / copying, network, device.type)


def _best(act: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of a few calls."""
    found = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found = min(found, time.perf_counter() - began)
    return found


def _flops(size: ModelSize, load: Workload, step: Step, share: int) -> float:
    tokens = share * load.tokens
    models = 2 if load.critic else 1
    learning = step.epochs * models * (8 if load.gradient_checkpointing else 6)
    # Beside an adapter no gradient of the base's weights is computed: a third of the product less.
    learning -= step.epochs * models * (2 if load.adapter is not None else 0)
    reading = 2 * (models + 1)
    return float(tokens) * size.parameters * (learning + reading)


def _writing(size: ModelSize, load: Workload, share: int, rates: Rates) -> float:
    rows = max(1, load.rollout_rows)
    width = 4 if load.precision == "float32" else 2
    token = max(2 * size.parameters * rows / rates.flops, size.parameters * width / rates.memory)
    return ceil(share / rows) * load.response_tokens * token
