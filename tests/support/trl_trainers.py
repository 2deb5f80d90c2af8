"""TRL's own trainers on a model of some thousand parameters, in process or as a program.

As a program (`python trl_trainers.py KIND FOLDER`) it trains beside another version of TRL than
the environment's, found through PYTHONPATH, and prints what was measured as JSON; as several
processes where torchrun's variables are set, each of which prints its own.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny_models
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def prefer_w3(completions: list[str], **columns: Any) -> list[float]:
    """How often a completion says w3."""
    return [float(text.split().count("w3")) for text in completions]


def prompts(count: int = 32) -> Dataset:
    """Prompts of two words, each of its own."""
    rows = [{"prompt": f"w{i % 20} w{(i + 1 + i // 20) % 20}"} for i in range(count)]
    return Dataset.from_list(rows)


def make_trainer(
    kind: str,
    model: Any,
    output: Path,
    *,
    lora: bool = False,
    processing_class: Any = None,
    **changes: Any,
) -> Any:
    """A GRPOTrainer ("grpo") or RLOOTrainer ("rloo") that has not begun to train."""
    import trl

    names = {"grpo": ("GRPOTrainer", "GRPOConfig"), "rloo": ("RLOOTrainer", "RLOOConfig")}
    trainer, config = (getattr(trl, name) for name in names[kind])
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 3e-3,
        "beta": 0.1,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"} if isinstance(model, str) else None,
        **changes,
    }
    more: dict[str, Any] = {}
    if lora:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    return trainer(
        model=model,
        reward_funcs=prefer_w3,
        args=config(**settings),
        train_dataset=prompts(),
        processing_class=processing_class,
        **more,
    )


@torch.no_grad()
def plain_kl(policy: Path | str, reference: Path | str, batch: Any) -> list[float]:
    """Σ_t KL(π‖π_ref) of each completion: plain models, one unpadded row at a time, in float64."""
    models = [
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in (policy, reference)
    ]
    found: list[float] = []
    for row in range(len(batch["completion_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        written = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, written])[None]
        p, q = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in models)
        found.append(float((p.exp() * (p - q)).sum()))
    return found


def batches_of(trainer: Any) -> list[dict[str, Any]]:
    """The batches of completions that a trainer will have made, in order."""
    seen: list[dict[str, Any]] = []
    generate = trainer._generate_and_score_completions

    def kept(*args: Any, **kwargs: Any) -> Any:
        seen.append(generate(*args, **kwargs))
        return seen[-1]

    trainer._generate_and_score_completions = kept
    return seen


def measured_run(kind: str, folder: Path) -> dict[str, Any]:
    """Train for a few steps with an audit and a budget; what they saw."""
    import trl

    from kleash.integrations.trl import KLAudit, KLBudget

    base = folder / "policy"
    if not base.exists():
        tiny_models.save_model(base, attention_dropout=0.0)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rows: dict[str, Any] = {"per_device_train_batch_size": 16 // size}
    trainer = make_trainer(kind, str(base), folder / "out", **saving, **rows)
    batches = batches_of(trainer)
    audit = KLAudit(every=1, both=True).attach(trainer)
    KLBudget(target_kl=0.5).attach(trainer)
    trainer.train()
    plain = plain_kl(folder / "out" / "checkpoint-2", base, batches[2])
    return {
        "trl": trl.__version__,
        "kl": [line["objective/kl_ref"] for line in audit.history],
        "plain": plain,
        "scores": [line["objective/scores"] for line in audit.history],
        "samples": [batch["completion_ids"].tolist() for batch in batches],
        "beta": [line["kleash/beta"] for line in trainer.state.log_history[:-1]],
    }


def stopped_run(folder: Path) -> dict[str, Any]:
    """Train as one of two processes, of which the second cannot read its completions in step 2."""
    from kleash.errors import NonFiniteError
    from kleash.integrations import _trl_hook
    from kleash.integrations.trl import KLAudit, Tripwires

    trainer = make_trainer(
        "grpo", str(folder / "policy"), folder / "stopped", per_device_train_batch_size=8
    )
    audit = KLAudit(every=1).attach(trainer)
    Tripwires(stop_kl=1e9, action="stop").attach(trainer)
    read = _trl_hook.read_completions

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 1 and os.environ["RANK"] == "1":
            raise NonFiniteError("expected finite numbers, got NaN")
        return read(*args, **kwargs)

    _trl_hook.read_completions = faulty
    trainer.train()
    return {"stopped_after": trainer.state.global_step, "measured": len(audit.history)}


if __name__ == "__main__":
    made = measured_run(sys.argv[1], Path(sys.argv[2]))
    if os.environ.get("WORLD_SIZE") == "2":
        made |= stopped_run(Path(sys.argv[2]))
    print(json.dumps(made))
