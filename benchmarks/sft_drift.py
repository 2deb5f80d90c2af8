"""How far supervised fine-tuning on Shakespeare takes a model from its stories.

    python benchmarks/sft_drift.py                      the curve
    python benchmarks/sft_drift.py --fail-above 0.2     stops where the drift lies above

Needs the optional real inputs. Drift is KL(π‖π_ref), on held-out story openings that the model
continues, and on stories that it reads.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from kleash.integrations.transformers import DriftAudit

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
WIDTH = 128
"""Tokens of a training row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path, default=REAL)
    parser.add_argument("--output", type=Path, default=Path("runs/sft-drift"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--fail-above", type=float, default=None, help="nats per token")
    args = parser.parse_args()
    path = args.real / "models" / "stories260K"
    model, tok = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    text = (args.real / "texts" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    ids: list[int] = tok(text[: 16 * WIDTH * args.steps * 3])["input_ids"]
    rows = [ids[at : at + WIDTH] for at in range(0, len(ids) - WIDTH, WIDTH)]
    settings: dict[str, Any] = {
        "output_dir": str(args.output),
        "per_device_train_batch_size": 16,
        "max_steps": args.steps,
        "learning_rate": args.lr,
        "logging_steps": args.every,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
        processing_class=tok,
    )
    stories = (args.real / "texts" / "tinystories_sample.txt").read_text(encoding="utf-8")
    audit = DriftAudit(
        args.every,
        prompts=args.real / "prompts" / "story-openings-heldout.jsonl",
        texts=[part.strip() for part in stories.split("\n") if part.strip()],
        fail_above=args.fail_above,
        max_new_tokens=48,
    ).attach(trainer)
    trainer.train()
    for step, found in audit.audits:
        said = [
            f"{name} {one.kl.per_token.mean:.4f} ({one.kl.per_token.low:.4f} … "
            f"{one.kl.per_token.high:.4f})"
            for name, one in found.items()
        ]
        print(f"step {step}: nats per token on {'; on '.join(said)}")
    print(audit.failed or f"ran all {args.steps} steps")


if __name__ == "__main__":
    main()
