"""Rows of ragged prompts and responses are read as plain transformers reads each of them alone."""

from typing import Any, cast

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from kleash.models.trunk import trunk_of, trunk_states

PROMPTS, RESPONSES = [1, 9, 4, 2], [7, 1, 3, 5]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ragged_rows_have_the_states_and_gradients_of_each_row_alone(kind: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_models.config(kind, 20)).double().eval()
    trunk = cast(Any, trunk_of(model))
    prompts, responses = torch.randint(20, (4, max(PROMPTS))), torch.randint(20, (4, 11))
    before = torch.arange(max(PROMPTS)) >= max(PROMPTS) - torch.tensor(PROMPTS)[:, None]
    after = torch.arange(11) < torch.tensor(RESPONSES)[:, None]
    seen: list[Any] = []
    hook = trunk.register_forward_pre_hook(
        lambda _, __, given: seen.append(given), with_kwargs=True
    )
    states = trunk_states(trunk, prompts, before, responses, after)
    hook.remove()
    # Not 9 + 11 columns: as many as the longest row has tokens, and padding behind it alone.
    assert seen[0]["input_ids"].shape[1] == max(map(sum, zip(PROMPTS, RESPONSES, strict=True)))
    assert "attention_mask" not in seen[0]
    weights = torch.randn(states.shape, dtype=torch.float64)
    inside = torch.nn.functional.pad(after, (1, 0), value=True)[..., None]
    torch.where(inside, states * weights, 0.0).sum().backward()
    gradients = [p.grad.clone() for p in trunk.parameters()]
    trunk.zero_grad()
    for row, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.cat([prompts[row, max(PROMPTS) - p :], responses[row, :r]])[None]
        alone = trunk(input_ids=ids)[0][0, p - 1 :]
        torch.testing.assert_close(states[row, : r + 1], alone, rtol=1e-10, atol=1e-10)
        (alone * weights[row, : r + 1]).sum().backward()
    for got, wanted in zip(gradients, (p.grad for p in trunk.parameters()), strict=True):
        assert float((got - wanted).norm()) <= 1e-10 * float(wanted.norm())
