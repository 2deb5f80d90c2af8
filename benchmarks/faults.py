"""Plant every fault of `tests/faults.py` on every architecture and see which checks find it.

    python benchmarks/faults.py [gpt2 llama gemma2]

A fault is found if the check that is responsible for it gives the verdict expected and its cause
names what was planted. Beside it: what else failed. Tiny random models; minutes on one core.
"""

import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import faults

from kleash.preflight.finding import Finding
from kleash.preflight.runner import examine_crew


def main(kinds: list[str]) -> None:
    torch.set_num_threads(1)
    for kind in faults.KINDS:
        if kinds and kind not in kinds:
            continue
        with tempfile.TemporaryDirectory() as folder:
            material = faults.material(Path(folder), kind)
            found = [
                examine(material, fault, kind, number) for number, fault in enumerate(faults.FAULTS)
            ]
        counted = [
            right
            for right, fault in zip(found, faults.FAULTS, strict=True)
            if fault.verdict == "fail"
        ]
        print(
            f"{kind}: {sum(found)} of {len(found)} found; of those that must fail {sum(counted)} of {len(counted)}"
        )


def examine(material: Path, fault: faults.Fault, kind: faults.Kind, number: int) -> bool:
    scratch = material / f"fault-{number}"
    scratch.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        world = faults.clean(material, kind, patch, scratch)
        fault.plant(world)
        report = faults.findings(
            world, lambda config, crew: list(examine_crew(config, crew, quick=False).findings)
        )
    right = any(hit(fault, finding) for finding in report)
    others = [f.name for f in report if f.verdict == "fail" and f.name != fault.check]
    print(
        f"  {'found ' if right else 'MISSED'} {fault.name}: {fault.check}; also failed: {', '.join(others) or '–'}"
    )
    if not right:
        for finding in report:
            if finding.name == fault.check or finding.verdict == "fail":
                print(
                    f"         {finding.name} {finding.verdict}: {finding.measured} | {finding.cause}"
                )
    return right


def hit(fault: faults.Fault, finding: Finding) -> bool:
    return (
        finding.name == fault.check
        and finding.verdict == fault.verdict
        and re.search(fault.cause, finding.cause) is not None
    )


if __name__ == "__main__":
    main(sys.argv[1:])
