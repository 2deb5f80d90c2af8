"""Models: heads read right, states that ignore padding, references that stay."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kleash.errors import ModelError
from kleash.models.lm_head import apply_head, check_head, read_head
from kleash.models.loading import load_causal_lm, load_config, quiet, switch_off_dropout
from kleash.models.policy import (
    AdapterSpec,
    LanguageModel,
    Policy,
    check_compatible,
    freeze_copy,
    load_policy,
    load_reference,
)

REAL_MODELS = ["stories260K", "babyllama-tok105"]
PROMPT, RESPONSE = [5, 6, 7], [8, 9, 10, 1]


def batch(prompts: list[list[int]], responses: list[list[int]], *, left: int = 0, right: int = 0):
    """Padded tensors, with extra padding on both sides."""
    p = max(map(len, prompts)) + left
    t = max(map(len, responses)) + right
    prompt_ids = torch.tensor([[3] * (p - len(x)) + x for x in prompts])
    prompt_mask = torch.tensor([[False] * (p - len(x)) + [True] * len(x) for x in prompts])
    response_ids = torch.tensor([x + [4] * (t - len(x)) for x in responses])
    response_mask = torch.tensor([[True] * len(x) + [False] * (t - len(x)) for x in responses])
    return prompt_ids, prompt_mask, response_ids, response_mask


def logprobs_alone(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """The obvious way: the whole model on one unpadded text."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        table = model(input_ids=ids).logits[0].double().log_softmax(-1)
    steps = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return torch.stack([table[i, ids[0, i + 1]] for i in steps])


def logprobs(model: LanguageModel, inputs: tuple[Tensor, ...], row: int, length: int) -> Tensor:
    with torch.no_grad():
        hidden = model.hidden_states(*inputs)[row, :length]
        table = apply_head(model.head, hidden).double().log_softmax(-1)
    return table.gather(1, inputs[2][row, :length, None]).squeeze(1)


