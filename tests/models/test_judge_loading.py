"""Judges of every make: the tokens they can take, padding, and adapters on a base."""

import json
from pathlib import Path
from typing import Any

import chat_families
import peft
import pytest
import tiny_models
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    MPNetConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
    XLNetConfig,
)

from kleash.errors import ModelError, NonFiniteScoreError, RewardError
from kleash.models.judge_loading import most_tokens, padding_changes
from kleash.models.reward_model import ClassifierReward, WeightedSum

# Of peft, about an attribute of transformers that it still reads.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
    "max_position_embeddings": 20,
    "num_labels": 1,
}
ROBERTA_KIND = {"roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig, "mpnet": MPNetConfig}


def configuration(kind: str, tok: Any) -> PretrainedConfig:
    ids = {"vocab_size": len(tok), "pad_token_id": tok.pad_token_id}
    match kind:
        case "roberta" | "xlm-roberta":
            return ROBERTA_KIND[kind](**SMALL, **ids, bos_token_id=1, eos_token_id=1)
        case "mpnet":
            return MPNetConfig(**SMALL, **{**ids, "pad_token_id": 1})
        case "bert":
            return BertConfig(**SMALL, **ids)
        case "distilbert":
            sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "num_labels": 1}
            return DistilBertConfig(**sizes, **ids, max_position_embeddings=20)
        case "opt":
            return OPTConfig(**SMALL, **ids, ffn_dim=24, word_embed_proj_dim=16)
        case "xlnet":
            sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "num_labels": 1}
            return XLNetConfig(**sizes, **ids, initializer_range=0.3)
        case _:
            return tiny_models.config("llama", len(tok), num_labels=1, max_position_embeddings=20)


def save(folder: Path, kind: str) -> tuple[Path, Any]:
    tok = tiny_models.tokenizer()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(configuration(kind, tok))
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder, tok


@torch.no_grad()
def standalone(model: Any, ids: list[int]) -> float:
    """The library's own way, one text and no padding."""
    return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "mpnet", "bert", "distilbert", "opt"])
def test_the_longest_text_is_taken_and_no_longer_one(tmp_path: Path, kind: str) -> None:
    path, tok = save(tmp_path, kind)
    reward = ClassifierReward(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    limit = most_tokens(model)
    assert limit == (18 if kind == "mpnet" else 17 if kind in ROBERTA_KIND else 20)
    texts = [" ".join(["w1"] * count) for count in range(limit - 3, limit + 1)]
    expected = [standalone(model, tok(text)["input_ids"]) for text in texts]
    scores = reward.score([""] * 4, texts)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises((IndexError, RuntimeError)):
        standalone(model, [6] * (limit + 1))
    with pytest.raises(RewardError, match=rf"texts of 1 to {limit} tokens .* got {limit + 1} for"):
        reward.score([""], [" ".join(["w1"] * (limit + 1))])


def test_a_judge_without_a_limit_takes_any_text(tmp_path: Path) -> None:
    path, tok = save(tmp_path, "xlnet")
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert model.config.max_position_embeddings == -1
    # It takes the last position for the end of a text, so a padded text scores otherwise.
    assert most_tokens(model) is None and padding_changes(model, None)
    texts = ["w1", "w2", " ".join(["w3"] * 70), "w4 w5 w6"]
    expected = [standalone(model, tok(text)["input_ids"]) for text in texts]
    scores = ClassifierReward(path).score([""] * 4, texts)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(RewardError, match=r"texts of 1 token or more .* got 0 for response 0"):
        ClassifierReward(path).score([""], [""])


@pytest.mark.parametrize("kind", ["roberta", "bert", "opt", "llama"])
def test_other_judges_are_padded(tmp_path: Path, kind: str) -> None:
    path, _ = save(tmp_path, kind)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    model.config.pad_token_id = 2
    assert not padding_changes(model, most_tokens(model))


def save_adapter(
    folder: Path, base: Path, *, labels: int = 1, head: bool = True, **settings: Any
) -> Path:
    """An adapter with its head, away from where training begins; its scores are the unmerged's."""
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if head else "FEATURE_EXTRACTION",
        r=2,
        target_modules=["q_proj", "v_proj"],
        **settings,
    )
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.normal_(std=0.5)
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_an_adapter_judges_as_peft_reads_it(
    tmp_path: Path, kind: tiny_models.Architecture, settings: dict[str, Any]
) -> None:
    tok = tiny_models.tokenizer()
    base = tiny_models.save_model(tmp_path / "base", kind, tok=tok)
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    unmerged = peft.PeftModel.from_pretrained(plain, adapter).eval()
    texts = ["w1 w2", "w3 w4 w5 w6", "w1"]
    expected = [standalone(unmerged, tok(text)["input_ids"]) for text in texts]
    reward = ClassifierReward(base, adapter=adapter)
    assert reward.score([""] * 3, texts).tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.tensor(expected).std() > 0.1 and reward.adapter == str(adapter)


