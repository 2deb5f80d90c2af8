"""Reward models: read as they were taught, the same alone and in a batch, and never nonsense."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import AutoModelForSequenceClassification

from kleash.errors import ModelError, RewardError
from kleash.models.callable_reward import CallableReward
from kleash.models.reward_model import (
    ClassifierReward,
    RewardModel,
    WeightedSum,
    text_of,
)

PROMPTS = ["w1 w2", "w3", "w4 w5 w6 w7 w8 w9", "w1"]
RESPONSES = [" w3", " w4 w5 w6 w7 w8 w9 w10", " w1 <eos>", " w2 w2 w2"]


def standalone(path: Path, ids: list[int]) -> float:
    """The library's own way, one text and no padding."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_scores_are_those_of_the_text_alone(
    tmp_path: Path, kind: tiny_models.Architecture, pad: str
) -> None:
    tok = tiny_models.tokenizer(pad=pad)
    path = tiny_models.save_classifier(tmp_path, kind, tok=tok)
    reward = ClassifierReward(path)
    assert isinstance(reward, RewardModel)
    scores = reward.score(PROMPTS, RESPONSES)
    for prompt, response, score in zip(PROMPTS, RESPONSES, scores.tolist(), strict=True):
        assert score == pytest.approx(
            standalone(path, tok(prompt + response)["input_ids"]), abs=1e-6
        )
        assert reward.score([prompt], [response]).item() == pytest.approx(score, abs=1e-6)
    small = ClassifierReward(path, batch_size=2).score(PROMPTS, RESPONSES)
    torch.testing.assert_close(small, scores, atol=1e-6, rtol=0)
    assert scores.std() > 0.1


def test_its_own_tokenizer_reads(tmp_path: Path) -> None:
    tok = tiny_models.tokenizer(words=30, bos="<s>")
    path = tiny_models.save_classifier(tmp_path, tok=tok)
    (score,) = ClassifierReward(path).score(["w25"], [" w26"]).tolist()
    ids = tok("w25 w26")["input_ids"]
    assert ids[0] == tok.bos_token_id
    assert score == pytest.approx(standalone(path, ids), abs=1e-6)


def test_bos_is_never_doubled(tmp_path: Path) -> None:
    path = tiny_models.save_classifier(tmp_path, tok=tiny_models.tokenizer(bos="<s>"))
    plain = ClassifierReward(path).score(["w2"], [" w3"])
    written = ClassifierReward(path, template="<s> {prompt}{response}").score(["w2"], [" w3"])
    assert torch.equal(plain, written)


def test_templates(tmp_path: Path) -> None:
    tok = tiny_models.tokenizer()
    path = tiny_models.save_classifier(tmp_path, tok=tok)
    reward = ClassifierReward(path, template="w1 {prompt} w2 {response} w3")
    (score,) = reward.score(["{response} w4"], ["w5"]).tolist()
    ids = tok("w1 {response} w4 w2 w5 w3")["input_ids"]
    assert score == pytest.approx(standalone(path, ids), abs=1e-6)
    with pytest.raises(RewardError, match=r"template with {response}"):
        ClassifierReward(path, template="{prompt}")


def test_conversations_go_through_its_chat_template(tmp_path: Path) -> None:
    tok = tiny_models.tokenizer(bos="<s>", chat_template="<s> " + tiny_models.CHAT_TEMPLATE)
    path = tiny_models.save_classifier(tmp_path, tok=tok)
    (score,) = ClassifierReward(path).score([[{"role": "user", "content": "w4"}]], ["w5"]).tolist()
    ids = tok("<user> w4 <assistant> w5")["input_ids"]
    assert ids.count(tok.bos_token_id) == 1
    assert score == pytest.approx(standalone(path, ids), abs=1e-6)


def test_a_chat_template_alone_decides_about_special_tokens(tmp_path: Path) -> None:
    tok = tiny_models.tokenizer(bos="<s>", chat_template=tiny_models.CHAT_TEMPLATE)
    path = tiny_models.save_classifier(tmp_path, tok=tok)
    (score,) = ClassifierReward(path).score([[{"role": "user", "content": "w4"}]], ["w5"]).tolist()
    ids = tok("<user> w4 <assistant> w5", add_special_tokens=False)["input_ids"]
    assert score == pytest.approx(standalone(path, ids), abs=1e-6)


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    reward = ClassifierReward(tiny_models.save_classifier(tmp_path))
    with pytest.raises(RewardError, match="with a chat template"):
        reward.score([[{"role": "user", "content": "w4"}]], ["w5"])


def test_without_a_padding_id_texts_are_read_one_by_one(tmp_path: Path) -> None:
    tok = tiny_models.tokenizer()
    path = tiny_models.save_classifier(tmp_path, tok=tok)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    scores = ClassifierReward(path).score(PROMPTS, RESPONSES).tolist()
    expected = [
        standalone(path, tok(p + r)["input_ids"]) for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert scores == pytest.approx(expected, abs=1e-6)


def test_texts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    reward = ClassifierReward(tiny_models.save_classifier(tmp_path))
    with pytest.raises(RewardError, match=r"1 to 64 tokens.*got 71 for response 1, ' w1 w1"):
        reward.score(["w1", "w1"], ["", " w1" * 70])
    with pytest.raises(RewardError, match="got 0 for response 0"):
        reward.score([""], [""])


def test_several_outputs_are_refused(tmp_path: Path) -> None:
    tiny_models.save_classifier(tmp_path, labels=2)
    with pytest.raises(ModelError, match=r"of 1 output .* got num_labels = 2"):
        ClassifierReward(tmp_path)


def test_an_untrained_head_is_refused(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "LABEL_0"}}))
    with pytest.raises(ModelError, match=r"trained reward model.*score.weight"):
        ClassifierReward(tmp_path)


def test_a_classifier_that_says_nan_is_refused(tmp_path: Path) -> None:
    path = tiny_models.save_classifier(tmp_path)
    reward = ClassifierReward(path)
    with torch.no_grad():
        reward._model.score.weight.fill_(torch.nan)
    with pytest.raises(RewardError, match=r"finite score from the reward model .* response 0"):
        reward.score(["w1"], ["w2"])


def good(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(p) + len(r)) for p, r in zip(prompts, responses, strict=True)]


def ordered(prompts: list[str], responses: list[str]) -> torch.Tensor:
    return torch.tensor([1, 2, 3, 4])


def test_a_weighted_sum_keeps_its_parts() -> None:
    good_one = CallableReward(good)
    other = CallableReward(ordered)
    total = WeightedSum({"length": (good_one, 0.5), "order": (other, -2.0)})
    assert isinstance(total, RewardModel)
    scored = total.score_each(PROMPTS, RESPONSES)
    expected = [
        0.5 * a - 2.0 * b for a, b in zip(good(PROMPTS, RESPONSES), [1, 2, 3, 4], strict=True)
    ]
    assert scored.total.tolist() == expected == total.score(PROMPTS, RESPONSES).tolist()
    assert scored.parts["order"].tolist() == [1, 2, 3, 4]
    assert list(scored.parts) == ["length", "order"]


def test_sums_that_cannot_be() -> None:
    with pytest.raises(RewardError, match="at least one reward model"):
        WeightedSum({})
    with pytest.raises(RewardError, match="finite weight for reward 'x', got nan"):
        WeightedSum({"x": (CallableReward(good), float("nan"))})


def test_text_of() -> None:
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert text_of(turns) == "system: a\nuser: b"
    assert text_of("c") == "c"
