"""`kleash check --world-size`: what a run would take of so many devices."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from kleash.cli.console import split_overrides
from kleash.config.loading import load_config
from kleash.errors import UsageError
from kleash.preflight import scaling_table


@dataclass(frozen=True)
class Devices:
    """What was asked for."""

    world_size: int
    prompt_tokens: int
    network: float
    """GB/s."""


def predict(
    arguments: tuple[str, ...], devices: Devices, *, base: Path, as_json: bool = False
) -> None:
    """Print the table, or its numbers.

    Raises:
        UsageError: numbers that no machine has.
    """
    if devices.prompt_tokens < 1 or not 0 < devices.network < float("inf"):
        raise UsageError(
            "expected --prompt-tokens of at least 1 and --network above 0, got "
            f"{devices.prompt_tokens} and {devices.network:g}"
        )
    path, overrides = split_overrides(arguments)
    config = load_config(path, overrides, base=base)
    try:
        found, rates = scaling_table.predict_run(
            config,
            world_size=devices.world_size,
            prompt_tokens=devices.prompt_tokens,
            network=devices.network * 1e9,
        )
    except ValueError as error:
        raise UsageError(f"--world-size: {error}") from None
    if as_json:
        print(json.dumps(scaling_table.as_json(found, rates), indent=2))
    else:
        scaling_table.print_predictions(found, rates, Console(highlight=False))
