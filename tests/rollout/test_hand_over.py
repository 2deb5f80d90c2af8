"""Weights handed over to an engine: proven, and the group at fault named."""

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from stand_in_engine import StandInEngine

from kleash.errors import EngineError, EngineLostError
from kleash.models.lora import AdapterSpec
from kleash.models.policy import Policy, load_policy
from kleash.rollout.engine import WritingRequest, writing_request
from kleash.rollout.hand_over import hand_over, policy_weights, write_weights, write_with
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    tok = tiny_models.tokenizer()
    return load_policy(tiny_models.save_model(tmp_path / "llama", tok=tok, rows=len(tok) + 7))


def request_of(engine: StandInEngine, policy: Policy) -> WritingRequest:
    rows = [Prompt("", ids, 0) for ids in ((5, 6, 7), (9,), (8, 10))]
    batch = batch_prompts(rows, pad_id=policy.pad_id)
    return writing_request(engine, batch, SamplingSpec(max_new_tokens=6), microbatch=8)


def test_weights_go_once_until_they_change(policy: Policy) -> None:
    engine = StandInEngine(policy)
    assert hand_over(engine, policy)
    assert not hand_over(engine, policy)
    with torch.no_grad():
        policy.model.lm_head.weight[3, 3] += 1e-4
    assert hand_over(engine, policy)
    assert torch.equal(engine.model.lm_head.weight[3], policy.model.lm_head.weight[3])


@pytest.mark.parametrize("group", ["model.embed_tokens", "model.layers.1", "model.norm", "lm_head"])
def test_a_group_that_is_not_taken_is_named(policy: Policy, group: str) -> None:
    engine = StandInEngine(policy)
    engine.takes = lambda name: not name.startswith(f"{group}.")
    with pytest.raises(EngineError, match=f"whatever is sent for {group} changes nothing in it"):
        hand_over(engine, policy)
    assert engine.loaded is None


def test_a_group_that_came_late_is_named(policy: Policy) -> None:
    engine = StandInEngine(policy)
    engine.takes = lambda name: not name.startswith("model.layers.0.") or engine.handed_over
    with pytest.raises(
        EngineError, match=r"model\.layers\.0 had not arrived, and arrived when sent again; restart"
    ):
        hand_over(engine, policy)


def test_another_computation_is_not_blamed_on_a_group(policy: Policy) -> None:
    engine = StandInEngine(policy)
    engine.model.model.rotary_emb.inv_freq.mul_(1.5)
    with pytest.raises(EngineError, match="every group of parameters arrives; with all of them"):
        hand_over(engine, policy)


def test_an_engine_that_was_restarted_gets_the_weights_again(policy: Policy) -> None:
    engine = StandInEngine(policy)
    hand_over(engine, policy)
    loaded = engine.loaded
    engine.restart()
    engine.loaded = loaded
    assert hand_over(engine, policy)
    assert torch.equal(engine.model.lm_head.weight[3], policy.model.lm_head.weight[3])


def test_a_rollout_that_breaks_off_is_written_again_whole(policy: Policy) -> None:
    engine = StandInEngine(policy)
    request = request_of(engine, policy)
    expected = write_with(engine, policy, request)
    engine.losses = 1
    got = write_with(engine, policy, request)
    assert torch.equal(got.response_ids, expected.response_ids)
    assert got.sampler_logprobs is not None and expected.sampler_logprobs is not None
    assert torch.equal(got.sampler_logprobs, expected.sampler_logprobs)
    engine.losses = 1
    engine.restart = lambda: setattr(engine, "losses", 1)
    engine.wait_until_back = lambda: None
    with pytest.raises(EngineLostError):
        write_with(engine, policy, request)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("whole", ["", "lm_head", "embed_tokens"])
def test_an_adapter_is_merged_into_what_is_handed_over(
    tmp_path: Path, kind: tiny_models.Architecture, whole: str
) -> None:
    """The oracle is the model with its adapter beside the weights; tied ends come apart with it."""
    gpt2 = kind == "gpt2"
    saved = ("wte" if gpt2 and whole == "embed_tokens" else whole,) if whole else ()
    spec = AdapterSpec(
        rank=2, alpha=4, targets=("c_attn" if gpt2 else "q_proj",), modules_to_save=saved
    )
    folder = tiny_models.save_model(tmp_path / kind, kind)
    policy = load_policy(folder, adapter=spec)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(std=0.3)
    ids = torch.tensor([[5, 6, 7, 8, 3]])
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits[..., : policy.words]
    config = load_policy(folder).model.config
    config.tie_word_embeddings = False
    rebuilt = type(policy.model)(config).eval()
    missing, unknown = rebuilt.load_state_dict(dict(policy_weights(policy)), strict=False)
    assert not missing and not unknown
    with torch.no_grad():
        got = rebuilt(input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_weights_are_written_in_pieces_and_nothing_older_stays(
    policy: Policy, tmp_path: Path
) -> None:
    write_weights(policy_weights(policy), tmp_path, piece=4096)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    found = {name: x for file in files for name, x in load_file(file).items()}
    wanted = dict(policy_weights(policy))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    write_weights([("model.norm.weight", wanted["model.norm.weight"])], tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert list(load_file(file)) == ["model.norm.weight"]
