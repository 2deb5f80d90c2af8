"""How often sound runs get a warning sign: small runs of a tiny model, none of which collapses.

    python benchmarks/false_alarms.py [SEEDS]

PPO, RLOO and GRPO, a fixed β and a budget, at a learning rate that learns: for each kind SEEDS runs
of 12 steps with held-out evaluation. A sign in any of them is a false alarm. The last row is a run
at an absurd learning rate, which must have one.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import small_run  # pyright: ignore[reportMissingImports]

from kleash.storage.run_directory import read_run
from kleash.training.loop import train

BUDGET = {"beta": None, "target_kl": 0.3}
GROUPED = {"rollout": {"responses_per_prompt": 4, "prompts_per_step": 8}}
KINDS: dict[str, dict[str, Any]] = {
    "PPO, β = 0.1": {},
    "PPO, a budget of 0.3 nats": {"leash": BUDGET},
    "RLOO, β = 0.1": {**GROUPED, "algorithm": "rloo"},
    "GRPO, a budget of 0.3 nats": {**GROUPED, "algorithm": "grpo", "leash": BUDGET},
    "wrecked: PPO, β = 0, learning rate 10": {"leash": {"beta": 0.0}, "optimizer": {"lr": 10.0}},
}


def main() -> None:
    """Print a row for each kind."""
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print("| runs | with a sign | signs |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = small_run.save_material(
            Path(name),
            prompts=small_run.two_words(range(8)),
            heldout=small_run.two_words(range(10, 14)),
        )
        for number, (kind, layer) in enumerate(KINDS.items()):
            signs: list[list[str]] = []
            for seed in range(seeds):
                output = folder / f"{number}-{seed}"
                config = small_run.settings(folder, output, layer, seed=seed, steps=12)
                with contextlib.redirect_stdout(io.StringIO()):
                    train(config)
                signs.append([sign["name"] for sign in read_run(output).meta["warning_signs"]])
            names = sorted({name for found in signs for name in found})
            some = sum(bool(found) for found in signs)
            print(f"| {kind} | {some} of {seeds} | {', '.join(names) or '–'} |", flush=True)


if __name__ == "__main__":
    main()
