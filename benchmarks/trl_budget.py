"""Does KLBudget hold TRL's GRPO to its budget, and does a killed run go on with the same β?

    python benchmarks/trl_budget.py                  three seeds, then one that is killed
    python benchmarks/trl_budget.py --seeds 0        one of them

The stories model and its VADER reward, as in `recipes/stories.yaml`; needs the optional real inputs
beside the checkout and `pip install 'kleash[stories,trl]'`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


def trainer_of(output: Path, args: argparse.Namespace, seed: int, **changes: Any) -> Any:
    """TRL's GRPOTrainer on the stories model, its callbacks attached."""
    from trl import GRPOConfig, GRPOTrainer

    from kleash.integrations.trl import KLAudit, KLBudget, exact_kl_loss
    from kleash.playground.vader import compound

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        return [*compound(prompts, completions)]

    rows = [
        {"prompt": json.loads(line)["prompt"]}
        for line in (args.real / "prompts" / "story-openings.jsonl").read_text().splitlines()
    ]
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": args.responses,
        "num_generations": args.group,
        "max_completion_length": 48,
        "max_steps": args.steps,
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant",
        "beta": args.beta,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
        "seed": seed,
        **changes,
    }
    trainer = GRPOTrainer(
        model=str(args.real / "models" / "stories260K"),
        reward_funcs=reward,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
    )
    KLAudit(every=1, samples=0).attach(trainer)
    KLBudget(target_kl=args.target).attach(trainer)
    if args.exact:
        exact_kl_loss(trainer)
    return trainer


def series(run: Path) -> list[dict[str, Any]]:
    """The lines of a run directory."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def one_run(args: argparse.Namespace, seed: int) -> None:
    """A whole run, and how far it was over its last third."""
    output = args.output / f"seed-{seed}"
    start = time.process_time()
    trainer_of(output, args, seed).train()
    lines = series(output / "kleash")
    third = lines[-(len(lines) // 3) :]
    mean = sum(line["objective/kl_ref"] for line in third) / len(third)
    print(
        f"seed {seed}: {mean:.3f} nats over the last {len(third)} of {len(lines)} steps, budget "
        f"{args.target}; beta {lines[0]['objective/beta']:.3f} → {lines[-1]['objective/beta']:.3f},"
        f" score {lines[0]['objective/scores']:.3f} → {lines[-1]['objective/scores']:.3f}; "
        f"{time.process_time() - start:.0f} s of CPU",
        flush=True,
    )


def killed_run(args: argparse.Namespace) -> None:
    """Kill a run with SIGKILL in the middle, resume it, and compare with one that was not."""
    steps = min(args.steps, 12)
    command = [sys.executable, __file__, "--real", str(args.real), "--steps", str(steps)]
    command += ["--responses", str(args.responses), "--target", str(args.target)]
    whole, broken = args.output / "whole", args.output / "broken"
    subprocess.run([*command, "--child", str(whole)], check=True, stdout=subprocess.DEVNULL)
    child = subprocess.Popen([*command, "--child", str(broken)], stdout=subprocess.DEVNULL)
    metrics = broken / "kleash" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps // 2 + 2:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    at = len(series(broken / "kleash"))
    resumed = [*command, "--child", str(broken), "--resume"]
    subprocess.run(resumed, check=True, stdout=subprocess.DEVNULL)
    betas = [[line["objective/beta"] for line in series(p / "kleash")] for p in (whole, broken)]
    print(f"killed after step {at} of {steps}; the same β series: {betas[0] == betas[1]}", betas[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, default=REAL)
    parser.add_argument("--output", type=Path, default=Path("runs/trl-budget"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--responses", type=int, default=128)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--target", type=float, default=2.0)
    parser.add_argument("--exact", action="store_true", help="with exact_kl_loss")
    parser.add_argument("--no-kill", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        trainer = trainer_of(args.child, args, 0, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=args.resume or None)
        return
    for seed in args.seeds:
        one_run(args, seed)
    if not args.no_kill:
        killed_run(args)


if __name__ == "__main__":
    main()