@pytest.fixture(scope="module", params=tiny_models.ARCHITECTURES)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("models") / request.param
    return load_policy(tiny_models.save_model(folder, request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("models") / "llama")


def test_head_is_the_models_own(policy: Policy) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        hidden = policy.model.base_model(input_ids=ids)[0]
    torch.testing.assert_close(apply_head(policy.head, hidden), expected, atol=1e-5, rtol=1e-5)
    kind = policy.model.config.model_type
    assert policy.head.scale == pytest.approx({"cohere": 0.25, "granite": 1 / 3}.get(kind, 1.0))
    assert policy.head.softcap == (1.5 if kind == "gemma2" else None)
    assert (policy.head.bias is not None) == (kind == "phi")
    assert policy.head.weight.data_ptr() == policy.model.get_output_embeddings().weight.data_ptr()


@pytest.mark.parametrize(("left", "right"), [(0, 0), (1, 0), (0, 1), (30, 0), (0, 30)])
def test_log_probabilities_ignore_padding(policy: Policy, left: int, right: int) -> None:
    expected = logprobs_alone(policy.model, PROMPT, RESPONSE)
    others = [[9, 8, 7, 6, 5, 4], [5]], [[10], [11, 12, 13, 14, 15]]
    alone = batch([PROMPT], [RESPONSE], left=left, right=right)
    among = batch([others[0][0], PROMPT, others[0][1]], [others[1][0], RESPONSE, others[1][1]])
    for inputs, row in ((alone, 0), (among, 1)):
        got = logprobs(policy, inputs, row, len(RESPONSE))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_state_after_the_last_token_is_at_the_length(policy: Policy) -> None:
    short = batch([PROMPT, PROMPT], [RESPONSE[:2], RESPONSE])
    with torch.no_grad():
        hidden = policy.hidden_states(*short)
        whole = policy.model.base_model(input_ids=torch.tensor([PROMPT + RESPONSE]))[0][0]
    assert hidden.shape[1] == len(RESPONSE) + 1
    torch.testing.assert_close(hidden[0, 2], whole[4], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[1, 4], whole[6], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_models_ignore_padding(name: str) -> None:
    path = tiny_models.REAL / "models" / name
    if not path.is_dir():
        pytest.skip("no real inputs beside the checkout")
    policy = load_policy(path)
    prompt = policy.tokenizer("One day, a dog")["input_ids"]
    response = policy.tokenizer(" was happy.", add_special_tokens=False)["input_ids"]
    assert policy.stop_ids == (1,)
    expected = logprobs_alone(policy.model, prompt, response)
    others = batch([prompt * 3, prompt], [[5, 6], response], left=100, right=20)
    for inputs, row in ((batch([prompt], [response], left=100), 0), (others, 1)):
        got = logprobs(policy, inputs, row, len(response))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_dropout_is_off_even_in_training_mode(tmp_path: Path) -> None:
    for kind in ("gpt2", "llama"):
        policy = load_policy(tiny_models.save_model(tmp_path / kind, kind))
        policy.model.train()
        inputs = batch([PROMPT], [RESPONSE])
        first, second = (policy.hidden_states(*inputs) for _ in range(2))
        assert torch.equal(first, second)
        assert torch.allclose(
            logprobs(policy, inputs, 0, 4), logprobs_alone(policy.model.eval(), PROMPT, RESPONSE)
        )


class _Forgetful(nn.Module):
    """Dropout in the three places where models keep it."""

    def __init__(self):
        super().__init__()
        self.module = nn.Dropout(0.5)
        self.attention_dropout = 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.module(nn.functional.dropout(x, 0.5, training=self.training))
        return nn.functional.dropout(x, self.attention_dropout, training=True)


def test_dropout_is_off_wherever_a_model_keeps_it() -> None:
    model = _Forgetful().train()
    switch_off_dropout(model)
    x = torch.ones(1000)
    assert torch.equal(model(x), x)
    assert not model.training
    assert model.module.p == 0


def test_padded_vocabulary_rows_are_no_words(tmp_path: Path) -> None:
    tok = tiny_models.tokenizer()
    policy = load_policy(tiny_models.save_model(tmp_path, tok=tok, rows=len(tok) + 9))
    assert policy.words == policy.head.words == len(tok)
    assert policy.head.weight.shape[0] == len(tok) + 9


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path, rows=10)
    with pytest.raises(ModelError, match=r"at most 10 token ids.*resize"):
        load_policy(tmp_path)


@pytest.mark.parametrize("role", ["eos", "pad"])
def test_a_tokenizer_without_special_token_is_refused(tmp_path: Path, role: str) -> None:
    tok = tiny_models.tokenizer(eos=None) if role == "eos" else tiny_models.tokenizer(pad=None)
    tiny_models.save_model(tmp_path, tok=tok)
    with pytest.raises(ModelError, match=f"tokenizer with {role}_token.*tokenizer_config.json"):
        load_policy(tmp_path)


def test_an_unknown_transformation_of_logits_is_refused(llama: Path) -> None:
    model = load_causal_lm(llama, dtype="float32", device="cpu", attention="auto")
    head = read_head(model, 1)
    check_head(model, head, llama)
    with pytest.raises(ModelError, match="transforms its logits"):
        check_head(model, replace(head, scale=1.01), llama)
    for value in (torch.nan, -torch.inf):
        damaged = head.weight.detach().clone()
        damaged[3] = value
        with pytest.raises(
            ModelError, match=rf"got {value} in row 3 of its weight \(1 rows in all"
        ):
            check_head(model, replace(head, weight=damaged), llama)


def test_a_word_banned_by_its_bias_is_read_as_the_model_reads_it(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path, "phi")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.bias[7] = -torch.inf
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    hidden = policy.hidden_states(*batch([PROMPT], [RESPONSE]))
    assert bool((apply_head(policy.head, hidden)[..., 7] == -torch.inf).all())
    policy.model.lm_head.bias.data[7] = torch.inf  # pyright: ignore
    with pytest.raises(ModelError, match="got inf in row 7 of its bias"):
        check_head(policy.model, policy.head, tmp_path)


def test_a_model_without_head_is_refused(llama: Path) -> None:
    model = load_causal_lm(llama, dtype="float32", device="cpu", attention="sdpa")
    with pytest.raises(ModelError, match="with an output matrix"):
        read_head(model.base_model, 1)


def test_missing_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a model at .*nowhere"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"got: nothing there: check the path"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"got: nothing there \(it is looked for in /"):
        load_policy("../no/such/model")
    tiny_models.config("llama", 10).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="expected a model at"):
        load_policy(tmp_path)


def test_an_attention_the_architecture_lacks_is_refused(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path, "gemma2")
    with pytest.raises(ModelError, match="got 'sdpa': take 'auto' or 'eager'"):
        load_policy(tmp_path, attention="sdpa")


def test_pickles_are_refused(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"safetensors.*pytorch_model.bin.*can execute code"):
        load_policy(tmp_path)


def test_a_corrupt_file_is_refused(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(
            content[:-40] if file.suffix == ".safetensors" else content
        )
    with pytest.raises(ModelError, match="expected a model at"):
        load_policy(tmp_path)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"every weight.*model.layers.2.* and \d+ more.*random"):
        load_policy(tmp_path)


def test_a_missing_tokenizer_is_refused(llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"expected a tokenizer at .*: copy tokenizer\.json"):
        load_policy(tmp_path)


def test_a_path_that_is_something_else_is_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="got: a file: give the directory"):
        load_policy(llama / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"a LoRA adapter .* this directory as its adapter \(`policy\.adapter`"
    ):
        load_policy(tmp_path)


def test_the_saved_tokenizer_is_the_one_that_reads(policy: Policy) -> None:
    assert policy.tokenizer("w1 w2")["input_ids"] == [6, 7]


