"""What a checkpoint costs: seconds in which training waits, and their share at the default cadence.

    python benchmarks/saving.py                      # stories (needs ../shared/real) and 200 M
    python benchmarks/saving.py --cases large
    torchrun --nproc-per-node 2 benchmarks/saving.py --cases large --strategy fsdp

A run of a few steps that writes a checkpoint after each of them. What is timed is the whole of it:
the hash of the reference, the policy in Hugging Face format and its verification, the moments by
torch.distributed.checkpoint, and the manifest. The first checkpoint of a process is also opened by
plain transformers; the later ones are what a long run waits for. The share is that of a checkpoint
after every 10 minutes of training, which is the default.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kleash.config.loading import parse_config
from kleash.config.recipe_library import recipe_named
from kleash.mesh import joined
from kleash.training.loop import Trainer
from kleash.training.metrics import Number
from kleash.training.session import Session

SIZES = {"small": (384, 8, 8_000), "large": (1024, 12, 32_000)}
"""Width, layers and words."""
STEPS, CADENCE_S = 4, 600.0


def build(folder: Path, width: int, layers: int, words: int) -> None:
    """A model with random weights, its tokenizer and a few prompts."""
    torch.manual_seed(0)
    names = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(words - 3))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=words,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [f'{{"prompt": "w{i} w{i + 1}"}}\n' for i in range(16)]
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


def tree_of(case: str, folder: Path) -> dict[str, Any]:
    """The configuration of a case, without what all have."""
    if case == "stories":
        recipe = recipe_named("stories").path
        return yaml.safe_load(recipe.read_text(encoding="utf-8")) | {"heldout": {"every": 0}}
    return {
        "policy": {"path": str(folder / "model")},
        "reward_models": {"length": {"callable": "kleash.playground.example_reward:word_length"}},
        "prompts": {"train": str(folder / "prompts.jsonl")},
        "algorithm": {"name": "rloo", "epochs": 1, "minibatches": 1, "microbatch_size": 2},
        "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2, "max_new_tokens": 4},
        "leash": {"beta": 0.1},
        "optimizer": {"lr": 1e-6},
    }


def seconds_of(case: str, folder: Path, strategy: str) -> list[float]:
    """Seconds that each checkpoint of a short run takes."""
    found: list[float] = []
    save = Session.save_if_due

    def timed(self: Session, metrics: Mapping[str, Number]) -> None:
        began = time.perf_counter()
        save(self, metrics)
        found.append(time.perf_counter() - began)

    tree = tree_of(case, folder) | {
        "logging": {"checkpoint_every": 1, "samples_per_step": 0},
        "distributed": {"strategy": strategy},
        "steps": STEPS,
        "output": str(folder / f"run-{case}"),
        "device": "cpu",
    }
    Session.save_if_due = timed
    try:
        Trainer(parse_config(tree, where="benchmark")).fit()
    finally:
        Session.save_if_due = save
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["stories", "large"])
    parser.add_argument("--strategy", default="auto", choices=["auto", "ddp", "fsdp"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as own:
        # One folder for all processes, which the first one fills.
        folder = Path(os.environ.get("SAVING_FOLDER", own))
        with joined(600) as mesh:
            folder = Path(mesh.broadcast(lambda: str(folder)))
            rows: list[str] = []
            for case in given.cases:
                if case in SIZES and mesh.is_first:
                    build(folder, *SIZES[case])
                mesh.broadcast(lambda: None)
                first, *later = seconds_of(case, folder, given.strategy)
                usual = statistics.median(later)
                share = 100 * usual / (CADENCE_S + usual)
                files = sum(f.stat().st_size for f in _newest(folder / f"run-{case}"))
                rows.append(
                    f"| {case}, {mesh.size} × {given.strategy} | {files / 2**20:.0f} MiB | "
                    f"{first:.2f} s | {usual:.2f} s | {share:.2g} % |"
                )
            if mesh.is_first:
                print("| case | checkpoint | first | later ones | share of a run |")
                print("|---|---|---|---|---|")
                print("\n".join(rows))


def _newest(run: Path) -> list[Path]:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return [file for file in newest.rglob("*") if file.is_file()]


if __name__ == "__main__":
    main()
