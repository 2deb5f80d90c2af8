"""A small configuration as a tree and as a file."""

from pathlib import Path
from typing import Any

import yaml


def minimal(**changes: Any) -> dict[str, Any]:
    """The keys that a configuration must have, with changes over them."""
    tree: dict[str, Any] = {
        "policy": {"path": "p"},
        "reward_models": {"r": {"callable": "m:f"}},
        "prompts": {"train": "x.jsonl"},
        "leash": {"beta": 0.1},
        "output": "runs/x",
    }
    return tree | changes


def write(folder: Path, tree: dict[str, Any], name: str = "c.yaml") -> Path:
    """A configuration file with the prompts it names beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x.jsonl").touch()
    (folder / name).write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / name
