"""Predicted memory of a step against what a process really takes: the table of docs/scaling.md.

    python benchmarks/memory.py                 # three sizes, one process each
    python benchmarks/memory.py --sizes small
    python benchmarks/memory.py --processes 2   # ddp and fsdp, by torchrun, each with its own rows

Each case is a process of its own, or two: it loads the libraries, notes its resident memory, builds
policy and reference with random weights, and makes two updates of one microbatch each (forward, KL
to the reference over the vocabulary, backward, AdamW). Its highest resident memory less the noted
one, of two processes the larger, is compared with `kleash.preflight.memory.predict`. Exits 1 where
the two differ by more than 15 %.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kleash.mesh import Mesh

SIZES = {  # width, layers, heads, words
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
HEAP = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
"""Freed tensors go back at once: glibc would keep holes of up to 32 MiB, which no run needs."""


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(size: str, variant: str, strategy: str) -> None:
    """In the process of its own: print prediction and measurement in bytes."""
    from kleash.mesh import joined

    with joined(300) as mesh:
        expected, found = predicted_and_measured(size, variant, strategy, mesh)
        largest = max(mesh.gather(found))
        if mesh.is_first:
            print(json.dumps({"predicted": expected, "measured": largest}))


def predicted_and_measured(size: str, variant: str, strategy: Any, mesh: "Mesh") -> tuple[int, int]:
    """Bytes of this process."""
    # So late because resident memory is noted once everything is loaded.
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from kleash.models.frozen_weights import divided_copy, frozen_copy
    from kleash.models.lm_head import read_head
    from kleash.models.lora import AdapterSpec, add_adapter
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
    from kleash.preflight.memory import Workload, predict
    from kleash.scoring import token_scores
    from kleash.training.optimizers import make_optimizer

    width, layers, heads, words = SIZES[size]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=words,
    )
    settings = dict(VARIANTS[variant])
    rank = settings.pop("adapter", None)
    adapter = None if rank is None else AdapterSpec(rank=int(str(rank)))
    load = Workload(
        **settings,  # pyright: ignore[reportArgumentType]
        adapter=adapter,
        update_rows=ROWS,
        rollout_rows=0,
        prompt_tokens=PROMPT,
        response_tokens=RESPONSE,
    )
    expected = predict(config, load, strategy=strategy, world_size=mesh.size).peak
    # The first call of each library function loads code and makes caches: before the note.
    update(torch.nn.Linear(4, 4))
    before = peak()
    device = torch.device("cpu")
    if strategy == "fsdp":
        sharding = Sharding(device_mesh(device, mesh.size), device, load.precision)
        with weights_on_meta():
            model = AutoModelForCausalLM.from_config(config).eval()
        structure = blueprint(model)
        shard(model, sharding.mesh, precision=load.precision)
        materialise(model, device)
        with torch.no_grad():
            for parameter in model.parameters():
                own(parameter).normal_(std=0.02)
        start(model, device)
        reference = divided_copy(sharding, structure, model)
    else:
        model = AutoModelForCausalLM.from_config(config).eval()
        reference = model if adapter else frozen_copy(model, load.precision)
    wrapped = add_adapter(model, adapter) if adapter else None
    if load.gradient_checkpointing:
        enable_recomputation(trunk_of(model))
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer([{"params": learning, "lr": 1e-5, "peak_lr": 1e-5}])
    ids = torch.randint(words, (ROWS, PROMPT + RESPONSE))
    mask = torch.ones_like(ids, dtype=torch.bool)
    parts = (ids[:, :PROMPT], mask[:, :PROMPT], ids[:, PROMPT:], mask[:, PROMPT:])
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        for _ in range(2):
            if wrapped is None:
                with torch.no_grad():
                    base = trunk_states(
                        trunk_of(reference), *parts, model=reference, precision=load.precision
                    )
            else:
                with wrapped.disable_adapter(), torch.no_grad():
                    base = trunk_states(trunk_of(model), *parts, precision=load.precision)
            states = trunk_states(trunk_of(model), *parts, model=model, precision=load.precision)
            gather_ends(model)
            gather_ends(reference)
            rows = [s[:, :-1].reshape(-1, width) for s in (states, base)]
            scores = token_scores(
                rows[0],
                read_head(model, words),
                ids[:, PROMPT:].reshape(-1),
                reference=(rows[1], read_head(reference, words)),
                want=("logprobs", "kl"),
            )
            assert scores.logprobs is not None and scores.kl is not None
            (scores.kl - scores.logprobs).mean().backward()
        release(model)
        release(reference)
        if strategy == "ddp":
            mesh.add([p.grad for p in learning if p.grad is not None])
        optimizer.step()
    return expected, peak() - before


def update(layer: "object") -> None:
    """One tiny step of everything, so that what is loaded on first use is loaded."""
    import torch

    from kleash.scoring import token_scores
    from kleash.training.optimizers import make_optimizer
    from kleash.types import Head

    assert isinstance(layer, torch.nn.Linear)
    optimizer = make_optimizer([{"params": [layer.weight], "lr": 1e-5, "peak_lr": 1e-5}])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = torch.nn.functional.scaled_dot_product_attention(*[layer(torch.ones(1, 4, 4))] * 3)
    head = Head(weight=torch.eye(4))
    found = token_scores(hidden[0].float(), head, torch.tensor([0, 1, 2, 3]), want=("logprobs",))
    assert found.logprobs is not None
    found.logprobs.sum().backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2])
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
    for size in given.sizes:
        for variant, strategy in ways:
            start = [sys.executable, *([] if one else launcher), __file__]
            command = [*start, "--one", size, variant, strategy]
            made = subprocess.run(command, capture_output=True, text=True, check=True, env=HEAP)
            found = json.loads(made.stdout.splitlines()[-1])
            off = found["predicted"] / found["measured"] - 1
            good = good and abs(off) <= LIMIT
            numbers = f"{found['predicted'] / 2**20:.0f} | {found['measured'] / 2**20:.0f}"
            name = variant if one else f"{variant}, {strategy}"
            print(f"| {size} | {name} | {numbers} | {off:+.1%} |", flush=True)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
