"""Planted faults are found and named, and go away by the words of the remedy.

One architecture each, by turns; `benchmarks/preflight.py` plants every fault on all of them.
"""

import re
from collections.abc import Callable
from pathlib import Path

import faults
import planting
import pytest

from kleash.preflight.finding import Finding


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("worlds")
    return {kind: planting.material(folder / kind, kind) for kind in planting.KINDS}


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
            (finding,) = planting.findings(world, planting.only(fault.check))
        return finding

    seen = look(fault.plant)
    assert (seen.name, seen.verdict) == (fault.check, fault.verdict), seen
    assert re.search(fault.cause, seen.cause), seen

    remedy = planting.advice(seen)
    for words in fault.mend.words:
        assert words in remedy, f"{words!r} is not said: {remedy}"
    mended = look(fault.plant, lambda world: fault.mend.apply(world, remedy))
    assert mended.verdict == "ok", (remedy, mended)
