"""Planted faults are found and named, and go away by the words of the remedy.

One architecture each, by turns; `benchmarks/preflight.py` plants every fault on all of them.
"""

import re
from collections.abc import Callable
from pathlib import Path

import faults
import planting
import pytest
import torch

from kleash.assembly import Crew
from kleash.config import Config
from kleash.preflight import resources, runner
from kleash.preflight.finding import Finding
from kleash.preflight.trial import Size, draw

FEW = Size(prompts=8, responses_per_prompt=2, texts=2)
# The faults in the words of a sampler need more words to be told apart.
MANY = Size(prompts=26, responses_per_prompt=3, texts=1)


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("worlds")
    return {kind: planting.material(folder / kind, kind) for kind in planting.KINDS}


def only(name: str) -> Callable[[Config, Crew], list[Finding]]:
    """The one check of that name; for `assembly`, to come so far is to pass."""

    def examine(config: Config, crew: Crew) -> list[Finding]:
        if name == "assembly":
            return [Finding(name, "ok", "assembled", "no error")]
        if name == "reference.vocabulary":
            return [runner.reference.vocabulary(crew)]
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            trial = draw(config, crew, MANY if name == "sampling.law" else FEW)
            if name == "resources.memory":
                return resources.examine(trial)[:1]
            checks = [*runner.QUICK_CHECKS, runner.reward.probes]
            return runner.run_checks([c for c in checks if runner.name_of(c) == name], trial)

    return examine


TURNS: tuple[planting.Kind, ...] = ("gpt2", "llama", "gpt2", "llama", "gemma2")
"""The slow one less often."""


def kind_of(number: int) -> planting.Kind:
    law = faults.FAULTS[number].check == "sampling.law"
    return "gpt2" if law else TURNS[number % len(TURNS)]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        pytest.param(fault, kind_of(number), id=f"{fault.name}-{kind_of(number)}")
        for number, fault in enumerate(faults.FAULTS)
    ],
)
def test_a_planted_fault_is_named_and_its_remedy_mends_it(
    materials: dict[str, Path], tmp_path: Path, fault: faults.Fault, kind: planting.Kind
) -> None:
    def look(*changes: Callable[[planting.World], None]) -> Finding:
        with pytest.MonkeyPatch.context() as patch:
            world = planting.clean(materials[kind], kind, patch, tmp_path)
            for change in changes:
                change(world)
            (finding,) = planting.findings(world, only(fault.check))
        return finding

    seen = look(fault.plant)
    assert (seen.name, seen.verdict) == (fault.check, fault.verdict), seen
    assert re.search(fault.cause, seen.cause), seen

    remedy = planting.advice(seen)
    for words in fault.mend.words:
        assert words in remedy, f"{words!r} is not said: {remedy}"
    mended = look(fault.plant, lambda world: fault.mend.apply(world, remedy))
    assert mended.verdict == "ok", (remedy, mended)
