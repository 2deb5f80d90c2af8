"""Several processes: are they one, how fast, and how much memory does each take?

    python benchmarks/several.py same      1, 2 and 4 processes × ddp, fsdp × PPO, GRPO, RLOO ×
                                           copy, adapter-off: metrics and weights against one
    python benchmarks/several.py speed     tokens a second with 1 process and 2, of one thread each
    python benchmarks/several.py memory    resident memory of a process with a model of 200 M

Every run is started by `torchrun`; kills are in `kill.py`. The model of `speed` is a Llama of 9.7 M
parameters with random weights, a vocabulary of 50,257, 32 prompts a step and 64 new tokens, PPO
with two epochs.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kleash.storage.atomic_directories import load_tensors, verify_checkpoint
from kleash.storage.run_directory import read_run

PHASES = ("time/generate", "time/score", "time/update")
CLOCK = ("seconds", "tokens_per_second")
STRATEGIES = ["none", "ddp", "fsdp"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
MIDDLE = {"hidden_size": 160, "num_hidden_layers": 4, "intermediate_size": 640}
MEDIUM = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1792}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 12, "intermediate_size": 3584}


def even(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of words with an even number: something to learn."""
    ends = [[word[-1] in "02468" for word in response.split()] for response in responses]
    return [sum(words) / max(1, len(words)) for words in ends]


