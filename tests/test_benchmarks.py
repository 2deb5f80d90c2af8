"""The scripts of `benchmarks/` follow the code: each can be imported; the iteration one runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_can_be_imported(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"benchmark_{script.stem}", module)
    spec.loader.exec_module(module)
    assert module.__doc__


def test_an_iteration_is_measured_phase_by_phase() -> None:
    """It wraps functions by name, which no type checker follows."""
    command = [sys.executable, str(FOLDER / "iteration.py"), "--algorithm", "grpo"]
    command += ["--shape", "tiny", "--runs", "1", "--systems", "kleash-default", "--verbose"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # The table rounds to hundredths of a second; what --verbose prints does not.
    (printed,) = (line for line in done.stderr.splitlines() if line.startswith("{"))
    seconds = json.loads(printed)["wall_by_phase"]
    assert all(seconds[phase] > 0 for phase in ("generate", "score", "update"))
