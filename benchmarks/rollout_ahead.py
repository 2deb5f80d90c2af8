"""Iterations per second with `rollout.ahead: 0` and `1`: `python benchmarks/rollout_ahead.py`.

A vLLM server writes on one core and the trainer updates on another, one thread each, so what
overlaps is what two devices would overlap. The model is that of 9.7 M parameters of `rollouts.py`,
with random weights and the GPT-2 tokenizer of ../shared/real; the algorithm is RLOO. With `ahead`
the next rollout is written beside the update, not beside the scoring:

    time of a step = write + score + update    or    score + max(write, update)

Needs vLLM: see docs/rollouts.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rollouts import SHAPES, random_policy
from transformers import AutoTokenizer

from kleash.config.loading import parse_config
from kleash.storage.run_directory import read_run
from kleash.training.loop import train

REAL = Path("../shared/real")
TIMES = ("seconds", "time/generate", "time/score", "time/update")


def count_e(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that costs nothing."""
    del prompts
    return [float(text.count("e")) for text in responses]


def tree_of(folder: Path, arguments: argparse.Namespace, ahead: int) -> dict[str, Any]:
    """The run."""
    url = f"http://127.0.0.1:{arguments.port}"
    return {
        "policy": {"path": str(folder / "policy")},
        "reward_models": {"e": {"callable": "rollout_ahead:count_e"}},
        "prompts": {"train": str(REAL / "prompts/story-openings.jsonl")},
        "rollout": {
            "engine": "vllm",
            "vllm": {"url": url, "enforce_eager": True, "kv_cache_gib": 1.0},
            "prompts_per_step": arguments.prompts // 4,
            "responses_per_prompt": 4,
            "max_new_tokens": arguments.tokens,
            "ahead": ahead,
            "correction": "sequence_truncated",
        },
        "leash": {"beta": 0.05},
        "algorithm": {"name": "rloo", "microbatch_size": 16},
        "logging": {"checkpoint_every": 0, "checkpoint_minutes": 0.0, "spot_check_every": 0},
        "optimizer": {"lr": 1e-5},
        "steps": arguments.steps,
        "output": str(folder / f"ahead-{ahead}"),
    }


@contextmanager
def served(file: Path, port: int) -> Generator[None]:
    """A server on the second core, while it answers."""
    command = [sys.executable, "-m", "kleash", "serve-rollouts", str(file), "--port", str(port)]
    process = subprocess.Popen(command, preexec_fn=lambda: os.sched_setaffinity(0, {1}))
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit("the server ended")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64, help="responses of a step")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--port", type=int, default=8017)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_policy(SHAPES["9.7 M"]).model.save_pretrained(folder / "policy")
        tokenizer = AutoTokenizer.from_pretrained(REAL / "models/gpt2-tokenizer-only")
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder / "policy")
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(tree_of(folder, arguments, 0)))
        found: dict[str, Any] = {}
        with served(file, arguments.port):
            os.sched_setaffinity(0, {0})
            for ahead in (0, 1):
                run = train(parse_config(tree_of(folder, arguments, ahead), where="here"))
                # The first step has nothing written ahead, and nothing is beside the last update.
                lines: list[dict[str, Any]] = [dict(line) for line in read_run(run).metrics]
                rows = [row for row in lines if 1 < row["step"] < arguments.steps]
                both = [lines[0], *rows]
                steps = [b["seconds"] - a["seconds"] for a, b in zip(both, rows, strict=False)]
                found[f"ahead {ahead}"] = {
                    "step_s": statistics.median(steps),
                    **{key: statistics.median(row[key] for row in rows) for key in TIMES[1:]},
                }
        found["rate"] = found["ahead 0"]["step_s"] / found["ahead 1"]["step_s"]
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
