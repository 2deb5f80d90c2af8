"""Does GRPO of kleash learn as fast as TRL's? Score against tokens written, three seeds of each.

    python benchmarks/learning_curves.py
    python benchmarks/learning_curves.py --systems kleash --seeds 0 --steps 20

The stories model and its VADER reward, as in `recipes/stories.yaml`; needs the optional real inputs
beside the checkout, `pip install 'kleash[stories]'`, and TRL 1.16, which is installed into the
folder that `iteration.py` uses. Both: groups of 8, 64 responses a step, at most 48 tokens, one
update of all of them, AdamW with the same numbers, β = 0.05. kleash charges k1 in the reward, TRL
k3 in the loss, each by default (kleash's scores are those of a group in its standard deviations
too). Every run is a process of its own; its scores are kept, and one that is there is not repeated.

The curve is the mean score of the responses of a stretch of steps. The difference of two systems is
that of the means over seeds, with the standard error of that difference. The KL is that of the last
policy from the model it began as, in nats per response: exact, measured by `kleash.audit` in the
same way for both, on responses to the prompts drawn with one seed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from iteration import TRL, install_trl

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
SYSTEMS = ("trl", "kleash")
GROUP, PROMPTS, NEW_TOKENS, BETA = 8, 8, 48, 0.05
STRETCHES = 6

Curve = list[tuple[float, float]]
"""Of every step: tokens written so far, and the mean score of its responses."""


def kl_of(policy: Any, options: argparse.Namespace) -> float:
    """KL(π‖π_ref) of a policy that has learned, in nats per response."""
    from kleash import audit

    prompts = options.real / "prompts" / "story-openings.jsonl"
    base = str(options.real / "models" / "stories260K")
    found = audit(policy, base, prompts, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=1)
    assert found.kl is not None
    return found.kl.per_response.mean


def run_kleash(options: argparse.Namespace, seed: int, output: Path) -> tuple[Curve, float]:
    """A run of `kleash.train`."""
    from kleash.config.loading import parse_config
    from kleash.storage.run_directory import read_run
    from kleash.training.loop import train

    tree: dict[str, Any] = {
        "policy": {"path": str(options.real / "models" / "stories260K")},
        "reward_models": {"vader": {"callable": "kleash.playground.vader:compound"}},
        "prompts": {"train": str(options.real / "prompts" / "story-openings.jsonl")},
        "rollout": {
            "prompts_per_step": PROMPTS,
            "responses_per_prompt": GROUP,
            "max_new_tokens": NEW_TOKENS,
        },
        "leash": {"beta": BETA},
        "algorithm": {"name": "grpo", "epochs": 1, "minibatches": 1},
        "optimizer": {"lr": options.lr},
        "logging": {"samples_per_step": 0},
        "steps": options.steps,
        "seed": seed,
        "output": str(output),
    }
    curve, tokens = Curve(), 0.0
    directory = train(parse_config(tree, where="benchmark"))
    for line in read_run(directory).metrics:
        if "rollout/length" in line:
            tokens += PROMPTS * GROUP * float(str(line["rollout/length"]))
            curve.append((tokens, float(str(line["objective/scores"]))))
    return curve, kl_of(str(directory), options)


def run_trl(options: argparse.Namespace, seed: int, output: Path) -> tuple[Curve, float]:
    """A run of TRL's `GRPOTrainer`."""
    sys.path.insert(0, str(options.trl))
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from kleash.playground.vader import compound

    curve, tokens = Curve(), 0

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        nonlocal tokens
        tokens += sum(len(ids) for ids in completion_ids)
        scores = compound(prompts, completions)
        curve.append((float(tokens), statistics.mean(scores)))
        return scores

    lines = (options.real / "prompts" / "story-openings.jsonl").read_text().splitlines()
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": GROUP * PROMPTS,
        "num_generations": GROUP,
        "max_completion_length": NEW_TOKENS,
        "max_steps": options.steps,
        "learning_rate": options.lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "beta": BETA,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
        "seed": seed,
    }
    trainer = GRPOTrainer(
        model=str(options.real / "models" / "stories260K"),
        reward_funcs=cast(Any, reward),
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines]),
    )
    trainer.train()
    tokenizer = AutoTokenizer.from_pretrained(options.real / "models" / "stories260K")
    return curve, kl_of((trainer.model, tokenizer), options)


def stretches(curve: Curve) -> list[float]:
    """Mean scores of equal stretches of a curve."""
    size = len(curve) // STRETCHES
    return [
        statistics.mean(score for _, score in curve[i * size : (i + 1) * size])
        for i in range(STRETCHES)
    ]


def table(curves: dict[str, list[Curve]], kls: dict[str, list[float]]) -> str:
    """The result in Markdown."""
    first = next(iter(curves.values()))[0]
    size = len(first) // STRETCHES
    marks = [f"{first[(i + 1) * size - 1][0] / 1000:,.0f} k" for i in range(STRETCHES)]
    lines = ["| tokens written | " + " | ".join(marks) + " | KL at the end |"]
    lines.append("|---|" + "---:|" * (STRETCHES + 1))
    means: dict[str, list[list[float]]] = {}
    for system, runs in curves.items():
        means[system] = [list(column) for column in zip(*map(stretches, runs), strict=True)]
        means[system].append(kls[system])
        cells = [_with_error(column) for column in means[system]]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    if len(means) == len(SYSTEMS):
        pairs = zip(means["kleash"], means["trl"], strict=True)
        cells = [
            f"{statistics.mean(a) - statistics.mean(b):+.3f} ± "
            f"{(_error(a) ** 2 + _error(b) ** 2) ** 0.5:.3f}"
            for a, b in pairs
        ]
        lines.append("| kleash less trl | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _error(numbers: Sequence[float]) -> float:
    return statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else float("nan")


def _with_error(numbers: Sequence[float]) -> str:
    return f"{statistics.mean(numbers):.3f} ± {_error(numbers):.3f}"


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--real", type=Path, default=REAL)
    parser.add_argument("--output", type=Path, default=Path("runs/learning-curves"))
    parser.add_argument("--trl", type=Path, help="folder of TRL; made if missing")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    options.trl = options.trl or cache / "kleash" / TRL["grpo"]
    kept = {
        (system, seed): options.output / f"{system}-{seed}.json"
        for system in options.systems
        for seed in options.seeds
    }
    if options.alone:
        ((system, seed),) = kept
        run = run_trl if system == "trl" else run_kleash
        curve, kl = run(options, seed, options.output / f"{system}-{seed}")
        kept[system, seed].write_text(json.dumps({"curve": curve, "kl": kl}))
        return
    install_trl(options.trl, TRL["grpo"])
    options.output.mkdir(parents=True, exist_ok=True)
    for (system, seed), file in kept.items():
        if not file.exists():
            command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--alone"]
            command += ["--systems", system, "--seeds", str(seed)]
            environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    runs = {
        system: [json.loads(kept[system, seed].read_text()) for seed in options.seeds]
        for system in options.systems
    }
    curves, kls = (
        {system: [run[what] for run in found] for system, found in runs.items()}
        for what in ("curve", "kl")
    )
    print(table(curves, kls))


if __name__ == "__main__":
    main()
