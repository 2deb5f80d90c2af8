"""Does it matter who writes? The same training with `hf` and with `vllm`, by its curves.

`python benchmarks/rollout_curves.py --output FOLDER`: thirty steps of the recipe `stories`, its
batches and responses halved, with three seeds and either engine, on the real model and reward of
../shared/real. The model is written
with heads of 32 numbers, the least that vLLM attends to on a CPU: the other numbers of each head
are zero and stay so, and every logit is what it was (see `with_heads_of`). Runs that are finished
are read and not made again, so engines and seeds may be divided among several calls. Needs vLLM:
see docs/rollouts.md.

What is printed is, of the last third of the steps and then of the seeds, mean and spread of score
and exact KL, and the difference between the engines with its standard error, which treats the runs
as independent. Beside them how far the KL is from its target, and KL(sampler‖policy) per token over
its floor, that of the first rollout.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kleash.config.loading import load_config
from kleash.config.recipe_library import FOLDER
from kleash.storage.run_directory import read_run
from kleash.training.loop import train

REAL = Path("../shared/real")
HEAD = 32
ENGINES = ("hf", "vllm")
COLUMNS = {
    "score": "reward/total",
    "KL, nats per response": "objective/kl_ref",
    "|KL - target|": "",
    "kl_sampler per token": "rollout/kl_sampler_per_token",
}


def with_heads_of(source: Path, folder: Path, size: int) -> Path:
    r"""A Llama whose heads are longer and whose every logit is the same but for rounding.

    Rotary pair i of a head of d numbers, (i, i + d/2), turns with frequency θ^(−2i/d): that of pair
    i·s of a head of s·d numbers, where it goes. The softmax divides by √(s·d) in place of √d, so
    queries are multiplied by √s. Values go to the first d numbers. The rest is zero, and so are
    its gradients: of a product of two zeros.
    """
    if (folder / "config.json").is_file():
        return folder
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before = model.config.head_dim
    factor = size // before
    turned = [i * factor for i in range(before // 2)]
    turned += [place + size // 2 for place in turned]
    places = {"q_proj": turned, "k_proj": turned, "v_proj": list(range(before))}
    state = model.state_dict()
    for name, weight in state.items():
        kind = name.split(".")[-2]
        if kind in places:
            longer = torch.zeros(weight.shape[0] // before, size, weight.shape[1])
            longer[:, places[kind]] = weight.view(-1, before, weight.shape[1])
            scale = math.sqrt(factor) if kind == "q_proj" else 1.0
            state[name] = longer.flatten(0, 1) * scale
        elif kind == "o_proj":
            longer = torch.zeros(weight.shape[0], weight.shape[1] // before, size)
            longer[:, :, :before] = weight.view(weight.shape[0], -1, before)
            state[name] = longer.flatten(1)
    model.config.head_dim = size
    wider = type(model)(model.config)
    wider.load_state_dict(state)
    ids = torch.randint(
        wider.config.vocab_size, (4, 40), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        apart = (wider(ids).logits - model(ids).logits).abs().max()
    assert float(apart) < 1e-4, f"the model with longer heads is another one: {float(apart):.3g}"
    wider.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def run_of(arguments: argparse.Namespace, engine: str, seed: int) -> Path:
    """Where a run goes."""
    return arguments.output / f"{engine}-{seed}"


def make_run(arguments: argparse.Namespace, model: Path, engine: str, seed: int) -> None:
    """One training run, if it is not there yet."""
    if last_third(arguments, engine, seed) is not None:
        return
    given: dict[str, Any] = {
        "policy.path": model,
        "rollout.engine": engine,
        "rollout.prompts_per_step": arguments.prompts,
        "rollout.max_new_tokens": arguments.tokens,
        "leash.target_kl": arguments.target,
        "optimizer.lr": arguments.lr,
        "heldout": None,
        "prompts.heldout": None,
        "steps": arguments.steps,
        "seed": seed,
        "output": run_of(arguments, engine, seed),
    }
    if engine == "vllm":
        given |= {"rollout.vllm.enforce_eager": True, "rollout.vllm.kv_cache_gib": 0.5}
    texts = {key: "none" if value is None else str(value) for key, value in given.items()}
    train(load_config(FOLDER / "stories.yaml", texts, base=FOLDER / "stories.yaml"))


def last_third(arguments: argparse.Namespace, engine: str, seed: int) -> dict[str, float] | None:
    """Means over the last third of a run's steps; None where it is not finished."""
    path = run_of(arguments, engine, seed)
    if not (path / "metrics.jsonl").is_file():
        return None
    rows: list[dict[str, Any]] = [dict(row) for row in read_run(path).metrics]
    steps = [row for row in rows if row["step"] > 0]
    if len(steps) < arguments.steps:
        return None
    last = steps[-(arguments.steps // 3) :]
    found = {
        name: statistics.fmean(float(row[key]) for row in last)
        for name, key in COLUMNS.items()
        if key
    }
    found["|KL - target|"] = statistics.fmean(
        abs(float(row["objective/kl_ref"]) - arguments.target) for row in last
    )
    found["largest kl_sampler / floor"] = max(
        float(row["rollout/kl_sampler_per_token"]) / float(row["rollout/kl_sampler_floor"])
        for row in steps
    )
    return found


def table(arguments: argparse.Namespace) -> list[str]:
    """The rows of the table, as far as the runs are there."""
    found: dict[str, list[dict[str, float]]] = {
        engine: [
            numbers
            for seed in arguments.seeds
            if (numbers := last_third(arguments, engine, seed)) is not None
        ]
        for engine in ENGINES
    }
    rows = ["| last third of the steps | hf | vllm | vllm - hf |", "|---|---|---|---|"]
    if min(len(runs) for runs in found.values()) < 2:
        return [*rows, f"finished so far: { {e: len(runs) for e, runs in found.items()} }"]
    for name in [*COLUMNS, "largest kl_sampler / floor"]:
        cells, means, errors = list[str](), list[float](), list[float]()
        for engine in ENGINES:
            each = [numbers[name] for numbers in found[engine]]
            means.append(statistics.fmean(each))
            errors.append(statistics.stdev(each) / math.sqrt(len(each)))
            cells.append(f"{means[-1]:.4g} ± {statistics.stdev(each):.2g}")
        cells.append(f"{means[1] - means[0]:.2g} ± {math.hypot(*errors):.2g} (s.e.)")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for model and runs")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--target", type=float, default=3.0, help="nats per response")
    parser.add_argument("--lr", type=float, default=3e-4)
    arguments = parser.parse_args()
    name = REAL / "models/stories260K"
    model = with_heads_of(name, arguments.output / "model", HEAD)
    for seed in arguments.seeds:
        for engine in arguments.engines:
            make_run(arguments, model, engine, seed)
    print("\n".join(table(arguments)))


if __name__ == "__main__":
    main()
