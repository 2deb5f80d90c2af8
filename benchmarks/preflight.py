"""Plant every fault of the tests on every architecture: is it found, and does its remedy work?

    python benchmarks/preflight.py                       faults and clean variants
    python benchmarks/preflight.py gpt2 --clean          the clean variants of one architecture
    python benchmarks/preflight.py gpt2 --faults 0:20    the first twenty faults on it
    python benchmarks/preflight.py gpt2 --whole          and what the other checks say of each

A fault is found if the check that is responsible for it gives the verdict expected and its cause
names what was planted. It is fixed if that check says ok once its remedy is carried out in a
set-up with the same fault: a setting or file as named, or the code asked for, written anew.
"Restored" are defects that the text can only place: there the fault is taken out again. Of a clean
variant nothing may fail. Tiny random models; minutes on one core.
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import fault_types  # pyright: ignore[reportMissingImports]
import model_variants  # pyright: ignore[reportMissingImports]
import planted_faults  # pyright: ignore[reportMissingImports]

from kleash.config.schema import Config
from kleash.preflight.findings import Finding
from kleash.preflight.probe_batch import WHOLE
from kleash.preflight.runner import examine_components
from kleash.training.components import Components


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*", help="architectures; all if none is named")
    parser.add_argument("--clean", action="store_true", help="only the clean variants")
    parser.add_argument("--whole", action="store_true", help="with all other checks too")
    parser.add_argument("--faults", metavar="FIRST:END", help="only these faults, by number")
    arguments = parser.parse_args()
    part = slice(
        *(int(end) for end in (arguments.faults or f"0:{len(planted_faults.FAULTS)}").split(":"))
    )
    torch.set_num_threads(1)
    for kind in arguments.kinds or fault_types.KINDS:
        with tempfile.TemporaryDirectory() as folder:
            material = fault_types.material(Path(folder), kind)
            if not arguments.clean:
                plant_all(material, kind, part, whole=arguments.whole)
            if arguments.clean or not arguments.faults:
                leave_clean(material, kind)


def plant_all(material: Path, kind: str, part: slice, *, whole: bool) -> None:
    found, must, fixed = Counter[bool](), Counter[bool](), Counter[str]()
    for number, fault in list(enumerate(planted_faults.FAULTS))[part]:
        look = everything if whole else fault_types.only(fault.check, WHOLE)
        report = examine(material, kind, f"fault-{number}", look, fault.plant)
        hits = [finding for finding in report if hit(fault, finding)]
        found[bool(hits)] += 1
        must[bool(hits)] += fault.verdict == "fail"
        others = [f.name for f in report if f.verdict == "fail" and f.name != fault.check]
        print(f"  {'found ' if hits else 'MISSED'} {fault.name}: {fault.check}", end="")
        print(f"; also: {', '.join(others) or '–'}", end="")
        if hits:
            after = fix(material, kind, f"fault-{number}", fault, hits[0])
            good = [(f.name, f.verdict) for f in after] == [(fault.check, "ok")]
            fixed[fault.fix.kind if good else "not"] += 1
            print(f"; {'fixed' if good else 'NOT MENDED'} ({fault.fix.kind})", end="")
        print(flush=True)
    print(f"{kind}: {found[True]} of {found.total()} found; of those to fail, ", end="")
    print(f"{must[True]}/{must.total()}; fixed: {dict(fixed)}")


def fix(
    material: Path, kind: str, name: str, fault: planted_faults.Fault, finding: Finding
) -> list[Finding]:
    """What the check says after the remedy, whose words must be those that are carried out."""
    remedy = fault_types.advice(finding)
    assert all(words in remedy for words in fault.fix.words), (fault.fix.words, remedy)

    def fixed(world: fault_types.World) -> None:
        fault.fix.apply(world, remedy)

    return examine(material, kind, name, fault_types.only(fault.check, WHOLE), fault.plant, fixed)


def leave_clean(material: Path, kind: str) -> None:
    fails, warnings = 0, 0
    for number, (name, plant) in enumerate(model_variants.VARIANTS.items()):
        report = examine(material, kind, f"clean-{number}", everything, plant)
        bad = [f for f in report if f.verdict in ("warn", "fail")]
        fails += sum(f.verdict == "fail" for f in bad)
        warnings += sum(f.verdict == "warn" for f in bad)
        said = "; ".join(f"{f.verdict} {f.name}: {f.measured}: {f.cause}" for f in bad)
        print(f"  {name}: {said or 'nothing'}", flush=True)
    print(
        f"{kind}, {len(model_variants.VARIANTS)} clean variants: {fails} fails, {warnings} warnings"
    )


def examine(
    material: Path,
    kind: str,
    name: str,
    look: Callable[[Config, Components], list[Finding]],
    *changes: Callable[[fault_types.World], None],
) -> list[Finding]:
    scratch = material / name
    scratch.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        world = fault_types.clean(material, kind, patch, scratch)
        for change in changes:
            change(world)
        return fault_types.findings(world, look)


def everything(config: Config, components: Components) -> list[Finding]:
    return list(examine_components(config, components, quick=False).findings)


def hit(fault: planted_faults.Fault, finding: Finding) -> bool:
    return (
        finding.name == fault.check
        and finding.verdict == fault.verdict
        and re.search(fault.cause, finding.cause) is not None
    )


if __name__ == "__main__":
    main()
