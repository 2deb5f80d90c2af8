"""Runs by several processes, which a helper forks anew for each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

from kleash.config.loading import dump_config
from kleash.config.schema import Config

Ended = list[dict[str, Any] | None]
"""How a run ended in each process: the error's name and message; None where it was killed."""


class Ranks:
    """Makes runs by several processes."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        paths = os.pathsep.join([str(here), *sys.path])
        self._helper = subprocess.Popen(
            [sys.executable, str(here / "rank_process.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )

    def job(self, *, size: int, **given: Any) -> Ended:
        """Have so many processes do something; see `rank_process`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        stdin, stdout = cast(Any, self._helper.stdin), cast(Any, self._helper.stdout)
        stdin.write(json.dumps({"port": port, "size": size, **given}) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    def run(self, config: Config, *, size: int = 2, **given: Any) -> Ended:
        """Make a run, in one process with a `fault`."""
        file = Path(config.output).with_suffix(".yaml")
        file.write_text(dump_config(config), encoding="utf-8")
        return self.job(size=size, config=str(file), **given)

    def train(self, config: Config, *, size: int = 2, checked: bool = False) -> Path:
        """Make a run that ends well; its directory.

        Args:
            config: the run.
            size: processes.
            checked: make the quick check first, and examine each batch, as `kleash train` does.
        """
        for answer in self.run(config, size=size, checked=checked):
            assert answer is not None
            assert answer["error"] is None, answer["message"]
        return Path(config.output)

    def call(self, function: str, *, size: int) -> list[Any]:
        """What a function of a test module gives in each process."""
        answers = self.job(size=size, call=function)
        for answer in answers:
            assert answer is not None
            assert answer["error"] is None, answer["message"]
        return [answer["result"] for answer in answers if answer is not None]

    def close(self) -> None:
        """End the helper."""
        cast(Any, self._helper.stdin).close()
        assert self._helper.wait(60) == 0
        cast(Any, self._helper.stdout).close()
