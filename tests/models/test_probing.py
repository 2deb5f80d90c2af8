"""Models whose own code or whose padding is at fault are refused by name when they are opened."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_architectures
import tiny_models
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    MiniMaxConfig,
    PreTrainedModel,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from kleash.errors import ModelError
from kleash.models.policy import load_policy, load_reference
from kleash.models.probing import check_padding, distance, own_code, probe_texts
from kleash.models.trunk import trunk_of


def save(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def sharp(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def rwkv() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    config = RwkvConfig(vocab_size=25, intermediate_size=24, context_length=64, **sizes)
    return sharp(AutoModelForCausalLM.from_config(config))


def minimax() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    config = MiniMaxConfig(
        vocab_size=25, intermediate_size=24, num_key_value_heads=2, num_local_experts=2, **sizes
    )
    return sharp(AutoModelForCausalLM.from_config(config))


def deaf(model: PreTrainedModel) -> None:
    """As linear attention once did: padding is not left out where a text is written."""
    original = type(model).prepare_inputs_for_generation

    def without_mask(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return {**original(self, *args, **kwargs), "attention_mask": None}

    type(model).prepare_inputs_for_generation = without_mask  # pyright: ignore


def test_linear_attention_that_leaves_padding_out_is_read(tmp_path: Path) -> None:
    model = load_policy(save(tmp_path, minimax())).model
    assert "linear_attention" in model.config.layer_types


def test_a_model_whose_writing_padding_changes_is_refused(tmp_path: Path) -> None:
    model = load_policy(tiny_models.save_model(tmp_path)).model
    check_padding(model, 25, tmp_path)
    model.__class__ = type("Deaf", (type(model),), {})
    deaf(model)
    with pytest.raises(ModelError, match=r"expected padding to change nothing for Deaf .* writing"):
        check_padding(model, 25, tmp_path)


def test_models_that_padding_changes_are_refused(tmp_path: Path) -> None:
    doing = "reading"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = save(tmp_path, rwkv())
        # The audit measures padding itself: tests/auditing/test_padding.py.
        for opened in (load_policy, load_reference):
            with pytest.raises(ModelError, match=rf"expected padding to change .* when {doing}"):
                opened(folder)


def test_the_distance_of_two_distributions_by_hand() -> None:
    ours, theirs = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.75, 0.0]).log()
    expected = (0.5 * torch.tensor(2.0).log() ** 2 + 0.5 * torch.tensor(1.5).log() ** 2).sqrt()
    assert distance(ours, theirs) == pytest.approx(float(expected))
    assert distance(theirs, torch.tensor([0.0, 1.0, 0.0]).log()) == torch.inf


def test_texts_to_be_included_are_there() -> None:
    ids = probe_texts(100, include=list(range(40, 90)))
    assert set(range(40, 90)) <= set(ids.flatten().tolist())
    assert torch.equal(probe_texts(100), probe_texts(100))
    assert int(probe_texts(7).max()) < 7


def test_a_trunk_that_the_class_does_not_name_is_found(tmp_path: Path) -> None:
    policy = load_policy(tiny_models.save_model(tmp_path))
    cast_class = type(policy.model)
    trunk = policy.model.base_model
    # As the text model of Llama 4: the prefix is of another class than the attribute.
    renamed = type("Renamed", (cast_class,), {"base_model_prefix": "language_model"})
    policy.model.__class__ = renamed
    assert policy.model.base_model is policy.model
    assert trunk_of(policy.model) is trunk
    check_padding(policy.model, policy.words, tmp_path)
    with pytest.raises(ModelError, match="got LlamaModel, which has no part that gives hidden"):
        trunk_of(trunk)


@pytest.mark.filterwarnings("ignore")
def test_a_head_of_another_width_than_the_states_is_named(tmp_path: Path) -> None:
    said = r"states of width 16 and a head of width 128: this architecture transforms its states"
    with pytest.raises(ModelError, match=said) as caught:
        load_policy(tiny_architectures.save(tmp_path, "electra"))
    assert "own code" not in str(caught.value)


def test_encoders_are_named(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bert = BertLMHeadModel(BertConfig(vocab_size=25, intermediate_size=24, **small))
        folder = save(tmp_path / "bert", sharp(bert))
        with pytest.raises(ModelError, match=r"got BertModel, .*\(an encoder\): take a decoder"):
            load_policy(folder)


def test_encoder_decoders_are_named(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 24}
    bart = BartConfig(vocab_size=25, encoder_layers=1, decoder_attention_heads=2, **sizes)
    t5 = T5Config(vocab_size=25, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    for model in (BartForCausalLM(bart), T5ForConditionalGeneration(t5)):
        folder = save(tmp_path / type(model).__name__, model)
        file = folder / "config.json"
        config = {**json.loads(file.read_text()), "is_encoder_decoder": True}
        file.write_text(json.dumps(config))
        with pytest.raises(ModelError, match=rf"got {type(model).__name__}, an encoder–decoder"):
            load_policy(folder)


def test_an_error_in_a_models_own_code_is_quoted(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with (
        pytest.raises(
            ModelError, match=r"Linear in .*/x' to read .*own code: IndexError: index 9;"
        ),
        own_code(model, "/x"),
    ):
        raise IndexError("index 9")
    with pytest.raises(ModelError, match=r"^as it is$"), own_code(model, "/x"):
        raise ModelError("as it is")


def test_a_configuration_that_its_own_code_rejects_is_named(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "hidden_act": "no such function"}))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .*no such function"):
        load_policy(tmp_path)
