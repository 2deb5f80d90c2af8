"""bf16 against float32 on the stories, and what pure bf16 loses: the table of docs/precision.md.

    python benchmarks/precision.py                     # 3 seeds, 60 steps
    python benchmarks/precision.py --steps 20 --seeds 1
    python benchmarks/precision.py --table             # of the runs that are there

Every run is `kleash train stories` with other keys, one after the other; one that is finished is
not made again. Exits 1 if a number is not as it should be.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

PRECISIONS = ("float32", "bf16")
LEAST_SHARE = 0.99


def command(precision: str, seed: int, steps: int, prompts: int, output: Path) -> list[str]:
    keys = {
        "policy.precision": precision,
        "seed": seed,
        "steps": steps,
        "rollout.prompts_per_step": prompts,
        "output": output,
    }
    flags = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    return [sys.executable, "-m", "kleash", "train", "stories", *flags]


def last_evaluation(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if line.get("heldout/scores") is not None)
    ratios = [line.get("policy/ratio_first_error") or 0.0 for line in lines]
    gaps = [abs(line.get("rollout/kl_sampler") or 0.0) for line in lines]
    return last | {"worst_ratio": max(ratios), "worst_sampler": max(gaps)}


def survival(precision: str, prompts: int) -> tuple[str, float]:
    """Verdict and measured share of `kleash check` on the recipe."""
    flags = ["--policy.precision", precision, "--rollout.prompts_per_step", str(prompts)]
    made = subprocess.run(
        [sys.executable, "-m", "kleash", "check", "stories", "--quick", "--json", *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    findings = json.loads(made.stdout)["findings"]
    found = next(f for f in findings if f["name"] == "precision.survival")
    return found["verdict"], float(found["measured"].split()[0])


def table(folder: Path, seeds: int, steps: int) -> bool:
    """Print every run and the comparison; whether the scores agree."""
    print("| precision | seed | held-out score | KL, nats | worst first ratio − 1 | kl_sampler |")
    print("|---|---|---|---|---|---|")
    scores: dict[str, list[float]] = {}
    for precision in PRECISIONS:
        for seed in range(seeds):
            found = last_evaluation(folder / f"{precision}-{seed}")
            if found["step"] != steps:
                raise SystemExit(f"{precision}-{seed} ends at step {found['step']}, not {steps}")
            scores.setdefault(precision, []).append(found["heldout/scores"])
            print(
                f"| {precision} | {seed} | {found['heldout/scores']:.3f} ± "
                f"{found['heldout/scores_se']:.3f} | {found['heldout/kl_ref']:.2f} ± "
                f"{found['heldout/kl_ref_se']:.2f} | {found['worst_ratio']:.2g} | "
                f"{found['worst_sampler']:.2g} |"
            )
    if seeds < 2:
        return True
    means = {name: sum(found) / seeds for name, found in scores.items()}
    variances = [
        sum((score - means[name]) ** 2 for score in found) / (seeds - 1)
        for name, found in scores.items()
    ]
    gap, noise = means["bf16"] - means["float32"], math.sqrt(sum(variances) / seeds)
    print(f"\nbf16 − float32: {gap:+.3f}, standard error of the difference {noise:.3f}")
    return abs(gap) <= 2 * noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a step")
    parser.add_argument("--folder", type=Path, default=Path("runs/precision"))
    parser.add_argument("--table", action="store_true", help="make no run")
    given = parser.parse_args()
    if not given.table:
        for seed in range(given.seeds):
            for precision in PRECISIONS:
                run = given.folder / f"{precision}-{seed}"
                made = command(precision, seed, given.steps, given.prompts, run)
                subprocess.run(made, check=True)
    good = table(given.folder, given.seeds, given.steps)
    print("\n| precision | share of an AdamW update that survives | verdict of `kleash check` |")
    print("|---|---|---|")
    for precision in (*PRECISIONS, "pure_bf16"):
        verdict, share = survival(precision, given.prompts)
        print(f"| {precision} | {share:.4f} | {verdict} |")
        kept = verdict == "ok" and share >= LEAST_SHARE
        good = good and (verdict == "fail" if precision == "pure_bf16" else kept)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
