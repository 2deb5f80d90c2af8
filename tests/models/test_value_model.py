"""Value functions: where they start, what they look at, where their gradient goes."""

import json
from pathlib import Path

import pytest
import tiny_architectures
import tiny_models
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertLMHeadModel

from kleash.errors import ModelError
from kleash.models.policy import Policy, load_policy
from kleash.models.reward_model import ClassifierReward
from kleash.models.value_model import ValueFunction, ValueHead, ValueModel, load_value_model

INPUTS = (
    torch.tensor([[5, 6, 7], [2, 2, 9]]),
    torch.tensor([[True, True, True], [False, False, True]]),
    torch.tensor([[8, 9, 10, 1], [11, 12, 2, 2]]),
    torch.tensor([[True, True, True, True], [True, True, False, False]]),
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(tiny_models.save_model(tmp_path_factory.mktemp("models") / "llama"))


def test_a_head_starts_at_zero_and_learns_alone(policy: Policy) -> None:
    head = ValueHead(policy.hidden_size)
    assert isinstance(head, ValueFunction)
    trunk = policy.hidden_states(*INPUTS)
    values = head.state_values(*INPUTS, trunk)
    assert values.shape == (2, 5)
    assert not values.any()
    nn.init.ones_(head.outer.weight)
    head.state_values(*INPUTS, trunk).sum().backward()
    assert all(p.grad is None for p in policy.parameters())
    assert head.inner.weight.grad is not None
    assert head.inner.weight.grad.any()


def test_a_head_on_the_trunk_shapes_the_policy(policy: Policy) -> None:
    head = ValueHead(policy.hidden_size, features="trunk")
    nn.init.ones_(head.outer.weight)
    head.state_values(*INPUTS, policy.hidden_states(*INPUTS)).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())
    policy.model.zero_grad()


def test_a_head_computes_in_its_own_precision(policy: Policy) -> None:
    trunk = policy.hidden_states(*INPUTS).bfloat16()
    assert ValueHead(policy.hidden_size).state_values(*INPUTS, trunk).dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_reward_model_becomes_a_value_model(
    policy: Policy, tmp_path: Path, kind: tiny_models.Architecture
) -> None:
    path = tiny_models.save_classifier(tmp_path, kind, seed=3)
    value = load_value_model(path, policy)
    assert isinstance(value, ValueFunction)
    values = value.state_values(*INPUTS, policy.hidden_states(*INPUTS))
    # After the last token it says what the reward model says of the whole text.
    words = policy.tokenizer.convert_ids_to_tokens([5, 6, 7, 8, 9, 10, 9, 11, 12])
    reward = ClassifierReward(path, template="{prompt} {response}")
    prompts, responses = [" ".join(words[:3]), words[6]], [" ".join(words[3:6]), "w6 w7"]
    assert [policy.tokenizer(r)["input_ids"] for r in responses] == [[8, 9, 10], [11, 12]]
    scores = reward.score(prompts, responses)
    torch.testing.assert_close(values[0, 3].detach(), scores[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values[1, 2].detach(), scores[1], atol=1e-5, rtol=1e-5)
    values.sum().backward()
    learnt = [n for n, p in value.named_parameters() if p.grad is not None and p.grad.any()]
    assert "layer.bias" in learnt
    assert any(n.startswith("trunk.") for n in learnt)
    assert all(p.grad is None for p in policy.parameters())


def test_a_language_model_gives_its_trunk_under_a_zero_layer(
    policy: Policy, tmp_path: Path
) -> None:
    value = load_value_model(tiny_models.save_model(tmp_path), policy)
    assert isinstance(value, ValueModel)
    assert not value.state_values(*INPUTS, policy.hidden_states(*INPUTS)).any()


def test_a_bias_of_the_score_layer_is_kept(policy: Policy, tmp_path: Path) -> None:
    from kleash.models.value_model import _score_layer

    model = nn.Module()
    model.score = nn.Linear(16, 1)
    assert torch.equal(_score_layer(model, tmp_path).bias, model.score.bias)  # type: ignore


def test_another_vocabulary_is_refused(policy: Policy, tmp_path: Path) -> None:
    tiny_models.save_classifier(tmp_path, tok=tiny_models.tokenizer(words=5))
    with pytest.raises(ModelError, match=r"the value model in .* to have the policy's vocabulary"):
        load_value_model(tmp_path, policy)


def _save_bert(policy: Policy, folder: Path) -> None:
    config = BertConfig(
        vocab_size=25, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def test_a_classifier_that_reads_both_ways_is_refused(policy: Policy, tmp_path: Path) -> None:
    _save_bert(policy, tmp_path)
    with pytest.raises(ModelError, match="it cannot value unfinished texts"):
        load_value_model(tmp_path, policy)


def test_models_that_look_ahead_are_refused(policy: Policy, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=25,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="states depend on later tokens"):
        load_value_model(tmp_path, policy)
    with pytest.raises(ModelError, match="states depend on later tokens"):
        load_policy(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_reads_padding_is_refused(policy: Policy, tmp_path: Path) -> None:
    tiny_architectures.save(tmp_path / "rwkv", "rwkv")
    said = r"padding to change nothing for RwkvModel in .*, got states .* every value would depend"
    with pytest.raises(ModelError, match=said):
        load_value_model(tmp_path / "rwkv", policy)
    tiny_architectures.save(tmp_path / "mamba", "mamba")
    load_value_model(tmp_path / "mamba", policy)


def test_an_untrained_reward_model_is_refused(policy: Policy, tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **names}))
    with pytest.raises(ModelError, match=r"no weights for score\.weight"):
        load_value_model(tmp_path, policy)
