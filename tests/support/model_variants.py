"""Set-ups without a fault, of which no check may complain."""

from collections.abc import Callable
from typing import Any

import tiny_models
from fault_patches import chat, reward_by, set_key, several
from fault_types import World, save_policy


def other_tokenizer(**settings: Any) -> Callable[[World], None]:
    """A policy of another tokenizer; the judge keeps its own."""

    def plant(world: World) -> None:
        tok = tiny_models.tokenizer(**settings)
        world.set("policy.path", str(save_policy(world.folder / "own", world.kind, tok=tok)))

    return plant


def padded_rows(world: World) -> None:
    tok = tiny_models.tokenizer(bos="<bos>")
    path = save_policy(world.folder / "padded", world.kind, tok=tok, rows=len(tok) + 7)
    world.set("policy.path", str(path))


def another_reference(world: World) -> None:
    path = str(world.material / "other")
    world.set("reference", {"path": path, "reference_differs": True})


VARIANTS: dict[str, Callable[[World], None]] = {
    "as it is": several(),
    "temperature 0.7": set_key("rollout.temperature", 0.7),
    "padding is the end token": other_tokenizer(pad="<eos>"),
    "one token begins and ends": other_tokenizer(bos="<eos>"),
    "a chat template": lambda world: chat(world, "hello"),
    "an adapter": set_key("policy.lora", {"rank": 2}),
    # Rounded by chance, so that updates smaller than half a step of such weights survive.
    "pure bfloat16": several(
        set_key("policy.precision", "pure_bf16"), set_key("optimizer.rounding", "stochastic")
    ),
    "float32 weights, computed in bfloat16": set_key("policy.precision", "bf16"),
    "a value model of its own": several(
        set_key("algorithm", {"value": {"kind": "model", "path": "{m}/reward"}})
    ),
    "a budget": set_key("leash", {"target_kl": 3.0}),
    "the exact placement": set_key("leash", {"beta": 0.2, "placement": "exact"}),
    "eager attention, a callable reward": several(
        set_key("policy.attention", "eager"), reward_by("short")
    ),
    "a padded vocabulary": padded_rows,
    "another reference, on purpose": another_reference,
    "scores in the hundreds": several(
        set_key("reward_models.rm.weight", 300.0), set_key("leash.beta", 60.0)
    ),
}
"""Set-ups without a fault: nothing may fail."""
