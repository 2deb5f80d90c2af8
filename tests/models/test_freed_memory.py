"""Freed memory goes back to the system when a trunk's gradients are about to come."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from kleash.models import freed_memory
from kleash.models.freed_memory import return_freed_memory_before
from kleash.models.trunk import trunk_of

HOLES = """
import ctypes
from pathlib import Path
from kleash.models.freed_memory import return_freed_memory

def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 100_000
blocks = [libc.malloc(size) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, size)
for block in (b for i, b in enumerate(blocks) if i % 10):
    libc.free(block)
before = resident()
assert return_freed_memory()
print(before - resident())
"""


def a_model() -> Any:
    torch.manual_seed(0)
    config = tiny_models.config("llama", 20, num_hidden_layers=1)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own call")
def test_pages_between_blocks_go_back_to_the_system() -> None:
    """Nine of ten blocks of 100 kB are freed; those between them stay."""
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0.8 * 900 * 100_000 / 1024


def test_it_is_returned_before_the_head_and_before_the_trunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After everything that was read later: a critic, which comes behind the head here."""
    model, order = a_model(), list[str]()
    monkeypatch.setattr(freed_memory, "WIDE", 1)
    monkeypatch.setattr(freed_memory, "return_freed_memory", lambda: order.append("returned"))
    model.lm_head.weight.register_hook(lambda _: order.append("head"))
    model.model.layers[0].mlp.down_proj.weight.register_hook(lambda _: order.append("trunk"))
    other = torch.ones(3, requires_grad=True)
    other.register_hook(lambda _: order.append("critic"))
    states = trunk_of(model)(torch.tensor([[1, 2, 3]]))[0]
    logits = model.lm_head(states).flatten()
    return_freed_memory_before(SimpleNamespace(model=model, words=1), logits, states)
    critic = other * other
    (logits.square().sum() + critic.sum()).backward()
    assert order == ["critic", "returned", "head", "returned", "trunk"]


def test_where_it_would_not_pay_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow models, logits larger than the gradients, frozen weights, and what is no model."""
    model, order = a_model(), list[str]()
    monkeypatch.setattr(freed_memory, "return_freed_memory", lambda: order.append("returned"))

    def returned(policy: object) -> bool:
        order.clear()
        states = trunk_of(model)(torch.tensor([[1, 2, 3]]))[0]
        return_freed_memory_before(policy, torch.zeros(3), states)
        states.sum().backward()
        return bool(order)

    # Three tokens, so that their logits are as many as the parameters.
    words = sum(p.numel() for p in model.parameters()) // 3
    assert not returned(SimpleNamespace(model=model, words=words))
    monkeypatch.setattr(freed_memory, "WIDE", model.config.hidden_size)
    assert returned(SimpleNamespace(model=model, words=words))
    assert not returned(SimpleNamespace(model=model, words=words + 1))
    assert not returned(SimpleNamespace())
    model.lm_head.weight.requires_grad_(False)
    assert not returned(SimpleNamespace(model=model, words=words))