def test_the_tokenizer_of_an_adapter_is_taken(tmp_path: Path) -> None:
    base = tiny_models.save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    tiny_models.tokenizer(chat_template=tiny_models.CHAT_TEMPLATE).save_pretrained(adapter)
    reward = ClassifierReward(base, adapter=adapter)
    chat = [{"role": "user", "content": "w4"}]
    assert reward.encode(chat, "w5") == reward.tokenizer("<user> w4 <assistant> w5")["input_ids"]


def test_adapters_that_cannot_judge(tmp_path: Path) -> None:
    base = tiny_models.save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    with pytest.raises(ModelError, match=r"without the model .*base'\) as `path`, .* as `adapter`"):
        ClassifierReward(adapter)
    with pytest.raises(ModelError, match="of 1 output, got num_labels = 2 from the adapter"):
        ClassifierReward(base, adapter=save_adapter(tmp_path / "two", base, labels=2))
    headless = save_adapter(tmp_path / "headless", base, head=False)
    with pytest.raises(ModelError, match=r"(num_labels = 2|no weights for score.weight there or)"):
        ClassifierReward(base, adapter=headless)
    with pytest.raises(ModelError, match=r"expected an adapter saved by peft in .*base"):
        ClassifierReward(base, adapter=base)
    other = tiny_models.save_model(tmp_path / "other", hidden_size=32)
    with pytest.raises(ModelError, match="expected a LoRA adapter for Llama"):
        ClassifierReward(other, adapter=adapter)
    with pytest.raises(ModelError, match=r"expected .* at .*nowhere"):
        ClassifierReward(tmp_path / "nowhere", adapter=adapter)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match="expected a LoRA adapter for Llama"):
        ClassifierReward(base, adapter=adapter)


def test_a_sum_that_float32_does_not_hold() -> None:
    class Constant:
        def score(self, prompts: Any, responses: Any, columns: Any = None) -> torch.Tensor:
            return torch.tensor([1.0, 3e38])

    total = WeightedSum({"big": (Constant(), 10.0)})
    with pytest.raises(NonFiniteScoreError, match="sum of rewards up to 'big' for response 1, 'b'"):
        total.score(["p", "p"], ["a", "b"])


# --- conversations: whole rows, as the policy reads them ----------------------------------------


def judge_of(folder: Path, template: Any) -> ClassifierReward:
    tok = chat_families.byte_tokenizer(template)
    return ClassifierReward(
        tiny_models.save_classifier(folder, tok=tok, max_position_embeddings=2048)
    )


@pytest.mark.parametrize("family", chat_families.FAMILIES)
def test_a_judge_reads_the_whole_row(tmp_path: Path, family: str) -> None:
    judge = judge_of(tmp_path, chat_families.FAMILIES[family])
    for row in chat_families.ROWS:
        asked, further = row["messages"], row.get("chat_template_kwargs") or {}
        ids = judge.encode(asked, "Yes.", 0, row)
        assert ids == judge.tokenizer.apply_chat_template(
            [*asked, {"role": "assistant", "content": "Yes."}],
            tools=row.get("tools"),
            return_dict=False,
            **further,
        )
    assert "Weather of a city." in judge.tokenizer.decode(
        judge.encode(chat_families.ROWS[0]["messages"], "", 0, chat_families.ROWS[0])
    )


def test_a_judge_reads_a_continued_answer_as_one(tmp_path: Path) -> None:
    judge = judge_of(tmp_path, chat_families.CHATML)
    begun = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "It will"}]
    row = {"chat_template_kwargs": {"continue_final_message": True}}
    text = judge.tokenizer.decode(judge.encode(begun, " not.", 0, row))
    assert text.endswith("<|im_start|>assistant\nIt will not.<|im_end|>")


def test_templates_of_a_judge_that_raise_or_have_names(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "a"}]
    judge = judge_of(tmp_path / "raises", chat_families.BRACKETS)
    with pytest.raises(RewardError, match=r"of response 0 for the reward .*System role not supp"):
        judge.score([system], ["b"])
    named = {"one": "{{ messages[0].content }}", "two": "{{ messages[1].content }}"}
    tok = chat_families.byte_tokenizer(named)
    path = tiny_models.save_classifier(tmp_path / "named", tok=tok)
    with pytest.raises(RewardError, match=r"got only those named 'one', 'two': choose"):
        ClassifierReward(path).score([system], ["b"])
    chosen = ClassifierReward(path, chat_template="two")
    assert tok.decode(chosen.encode(system, "b")) == "b"
