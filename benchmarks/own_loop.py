"""What a budget becomes where β is fed in another unit than the loss: docs/own-loops.md.

    python benchmarks/own_loop.py MODEL_DIR

Runs `examples/grpo_loop.py` as it stands and with one line changed, three seeds each, and prints
the mean KL of the last third of the steps. MODEL_DIR is a causal language model whose tokenizer
writes the word w7 (`tests/support/tiny_models.py` saves one).
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "grpo_loop.py"
STEP = "leash.step(then.kl, scores, index)"
SCORES = "scores = kleash.group_relative(scores, index)"
LEASH = "leash = kleash.Leash(target_kl)"
RAW = (SCORES, "raw, scores = scores, kleash.group_relative(scores, index)")
BY_HAND = (
    "read(kleash.clustered_mean(then.kl.sum(1), index))",
    "; state = controller.init()\n"
    "    def read(e):\n"
    "        nonlocal state\n"
    "        state = controller.update(state, kleash.Measurement(e.mean, e.standard_error, e.n))\n"
    "        return state.beta",
)


def by_hand(beta: float) -> list[tuple[str, str]]:
    controller = f"controller = kleash.BudgetBeta(target_kl, {beta})"
    return [(STEP, BY_HAND[0]), (LEASH, controller + BY_HAND[1])]


VARIANTS: dict[str, tuple[float, list[tuple[str, str]]]] = {
    "as it stands": (1.0, []),
    "raw scores of sd 0.05": (0.1, [RAW, (STEP, "leash.step(then.kl, raw, index)")]),
    "raw scores of sd 0.27": (0.5, [RAW, (STEP, "leash.step(then.kl, raw, index)")]),
    "raw scores of sd 5.4": (10.0, [RAW, (STEP, "leash.step(then.kl, raw, index)")]),
    "BudgetBeta alone, from 0.05": (1.0, by_hand(0.05)),
    "BudgetBeta alone, from 0.2": (1.0, by_hand(0.2)),
    "BudgetBeta alone, from 2": (1.0, by_hand(2.0)),
}


def module(changes: list[tuple[str, str]]) -> ModuleType:
    text = EXAMPLE.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    made = ModuleType("loop")
    exec(compile(text, str(EXAMPLE), "exec"), made.__dict__)
    return made


def reward(scale: float) -> Callable[[str], float]:
    def count(text: str) -> float:
        return scale * text.split().count("w7")

    return count


def main() -> None:
    torch.set_num_threads(1)
    prompts = [f"w{i} w{i + 1}" for i in range(8)]
    for name, (scale, changes) in VARIANTS.items():
        loop, found = module(changes), list[float]()
        for seed in range(3):
            torch.manual_seed(seed)
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                loop.train(sys.argv[1], prompts, str(run), reward(scale), 1.0)
                lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
            series = [json.loads(line)["objective/kl_ref"] for line in lines]
            last = series[-len(series) // 3 :]
            found.append(sum(last) / len(last))
        print(f"{name:30s}", "  ".join(f"{each:.2f}" for each in found), flush=True)


if __name__ == "__main__":
    main()
