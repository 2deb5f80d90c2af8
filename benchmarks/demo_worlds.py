"""Does the demo's story hold in worlds nobody tuned it on? Five fresh ones, all printed.

    .venv/bin/python benchmarks/demo_worlds.py
    .venv/bin/python benchmarks/demo_worlds.py --seeds 200 201 --output runs/more-worlds

A world counts if three differences on held-out prompts are all beyond two standard errors:

    gold:    on the leash > reference,   reference > off the leash
    proxy:   off the leash > on the leash

The recipe was fixed on worlds 0 and 1; a world that fails is printed like one that does not.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from kleash.cli.demo import Demo, run_demo
from kleash.cli.demo_output import Row
from kleash.models.loading import quiet

FRESH = (100, 101, 102, 103, 104)


def above(higher: tuple[float, float], lower: tuple[float, float]) -> float:
    """Difference of two means in standard errors of the difference, taken as independent."""
    return (higher[0] - lower[0]) / (higher[1] ** 2 + lower[1] ** 2) ** 0.5


def verdict(rows: tuple[Row, Row, Row]) -> dict[str, float]:
    """Each claim's difference, in standard errors."""
    reference, leashed, free = rows
    return {
        "gold leash > reference": above(leashed.gold, reference.gold),
        "gold reference > free": above(reference.gold, free.gold),
        "proxy free > leash": above(free.proxy, leashed.proxy),
    }


def holds(rows: tuple[Row, Row, Row]) -> bool:
    """True if every claim is beyond two standard errors."""
    return all(errors > 2 for errors in verdict(rows).values())


def table(demos: dict[int, Demo]) -> str:
    """One Markdown row per world."""
    lines = [
        "| world | proxy ref / leash / free | gold ref / leash / free | KL leash / free "
        "| distinct-2 ref / leash / free "
        "| seconds build / check / plan / leash / free / audit / all | holds |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, demo in demos.items():
        proxy = " / ".join(f"{row.proxy[0]:.2f} ± {row.proxy[1]:.2f}" for row in demo.rows)
        gold = " / ".join(f"{row.gold[0]:.2f} ± {row.gold[1]:.2f}" for row in demo.rows)
        kl = " / ".join(f"{row.kl[0]:.1f} ± {row.kl[1]:.1f}" for row in demo.rows[1:])
        distinct = " / ".join(f"{row.distinct_2:.2f}" for row in demo.rows)
        seconds = " / ".join(f"{value:.0f}" for value in demo.seconds.values())
        word = "yes" if holds(demo.rows) else "no"
        lines.append(f"| {seed} | {proxy} | {gold} | {kl} | {distinct} | {seconds} | {word} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo in fresh worlds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=FRESH)
    parser.add_argument("--output", type=Path, default=Path("runs/demo-worlds"))
    arguments = parser.parse_args()
    console = Console(highlight=False)
    demos: dict[int, Demo] = {}
    for seed in arguments.seeds:
        console.rule(f"world {seed}")
        with quiet():
            demos[seed] = run_demo(seed, arguments.output / str(seed), console=console)
    held = sum(holds(demo.rows) for demo in demos.values())
    print(f"\n{table(demos)}\n\n{held} of {len(demos)} worlds hold beyond two standard errors")
    record = {
        str(seed): {
            "rows": [asdict(row) for row in demo.rows],
            "seconds": demo.seconds,
            "standard_errors": verdict(demo.rows),
            "holds": holds(demo.rows),
        }
        for seed, demo in demos.items()
    }
    path = arguments.output / "worlds.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
