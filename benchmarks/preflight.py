"""Plant every fault of `tests/faults.py` on every architecture and see which checks find it.

    python benchmarks/preflight.py                 faults and clean variants
    python benchmarks/preflight.py gpt2 --clean    the clean variants of one architecture

A fault is found if the check that is responsible for it gives the verdict expected and its cause
names what was planted; beside it stands what else failed. Of a clean variant nothing may fail.
Tiny random models; minutes on one core.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import faults  # pyright: ignore[reportMissingImports]
import planting  # pyright: ignore[reportMissingImports]

from kleash.assembly import Crew
from kleash.config import Config
from kleash.preflight.finding import Finding
from kleash.preflight.runner import examine_crew


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*", help="architectures; all if none is named")
    parser.add_argument("--clean", action="store_true", help="only the clean variants")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind in arguments.kinds or planting.KINDS:
        with tempfile.TemporaryDirectory() as folder:
            material = planting.material(Path(folder), kind)
            if not arguments.clean:
                plant_all(material, kind)
            leave_clean(material, kind)


def plant_all(material: Path, kind: str) -> None:
    found: list[bool] = []
    for number, fault in enumerate(faults.FAULTS):
        report = examine(material, fault.plant, kind, f"fault-{number}")
        right = any(hit(fault, finding) for finding in report)
        others = [f.name for f in report if f.verdict == "fail" and f.name != fault.check]
        word = "found " if right else "MISSED"
        print(f"  {word} {fault.name}: {fault.check}; also: {', '.join(others) or '–'}", flush=True)
        found.append(right)
    must = [f for f, fault in zip(found, faults.FAULTS, strict=True) if fault.verdict == "fail"]
    print(f"{kind}: {sum(found)} of {len(found)} found; of those to fail, {sum(must)}/{len(must)}")


def leave_clean(material: Path, kind: str) -> None:
    fails, warnings = 0, 0
    for number, (name, plant) in enumerate(faults.VARIANTS.items()):
        report = examine(material, plant, kind, f"clean-{number}")
        bad = [f for f in report if f.verdict in ("warn", "fail")]
        fails += sum(f.verdict == "fail" for f in bad)
        warnings += sum(f.verdict == "warn" for f in bad)
        said = "; ".join(f"{f.verdict} {f.name}: {f.measured}: {f.cause}" for f in bad)
        print(f"  {name}: {said or 'nothing'}", flush=True)
    print(f"{kind}, {len(faults.VARIANTS)} clean variants: {fails} fails, {warnings} warnings")


def examine(
    material: Path, plant: Callable[[planting.World], None], kind: str, name: str
) -> list[Finding]:
    scratch = material / name
    scratch.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        world = planting.clean(material, kind, patch, scratch)
        plant(world)
        return planting.findings(world, _all)


def _all(config: Config, crew: Crew) -> list[Finding]:
    return list(examine_crew(config, crew, quick=False).findings)


def hit(fault: faults.Fault, finding: Finding) -> bool:
    return (
        finding.name == fault.check
        and finding.verdict == fault.verdict
        and re.search(fault.cause, finding.cause) is not None
    )


if __name__ == "__main__":
    main()
