"""Directories that are there whole or not at all, and that say when they were damaged.

A checkpoint is written to a temporary name, every file of it flushed to the disk, listed in
`manifest.json` with its size and SHA-256, and only then renamed. What is in it is the caller's
business; nothing here can execute code.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kleash.errors import RunError

_MANIFEST = "manifest.json"
_PREFIX = "step-"


def write_checkpoint(parent: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Write a checkpoint atomically, then drop the oldest beyond `keep`.

    Args:
        parent: the run's `checkpoints/`; made if missing.
        step: number of the step it follows.
        write: called with an empty directory to fill.
        keep: how many checkpoints remain.

    Returns:
        The finished directory, `parent/step-NNNNNN`.

    Raises:
        RunError: it cannot be written; nothing of it remains and the older ones are untouched.
    """
    final = parent / f"{_PREFIX}{step:06d}"
    temporary = parent / f".{final.name}.{os.getpid()}.tmp"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent)
        temporary.mkdir()
        write(temporary)
        _write_manifest(temporary)
        if final.exists():  # a resumed run comes by the same step again
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = error.errno == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        raise RunError(f"cannot write the checkpoint {final}: {reason}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(parent)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(parent: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in parent.glob(f"{_PREFIX}*") if path.is_dir())


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
            raise RunError(f"the checkpoint {directory} is damaged: {name} is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise RunError(
                f"the checkpoint {directory} is damaged: {name} should have "
                f"{expected['size']} bytes, got {size}; resume from an older checkpoint"
            )
        if _sha256(file) != expected["sha256"]:
            raise RunError(
                f"the checkpoint {directory} is damaged: the bytes of {name} changed; resume from "
                "an older checkpoint"
            )


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as safetensors."""
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, file)


def load_tensors(file: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read named tensors from safetensors."""
    return load_file(file, device=str(device))


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


def _remove_leftovers(parent: Path) -> None:
    """What a killed process left half-written; no other process writes into the same run."""
    for leftover in parent.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(leftover)
