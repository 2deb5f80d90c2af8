"""`check --world-size`: the table for people and the numbers for programs say the same."""

import io
from dataclasses import fields
from typing import Any

import pytest
from rich.console import Console

from kleash.preflight.memory import Memory
from kleash.preflight.scaling import Prediction, Rates
from kleash.preflight.scaling_table import as_json, print_predictions

PARTS: dict[str, Any] = {field.name: 0 for field in fields(Memory)}
MEMORY = Memory(**{**PARTS, "weights": 3 << 30, "gathered": 5 << 30, "layers": 7 << 20})
FOUND = [Prediction("fsdp", 2, MEMORY, sent=0, computing=1.0, writing=0.0, sending=0.0)]


@pytest.mark.parametrize(
    ("device", "there", "missing"),
    [
        ("cpu", ["0.4 GiB", "holes in the heap", "are smaller than 2 MiB"], ["1 GiB with"]),
        ("cuda", ["1 GiB with the device's context"], ["holes", "0.4 GiB"]),
    ],
)
def test_text_and_json_say_what_is_not_counted(
    device: str, there: list[str], missing: list[str]
) -> None:
    rates = Rates(1e12, 1e11, 1e10, device)
    text = io.StringIO()
    print_predictions(FOUND, rates, Console(file=text, width=1000))
    made = as_json(FOUND, rates)
    assert made["not_counted"] in text.getvalue()
    assert all(words in made["not_counted"] for words in there)
    assert not any(words in made["not_counted"] for words in missing)


def test_what_fsdp_gathers_stands_in_the_table_part_by_part() -> None:
    text = io.StringIO()
    print_predictions(FOUND, Rates(1e12, 1e11, 1e10), Console(file=text, width=1000))
    lines = {" ".join(line.split()) for line in text.getvalue().splitlines()}
    assert {"gathered for a pass 5.00 GiB", "whole for a layer 7 MiB"} <= lines
    assert {"steady 3.00 GiB", "at the highest 8.01 GiB"} <= lines
    (made,) = as_json(FOUND, Rates(1e12, 1e11, 1e10))["predictions"]
    assert made["peak"] == (8 << 30) + (7 << 20)
