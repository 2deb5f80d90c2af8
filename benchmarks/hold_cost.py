"""What does holding the leash cost: controller, identity, tripwires, undoing, saving?

    python benchmarks/hold_cost.py
    python benchmarks/hold_cost.py --rounds 3 --save 100

First the shipped recipe of the embedded world with a budget and every tripwire: time spent in each
part that holds the leash, as a share of the iteration. Then saving: a checkpoint of a whole state
(policy, critic, both moments; `--save` million parameters) beside plainly writing and flushing
files of the same sizes, in turns, medians. One thread.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kleash.training.loop
from kleash.algorithms.rewards import ScoreStatistics
from kleash.config.loading import load_config, parse_config
from kleash.config.recipe_library import FOLDER
from kleash.kl.control.controllers import BudgetBeta
from kleash.kl.control.groups import OTHERS
from kleash.models.fingerprint import weights_sha256
from kleash.models.loading import quiet
from kleash.models.policy import Identity
from kleash.playground.build import build_world, with_world
from kleash.rollout.prompts import PromptCursor
from kleash.storage.atomic_directories import drop_directory
from kleash.storage.run_directory import read_run
from kleash.training.components import Components
from kleash.training.state import TrainingState, save_run_state

PARTS: dict[str, tuple[Any, str]] = {
    "controller": (BudgetBeta, "update"),
    "identity: sum of the weights": (kleash.training.loop, "require_unchanged"),
    "tripwires": (kleash.training.loop, "check_bounds"),
    "copy to undo the step": (kleash.training.loop, "attempt_step"),
}


def timed(owner: Any, name: str, spent: list[float]) -> None:
    """Note the duration of every call of a function."""
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = inner(*args, **kwargs)
        spent.append(time.perf_counter() - began)
        return result

    setattr(owner, name, outer)


def shares(steps: int, folder: Path) -> None:
    """Each part's share of an iteration of the embedded world's recipe."""
    world, path = build_world(0), FOLDER / "embedded-world.yaml"
    overrides = {"steps": str(steps), "output": str(folder / "run"), "heldout.every": "0"}
    tree = with_world(load_config(path, overrides, base=path), world).model_dump()
    tree["leash"] |= {"beta": None, "target_kl": 2.0}
    tree["tripwires"] |= {"stop_kl": 100.0, "min_entropy": 1e-3}
    spent: dict[str, list[float]] = {part: [] for part in PARTS}
    for part, (owner, name) in PARTS.items():
        timed(owner, name, spent[part])
    run = read_run(kleash.training.loop.train(parse_config(tree, where="the benchmark")))
    # Wall time of a step as the run tells it, which leaves out saving and held-out evaluation.
    seconds = [cast(float, line["seconds"]) for line in run.metrics[1:]]
    whole = statistics.median(b - a for a, b in pairwise(seconds))
    print(f"\niteration: {1000 * whole:.0f} ms (median of {steps - 1})\n")
    print("| part | ms per iteration | share |\n|---|---|---|")
    total = 0.0
    for part, times in spent.items():
        median = statistics.median(times[1:])
        total += median
        print(f"| {part} | {1000 * median:.2f} | {100 * median / whole:.2f} % |")
    print(f"| together | {1000 * total:.2f} | {100 * total / whole:.2f} % |")


def saving(millions: int, rounds: int, folder: Path) -> None:
    """A checkpoint beside writing the same bytes."""
    components = components_of(millions)
    betas = {OTHERS: BudgetBeta(1.0, 1.0).init()}
    state = TrainingState(1, 1, betas, ScoreStatistics(), PromptCursor(1, 0))
    identity = Identity("nowhere", "loaded", "float32", "0" * 64)
    parent = folder / "checkpoints"
    save = partial(save_run_state, parent, components, state, identity, keep=1)
    made = save()
    sizes = [file.stat().st_size for file in made.rglob("*") if file.is_file()]
    drop_directory(made)
    ways: dict[str, Callable[[], object]] = {
        "save": save,
        "write": partial(write_plainly, folder / "plain", sizes),
        "hash the reference": lambda: weights_sha256(components.policy.model.named_parameters()),
    }
    spent: dict[str, list[float]] = {what: [] for what in ways}
    for turn in range(rounds):
        for what in list(ways)[:: -1 if turn % 2 else 1]:
            spent[what].append(clocked(ways[what]))
            for directory in parent.iterdir():
                drop_directory(directory)
    write = statistics.median(spent["write"])
    print(f"\n{sum(sizes) / 2**20:.0f} MiB in {len(sizes)} files, {rounds} rounds\n")
    print("| what | s | beside writing |\n|---|---|---|")
    for what, times in spent.items():
        median = statistics.median(times)
        print(f"| {what} | {median:.2f} | {median / write:.2f} × |")


def components_of(millions: int) -> Components:
    """Enough of a run to be saved: a policy, a small critic, and an optimiser with moments."""
    layers = max(1, round(millions / 7.1))
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=768,
        num_hidden_layers=layers,
        intermediate_size=2048,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
    )
    model, value = LlamaForCausalLM(config), torch.nn.Linear(768, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *value.parameters()])
    for parameter in (*model.parameters(), *value.parameters()):
        moments = {name: torch.rand_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.ones(()), **moments}
    policy = SimpleNamespace(model=model, adapter=None, save=model.save_pretrained)
    components = SimpleNamespace(policy=policy, value=value, optimizer=optimizer)
    return cast(Components, components)


def write_plainly(folder: Path, sizes: list[int]) -> None:
    """Files of the given sizes, flushed to the disk."""
    folder.mkdir(exist_ok=True)
    block = os.urandom(2**20)
    for number, size in enumerate(sizes):
        with (folder / str(number)).open("wb") as stream:
            for start in range(0, size, len(block)):
                stream.write(block[: size - start])
            stream.flush()
            os.fsync(stream.fileno())
    for file in folder.iterdir():
        file.unlink()


def clocked(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of holding the leash.")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--save", type=int, default=100, help="million parameters to save")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, one thread, torch {torch.__version__}")
    with quiet(), tempfile.TemporaryDirectory() as name:
        shares(arguments.steps, Path(name))
        saving(arguments.save, arguments.rounds, Path(name))


if __name__ == "__main__":
    main()
