"""What does a reference cost beside an adapter: none of its own, or a frozen copy?

    python benchmarks/lora_memory.py

A Llama of about 100 million random parameters in float32, a LoRA adapter of rank 8 on it, `kleash
train` with `reference.kind: adapter_off` and `copy`, each in a process of its own: the same
prompts, seed and responses. Peak memory is that of the process while it trains and saves (Linux:
VmHWM, reset once everything is loaded), above what the libraries hold. The KL is the run's own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KINDS = ("adapter_off", "copy")
STEPS, VOCABULARY = 4, 16_000


def prefer_even(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that any model can climb: the share of words with an even number."""
    words = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in responses]
    return [sum(n % 2 == 0 for n in row) / max(1, len(row)) for row in words]


def save_model(folder: Path) -> int:
    """A random model and its tokenizer; how many parameters it has."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            intermediate_size=2048,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            eos_token_id=1,
            bos_token_id=1,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def memory(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {key} here: this needs Linux")


def work(kind: str, folder: Path) -> None:
    """One run; prints what it held and how far it went as JSON."""
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    import kleash.training.loop
    import kleash.training.startup
    from kleash.config.loading import parse_config
    from kleash.storage.run_directory import read_run

    torch.set_num_threads(1)
    held: dict[str, float] = {}
    assemble = kleash.training.startup.assemble

    def measured(config: Any) -> Any:
        held["libraries"] = memory("VmRSS")
        components = assemble(config)
        held["loading"] = memory("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")
        return components

    kleash.training.startup.assemble = measured
    tree: dict[str, Any] = {
        "policy": {"path": str(folder / "model"), "lora": {"rank": 8, "alpha": 16}},
        "reference": {"kind": kind},
        "reward_models": {"even": {"callable": "lora_memory:prefer_even"}},
        "prompts": {"train": str(folder / "prompts.jsonl")},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 12},
        "leash": {"beta": 0.01},
        "tripwires": {"stop_kl": 1000},
        "optimizer": {"lr": 3e-3},
        "logging": {"samples_per_step": 0},
        "steps": STEPS,
        "device": "cpu",
        "output": str(folder / kind),
    }
    os.dup2(2, 1)  # the display goes elsewhere
    path = kleash.training.loop.train(parse_config(tree, where="the benchmark"))
    held["training"] = memory("VmHWM")
    kls = [line["objective/kl_ref"] for line in read_run(path).metrics]
    (folder / f"{kind}.json").write_text(json.dumps({"held": held, "kls": kls}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a reference beside an adapter.")
    parser.add_argument("--work", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work[0], Path(arguments.work[1]))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = save_model(folder / "model")
        prompts = [json.dumps({"prompt": f"w{7 * i} w{11 * i + 1} w{i}"}) for i in range(32)]
        (folder / "prompts.jsonl").write_text("\n".join(prompts))
        for kind in KINDS:
            command = [sys.executable, __file__, "--work", kind, name]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            found[kind] = json.loads((folder / f"{kind}.json").read_text())
    print(f"{platform.machine()}, one thread; {parameters / 1e6:.1f} million parameters, float32")
    print(
        "| reference | peak above the libraries, MiB | peak in all, MiB | KL at each step, nats |"
    )
    print("|---|---|---|---|")
    for kind in KINDS:
        held = found[kind]["held"]
        kls = ", ".join(f"{kl:.6f}" for kl in found[kind]["kls"])
        above = held["training"] - held["libraries"]
        print(f"| `{kind}` | {above:.0f} | {held['training']:.0f} | {kls} |")
    above = [found[kind]["held"]["training"] - found[kind]["held"]["libraries"] for kind in KINDS]
    apart = max(abs(a - b) for a, b in zip(*(found[kind]["kls"] for kind in KINDS), strict=True))
    print(f"ratio {above[0] / above[1]:.3f}; KL curves at most {apart:.1e} nats apart")


if __name__ == "__main__":
    main()
