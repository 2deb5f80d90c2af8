"""The audit beside the loop that one would write: speed and memory, and whether memory is flat.

    python benchmarks/audit_speed.py --runs 3   # both in turns, on 50,257 words and ragged lengths
    python benchmarks/audit_speed.py --flat     # the audit on 1,000 and on 20,000 texts

The loop: transformers, batches of texts in the order of the file, padded, all logits of both models
at once, log-softmax, sums over the vocabulary. The audit: `kleash.audit(texts=…)` with batches of
as many tokens as a batch of the loop has on average. Both give the KL in both directions, both
entropies, both log-probabilities and the top-1 agreement of every token; the means must agree.
Each runs in a process of its own; memory is that process's peak resident set.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from kleash.auditing import audit
from kleash.auditing.inputs import Source
from kleash.auditing.model_pair import load_pair

BATCH = 8
TEXTS = 48
MEASURED = ("seconds", "cpu", "peak")


def make_pair(folder: Path, *, words: int, width: int, layers: int) -> None:
    """Two Llamas that are near each other, with a tokenizer of so many words."""
    vocabulary = {"<unk>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, words)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name in ("reference", "policy"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))


def write_texts(file: Path, *, count: int, words: int, longest: int, median: float) -> None:
    """Texts of log-normal lengths, from 8 words to `longest`."""
    generator = torch.Generator().manual_seed(1)
    with file.open("w") as stream:
        for _ in range(count):
            size = median * torch.randn(1, generator=generator).mul(0.8).exp().item()
            length = int(min(max(size, 8), longest))
            ids = torch.randint(2, words, (length,), generator=generator).tolist()
            stream.write(json.dumps({"text": " ".join(f"w{i}" for i in ids)}) + "\n")


def run_audit(folder: Path, batch_tokens: int) -> dict[str, Any]:
    """Mean KL per token, tokens and seconds of kleash."""
    pair = load_pair(folder / "policy", folder / "reference")
    began, used = time.perf_counter(), time.process_time()
    found = audit(
        pair.policy, pair.reference, texts=folder / "texts.jsonl", batch_tokens=batch_tokens, keep=2
    )
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    measures, part = found.parts[0].measures, found.parts[0]
    return {
        "kl": measures["kl"].per_token.mean,
        "reverse_kl": measures["reverse_kl"].per_token.mean,
        "same_top": measures["same_top"].per_token.mean,
        "tokens": part.tokens,
        "seconds": seconds,
        "cpu": cpu,
    }


@torch.no_grad()
def run_loop(folder: Path, _batch_tokens: int) -> dict[str, Any]:
    """The same numbers from whole logits."""
    pair = load_pair(folder / "policy", folder / "reference")
    sums: dict[str, float] = {"kl": 0.0, "reverse_kl": 0.0, "same_top": 0.0, "rest": 0.0}
    tokens = 0
    began, used = time.perf_counter(), time.process_time()
    for ids, mask in _padded(pair, folder / "texts.jsonl"):
        p, q = (
            side.model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
            for side in (pair.policy, pair.reference)
        )
        real = mask[:, 1:].bool()
        target = ids[:, 1:, None]
        sums["kl"] += float((p.exp() * (p - q)).sum(-1)[real].sum())
        sums["reverse_kl"] += float((q.exp() * (q - p)).sum(-1)[real].sum())
        sums["same_top"] += float((p.argmax(-1) == q.argmax(-1))[real].sum())
        for one in (p, q):
            sums["rest"] += float((one.exp() * one).sum(-1)[real].sum())
            sums["rest"] += float(one.gather(-1, target)[..., 0][real].sum())
        tokens += int(real.sum())
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    means = {name: value / tokens for name, value in sums.items() if name != "rest"}
    return {**means, "tokens": tokens, "seconds": seconds, "cpu": cpu}


def _padded(pair: Any, file: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    items = list(Source("texts", file).items(pair.policy.tokenizer, pair.context))
    for start in range(0, len(items), BATCH):
        rows = [(*i.prompt_ids, *i.response_ids) for i in items[start : start + BATCH]]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[1] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        yield ids, mask


def measure(what: str, folder: Path, batch_tokens: int) -> dict[str, Any]:
    """Run one of the two in a process of its own."""
    command = [sys.executable, __file__, "--child", what, str(folder), str(batch_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(what: str, folder: Path, batch_tokens: int) -> None:
    """Print what one of the two found, and its peak memory in MiB."""
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"audit": run_audit, "loop": run_loop}[what](folder, batch_tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**found, "idle": idle, "peak": peak}))


def beside(runs: int) -> None:
    """The table of speed and memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pair(folder, words=50_257, width=256, layers=4)
        write_texts(folder / "texts.jsonl", count=TEXTS, words=50_257, longest=511, median=100.0)
        lengths = [
            len(json.loads(line)["text"].split())
            for line in (folder / "texts.jsonl").read_text().splitlines()
        ]
        batch_tokens = max(511, BATCH * sum(lengths) // len(lengths))
        print(f"{TEXTS} texts, {sum(lengths):,} tokens, {min(lengths)}…{max(lengths)} each")
        print("| | tokens/s | tokens/CPU-s | peak MiB | KL per token | reverse | top-1 |")
        print("|---|---|---|---|---|---|---|", flush=True)
        found: dict[str, list[dict[str, Any]]] = {"audit": [], "loop": []}
        for what in runs * tuple(found):
            one = measure(what, folder, batch_tokens)
            found[what].append(one)
            print(
                f"| {what} | {one['tokens'] / one['seconds']:,.0f} "
                f"| {one['tokens'] / one['cpu']:,.0f} | {one['peak']:,.0f} "
                f"| {one['kl']:.6f} | {one['reverse_kl']:.6f} | {one['same_top']:.5f} |",
                flush=True,
            )
    ours, loop = (
        {name: statistics.median(one[name] for one in found[what]) for name in MEASURED}
        for what in ("audit", "loop")
    )
    print(
        f"medians: {loop['seconds'] / ours['seconds']:.2f} × the speed, "
        f"{loop['cpu'] / ours['cpu']:.2f} × the tokens of a CPU-second, "
        f"{ours['peak'] / loop['peak']:.2f} × the memory"
    )


def flat() -> None:
    """Peak memory on few texts and on many."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pair(folder, words=2_000, width=32, layers=2)
        print("| texts | tokens | seconds | peak MiB |")
        print("|---|---|---|---|")
        for count in (1_000, 5_000, 20_000):
            write_texts(folder / "texts.jsonl", count=count, words=2_000, longest=200, median=30.0)
            one = measure("audit", folder, 2048)
            print(
                f"| {count:,} | {one['tokens']:,} | {one['seconds']:.0f} | {one['peak']:,.0f} |",
                flush=True,
            )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    if given.child:
        child(given.child[0], Path(given.child[1]), int(given.child[2]))
        return
    logging.disable_progress_bar()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    flat() if given.flat else beside(given.runs)


if __name__ == "__main__":
    main()
