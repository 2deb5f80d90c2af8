"""The Python of the README, run as it stands there."""

import re
from pathlib import Path

import pytest
import tiny_models
from command_line import CommandLine
from small_run import two_words

from kleash.report.html import read_run

ROOT = Path(__file__).parents[1]


def scripts() -> list[str]:
    """Blocks fenced as `py`: they need a model, a configuration and prompts."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_script_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The lines inside TRL are run by tests/integrations/test_readme.py.
    (script,) = (script for script in scripts() if "kleash.integrations" not in script)
    assert len(script.splitlines()) == 12
    command = CommandLine(tmp_path, monkeypatch, capsys)
    tiny_models.save_model(tmp_path / "models" / "sft")
    lines = [f'{{"prompt": "{text}"}}' for text in two_words(range(6))]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    made = command.run("init", "models/sft", "--output", "run.yaml")
    assert made.code == 0, made
    exec(compile(script, "README.md", "exec"), {"__name__": "script"})
    said = capsys.readouterr().out
    run = read_run(Path("runs/script"))
    assert run.status == "finished"
    assert f"{run.metrics[-1]['objective/kl_ref']} nats per response" in said
    assert str(Path("runs/script/report.html")) in said
    assert "mean=" in said
