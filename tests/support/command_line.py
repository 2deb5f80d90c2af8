"""The command line within this process: arguments in, exit code and output out."""

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from kleash.cli.main import main

RUN: Mapping[str, Any] = {
    "policy": {"path": "models/sft"},
    "reward_models": {"words": {"path": "models/reward"}},
    "prompts": {"train": "prompts.jsonl"},
    "rollout": {"prompts_per_step": 8},
    "leash": {"target_kl": 2.0},
    "output": "runs/one",
}
"""A configuration with nothing wrong in it, beside a file of prompts."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


class CommandLine:
    """Runs commands in a folder of their own; training, where one gets that far, is left out."""

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self._patch, self._capsys = folder, patch, capsys
        patch.chdir(folder)
        (folder / "prompts.jsonl").write_text('{"prompt": "w1"}\n')

    def write_config(self, changes: Mapping[str, object], name: str = "run.yaml") -> Path:
        """The sound configuration with other values of dotted keys; None takes a key away."""
        tree = copy.deepcopy(dict(RUN))
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            section: dict[str, Any] = tree
            for parent in parents:
                section = section.setdefault(parent, {})
            if value is None:
                del section[last]
            else:
                section[last] = value
        file = self.folder / name
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        return file

    def run(self, *arguments: str) -> Outcome:
        """The command's exit code and output."""
        self._patch.setattr(sys, "argv", ["kleash", *arguments])
        self._capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        said = self._capsys.readouterr()
        return Outcome(code, said.out, said.err)

    def written(self) -> list[str]:
        """Every file and folder that is there."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))
