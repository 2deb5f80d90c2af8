"""The demo from its first line to its last, in a world that takes seconds."""

from pathlib import Path
from typing import Any

import fault_types
import pytest
from rich.console import Console

from kleash.cli import demo
from kleash.cli.demo_output import print_checks
from kleash.config.loading import parse_config
from kleash.config.schema import Config
from kleash.errors import PreflightError, RunError
from kleash.preflight.findings import Finding, Report
from kleash.report.svg_chart import format_number
from kleash.storage.plan_file import read_frontier
from kleash.storage.run_directory import read_run


def golden(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response.split())) for response in responses]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fault_types.World:
    """The demo's two runs, on a tiny world."""
    material = fault_types.material(tmp_path / "world", "llama")
    world = fault_types.clean(material, "llama", monkeypatch, tmp_path)

    def config(name: str, *, world: Path, seed: int, output: Path) -> Config:
        changes: dict[str, Any] = {
            "steps": 2,
            "seed": seed,
            "output": str(output),
            "plan": {"prompts": 4, "responses": 8},
            "heldout": {"gold": {"callable": f"{__name__}:golden"}},
            "leash": {"beta": 0.2 if name == "leashed" else 0.0},
        }
        return parse_config({**planted.tree, **changes}, where="the test")

    planted = world
    monkeypatch.setattr(demo, "build_world", lambda seed, say: material)
    monkeypatch.setattr(demo, "demo_config", config)
    return world


def test_the_story_in_order(world: fault_types.World, tmp_path: Path) -> None:
    console = Console(record=True, width=200, highlight=False)
    found = demo.run_demo(3, tmp_path / "out", console=console)
    said = console.export_text()
    told = [
        "1  a world", "2  is anything wrong", "3  what could be had", "4  training on the leash",
        "5  training off the leash", "6  on held-out prompts", "report: ",
    ]  # fmt: skip
    places = [said.index(words) for words in told]
    assert places == sorted(places)
    assert "E*[score]" in said and "moved most, per token" in said and "planned for β = " in said
    assert list(found.seconds) == ["build", "check", "plan", "leashed", "free", "audit", "total"]
    assert all(page.is_file() for page in found.pages)
    assert [row.name for row in found.rows] == ["reference", "on the leash", "off the leash"]
    last = read_run(tmp_path / "out" / "leashed").metrics[-1]
    assert found.rows[1].gold == (last["heldout/gold"], last["heldout/gold_se"])
    # What was planned is on the report of the run, and on the audit of its checkpoint.
    planned = read_frontier(tmp_path / "out" / "leashed" / "plan.json")
    assert [row.beta.value for row in planned.rows] == [
        row.beta.value for row in found.frontier.rows
    ]
    assert found.audit.standing is not None and found.audit.standing.step == 2
    assert found.audit.standing.score == last["heldout/scores"]
    assert format_number(found.audit.kl.per_token.mean) in found.pages[2].read_text("utf-8")
    with pytest.raises(RunError, match="already holds a run"):
        demo.run_demo(3, tmp_path / "out", console=console)


def test_a_failed_check_ends_the_story_with_its_table(tmp_path: Path) -> None:
    bad = Finding("logprobs.head", "fail", "3", "0", "The head is not the head.", "Fix it.")
    console = Console(record=True, width=120)
    with pytest.raises(PreflightError, match="The head is not the head"):
        print_checks(console, Report((bad,), 0.1))
    assert "Fix it." in console.export_text()
