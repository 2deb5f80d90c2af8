"""Directories that are there whole or not at all, and that say when they were damaged.

A checkpoint is written to a temporary name, every file of it flushed to the disk, listed in
`manifest.json` with its size and SHA-256, and only then renamed. What is in it is the caller's
business; nothing here can execute code.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Generator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kleash.errors import RunError
from kleash.mesh import ALONE, Mesh

_MANIFEST = "manifest.json"
_PREFIX = "step-"
_ASIDE = ".replaced"
_OLDER = "move it away, and the run resumes from the one before"


def write_checkpoint(
    parent: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int,
    spare: Collection[int] = (),
    together: Callable[[Path], None] | None = None,
    mesh: Mesh = ALONE,
) -> Path:
    """Write a checkpoint atomically, then drop the oldest beyond `keep`.

    Args:
        parent: the run's `checkpoints/`; made if missing.
        step: number of the step it follows.
        write: called with an empty directory to fill, by the first process.
        keep: how many checkpoints remain.
        spare: steps whose checkpoints remain beside those.
        together: called after it by every process, for what all of them write.
        mesh: the processes.

    Returns:
        The finished directory, `parent/step-NNNNNN`.

    Raises:
        RunError: it cannot be written; nothing of it remains and the older ones are untouched.
    """
    final = parent / f"{_PREFIX}{step:06d}"
    write_directory(final, write, what="the checkpoint", together=together, mesh=mesh)

    def drop() -> None:
        for old in list_checkpoints(parent)[:-keep]:
            if step_of(old) not in spare:
                drop_directory(old)

    mesh.agree(drop if mesh.is_first else _nothing)
    return final


def _nothing() -> None:
    """What the other processes do while the first one writes."""


def write_directory(
    final: Path,
    write: Callable[[Path], None],
    *,
    what: str,
    together: Callable[[Path], None] | None = None,
    mesh: Mesh = ALONE,
) -> None:
    """Write a directory with its manifest, so that it is there whole or, after a failure, not.

    Args:
        final: its name; one that is there is replaced, and there until it is.
        write: called with an empty directory to fill.
        what: what it is, for the error.
        together: called after `write` by every process, for what all of them write.
        mesh: the processes; the first one does the rest, while the others wait.

    Raises:
        RunError: it cannot be written; what was there before is still there.
    """
    parent = final.parent
    temporary = parent / mesh.broadcast(lambda: f".{final.name}.{os.getpid()}.tmp")

    def begin() -> None:
        with _undoing(final, temporary, what):
            parent.mkdir(parents=True, exist_ok=True)
            recover(parent)
            temporary.mkdir()
            write(temporary)

    def commit() -> None:
        with _undoing(final, temporary, what):
            _write_manifest(temporary)
            if final.exists():
                # Two renames: killed between them, `recover` undoes the first.
                final.rename(parent / f".{final.name}{_ASIDE}")
            temporary.rename(final)
            _flush(parent)
            recover(parent)

    mesh.agree(begin if mesh.is_first else _nothing)
    if together is not None:
        with _undoing(final, temporary, what):
            together(temporary)
    mesh.agree(commit if mesh.is_first else _nothing)


@contextlib.contextmanager
def _undoing(final: Path, temporary: Path, what: str) -> Generator[None]:
    """Nothing remains of a directory that could not be written.

    Raises:
        RunError: a part of it could not.
    """
    parent = final.parent
    try:
        yield
    # Rust and C++ say in their own ways that a write failed.
    except (OSError, SafetensorError, RuntimeError) as error:
        _undo(parent, temporary)
        number = error.errno if isinstance(error, OSError) else None
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        reason = "the disk is full" if full else str(error).splitlines()[0]
        raise RunError(f"cannot write {what} {final}: {reason}") from error
    except BaseException:
        _undo(parent, temporary)
        raise


def drop_directory(directory: Path) -> None:
    """Remove a directory: its name at once, then what was in it."""
    temporary = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    directory.rename(temporary)
    shutil.rmtree(temporary)


def recover(parent: Path) -> None:
    """Clear up after a killed process; no other process writes into the same run."""
    for aside in parent.glob(f".*{_ASIDE}"):
        final = parent / aside.name.removeprefix(".").removesuffix(_ASIDE)
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)
    for leftover in parent.glob(".*.tmp"):
        shutil.rmtree(leftover)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint follows.

    Example:
        >>> step_of(Path("runs/first/checkpoints/step-000120"))
        120
    """
    return int(checkpoint.name.removeprefix(_PREFIX))


def list_checkpoints(parent: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in parent.glob(f"{_PREFIX}*") if path.is_dir())


def checkpoint_of(run: Path, *, step: int | None = None) -> Path:
    """A finished checkpoint of a run.

    Args:
        run: the run directory.
        step: the step that it follows; None: the newest.

    Raises:
        RunError: there is none.
    """
    found = list_checkpoints(run / "checkpoints")
    wanted = [one for one in found if step is None or step_of(one) == step]
    if not wanted:
        which = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        steps = ", ".join(str(step_of(one)) for one in found) or "none"
        raise RunError(f"expected {which} in {str(run)!r}, got those of steps {steps}")
    return wanted[-1]


def verify_checkpoint(directory: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        RunError: a file is missing, has another size or other bytes; the message names it.
    """
    try:
        manifest = cast(
            "dict[str, dict[str, Any]]",
            json.loads((directory / _MANIFEST).read_text(encoding="utf-8")),
        )
    except (OSError, ValueError) as error:
        raise RunError(
            f"{directory} is not a whole checkpoint: cannot read its {_MANIFEST} ({error})"
        ) from None
    for name, expected in manifest.items():
        file = directory / name
        if not file.is_file():
            raise RunError(f"the checkpoint {directory} is damaged: {name} is missing; {_OLDER}")
        size = file.stat().st_size
        if size != expected["size"]:
            raise RunError(
                f"the checkpoint {directory} is damaged: {name} should have "
                f"{expected['size']} bytes, got {size}; {_OLDER}"
            )
        if _sha256(file) != expected["sha256"]:
            raise RunError(
                f"the checkpoint {directory} is damaged: the bytes of {name} changed; {_OLDER}"
            )


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as safetensors."""
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, file)


def load_tensors(file: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read named tensors from safetensors."""
    return load_file(file, device=str(device))


def _undo(parent: Path, temporary: Path) -> None:
    """Clear up after a failure, as far as a failing disk lets us."""
    shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(OSError):
        recover(parent)


def _write_manifest(directory: Path) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*files, directory / _MANIFEST]:
        _flush(path)
    _flush(directory)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
