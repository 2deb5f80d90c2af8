"""What every process but the leader does, until the leader ends it; and how the leader starts them.

Each job gives a process some rows; it sees nothing else of a run. See `distributed` for the jobs.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import yaml
from torch import Tensor

from kleash.algorithms.common import select
from kleash.config.loading import dump_config, parse_config
from kleash.config.schema import Config
from kleash.errors import ConfigError, ModelError, RefusedError
from kleash.rollout.sampling import write_piece
from kleash.training.assembly import assemble
from kleash.training.components import Components
from kleash.training.distributed import (
    SCORED,
    Workers,
    experience_of,
    flat,
    rollout_of,
    runs,
    set_random_state,
    strides,
    together,
)
from kleash.training.interruption import catch_signals
from kleash.training.process_group import Message, WorkerGroup, is_distributed, join


@contextmanager
def leading() -> Generator[WorkerGroup | None]:
    """The other processes, if a launcher started several; they end with what happens inside.

    Raises:
        ConfigError: they cannot be reached.
    """
    if not is_distributed():
        yield None
        return
    group = join()
    try:
        yield group
    finally:
        group.send(Message("end"))
        group.leave()


def assemble_everywhere(group: WorkerGroup, config: Config) -> Components:
    """Have every process load the models; they must be the same.

    Raises:
        ConfigError: the run has something that cannot be shared out.
        KleashError: a process cannot load them.
        ModelError: a process has another reference.
    """
    unshareable = {
        "reference.kind: cached": config.reference.kind == "cached",
        "leash.reanchor_every": config.leash.reanchor_every is not None,
        "logging.trackers": bool(config.logging.trackers),
    }
    for key in (key for key, there in unshareable.items() if there):
        raise ConfigError(f"`{key}` does not go with several processes: leave it out, or run one")
    group.send(Message("assemble", {"config": dump_config(config)}))
    components, messages = together(group, lambda: assemble(config))
    components = replace(components, workers=Workers(group, components.parameters()))
    own = components.reference.identity().sha256
    for rank, message in enumerate(messages, start=1):
        if message.facts["sha256"] != own:
            raise ModelError(
                f"expected the same reference in every process, got {own[:12]}… in process 0 and "
                f"{message.facts['sha256'][:12]}… in process {rank}: give all of them one directory"
            )
    return components


def serve_requests() -> None:
    """Do the leader's jobs until it says that the run ends.

    A first signal is left to the leader, which finishes the step and then says so.
    """
    with catch_signals(notice=False):
        _serve(join())


def _serve(group: WorkerGroup) -> None:
    worker = None
    while (message := group.receive()).name != "end":
        try:
            if message.name == "assemble":
                tree = yaml.safe_load(message.facts["config"])
                worker = Worker(assemble(parse_config(tree, where="the leader")), group)
                answer = Message("done", {"sha256": worker.components.reference.identity().sha256})
            else:
                assert worker is not None
                group.spread(worker.components.parameters())
                answer = worker.job(message)
        except RefusedError as error:
            where = {"response": error.response, "token": error.token}
            answer = Message(type(error).__name__, {"message": error.args[0], **where})
        except Exception as error:
            answer = Message("failed", {"message": f"{type(error).__name__}: {error}"})
        group.answer(answer)
        if worker is not None and message.name == "backward":
            group.add_gradients(worker.components.parameters())
    group.leave()


@dataclass(frozen=True, eq=False)
class Worker:
    """A process with the run's models, and the jobs it does for the leader."""

    components: Components
    group: WorkerGroup

    def job(self, message: Message) -> Message:
        """Do one job on this process's rows; its answer is empty where it has none."""
        jobs: Mapping[str, Callable[[Message], Message]] = {
            "generate": self._generate,
            "score": self._score,
            "backward": self._backward,
        }
        return jobs[message.name](message)

    def _generate(self, message: Message) -> Message:
        policy = self.components.policy
        ids, mask = (message.tensors[name].to(policy.device) for name in ("ids", "mask"))
        share = runs(len(ids), self.group.size)[self.group.rank]
        if share.start == share.stop:
            return Message("done")
        set_random_state(policy.device, message.tensors["random"])
        piece = write_piece(policy, ids, mask, self.components.sampling, rows=share)
        return Message(
            "done", {"draws": piece.draws}, {"ids": piece.ids, "logprobs": piece.logprobs}
        )

    def _score(self, message: Message) -> Message:
        rollout = rollout_of(self._on_device(message.tensors))
        share = strides(rollout, self.group.size)[self.group.rank]
        if not len(share):
            return Message("done")
        none = torch.zeros(len(share), device=share.device)
        scored = self.components.score(select(rollout, share), none, **message.facts)
        return Message("done", tensors={n: x for n, x in flat(scored).items() if n in SCORED})

    def _backward(self, message: Message) -> Message:
        self.components.optimizer.zero_grad(set_to_none=True)
        minibatch = experience_of(self._on_device(message.tensors))
        share = strides(minibatch.scored.rollout, self.group.size)[self.group.rank]
        if not len(share):
            return Message("done")
        passed = self.components.backward(select(minibatch, share), **message.facts)
        facts = {"metrics": passed.metrics, "ratio_error": passed.ratio_error}
        return Message("done", facts, {"weights": passed.weights})

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = self.components.policy.device
        return {name: tensor.to(device) for name, tensor in tensors.items()}
