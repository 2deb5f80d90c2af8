"""Dividing a model: what is set in the process for it."""

import ctypes
from typing import Any

import pytest

from kleash.models import sharding


@pytest.mark.parametrize(
    ("environment", "calls"),
    [
        ({}, [(-3, 1 << 21)]),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, []),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}, []),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, [(-3, 1 << 21)]),
    ],
)
def test_freed_blocks_go_back_from_a_size_that_the_environment_may_give(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], calls: list[tuple[int, int]]
) -> None:
    made: list[tuple[int, int]] = []

    class Library:
        def __init__(self, name: Any) -> None:
            del name

        def mallopt(self, setting: int, value: int) -> None:
            made.append((setting, value))

    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    sharding._return_freed_blocks()  # pyright: ignore[reportPrivateUsage]
    assert made == calls
