"""Every tensor of a checkpoint."""

from pathlib import Path

import torch
from training_material import material as material  # the fixture

from kleash.storage.atomic_directories import load_tensors
from kleash.training.state import latest_checkpoint


def everything(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    newest = latest_checkpoint(path / "checkpoints")
    assert newest is not None
    found: dict[str, torch.Tensor] = {}
    for file in newest.rglob("*.safetensors"):
        found |= {f"{file.name}/{name}": t for name, t in load_tensors(file).items()}
    return found
