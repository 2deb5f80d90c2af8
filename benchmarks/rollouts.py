"""Tokens per second of both engines that write: `python benchmarks/rollouts.py`.

256 prompts of 32 tokens × 128 new ones, float32, random weights: the shape of 9.7 M parameters (a)
that other benchmarks have, and one of 40 M. No response ends before the limit, or with `--ragged N`
one word in N ends it, so that lengths are geometric. Both engines write the same prompts in
turn, in one process, after a warm-up of each; a rate is the median of the rounds. Beside them the
time of a hand-over with its proof, and of an update, of which an iteration consists. CPU seconds
stand next to wall seconds: on a machine that does other work only their ratios mean something.
Needs vLLM: see docs/rollouts.md.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kleash.models.policy import Policy
from kleash.rollout.engine import TransformersEngine, writing_request
from kleash.rollout.hand_over import hand_over
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec, generate
from kleash.rollout.vllm_engine import VLLMEngine, VLLMSettings, import_vllm, start_vllm

PROMPT = 32
SHAPES: dict[str, dict[str, Any]] = {
    "9.7 M": {
        "vocab_size": 50257,
        "hidden_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "intermediate_size": 640,
    },
    "40 M": {
        "vocab_size": 50257,
        "hidden_size": 384,
        "num_hidden_layers": 9,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "intermediate_size": 1536,
    },
}


def random_policy(sizes: dict[str, Any], *, ragged: int = 0) -> Policy:
    """A model with random weights; no token ends a response, or one in `ragged`."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=512)
    model = LlamaForCausalLM(config).eval()
    tokenizer: Any = _NoTokenizer()
    stops = tuple(range(1, sizes["vocab_size"], ragged)) if ragged else ()
    return Policy(model, tokenizer, "random", sizes["vocab_size"], stops)


class _NoTokenizer:
    """Prompts are token ids; only these are ever asked for."""

    pad_token_id = 0
    bos_token_id = None
    eos_token_id = None


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Wall and CPU seconds of a piece of work."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def update(policy: Policy, ids: torch.Tensor, microbatch: int) -> None:
    """Forward and backward over texts, and a step that moves every weight."""
    parameters = list(policy.model.parameters())
    for part in ids.split(microbatch):
        states: torch.Tensor = policy.model.model(input_ids=part)[0]
        logits = states[:, PROMPT - 1 : -1] @ policy.head.weight.T
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part[:, PROMPT:].flatten()
        ).backward()
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter -= 1e-4 * parameter.grad.sign()
                parameter.grad = None


def vocabulary_parts(sizes: dict[str, Any], rows: int = 64) -> dict[str, float]:
    """CPU milliseconds of one core that vLLM spends on the vocabulary for each token, by part."""
    import_vllm()
    importlib.import_module("vllm._C")  # its kernels
    torch.set_num_threads(1)
    words, width = sizes["vocab_size"], sizes["hidden_size"]
    hidden, weight = torch.randn(rows, width), torch.randn(words, width)
    logits, seeds = torch.randn(rows, words), torch.randint(0, 2**31, (rows,))
    parts: dict[str, Callable[[], Any]] = {
        "head": lambda: hidden @ weight.T,
        "draw": lambda: torch.ops._C.fused_gumbel_argmax(logits, seeds),
        "rank of the drawn word": lambda: (logits >= logits[:, :1]).sum(-1),
        "log-softmax": lambda: logits.log_softmax(-1),
    }
    for work in parts.values():
        work()
    return {name: 1e3 * measured(work)["cpu_s"] / rows for name, work in parts.items()}


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both engines on one shape, in turn."""
    policy = random_policy(SHAPES[name], ragged=arguments.ragged)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(policy.words, (arguments.prompts, PROMPT), generator=generator)
    batch = batch_prompts([Prompt("", tuple(r), i) for i, r in enumerate(rows.tolist())], pad_id=0)
    spec = SamplingSpec(arguments.tokens)
    settings = VLLMSettings(
        max_tokens=PROMPT + arguments.tokens, kv_cache_gib=2.0, enforce_eager=arguments.eager
    )
    started: list[VLLMEngine] = []
    start = measured(lambda: started.append(start_vllm(policy, settings)))
    (served,) = started
    engines = {"hf": TransformersEngine(policy, generate), "vllm": served}
    hand_over(served, policy)
    small = batch_prompts([Prompt("", (5,) * PROMPT, i) for i in range(8)], pad_id=0)
    for engine in engines.values():
        engine.write(writing_request(engine, small, SamplingSpec(8), microbatch=8))
    lengths: list[int] = []
    times: dict[str, list[dict[str, float]]] = {"hf": [], "vllm": [], "update": [], "hand_over": []}
    for _ in range(arguments.rounds):
        kept: list[Any] = []
        for which, engine in engines.items():
            request = writing_request(engine, batch, spec, microbatch=arguments.microbatch)
            times[which].append(measured(lambda e=engine, r=request, k=kept: k.append(e.write(r))))
        lengths += [int(one.response_mask.sum()) for one in kept]
        ids = torch.cat([rows, kept[0].response_ids], dim=1)
        part = ids[: arguments.update_rows]
        one = measured(lambda i=part: update(policy, i, 16))
        times["update"].append({unit: x * len(ids) / len(part) for unit, x in one.items()})
        times["hand_over"].append(measured(lambda: hand_over(served, policy)))
    served.close()
    found: dict[str, Any] = {
        key: {unit: statistics.median(one[unit] for one in each) for unit in each[0]}
        for key, each in times.items()
    }
    total = statistics.median(lengths)
    iteration = sum(found[key]["wall_s"] for key in ("vllm", "update", "hand_over"))
    return {
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "start": start,
        **found,
        "tokens_per_second": {key: total / found[key]["wall_s"] for key in ("hf", "vllm")},
        "vllm_over_hf_wall": found["hf"]["wall_s"] / found["vllm"]["wall_s"],
        "vllm_over_hf_cpu": found["hf"]["cpu_s"] / found["vllm"]["cpu_s"],
        "hand_over_share": found["hand_over"]["wall_s"] / iteration,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--microbatch", type=int, default=256, help="responses hf writes at once")
    parser.add_argument("--ragged", type=int, default=0, help="one word in so many ends a response")
    parser.add_argument("--update-rows", type=int, default=64, help="then scaled to all of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--eager", action="store_true", help="start vLLM without compiling")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--parts", action="store_true", help="only the cost of the vocabulary")
    arguments = parser.parse_args()
    if arguments.parts:
        for name in arguments.shapes:
            print(name, json.dumps(vocabulary_parts(SHAPES[name]), indent=1))
        return
    found = {name: compare(name, arguments) for name in arguments.shapes}
    text = json.dumps(found, indent=1)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
