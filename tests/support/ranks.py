"""Processes that make runs together, started once and used for many runs."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from kleash.config.loading import dump_config
from kleash.config.schema import Config


@dataclass
class Ranks:
    """A few processes, and runs they make together."""

    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(
        self, config: Config, *, size: int = 2, fault: dict[str, Any] | None = None
    ) -> list[dict[str, Any] | None]:
        """Make a run with so many processes.

        Returns:
            How it ended in each: the error's name and message; None where the process was killed.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        file = Path(config.output).with_suffix(".yaml")
        file.write_text(dump_config(config), encoding="utf-8")
        while len(self.processes) < size:
            self.processes.append(_start())
        given = {"port": port, "size": size, "config": str(file), "fault": fault}
        for rank in range(size):
            stream = cast(Any, self.processes[rank].stdin)
            stream.write(json.dumps({**given, "rank": rank}) + "\n")
            stream.flush()
        answers: list[dict[str, Any] | None] = []
        for rank in range(size):
            line = cast(Any, self.processes[rank].stdout).readline()
            answers.append(json.loads(line) if line else None)
        for rank in [rank for rank, answer in enumerate(answers) if answer is None]:
            _end(self.processes[rank])
            self.processes[rank] = _start()
        return answers

    def train(self, config: Config, *, size: int = 2) -> Path:
        """Make a run that ends well; its directory."""
        for answer in self.run(config, size=size):
            assert answer is not None
            assert answer["error"] is None, answer["message"]
        return Path(config.output)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            assert _end(process) == 0


def _end(process: subprocess.Popen[str]) -> int:
    with contextlib.suppress(BrokenPipeError):
        cast(Any, process.stdin).close()
    ended = process.wait(60)
    cast(Any, process.stdout).close()
    return ended


def _start() -> subprocess.Popen[str]:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(here / "rank_process.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert cast(Any, process.stdout).readline() == "ready\n"
    return process
