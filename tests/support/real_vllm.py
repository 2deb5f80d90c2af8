"""Tests that run vLLM itself: `make test-vllm` does so in an environment of its own."""

import importlib.util

import pytest

NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here: make test-vllm runs this test",
    ),
]
"""For `pytestmark`."""
