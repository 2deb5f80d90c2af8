"""Adapters read by kleash are the models that plain transformers and peft read, unmerged.

The oracle: base and adapter opened by peft, in float64, nothing merged.
"""

import importlib
import itertools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from trained_adapters import (
    EMBEDDINGS_ONLY,
    KINDS,
    NEIGHBOURS,
    NOT_ON_EMBEDDINGS,
    PLACES,
    PROMPTS,
    made,
    save_adapter,
    wrap,
)
from transformers import AutoModelForCausalLM

import kleash
from kleash.auditing.model_pair import open_checkpoint
from kleash.errors import ModelError
from kleash.models.loading import load_causal_lm
from kleash.models.lora import compilers_kept
from kleash.models.merging import merge_adapter
from kleash.models.policy import Policy, load_policy, load_reference

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 3, 4, 1, 12, 13]])


@torch.no_grad()
def truth(base: Path, adapter: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """log-probabilities of the unmerged model in float64, by peft alone."""
    with compilers_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        model = peft.PeftModel.from_pretrained(model, adapter).double().eval()
    return model(input_ids=ids).logits.log_softmax(-1)


@torch.no_grad()
def read(policy: Policy) -> torch.Tensor:
    return policy.model(input_ids=IDS).logits.double().log_softmax(-1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: tiny_models.save_model(folder / name, tie_word_embeddings=name == "tied")
        for name in ("tied", "untied")
    }


TEXT, TEXT_IDS = "w1 w2 w3 w4 w5 w6", torch.tensor([[6, 7, 8, 9, 10, 11]])


def cells() -> Iterator[tuple[str, str, str]]:
    """Kinds × places × ties; of the rarer kinds only the tied, which is where merges go wrong."""
    for kind, place in itertools.product((*KINDS, *NEIGHBOURS), PLACES):
        if kind in EMBEDDINGS_ONLY and place != "embedding":
            continue
        for tied in ("tied",) if kind in NEIGHBOURS else ("tied", "untied"):
            yield kind, place, tied


@pytest.mark.parametrize(("kind", "place", "tied"), list(cells()))
def test_an_adapter_is_read_as_peft_reads_it_unmerged(
    kind: str, place: str, tied: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[tied]
    if kind in NOT_ON_EMBEDDINGS and place == "embedding":
        with pytest.raises((ValueError, TypeError)):
            save_adapter(base, tmp_path / "adapter", made(kind, place))
        return
    adapter = save_adapter(base, tmp_path / "adapter", made(kind, place))
    expected, plain = truth(base, adapter), truth_of_base(base)
    moved = (expected - plain).abs().max()
    assert moved > 0.05
    for name, policy in {
        "audit": open_checkpoint(adapter, dtype="float32", device="cpu"),
        "train": load_policy(base, merge=str(adapter)),
    }.items():
        torch.testing.assert_close(read(policy), expected, atol=1e-5, rtol=0, msg=name)
        # The number that the audit is asked for, summed by hand.
        ours, theirs = (
            given[0, :-1]
            for given in (truth(base, adapter, TEXT_IDS), truth_of_base(base, TEXT_IDS))
        )
        kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
        found = kleash.audit(policy, load_policy(base), texts=[TEXT], keep=1).kl.per_token.mean
        assert found == pytest.approx(kl, abs=1e-5), name
    reference = load_reference(base, merge=str(adapter))
    assert reference.identity().sha256 == policy.identity().sha256
    # And what training would save of it opens as the same, by plain transformers.
    policy.save(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(input_ids=IDS).logits, policy.model(input_ids=IDS).logits)


def truth_of_base(base: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return model(input_ids=ids).logits.log_softmax(-1).detach()


@pytest.mark.parametrize("compiler", [None, "clang++"])
def test_a_kernel_that_cannot_be_built_leaves_the_compilers_alone(
    compiler: str | None, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(bases["untied"], tmp_path, made("boft", "attention"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    if compiler is not None:
        monkeypatch.setenv("CXX", compiler)
    # It is tried once in a process.
    monkeypatch.setattr(importlib.import_module("peft.tuners.boft.layer"), "_FBD_CUDA", None)
    load_policy(bases["untied"], merge=str(adapter))
    assert (os.environ.get("CC"), os.environ.get("CXX")) == (None, compiler)


def test_an_untouched_tie_stays_a_tie(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(bases["tied"], tmp_path, made("lora", "attention"))
    model = load_policy(bases["tied"], merge=str(adapter)).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_half_precision_rounds_the_sum_once(
    dtype: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(bases["untied"], dtype=torch.bfloat16).save_pretrained(
        half
    )
    tiny_models.tokenizer().save_pretrained(half)
    adapter = save_adapter(half, tmp_path / "adapter", made("lora", "attention"))
    exact = load_policy(half, merge=str(adapter)).model.state_dict()
    found = load_policy(half, merge=str(adapter), dtype=dtype).model  # pyright: ignore
    kind = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, exact[name].to(kind)), name
    assert found.config.dtype == kind


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_adapters_that_are_no_change_of_weights_are_refused(
    kind: str, tied: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    settings = PROMPTS[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapter = save_adapter(bases[tied], tmp_path, settings)
    said = rf"got {kind.upper()}_TUNING, which adds inputs to a model and cannot be merged"
    for opened in (
        lambda: open_checkpoint(adapter, dtype="float32", device="cpu"),
        lambda: load_policy(bases[tied], merge=str(adapter)),
    ):
        with pytest.raises(ModelError, match=said):
            opened()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (peft.PolyConfig, r"reads a text by itself in .*, got POLY: ValueError: task_ids"),
        (peft.LilyConfig, r"can be merged into weights in .*, got LILY: This method"),
    ],
)
def test_adapters_that_cannot_be_read_or_merged_are_named(
    settings: Any, said: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    made_of = settings(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    adapter = save_adapter(bases["tied"], tmp_path, made_of)
    with pytest.raises(ModelError, match=said) as caught:
        load_policy(bases["tied"], merge=str(adapter))
    assert "own code" not in str(caught.value)


def test_an_adapters_own_tokenizer_template_and_rows_are_used(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base, adapter = bases["untied"], tmp_path / "adapter"
    tok = tiny_models.tokenizer()
    tok.add_tokens(["new"])
    tok.chat_template = "{{ messages[0]['content'] }} new"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tok), mean_resizing=False)
    wrapped = wrap(model, made("lora", "attention"))
    with torch.no_grad():
        wrapped.get_input_embeddings().weight[-1] = 0.7
        wrapped.get_output_embeddings().weight[-1] = 0.2
    wrapped.save_pretrained(adapter, save_embedding_layers=True)
    tok.save_pretrained(adapter)
    ids = torch.tensor([[5, 25, 6, 25, 7]])
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=ids).logits
    for policy in (
        load_policy(base, merge=str(adapter)),
        open_checkpoint(adapter_naming(adapter, base), dtype="float32", device="cpu"),
    ):
        assert policy.words == len(tok) == 26
        assert policy.tokenizer("w1 new")["input_ids"] == [6, 25]
        assert policy.tokenizer.chat_template == tok.chat_template
        torch.testing.assert_close(
            policy.model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5
        )


def adapter_naming(adapter: Path, base: Path) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)})
    )
    return adapter


def test_a_template_alone_beside_an_adapter_is_used(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(bases["tied"], tmp_path, made("lora", "attention"))
    (adapter / "chat_template.jinja").write_text("hello")
    assert load_policy(bases["tied"], merge=str(adapter)).tokenizer.chat_template == "hello"


def test_added_rows_that_are_not_in_the_file_are_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["untied"]
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(26, mean_resizing=False)
    settings = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    wrap(model, settings).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ModelError, match=r"of \[26\] instead of 25 and no lm_head: .* random"):
        load_policy(base, merge=str(tmp_path))


def test_a_merge_that_changes_the_model_is_an_error(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was before tied matrices were separated: the head moves with the embedding."""
    adapter = save_adapter(bases["tied"], tmp_path, made("lora", "embedding"))
    monkeypatch.setattr("kleash.models.merging._separate", lambda model: None)
    with pytest.raises(
        ModelError, match=r"merged, to be the model it stands for, got .* differ by"
    ):
        load_policy(bases["tied"], merge=str(adapter))


def test_an_adapter_with_more_than_the_model_has_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    adapter = save_adapter(bases["tied"], tmp_path, made("lora", "attention"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    extra = {
        name.replace("layers.1", "layers.7"): tensor.clone() for name, tensor in tensors.items()
    }
    save_file(tensors | extra, adapter / "adapter_model.safetensors")
    model = load_causal_lm(bases["tied"], dtype="float32", device="cpu", attention="auto")
    with pytest.raises(ModelError, match=r"weights that this model has no place for, .*layers\.7"):
        merge_adapter(model, adapter)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("[]", "no adapter_config.json that can be read: a list"),
        ('{"peft_type": "NOVEL"}', "a kind that peft knows in .*, got 'NOVEL'"),
        ('{"peft_type": "LORA", "megatron_config": {}}', "name a module to import"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    settings: str, said: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(bases["tied"], tmp_path, made("lora", "attention"))
    (adapter / "adapter_config.json").write_text(settings)
    with pytest.raises(ModelError, match=said):
        load_policy(bases["tied"], merge=str(adapter))
