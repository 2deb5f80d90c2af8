"""The client of a vLLM server, against a stand-in that answers as one does: what goes wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny_models
import torch
from stand_in_engine import StandInEngine
from stand_in_server import StandInServer, serving

from kleash.errors import EngineError, EngineLostError
from kleash.models.policy import Policy, load_policy
from kleash.rollout.engine import WritingRequest, writing_request
from kleash.rollout.hand_over import hand_over, write_with
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec
from kleash.rollout.vllm_server import VLLMServer, connect
from kleash.storage.run_directory import read_run
from kleash.training.loop import Trainer


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return load_policy(tiny_models.save_model(tmp_path / "llama"))


@pytest.fixture
def stand_in(policy: Policy) -> StandInServer:
    return StandInServer(StandInEngine(policy))


@pytest.fixture
def url(stand_in: StandInServer) -> Iterator[str]:
    with serving(stand_in) as address:
        yield address


@pytest.fixture
def server(policy: Policy, url: str) -> Iterator[VLLMServer]:
    made = connect(policy, url, max_tokens=20, timeout_s=5.0)
    hand_over(made, policy)
    yield made
    made.close()


def request_of(server: VLLMServer, policy: Policy, seed: int = 0) -> WritingRequest:
    rows = [Prompt("", ids, 0) for ids in ((5, 6, 7), (9,), (8, 10), (3, 4))]
    batch = batch_prompts(rows, pad_id=policy.pad_id)
    torch.manual_seed(seed)
    return writing_request(server, batch, SamplingSpec(6, 1.2), microbatch=8)


def test_what_is_written_is_what_the_engine_behind_it_writes(
    policy: Policy, stand_in: StandInServer, server: VLLMServer
) -> None:
    request = request_of(server, policy)
    got, expected = server.write(request), stand_in.engine.write(request)
    assert torch.equal(got.response_ids, expected.response_ids)
    assert got.sampler_logprobs is not None and expected.sampler_logprobs is not None
    torch.testing.assert_close(got.sampler_logprobs, expected.sampler_logprobs)
    text = [5, 6, 7, 8]
    (law,) = server.next_token_logprobs([text], temperature=0.7)
    (same,) = stand_in.engine.next_token_logprobs([text], temperature=0.7)
    torch.testing.assert_close(law, same)


@pytest.mark.parametrize(
    ("fault", "value", "message"),
    [
        ("version", "0.31.1", r"expected vLLM 0\.32 or newer, got 0\.31\.1"),
        ("length", 10, r"to read 20 tokens, got max_model_len 10"),
        ("extra_words", 3, r"of the policy's \d+ words, got 'policy' with \d+"),
        ("raw_logprobs", True, r"was not started with --logprobs-mode processed_logprobs"),
        ("garbage", True, r"to answer as vLLM does, got something else"),
        ("delay", 1.0, r"within 0\.5 s, got none"),
        ("dead_until", float("inf"), r"expected a server at http://127"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(
    policy: Policy, stand_in: StandInServer, url: str, fault: str, value: Any, message: str
) -> None:
    setattr(stand_in, fault, value)
    with pytest.raises(EngineError, match=message):
        connect(policy, url, max_tokens=20, timeout_s=0.5)


def test_no_server_is_one_sentence(policy: Policy) -> None:
    with pytest.raises(EngineLostError, match=r"expected a server at http://127.*serve-rollouts"):
        connect(policy, "http://127.0.0.1:9", max_tokens=20, timeout_s=1.0)


def test_a_server_killed_and_restarted_writes_the_same_rollout_again(
    policy: Policy, stand_in: StandInServer, server: VLLMServer
) -> None:
    expected = server.write(request_of(server, policy))
    stand_in.dies_after, stand_in.back_after = 2, 0.7
    with pytest.raises(EngineLostError):
        server.write(request_of(server, policy))
    stand_in.dead_until = 0.0
    stand_in.dies_after = 2
    got = write_with(server, policy, request_of(server, policy))
    assert torch.equal(got.response_ids, expected.response_ids)


def test_weights_that_change_under_a_rollout_are_noticed(
    policy: Policy, stand_in: StandInServer, server: VLLMServer
) -> None:
    stand_in.other_weights_after = 2
    with pytest.raises(EngineLostError, match="another run uses it; nothing of the rollout"):
        server.write(request_of(server, policy))
    stand_in.other_weights_after = 3
    expected = request_of(server, policy)
    got = write_with(server, policy, expected)
    assert torch.equal(got.response_ids, stand_in.engine.write(expected).response_ids)


def test_a_run_whose_server_is_gone_ends_in_one_sentence_and_goes_on_later(tmp_path: Path) -> None:
    """The oracle of going on is the run that nothing happened to."""
    small_run.save_material(
        tmp_path, prompts=small_run.two_words(range(8)), heldout=small_run.two_words([1])
    )
    policy = load_policy(tmp_path / "policy")
    outcomes: list[list[dict[str, Any]]] = []
    for name in ("whole", "broken"):
        stand_in = StandInServer(StandInEngine(policy))
        with serving(stand_in) as url:
            vllm = {"url": url, "timeout_s": 3.0}
            layer = {
                "rollout": {"engine": "vllm", "vllm": vllm},
                "logging": {"checkpoint_every": 0, "checkpoint_minutes": 0.0},
                "steps": 3,
            }
            config = small_run.settings(tmp_path, tmp_path / name, layer)
            if name == "whole":
                Trainer(config).fit()
            else:

                class Kill:
                    def on_step(self, event: Any, stand_in: StandInServer = stand_in) -> None:
                        if event.step == 2:
                            stand_in.dies_after, stand_in.back_after = 3, 1e9

                with pytest.raises(EngineLostError, match=r"step 3 was not made .*--resume"):
                    Trainer(config, callbacks=[Kill()]).fit()
                assert [row["step"] for row in read_run(tmp_path / name).metrics] == [0, 1, 2]
                assert read_run(tmp_path / name).status == "failed"
                stand_in.dead_until = 0.0
                Trainer(config).fit()
        outcomes.append(small_run.numbers(tmp_path / name))
    assert json.dumps(outcomes[0]) == json.dumps(outcomes[1])