def test_stop_ids_include_the_models_own(tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_policy(tmp_path).stop_ids == (1, 7, 9)


def test_a_copy_does_not_move_with_the_policy(llama: Path) -> None:
    policy = load_policy(llama)
    reference = freeze_copy(policy)
    check_compatible(policy, reference)
    before = reference.identity()
    inputs = batch([PROMPT], [RESPONSE])
    assert torch.equal(reference.hidden_states(*inputs), policy.hidden_states(*inputs).detach())
    assert before.sha256 == policy.identity().sha256
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    assert reference.identity() == before
    assert policy.identity().sha256 != before.sha256
    assert not reference.hidden_states(*inputs).requires_grad
    assert not reference.head.weight.requires_grad
    assert before.how == "copy of the policy"


def test_a_reference_that_is_the_policy_is_refused(llama: Path) -> None:
    policy = load_policy(llama)
    reference = replace(freeze_copy(policy), model=policy.model)
    with pytest.raises(ModelError, match="expected a frozen reference of its own"):
        check_compatible(policy, reference)
    policy.model.requires_grad_(False)
    with pytest.raises(ModelError, match="learns or is shared"):
        check_compatible(policy, reference)


def test_a_reference_of_its_own_path(llama: Path, tmp_path: Path) -> None:
    policy = load_policy(llama)
    other = load_reference(tiny_models.save_model(tmp_path, seed=1))
    check_compatible(policy, other)
    inputs = batch([PROMPT], [RESPONSE])
    expected = logprobs_alone(other.model, PROMPT, RESPONSE)
    torch.testing.assert_close(logprobs(other, inputs, 0, 4), expected, atol=1e-5, rtol=0)
    assert other.identity().how == "loaded"
    assert other.identity().sha256 != policy.identity().sha256


def test_other_vocabularies_are_refused(llama: Path, tmp_path: Path) -> None:
    policy = load_policy(llama)
    for number, (tok, message) in enumerate(
        [
            (tiny_models.tokenizer(words=21), r"token 'w20' with id None in the policy and 25"),
            (
                tiny_models.tokenizer(pad="<eos>"),
                r"token '<assistant>' with id 4 in the policy and 3",
            ),
        ]
    ):
        other = load_reference(tiny_models.save_model(tmp_path / str(number), tok=tok))
        with pytest.raises(ModelError, match=message):
            check_compatible(policy, other)


def test_special_tokens_may_have_other_roles(llama: Path) -> None:
    policy = load_policy(llama)
    tok = tiny_models.tokenizer()
    tok.eos_token = "w3"
    shared = check_compatible(policy, replace(freeze_copy(policy), tokenizer=tok))
    assert (
        shared.words == policy.words and "each ends its responses with its own" in shared.notes[0]
    )


def test_other_numbers_of_words_are_refused(llama: Path) -> None:
    policy = load_policy(llama)
    with pytest.raises(
        ModelError, match=r"one vocabulary, got only 24 ids .*'w19' would be left out"
    ):
        check_compatible(policy, replace(freeze_copy(policy), words=24))


def test_an_adapter_learns_and_its_reference_is_the_base(llama: Path, tmp_path: Path) -> None:
    base = load_policy(llama)
    policy = load_policy(llama, adapter=AdapterSpec(rank=2, alpha=4))
    reference = freeze_copy(policy)
    check_compatible(policy, reference)
    inputs = batch([PROMPT], [RESPONSE])
    expected = base.hidden_states(*inputs).detach()
    assert torch.equal(policy.hidden_states(*inputs).detach(), expected)
    parameters = policy.parameters()
    assert 0 < sum(p.numel() for p in parameters) < 2000
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    assert torch.equal(reference.hidden_states(*inputs), expected)
    moved = policy.hidden_states(*inputs)
    assert (moved - expected).abs().max() > 1e-2
    moved.sum().backward()
    assert all(p.grad is not None for p in parameters)
    assert reference.identity().sha256 == base.identity().sha256
    assert reference.identity().how == "policy with its adapter off"
    policy.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_adapters_that_cannot_be_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="got target 'lm_head'"):
        load_policy(llama, adapter=AdapterSpec(targets=("lm_head",)))
    with pytest.raises(ModelError, match=r"expected adapter targets .*; take some of .*q_proj"):
        load_policy(llama, adapter=AdapterSpec(targets=("nothing_like_this",)))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"kleash\[lora\]"):
        load_policy(llama, adapter=AdapterSpec())


def test_a_saved_policy_opens_again(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    again = load_policy(tmp_path)
    inputs = batch([PROMPT], [RESPONSE])
    assert torch.equal(again.hidden_states(*inputs), policy.hidden_states(*inputs))
    assert (again.hidden_size, again.context, again.pad_id) == (16, 64, 2)
    assert again.device.type == "cpu"
    assert isinstance(again, LanguageModel)


def test_half_precision_passes_the_check(llama: Path) -> None:
    policy = load_policy(llama, dtype="bfloat16")
    assert policy.identity().dtype == "bfloat16"


def test_quiet_restores_the_librarys_voice() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_configurations_are_read_without_dropout(tmp_path: Path) -> None:
    read = load_config(tiny_models.save_model(tmp_path, "gpt2"))
    assert (read.resid_pdrop, read.embd_pdrop, read.attn_pdrop) == (0.0, 0.0, 0.0)
