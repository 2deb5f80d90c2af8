"""Rows that end leave the batch; the oracle is the library, which carries them to the end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_architectures
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from kleash.errors import NonFiniteError
from kleash.models.policy import Policy, load_policy
from kleash.rollout import finished_rows
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec, _Sampler, generate
from kleash.types import Rollout

ROWS = 24


def write(policy: Policy) -> Rollout:
    """Prompts of several lengths; one word of four ends a response, so that ends are ragged."""
    rows = [Prompt("", tuple(range(5, 6 + i % 4)), i) for i in range(ROWS)]
    torch.manual_seed(0)
    few = replace(policy, stop_ids=tuple(range(1, policy.words, 4)))
    return generate(few, batch_prompts(rows, pad_id=policy.pad_id), SamplingSpec(20))


def rows_read(policy: Policy) -> tuple[list[int], Any]:
    """Rows of each pass of the model from now on."""
    seen: list[int] = []

    def note(_module: Any, _args: Any, given: Any) -> None:
        seen.append(len(given["input_ids"]))

    return seen, policy.model.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_responses_are_those_of_a_batch_that_carries_ended_rows(
    tmp_path: Path, kind: tiny_models.Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(tiny_models.save_model(tmp_path, kind))
    seen, hook = rows_read(policy)
    dropped = write(policy)
    hook.remove()
    after = torch.rand(1)
    monkeypatch.setattr(finished_rows, "_cache_by_rows", lambda model: None)
    carried = write(policy)
    # As many random numbers were drawn, too: what is drawn next is the same.
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(dropped.response_mask, carried.response_mask)
    mask = carried.response_mask
    assert torch.equal(dropped.response_ids[mask], carried.response_ids[mask])
    assert dropped.sampler_logprobs is not None and carried.sampler_logprobs is not None
    torch.testing.assert_close(dropped.sampler_logprobs, carried.sampler_logprobs)
    # Each pass has fewer rows than the batch had lost a quarter of before.
    assert seen[0] == ROWS and seen[-1] < ROWS / 2
    for step, there in enumerate(seen):
        going = int((mask.sum(1) > step).sum())
        assert going <= there < going / (1 - finished_rows._ENDED) + 1


def test_a_number_that_is_not_finite_is_named_by_its_row_in_the_batch() -> None:
    sampler = _Sampler(1.0, 5, slice(None), 6)
    sampler(None, torch.zeros(6, 5))
    sampler.keep(torch.tensor([0, 2, 4, 5]))
    sampler(None, torch.zeros(4, 5))
    sampler.keep(torch.tensor([1, 3]))
    bad = torch.zeros(2, 5)
    bad[1, 0] = torch.nan
    with pytest.raises(NonFiniteError) as error:
        sampler(None, bad)
    assert (error.value.response, error.value.token) == (5, 2)


def test_a_step_that_is_taken_back_is_drawn_again_by_the_same_number() -> None:
    torch.manual_seed(3)
    sampler = _Sampler(1.0, 50, slice(None), 4)
    scores = torch.randn(3, 4, 50)
    first = [sampler(None, one).argmax(1) for one in scores]
    sampler.rewind(1)
    sampler.keep(torch.tensor([1, 3]))
    again = [sampler(None, one[[1, 3]]).argmax(1) for one in scores[1:]]
    assert [x.tolist() for x in again] == [x[[1, 3]].tolist() for x in first[1:]]
    assert sampler.draws == 3
    whole = scores[2].log_softmax(-1)[[1, 3], again[1]]
    torch.testing.assert_close(sampler.logprobs(3)[[1, 3], 2], whole)


@pytest.mark.parametrize("kind", ["qwen3_next", "mamba", "rwkv"])
def test_states_beside_keys_and_values_are_carried(kind: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_architectures.save(tmp_path / kind, kind))
    assert finished_rows._cache_by_rows(model) is None
