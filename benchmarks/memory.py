"""Predicted memory of a step against what a process really takes: the table of docs/scaling.md.

    python benchmarks/memory.py                 # three sizes, one process each
    python benchmarks/memory.py --sizes small
    python benchmarks/memory.py --processes 2   # ddp and fsdp, by torchrun, each with its own rows
    python benchmarks/memory.py --heap default  # with the holes that the C library leaves

Each case is a process of its own, or two: it trains a tiny model, so that all libraries are loaded,
notes its resident memory, builds policy and reference with random weights, and makes two updates of
two microbatches each (forward, KL to the reference over the vocabulary, backward, AdamW). Its
highest resident memory less the noted one, of two processes the larger, is compared with
`kleash.preflight.memory.predict`. Exits 1 where the two differ by more than 15 %.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kleash.mesh import Mesh, joined
from kleash.models.frozen_weights import divided_copy, frozen_copy
from kleash.models.gradients_in_place import embedding_gradient_in_place
from kleash.models.lm_head import read_head
from kleash.models.lora import AdapterSpec, add_adapter
from kleash.models.precision import Precision, weights_dtype
from kleash.models.recomputation import enable_recomputation
from kleash.models.sharded_loading import weights_on_meta
from kleash.models.sharding import (
    Sharding,
    blueprint,
    device_mesh,
    gather_ends,
    materialise,
    own,
    release,
    shard,
)
from kleash.models.trunk import start, trunk_of, trunk_states
from kleash.preflight.memory import Strategy, Workload, predict
from kleash.scoring import token_scores
from kleash.scoring.tiles import default_tiles
from kleash.training.optimization import clip_gradients
from kleash.training.optimizers import make_optimizer

Shape = tuple[int, int, int, int]
SIZES: dict[str, Shape] = {  # width, layers, heads, words
    "tiny": (32, 2, 2, 100),
    "small": (384, 6, 6, 8_000),
    "middle": (512, 8, 8, 16_000),
    "large": (768, 10, 12, 32_000),
}
VARIANTS: dict[str, dict[str, object]] = {
    "float32": {},
    "bf16": {"precision": "bf16"},
    "recomputed": {"gradient_checkpointing": True},
    "adapter": {"adapter": 8},
}
ROWS, PROMPT, RESPONSE = 4, 64, 128
SHARED = ("float32", "bf16")
"""Variants that are measured with two processes."""
LIMIT = 0.15
HEAPS = {"returned": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "default": {}}
"""glibc keeps freed blocks of up to 32 MiB (fsdp: 2 MiB) and their holes, which no run needs."""


def measure(size: str, variant: str, strategy: Strategy) -> None:
    """In the process of its own: print prediction and measurement in bytes."""
    with joined(300) as mesh:
        load = workload(variant)
        # What is loaded and cached by first calls is no run's: a tiny model makes them all.
        train(SIZES["tiny"], load, strategy, mesh)
        before = resident()
        train(SIZES[size], load, strategy, mesh)
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        largest = max(mesh.gather(highest - before))
        shape = model_config(SIZES[size])
        expected = predict(shape, load, strategy=strategy, world_size=mesh.size).peak
        if mesh.is_first:
            print(json.dumps({"predicted": expected, "measured": largest}))


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def model_config(shape: Shape) -> LlamaConfig:
    width, layers, heads, words = shape
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=words,
    )


def workload(variant: str) -> Workload:
    settings: dict[str, Any] = dict(VARIANTS[variant])
    rank = settings.pop("adapter", None)
    return Workload(
        **settings,
        adapter=None if rank is None else AdapterSpec(rank=rank),
        reference=rank is None,
        update_rows=ROWS,
        rollout_rows=0,
        prompt_tokens=PROMPT,
        response_tokens=RESPONSE,
        microbatches=2,
    )


@dataclass(frozen=True)
class Models:
    """Policy and reference; `adapter` is the peft model around the policy, if there is one."""

    model: PreTrainedModel
    reference: PreTrainedModel
    adapter: Any

    def reference_states(self, parts: tuple[Tensor, ...], precision: Precision) -> Tensor:
        off = contextlib.nullcontext() if self.adapter is None else self.adapter.disable_adapter()
        with off, torch.no_grad():
            return states(self.reference, parts, precision)


def build(shape: Shape, load: Workload, strategy: Strategy, mesh: Mesh) -> Models:
    """Random weights; divided ones are never whole."""
    config, cpu = model_config(shape), torch.device("cpu")
    if strategy != "fsdp":
        dtype = getattr(torch, weights_dtype(load.precision, frozen=load.adapter is not None))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        wrapped = None if load.adapter is None else add_adapter(model, load.adapter)
        return Models(model, model if wrapped else frozen_copy(model, load.precision), wrapped)
    sharding = Sharding(device_mesh(cpu, mesh.size), cpu, load.precision)
    with weights_on_meta():
        model = AutoModelForCausalLM.from_config(config).eval()
    structure = blueprint(model)
    shard(model, sharding.mesh, precision=load.precision)
    materialise(model, cpu)
    with torch.no_grad():
        for parameter in model.parameters():
            own(parameter).normal_(std=0.02)
    start(model, cpu)
    return Models(model, divided_copy(sharding, structure, model), None)


def train(shape: Shape, load: Workload, strategy: Strategy, mesh: Mesh) -> None:
    """Two updates of two microbatches each."""
    models = build(shape, load, strategy, mesh)
    if load.gradient_checkpointing:
        enable_recomputation(trunk_of(models.model))
    learning = [p for p in models.model.parameters() if p.requires_grad]
    optimizer = make_optimizer([{"params": learning, "lr": 1e-5, "peak_lr": 1e-5}])
    for _ in range(2):
        for _ in range(load.microbatches):
            loss(models, load, words=shape[-1], divided=strategy == "fsdp").backward()
        release(models.model)
        release(models.reference)
        if strategy == "ddp":
            mesh.add([p.grad for p in learning if p.grad is not None])
        clip_gradients(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def loss(models: Models, load: Workload, *, words: int, divided: bool) -> Tensor:
    """KL and log-probabilities of random responses, read and walked as an update does."""
    ids = torch.randint(words, (ROWS, PROMPT + RESPONSE))
    mask = torch.ones_like(ids, dtype=torch.bool)
    parts = (ids[:, :PROMPT], mask[:, :PROMPT], ids[:, PROMPT:], mask[:, PROMPT:])
    whole = contextlib.nullcontext() if divided else embedding_gradient_in_place(models)
    with whole:
        ours = states(models.model, parts, load.precision)
    theirs = models.reference_states(parts, load.precision)
    gather_ends(models.model)
    gather_ends(models.reference)
    rows = [s[:, :-1].reshape(-1, s.shape[-1]) for s in (ours, theirs)]
    tiles = default_tiles(ids.device)
    scores = token_scores(
        rows[0],
        read_head(models.model, words),
        ids[:, PROMPT:].reshape(-1),
        reference=(rows[1], read_head(models.reference, words)),
        want=("logprobs", "kl"),
        tiles=replace(tiles, weight_gradients="returned" if divided else "in_place"),
    )
    assert scores.logprobs is not None and scores.kl is not None
    return (scores.kl - scores.logprobs).mean()


def states(model: PreTrainedModel, parts: tuple[Tensor, ...], precision: Precision) -> Tensor:
    prompt_ids, prompt_mask, response_ids, response_mask = parts
    return trunk_states(
        trunk_of(model),
        prompt_ids,
        prompt_mask,
        response_ids,
        response_mask,
        model=model,
        precision=precision,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES)[1:], choices=SIZES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2])
    parser.add_argument("--heap", default="returned", choices=HEAPS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return measure(*given.one)
    print("| model | run | predicted, MiB | measured, MiB | off by |")
    print("|---|---|---|---|---|")
    good = True
    one = given.processes == 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ways = [
        (variant, strategy)
        for variant in given.variants
        for strategy in (["none"] if one else ["ddp", "fsdp"])
        if one or variant in SHARED
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | HEAPS[given.heap]
    for size in given.sizes:
        for variant, strategy in ways:
            start = [sys.executable, *([] if one else launcher), __file__]
            command = [*start, "--one", size, variant, strategy]
            made = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
            found = json.loads(made.stdout.splitlines()[-1])
            off = found["predicted"] / found["measured"] - 1
            good = good and abs(off) <= LIMIT
            numbers = f"{found['predicted'] / 2**20:.0f} | {found['measured'] / 2**20:.0f}"
            name = variant if one else f"{variant}, {strategy}"
            print(f"| {size} | {name} | {numbers} | {off:+.1%} |", flush=True)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
