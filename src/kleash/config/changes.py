"""What differs between two configurations, and which differences a run can be continued with."""

from typing import Any, cast

from kleash.config.schema import Config

_SAFE_SECTIONS = ("distributed", "logging", "rollout.vllm")
_SAFE_KEYS = (
    "algorithm.keep_logits_mib",
    "algorithm.microbatch_size",
    "algorithm.microbatch_tokens",
    "device",
    "heldout.every",
    "output",
    "rollout.engine",
    "rollout.microbatch_size",
    "rollout.microbatch_tokens",
    "steps",
    "tripwires.undo",
    "tripwires.undo_copy_mib",
)


def config_differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """The keys whose values in force differ, in alphabetical order.

    Returns:
        Dotted key, old value, new value; None where a key is not in force.
    """
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def resumable_change(key: str, *, schedule: str) -> bool:
    """Whether a run may be continued with another value of a key.

    It may where every step already made would have been made the same under the new value, up to
    rounding and random draws: how many steps follow (`steps`, unless the learning rate falls over
    all of them), what is logged and kept (`logging.*`), when it is evaluated (`heldout.every`),
    where it lies (`output`), what writes (`rollout.engine`, `rollout.vllm.*`), and what changes
    memory and speed alone (`distributed.*`, `device`, `rollout.microbatch_size`,
    `rollout.microbatch_tokens`, the same two of `algorithm`, `algorithm.keep_logits_mib`,
    `tripwires.undo`, `tripwires.undo_copy_mib`).

    Args:
        key: a dotted key, as `config_differences` returns it.
        schedule: `optimizer.schedule`, by which the steps were made.
    """
    if key == "steps" and schedule != "constant":
        return False
    return key in _SAFE_KEYS or key.startswith(tuple(f"{name}." for name in _SAFE_SECTIONS))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
