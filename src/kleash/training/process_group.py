"""Several processes on one run: rank 0 leads, the others do shares of its work.

    torchrun --nproc-per-node 4 -m kleash train stories

The leader runs the loop and alone knows it: files, β, tripwires, random numbers, the optimiser.
What is heavy it shares out by rows, and the others keep nothing but a copy of the models, so that
a run that is refused, rolled back or resumed needs no agreement between processes.

What travels between them are tensors and JSON, never pickles. Left out: models that do not fit one
device.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from kleash.errors import ConfigError

_PATIENCE = timedelta(days=7)
"""A hand waits while the leader asks a slow judge or a person reads a message."""


@dataclass(frozen=True)
class Message:
    """What one process tells another."""

    name: str
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Plain JSON."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class WorkerGroup:
    """This process among the others; rank 0 leads."""

    rank: int
    size: int

    def send(self, message: Message) -> None:
        """From the leader to all."""
        packed = _pack(message)
        dist.broadcast(torch.tensor([len(packed)]), src=0)
        dist.broadcast(packed, src=0)

    def receive(self) -> Message:
        """What the leader sent."""
        size = torch.zeros(1, dtype=torch.long)
        dist.broadcast(size, src=0)
        packed = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(packed, src=0)
        return _unpack(packed)

    def answer(self, message: Message) -> None:
        """From a hand to the leader."""
        packed = _pack(message)
        dist.send(torch.tensor([len(packed)]), dst=0)
        dist.send(packed, dst=0)

    def answers(self) -> list[Message]:
        """What each of the others answered, in their order."""
        messages: list[Message] = []
        for rank in range(1, self.size):
            size = torch.zeros(1, dtype=torch.long)
            dist.recv(size, src=rank)
            packed = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(packed, src=rank)
            messages.append(_unpack(packed))
        return messages

    def spread(self, parameters: Iterable[nn.Parameter]) -> None:
        """The leader's weights to all."""
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The sum of all gradients to the leader; whoever has none adds nothing."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.reduce(parameter.grad, dst=0)

    def leave(self) -> None:
        """The end of the work together."""
        dist.destroy_process_group()


def is_distributed() -> bool:
    """Whether a launcher started more than this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_leader() -> bool:
    """Whether this process is the leader, or alone."""
    return not is_distributed() or int(os.environ["RANK"]) == 0


def join() -> WorkerGroup:
    """Meet the other processes that a launcher started.

    Raises:
        ConfigError: they cannot be reached.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            "expected the other processes of a launcher (WORLD_SIZE="
            f"{os.environ.get('WORLD_SIZE')}), got: {str(error).splitlines()[0]}; start them with "
            "torchrun, or unset WORLD_SIZE"
        ) from None
    return WorkerGroup(dist.get_rank(), dist.get_world_size())


def own_gpu() -> int:
    """Which of the machine's GPUs is this process's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _pack(message: Message) -> Tensor:
    """The length of the JSON in eight bytes, the JSON, and the tensors as safetensors."""
    text = json.dumps({"name": message.name, **message.facts}).encode()
    tensors = {name: x.detach().cpu().contiguous() for name, x in message.tensors.items()}
    whole = len(text).to_bytes(8, "little") + text + save(tensors)
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)


def _unpack(packed: Tensor) -> Message:
    whole = packed.numpy().tobytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    facts = json.loads(whole[8:start])
    return Message(facts.pop("name"), facts, load(whole[start:]))
