"""A run that is small enough for a test: a tiny policy, a few prompts, a reward that counts a word.

What a test module wants otherwise it says as a layer over the tree of keys; what a single test
wants, as changes over that.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tiny_models
import torch

from kleash.config.loading import parse_config
from kleash.config.schema import Config
from kleash.storage.atomic_directories import load_tensors
from kleash.storage.run_directory import read_run

TIMINGS = ("seconds", "tokens_per_second")


def prefer_w3(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward: how often a response says w3."""
    return [float(response.split().count("w3")) for response in responses]


def two_words(numbers: Iterable[int]) -> list[str]:
    """Prompts of two neighbouring words."""
    return [f"w{i} w{i + 1}" for i in numbers]


def save_material(folder: Path, *, prompts: list[str], heldout: list[str]) -> Path:
    """A policy and the prompt files beside it."""
    tiny_models.save_model(folder / "policy")
    for name, texts in (("prompts", prompts), ("heldout", heldout)):
        lines = [json.dumps({"prompt": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def settings(
    material: Path, output: Path, layer: Mapping[str, Any] | None = None, **changes: Any
) -> Config:
    """The small run with a layer and changes over it; a section is merged, not replaced."""
    tree: dict[str, Any] = {
        "policy": {"path": str(material / "policy")},
        "reward_models": {"w3": {"callable": "small_run:prefer_w3"}},
        "prompts": {
            "train": str(material / "prompts.jsonl"),
            "heldout": str(material / "heldout.jsonl"),
        },
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 6},
        "leash": {"beta": 0.1},
        "optimizer": {"lr": 1e-3},
        "logging": {"checkpoint_every": 2},
        "steps": 4,
        "output": str(output),
    }
    for overrides in (layer or {}, changes):
        for key, value in overrides.items():
            merges = key in tree and isinstance(value, dict)
            tree[key] = {**tree[key], **value} if merges else value
            if merges and "microbatch_tokens" in value:
                # A budget of tokens takes the place of a number of rows.
                tree[key].pop("microbatch_size", None)
    return parse_config(tree, where="the test")


def numbers(path: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if k not in TIMINGS and not k.startswith("time/")}
        for line in read_run(path).metrics
    ]


def policy_weights(path: Path) -> dict[str, torch.Tensor]:
    """The policy of the newest checkpoint."""
    (file,) = (_newest(path) / "policy").glob("*.safetensors")
    return load_tensors(file)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Policy and critic of the newest checkpoint."""
    critic = load_tensors(_newest(path) / "value.safetensors")
    return policy_weights(path) | {f"value.{name}": tensor for name, tensor in critic.items()}


def _newest(path: Path) -> Path:
    return sorted((path / "checkpoints").iterdir())[-1]
