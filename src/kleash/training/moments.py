"""The optimiser's moments in a checkpoint, which any number of processes can read.

They are written by `torch.distributed.checkpoint`, each process its part, as safetensors files that
say which part of which tensor they hold. Its own format begins with a pickle, which may execute
code when it is read, so it is not used.
"""

import json
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from kleash.errors import RunError
from kleash.mesh import Mesh
from kleash.training.optimizers import trained_parameters

_INDEX = "parameters.json"


def begin_moments(directory: Path, optimizer: torch.optim.Optimizer) -> None:
    """Make the directory for `save_moments`, in the first process; it says what it is to hold."""
    directory.mkdir()
    # A parameter that was never updated has no state, and needs none.
    (directory / _INDEX).write_text(json.dumps(sorted(_state_of(optimizer))), encoding="utf-8")


def _state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of each parameter, by its number and name."""
    return {
        f"{number:05d}.{name}": tensor
        for number, parameter in enumerate(trained_parameters(optimizer))
        for name, tensor in optimizer.state.get(parameter, {}).items()
    }


def save_moments(directory: Path, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
    """Write the state of each parameter; all processes together.

    Args:
        directory: where to, as `begin_moments` left it.
        optimizer: of all that is trained.
        mesh: the processes.

    Raises:
        RunError: it cannot be written, in every process.
    """
    state = _state_of(optimizer)
    if state:
        with _reported(directory):
            dcp.save(
                state,
                storage_writer=dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True),
                no_dist=mesh.size == 1,
            )


def load_moments(directory: Path, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
    """Give each parameter the state that it had; all processes together, as many as there are now.

    Raises:
        RunError: the files are of other parameters, or cannot be read.
    """
    parameters = trained_parameters(optimizer)
    try:
        names = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"expected the optimizer's state in {directory}, got: {error}; the checkpoint is of "
            "another version of kleash"
        ) from None
    optimizer.state.clear()
    state: dict[str, Tensor] = {}
    for key in names:
        number, name = key.split(".", 1)
        if not int(number) < len(parameters):
            raise RunError(f"{directory} is of other parameters: it has one of number {number}")
        parameter = parameters[int(number)]
        empty = (
            torch.zeros((), dtype=torch.float32, device=parameter.device)
            if name == "step"
            else torch.zeros_like(parameter, memory_format=torch.preserve_format)
        )
        optimizer.state[parameter][name] = state[key] = empty.detach()
    if state:
        with _reported(directory):
            dcp.load(
                state,
                storage_reader=dcp.HuggingFaceStorageReader(str(directory)),
                no_dist=mesh.size == 1,
            )


@contextmanager
def _reported(directory: Path) -> Generator[None]:
    """One sentence for what goes wrong; the library's own remarks are left out."""
    log = logging.getLogger("torch.distributed.checkpoint")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except dcp.api.CheckpointException as error:
        rank, failure = next(iter(_failures(error).items()))
        raise RunError(f"cannot write or read {directory}, in process {rank}: {failure}") from error
    finally:
        log.setLevel(level)


def _failures(error: Any) -> dict[int, str]:
    return {rank: str(what[0]).splitlines()[0] for rank, what in error.failures.items()}
