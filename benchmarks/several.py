"""How much faster do several processes make a run, and are its numbers the same?

    python benchmarks/several.py --sizes 1 2

A Llama of 9.7 M parameters with random weights, a vocabulary of 50,257, 32 prompts a step and 64
new tokens, PPO with two epochs; one thread a process. The same run with each number of processes;
the table has medians over the steps after the first.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kleash.storage.run_directory import read_run

WORDS, PROMPTS, NEW_TOKENS = 50_257, 32, 64
PHASES = ("time/generate", "time/score", "time/update")


def even(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of words with an even number: something to learn."""
    ends = [[word[-1] in "02468" for word in response.split()] for response in responses]
    return [sum(words) / max(1, len(words)) for words in ends]


def material(folder: Path) -> None:
    """A model with random weights, its tokenizer, and prompts."""
    names = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(WORDS - 3))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        intermediate_size=640,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    prompts = [{"prompt": " ".join(f"w{i * 7 + j}" for j in range(16))} for i in range(256)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))


def run(folder: Path, size: int, steps: int) -> list[dict[str, Any]]:
    """The metrics of one run by so many processes."""
    output = folder / f"run-{size}"
    tree = {
        "policy": {"path": str(folder)},
        "reward_models": {"even": {"callable": "several:even"}},
        "prompts": {"train": str(folder / "prompts.jsonl")},
        "rollout": {"prompts_per_step": PROMPTS, "max_new_tokens": NEW_TOKENS},
        "leash": {"beta": 0.1},
        "algorithm": {"epochs": 2, "minibatches": 1, "microbatch_size": 16},
        "optimizer": {"lr": 1e-3},
        "steps": steps,
        "output": str(output),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "kleash", "train", str(folder / "config.yaml"), "--no-check"]
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
                "OMP_NUM_THREADS": "1",
                "WORLD_SIZE": str(size),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(size)
    ]
    ended = [process.wait() for process in processes]
    if any(ended):
        raise SystemExit("a process failed")
    return [dict(line) for line in read_run(output).metrics]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    print("| processes | tokens/s | generate, s | score, s | update, s | KL of the last step |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        material(Path(name))
        for size in given.sizes:
            lines = run(Path(name), size, given.steps)[1:]
            speed = statistics.median(cast(float, line["tokens_per_second"]) for line in lines)
            spent = [statistics.median(cast(float, line[key]) for line in lines) for key in PHASES]
            cells = " | ".join(f"{seconds:.2f}" for seconds in spent)
            print(f"| {size} | {speed:.0f} | {cells} | {lines[-1]['objective/kl_ref']:.6f} |")
    print(
        f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU; ", end=""
    )
    print(f"torch {torch.__version__}; medians of {given.steps - 1} steps")


if __name__ == "__main__":
    main()
