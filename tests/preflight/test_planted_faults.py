"""Planted faults are found and named, and go away by the words of the remedy.

One architecture each, by turns; `benchmarks/preflight.py` plants every fault on all of them.
"""

import re
from collections.abc import Callable
from pathlib import Path

import fault_types
import planted_faults
import pytest

from kleash.preflight.findings import Finding


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("worlds")
    return {kind: fault_types.material(folder / kind, kind) for kind in fault_types.KINDS}


TURNS: tuple[fault_types.Kind, ...] = ("gpt2", "llama", "gpt2", "llama", "gemma2")
"""The slow one less often."""


def kind_of(number: int) -> fault_types.Kind:
    law = planted_faults.FAULTS[number].check == "sampling.law"
    return "gpt2" if law else TURNS[number % len(TURNS)]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        pytest.param(fault, kind_of(number), id=f"{fault.name}-{kind_of(number)}")
        for number, fault in enumerate(planted_faults.FAULTS)
    ],
)
def test_a_planted_fault_is_named_and_its_remedy_fixes_it(
    materials: dict[str, Path], tmp_path: Path, fault: planted_faults.Fault, kind: fault_types.Kind
) -> None:
    def look(*changes: Callable[[fault_types.World], None]) -> Finding:
        with pytest.MonkeyPatch.context() as patch:
            world = fault_types.clean(materials[kind], kind, patch, tmp_path)
            for change in changes:
                change(world)
            (finding,) = fault_types.findings(world, fault_types.only(fault.check))
        return finding

    seen = look(fault.plant)
    assert (seen.name, seen.verdict) == (fault.check, fault.verdict), seen
    assert re.search(fault.cause, seen.cause), seen

    remedy = fault_types.advice(seen)
    for words in fault.fix.words:
        assert words in remedy, f"{words!r} is not said: {remedy}"
    fixed = look(fault.plant, lambda world: fault.fix.apply(world, remedy))
    assert fixed.verdict == "ok", (remedy, fixed)