def material(folder: Path, shape: dict[str, Any], words: int) -> Path:
    """A model with random weights, its tokenizer, and prompts."""
    folder.mkdir(exist_ok=True)
    names = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(words - 3))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    heads = shape["hidden_size"] // 32
    config = LlamaConfig(
        vocab_size=words,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    prompts = [
        {"prompt": " ".join(f"w{(i * 7 + j) % (words - 3)}" for j in range(4 + i % 13))}
        for i in range(256)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return folder


def tree(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A configuration with changes; a section is merged."""
    whole: dict[str, Any] = {
        "policy": {"path": str(folder)},
        "reward_models": {"even": {"callable": "several:even"}},
        "prompts": {"train": str(folder / "prompts.jsonl")},
        "rollout": {"prompts_per_step": 32, "max_new_tokens": 64},
        "leash": {"beta": 0.1},
        "algorithm": {"epochs": 2, "minibatches": 1, "microbatch_size": 16},
        "optimizer": {"lr": 1e-3},
        "output": str(output),
    }
    for key, value in changes.items():
        merges = isinstance(value, dict) and key in whole
        whole[key] = {**whole[key], **value} if merges else value
    return whole


def start(config: dict[str, Any], size: int, *, quiet: bool = True) -> subprocess.Popen[str]:
    """A run by so many processes of one thread each, under torchrun."""
    file = Path(config["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [sys.executable, *launch, "-m", "kleash", "train", str(file), "--no-check"]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


def run(config: dict[str, Any], size: int) -> Path:
    """A whole run; its directory."""
    process = start(config, size)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"a process failed:\n{said}")
    return Path(config["output"])


def numbers(path: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if k not in CLOCK and not k.startswith("time/")}
        for line in read_run(path).metrics
    ]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The policy of the newest checkpoint."""
    newest = sorted((path / "checkpoints").glob("step-*"))[-1]
    verify_checkpoint(newest)
    (file,) = (newest / "policy").glob("*.safetensors")
    return load_tensors(file)


def apart(ours: Path, theirs: Path) -> tuple[float, float]:
    """Largest differences of metrics (relative; absolute below 1) and of weights."""
    metrics = max(
        abs(line[key] - value) / max(abs(value), 1.0)
        for line, wanted in zip(numbers(ours), numbers(theirs), strict=True)
        for key, value in wanted.items()
        if value is not None
    )
    held = weights(ours)
    return metrics, max(float((held[n] - t).abs().max()) for n, t in weights(theirs).items())


def same(folder: Path, steps: int) -> None:
    """Row by row, how far each way to divide a run is from one process."""
    place = material(folder / "small", SMALL, 500)
    grouped = {"rollout": {"prompts_per_step": 5, "responses_per_prompt": 2, "max_new_tokens": 8}}
    algorithms = {
        "ppo": {"rollout": {"prompts_per_step": 9, "max_new_tokens": 8}},
        "grpo": {"algorithm": {"name": "grpo"}, **grouped},
        "rloo": {"algorithm": {"name": "rloo"}, **grouped},
    }
    lora = {"path": str(place), "lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}}
    references = {"copy": {}, "adapter_off": {"policy": lora}}
    print("| algorithm | reference | strategy | processes | responses | metrics | weights |")
    print("|---|---|---|---:|---|---:|---:|")
    for algorithm, changes in algorithms.items():
        for reference, more in references.items():
            common = {"steps": steps, "logging": {"samples_per_step": 9}, **changes, **more}
            one = run(tree(place, folder / f"{algorithm}-{reference}-1", **common), 1)
            texts = [(s.step, s.response) for s in read_run(one).samples]
            for strategy in ("ddp", "fsdp"):
                for size in (2, 4):
                    name = folder / f"{algorithm}-{reference}-{strategy}-{size}"
                    divided = {**common, "distributed": {"strategy": strategy}}
                    many = run(tree(place, name, **divided), size)
                    alike = [(s.step, s.response) for s in read_run(many).samples] == texts
                    metrics, held = apart(many, one)
                    words = "identical" if alike else "DIFFERENT"
                    print(
                        f"| {algorithm} | {reference} | {strategy} | {size} | {words} | "
                        f"{metrics:.1e} | {held:.1e} |",
                        flush=True,
                    )


def speed(folder: Path, steps: int, only: list[str]) -> None:
    """Tokens a second, medians over the steps after the first."""
    place = material(folder / "middle", MIDDLE, 50_257)
    print("| processes | strategy | tokens/s | × | generate, s | score, s | update, s |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    first = None
    for strategy in only:
        size = 1 if strategy == "none" else 2
        changes = {"steps": steps, "distributed": {"strategy": strategy}}
        path = run(tree(place, folder / f"speed-{strategy}", **changes), size)
        lines = read_run(path).metrics[1:]
        fast = statistics.median(cast(float, line["tokens_per_second"]) for line in lines)
        spent = [statistics.median(cast(float, line[key]) for line in lines) for key in PHASES]
        first = first or fast
        cells = " | ".join(f"{seconds:.2f}" for seconds in spent)
        print(f"| {size} | {strategy} | {fast:.0f} | {fast / first:.2f} | {cells} |", flush=True)


def memory(folder: Path, only: list[str], shape: dict[str, Any]) -> None:
    """Private resident memory of the largest process, less that of the same run of a tiny model."""
    large, tiny = material(folder / "large", shape, 32_000), material(folder / "tiny", SMALL, 500)
    size_of = sum(t.numel() for t in load_tensors(large / "model.safetensors").values())
    print(f"{size_of / 1e6:.0f} M parameters, {4 * size_of / 2**20:.0f} MiB of weights\n")
    print("| processes | strategy | starting, MiB | between steps, MiB | × | peak, MiB |")
    print("|---:|---|---:|---:|---:|---:|")
    first = None
    for strategy in only:
        size = 1 if strategy == "none" else 2
        found = [
            _watch(memory_run(place, folder / f"{place.name}-{strategy}", strategy), size)
            for place in (tiny, large)
        ]
        begun, steady, highest = (b - a for a, b in zip(*found, strict=True))
        first = first or steady
        share = f"{steady / first:.2f}"
        print(
            f"| {size} | {strategy} | {begun:.0f} | {steady:.0f} | {share} | {highest:.0f} |",
            flush=True,
        )


def memory_run(place: Path, output: Path, strategy: str) -> dict[str, Any]:
    """A run whose weights, gradients and moments are nearly all that it holds."""
    section = {"name": "grpo", "epochs": 1, "minibatches": 1, "microbatch_size": 1}
    few = {"prompts_per_step": 1, "responses_per_prompt": 2, "max_new_tokens": 4}
    changes: dict[str, Any] = {
        "steps": 1000,
        "algorithm": section,
        "rollout": {**few, "microbatch_size": 1},
        "logging": {"samples_per_step": 0, "checkpoint_minutes": 0},
        "tripwires": {"undo": "checkpoint"},
        "leash": {"beta": 0.0},
        "distributed": {"strategy": strategy},
    }
    return tree(place, output, **changes)


def _watch(config: dict[str, Any], size: int) -> tuple[float, float, float]:
    """MiB of a run: most before its directory is there, least from the second step on, most.

    It is killed then.
    """
    process, file = start(config, size), Path(config["output"]) / "metrics.jsonl"
    readings: list[tuple[int, float]] = []
    made = 0
    while process.poll() is None and made <= 6:
        held = [_resident(pid) for pid in descendants(process.pid)]
        made = 1 + len(file.read_text().splitlines()) if file.is_file() else 0
        if len(held) >= size:
            readings.append((made, max(held)))
        time.sleep(0.05)
    for pid in [process.pid, *descendants(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    _, said = process.communicate()
    if made <= 6:
        raise SystemExit(f"the run ended before its sixth step:\n{said}")
    begun = max(held for made, held in readings if not made)
    later = [held for made, held in readings if made >= 3]
    return begun, min(later), max(held for _, held in readings)


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def _resident(pid: int) -> float:
    """Private resident memory: what libraries and mapped files share is left out."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (OSError, ProcessLookupError):
        return 0.0
    rows = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
    return (int(rows["Private_Dirty"])) / 1024


def machine() -> str:
    """What it was measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{model}, {os.cpu_count()} cores, no GPU; torch {torch.__version__}"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["same", "speed", "memory"])
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--small", action="store_true", help="`memory` with a model of 50 M")
    parser.add_argument("--only", nargs="*", help="strategies of `speed` and `memory`")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        match given.what:
            case "same":
                same(Path(name), given.steps or 10)
            case "speed":
                speed(Path(name), given.steps or 6, given.only or STRATEGIES)
            case _:
                memory(Path(name), given.only or STRATEGIES, MEDIUM if given.small else LARGE)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
