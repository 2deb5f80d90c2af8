"""vLLM in this process, on the real engine: what it writes, and what it holds."""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
from real_vllm import NEEDS_VLLM

from kleash.models.policy import Policy, load_policy
from kleash.rollout.engine import writing_request
from kleash.rollout.hand_over import hand_over
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec
from kleash.rollout.vllm_engine import VLLMEngine, VLLMSettings, start_vllm

pytestmark = NEEDS_VLLM

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
SETTINGS = VLLMSettings(max_tokens=64, kv_cache_gib=0.1, enforce_eager=True)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    tok = tiny_models.tokenizer(30)
    folder = tmp_path_factory.mktemp("models") / "llama"
    return load_policy(tiny_models.save_model(folder, tok=tok, rows=len(tok) + 7, **SIZES))


@pytest.fixture(scope="module")
def engine(policy: Policy) -> Iterator[VLLMEngine]:
    made = start_vllm(policy, SETTINGS)
    yield made
    made.close()


def test_it_says_of_what_it_wrote_what_transformers_says(
    policy: Policy, engine: VLLMEngine
) -> None:
    hand_over(engine, policy)
    spec = SamplingSpec(max_new_tokens=12, temperature=1.3)
    rows = [Prompt("", ids, 0) for ids in ((5, 6, 7), (9,), (8, 10, 5, 6, 7)) for _ in range(8)]
    batch = batch_prompts(rows, pad_id=policy.pad_id)
    rollout = engine.write(writing_request(engine, batch, spec, microbatch=64))
    assert rollout.response_ids.max() < policy.words
    assert rollout.ended.any() and not rollout.ended.all()
    for row in range(len(rows)):
        prompt = torch.tensor(rows[row].ids)
        response = rollout.response_ids[row][rollout.response_mask[row]]
        with torch.no_grad():
            logits = policy.model(input_ids=torch.cat([prompt, response])[None]).logits[0]
        logits = logits[len(prompt) - 1 : -1, : policy.words].double() / 1.3
        expected = logits.log_softmax(-1).gather(1, response[:, None]).squeeze(1)
        assert rollout.sampler_logprobs is not None
        got = rollout.sampler_logprobs[row][: len(response)].double()
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
