"""Planted faults are found and named, one architecture each; see `benchmarks/preflight.py`."""

import re
from collections.abc import Callable
from pathlib import Path

import faults
import planting
import pytest

from kleash.assembly import Crew
from kleash.config import Config
from kleash.preflight import resources, runner
from kleash.preflight.finding import Finding
from kleash.preflight.trial import QUICK, draw


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("worlds")
    return {kind: planting.material(folder / kind, kind) for kind in planting.KINDS}


def only(name: str) -> Callable[[Config, Crew], list[Finding]]:
    """The one check of that name, on a batch of the quick part's size."""

    def examine(config: Config, crew: Crew) -> list[Finding]:
        vocabulary = runner.reference.vocabulary(crew)
        if name == vocabulary.name:
            return [vocabulary]
        trial = draw(config, crew, QUICK)
        if name == "resources.memory":
            return resources.examine(trial)
        checks = [*runner.QUICK_CHECKS, runner.reward.probes]
        return [f for f in runner.run_checks(checks, trial) if f.name == name]

    return examine


# The faults in the words of a sampler need more words than the quick part draws to be told apart.
WORDS = ("sampling.law",)
CHOSEN = [
    pytest.param(fault, planting.KINDS[number % 3], id=f"{fault.name}-{planting.KINDS[number % 3]}")
    for number, fault in enumerate(faults.FAULTS)
    if fault.check not in WORDS or "left over" in fault.name
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize(("fault", "kind"), CHOSEN)
def test_a_planted_fault_is_found_and_named(
    materials: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: faults.Fault,
    kind: planting.Kind,
) -> None:
    world = planting.clean(materials[kind], kind, monkeypatch, tmp_path)
    fault.plant(world)
    found = planting.findings(world, only(fault.check))
    (finding,) = [finding for finding in found if finding.name == fault.check]
    assert finding.verdict == fault.verdict, finding
    assert re.search(fault.cause, finding.cause), finding
    assert finding.remedy
