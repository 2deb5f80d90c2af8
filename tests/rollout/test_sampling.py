"""Writing responses: lengths, ends, and a sampler whose draws can be replayed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from chat_families import byte_tokenizer
from transformers import GenerationConfig

from kleash.errors import ConfigError, PromptError
from kleash.models.policy import Policy, load_policy
from kleash.rollout.prompts import Prompt, PromptBatch, batch_prompts
from kleash.rollout.sampling import (
    SamplingSpec,
    _draw,
    _Sampler,
    generate,
    overridden_settings,
    response_columns,
    response_texts,
)
from kleash.types import Rollout


def prompts(policy: Policy, *ids: list[int], copies: int = 1) -> PromptBatch:
    made = [Prompt("", tuple(x), i) for i, x in enumerate(ids) for _ in range(copies)]
    return batch_prompts(made, pad_id=policy.pad_id)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(tiny_models.save_model(tmp_path_factory.mktemp("models") / "llama"))


def replay(policy: Policy, rollout: Rollout, row: int, temperature: float) -> torch.Tensor:
    """log-probabilities of a response by the whole model on the unpadded text, in float64."""
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
    response = rollout.response_ids[row][rollout.response_mask[row]]
    ids = torch.cat([prompt, response])[None]
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0].double() / temperature
    logits[:, policy.words :] = -torch.inf
    table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return table.gather(1, response[:, None]).squeeze(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "cohere"])
def test_the_samplers_log_probabilities_can_be_replayed(
    tmp_path: Path, kind: tiny_models.Architecture, temperature: float
) -> None:
    tok = tiny_models.tokenizer()
    policy = load_policy(tiny_models.save_model(tmp_path, kind, tok=tok, rows=len(tok) + 7))
    spec = SamplingSpec(max_new_tokens=12, temperature=temperature)
    torch.manual_seed(0)
    rollout = generate(policy, prompts(policy, [5, 6, 7], [9], [8, 10, 5, 6, 7], copies=4), spec)
    assert rollout.response_ids.max() < policy.words
    for row in range(12):
        length = int(rollout.response_mask[row].sum())
        assert rollout.sampler_logprobs is not None
        got = rollout.sampler_logprobs[row]
        expected = replay(policy, rollout, row, temperature)
        torch.testing.assert_close(got[:length].double(), expected, atol=1e-5, rtol=0)
        assert not got[length:].any()


def test_steps_that_the_library_takes_back_are_not_counted() -> None:
    """On a GPU `generate` may find out a step late that all rows have ended, and undo it."""
    torch.manual_seed(0)
    sampler = _Sampler(temperature=1.0, words=4, rows=slice(None), of=2)
    logits = torch.randn(3, 2, 5)
    drawn = [sampler(None, logits[step]).argmax(1) for step in range(3)]
    for length in (3, 2, 1):
        got = sampler.logprobs(length)
        assert got.shape == (2, length)
        for step in range(length):
            table = logits[step, :, :4].log_softmax(-1)
            expected = table.gather(1, drawn[step][:, None])[:, 0]
            torch.testing.assert_close(got[:, step], expected)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_word_of_no_probability_is_never_drawn(
    uniform: float,
) -> None:
    """Not even by the smallest and the greatest of random numbers."""
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 0.0, 1e-30, 0.0, 0.0]])
    words, mass = _draw(weights, torch.full((2, 1), uniform, dtype=torch.float64))
    assert (weights.gather(1, words) > 0).all()
    torch.testing.assert_close(mass, weights.double().sum(1, keepdim=True))


def test_draws_follow_the_distribution(policy: Policy) -> None:
    torch.manual_seed(0)
    rollout = generate(policy, prompts(policy, [5, 6], copies=4000), SamplingSpec(1, 0.8))
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[5, 6]])).logits[0, -1]
    expected = (logits / 0.8).softmax(-1)
    counts = torch.bincount(rollout.response_ids[:, 0], minlength=25)
    chi2 = ((counts - 4000 * expected) ** 2 / (4000 * expected)).sum()
    assert chi2 < 52  # the 99.9 % point of 24 degrees of freedom is 51.2


def test_the_seed_decides(policy: Policy) -> None:
    drawn: list[torch.Tensor] = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generate(policy, prompts(policy, [5, 6]), SamplingSpec(20)).response_ids)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def check_masks(policy: Policy, rollout: Rollout, limit: int) -> None:
    """What must hold for any rollout, looked at token by token."""
    for row in range(len(rollout.response_ids)):
        mask, ids = rollout.response_mask[row].tolist(), rollout.response_ids[row].tolist()
        length = sum(mask)
        assert mask == [True] * length + [False] * (len(mask) - length)
        stops = [t for t in range(length) if ids[t] in policy.stop_ids]
        assert stops == ([length - 1] if rollout.ended[row] else [])
        assert bool(rollout.ended[row]) or length == limit
        assert all(i == policy.pad_id for i in ids[length:])


@pytest.mark.parametrize(("pad", "bos"), [("<pad>", None), ("<eos>", None), ("<eos>", "<eos>")])
def test_ends_are_counted_once(tmp_path: Path, pad: str, bos: str | None) -> None:
    policy = load_policy(
        tiny_models.save_model(tmp_path, tok=tiny_models.tokenizer(pad=pad, bos=bos))
    )
    eos = policy.tokenizer.eos_token_id
    torch.manual_seed(0)
    start = [eos] if bos else []
    batch = prompts(policy, [*start, 5, 6, 7], [*start, 9], copies=32)
    rollout = generate(policy, batch, SamplingSpec(30))
    check_masks(policy, rollout, 30)
    assert 0 < int(rollout.ended.sum()) < 64
    lengths = rollout.response_mask.sum(1)
    assert len(set(lengths.tolist())) > 5
    assert rollout.prompt_index.tolist() == [0] * 32 + [1] * 32


def test_padding_tokens_the_policy_writes_are_its_own(policy: Policy) -> None:
    torch.manual_seed(0)
    rollout = generate(policy, prompts(policy, [5], copies=64), SamplingSpec(20))
    written = (rollout.response_ids == policy.pad_id) & rollout.response_mask
    assert written.any()
    check_masks(policy, rollout, 20)


def test_no_end_at_all(policy: Policy) -> None:
    endless = replace(policy, stop_ids=(24,))
    with torch.no_grad():
        before = endless.model.lm_head.weight[24].clone()
        endless.model.lm_head.weight[24] = 0.0
    rollout = generate(endless, prompts(policy, [5], [6, 7]), SamplingSpec(5))
    with torch.no_grad():
        endless.model.lm_head.weight[24] = before
    check_masks(endless, rollout, 5)


def test_several_stop_tokens(policy: Policy) -> None:
    torch.manual_seed(0)
    many = replace(policy, stop_ids=tuple(range(1, 20)))
    rollout = generate(many, prompts(policy, [5], copies=32), SamplingSpec(10))
    check_masks(many, rollout, 10)
    assert rollout.ended.all()
    assert rollout.response_ids.shape[1] < 10


def test_microbatches_write_the_same_kind_of_thing(policy: Policy) -> None:
    torch.manual_seed(0)
    batch = prompts(policy, [5, 6, 7, 8, 9], [5], [6, 7], [8], copies=4)
    rollout = generate(policy, batch, SamplingSpec(8), microbatch=3)
    check_masks(policy, rollout, 8)
    assert torch.equal(rollout.prompt_ids, batch.ids)
    for row in range(16):
        length = int(rollout.response_mask[row].sum())
        assert rollout.sampler_logprobs is not None
        got = rollout.sampler_logprobs[row, :length].double()
        torch.testing.assert_close(got, replay(policy, rollout, row, 1.0), atol=1e-5, rtol=0)


def test_settings_left_in_the_models_file_do_not_apply(policy: Policy) -> None:
    left_over = {
        "repetition_penalty": 5.0,
        "top_p": 0.1,
        "top_k": 3,
        "temperature": 0.1,
        "min_new_tokens": 6,
        "suppress_tokens": [8, 9, 10],
        "no_repeat_ngram_size": 1,
        "max_length": 3,
    }
    batch = prompts(policy, [5, 6], copies=8)
    torch.manual_seed(0)
    clean = generate(policy, batch, SamplingSpec(8))
    assert overridden_settings(policy) == {}
    own = policy.model.generation_config
    theirs = GenerationConfig(**left_over, do_sample=True)
    policy.model.generation_config = theirs
    try:
        torch.manual_seed(0)
        again = generate(policy, batch, SamplingSpec(8))
        expected = {k: v for k, v in left_over.items() if k != "max_length"}
        assert overridden_settings(policy) == expected
        assert policy.model.generation_config is theirs
    finally:
        policy.model.generation_config = own
    assert torch.equal(clean.response_ids, again.response_ids)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_p": 0.9}, "expected top_p = 1.0, got 0.9"),
        ({"top_k": 50}, "expected top_k = 0, got 50"),
        ({"min_p": 0.1}, "expected min_p = 0.0, got 0.1"),
        ({"repetition_penalty": 1.1}, "expected repetition_penalty = 1.0, got 1.1"),
        ({"no_repeat_ngram_size": 3}, "expected no_repeat_ngram_size = 0, got 3"),
        ({"min_new_tokens": 3}, "expected min_new_tokens = 0, got 3"),
        ({"temperature": 0.0}, "temperature above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature above 0"),
        ({"temperature": float("nan")}, "temperature above 0"),
        ({"temperature": float("inf")}, "temperature above 0"),
        ({"max_new_tokens": 0}, "at least 1, got 0"),
    ],
)
def test_samplers_that_cannot_be_replayed_are_refused(
    setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingSpec(**setting)


def test_prompts_that_leave_no_room_are_refused(policy: Policy) -> None:
    batch = prompts(policy, list(range(5, 15)))
    generate(policy, batch, SamplingSpec(54))
    with pytest.raises(PromptError, match=r"at most 9 tokens \(context 64 less 55.*got 10"):
        generate(policy, batch, SamplingSpec(55))


def test_texts_are_what_the_response_adds(policy: Policy) -> None:
    rollout = Rollout(
        prompt_ids=torch.tensor([[2, 5, 6], [7, 8, 9]]),
        prompt_mask=torch.tensor([[False, True, True], [True, True, True]]),
        response_ids=torch.tensor([[7, 8, 1], [1, 2, 2]]),
        response_mask=torch.tensor([[True, True, True], [True, False, False]]),
        ended=torch.tensor([True, True]),
        prompt_index=torch.tensor([0, 1]),
    )
    assert response_texts(policy.tokenizer, rollout) == [" w2 w3", ""]


def test_only_the_end_and_padding_are_dropped_from_texts() -> None:
    tok = byte_tokenizer()
    ids = {name: tok.convert_tokens_to_ids(name) for name in ("<s>", "<think>", "</think>", "</s>")}
    two, stop = tok("2", add_special_tokens=False)["input_ids"][0], tok.convert_tokens_to_ids("!")
    written = [ids["<think>"], two, ids["</think>"], two, ids["<s>"], stop]
    rollout = Rollout(
        prompt_ids=torch.tensor([[ids["<s>"], two], [ids["<s>"], two]]),
        prompt_mask=torch.ones(2, 2, dtype=torch.bool),
        response_ids=torch.tensor([[*written[:4], ids["</s>"], ids["</s>"]], written]),
        response_mask=torch.tensor([[True] * 5 + [False], [True] * 6]),
        ended=torch.tensor([True, True]),
        prompt_index=torch.tensor([0, 1]),
    )
    thought = "<think>2</think>2"
    assert response_texts(tok, rollout) == [thought, thought + "<s>!"]
    assert response_texts(tok, rollout, stop_ids=(stop,)) == [thought, thought + "<s>"]
    assert response_columns(tok, rollout) == {
        "completion_ids": [[*written[:4], ids["</s>"]], written],
        "completions_with_special_tokens": [thought + "</s>", thought + "<s>!"],
    }


def test_texts_that_do_not_continue_are_read_alone(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def joining(ids: list[int], **_: object) -> str:
        """Reads 5 6 as one character."""
        return "".join(map(str, ids)).replace("56", "x")

    monkeypatch.setattr(policy.tokenizer, "decode", joining)
    rollout = Rollout(
        prompt_ids=torch.tensor([[5]]),
        prompt_mask=torch.tensor([[True]]),
        response_ids=torch.tensor([[6, 7]]),
        response_mask=torch.tensor([[True, True]]),
        ended=torch.tensor([False]),
        prompt_index=torch.tensor([0]),
    )
    assert response_texts(policy.tokenizer, rollout) == ["67"]


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_real_models_write(name: str) -> None:
    path = tiny_models.REAL / "models" / name
    if not path.is_dir():
        pytest.skip("no real inputs beside the checkout")
    policy = load_policy(path)
    texts = ["One day, a dog", "Anna and Lucy were best friends. One day,"]
    ids = [policy.tokenizer(t)["input_ids"] for t in texts]
    torch.manual_seed(0)
    limit = 450 if name == "stories260K" else 48
    rollout = generate(policy, prompts(policy, *ids, copies=2), SamplingSpec(limit))
    check_masks(policy, rollout, limit)
    if name == "stories260K":
        assert rollout.ended.any()
    written = response_texts(policy.tokenizer, rollout)
    for row, (text, added) in enumerate(zip(texts, written[::2], strict=True)):
        kept = rollout.response_ids[2 * row][rollout.response_mask[2 * row]].tolist()
        whole = policy.tokenizer.decode(ids[row] + kept, skip_special_tokens=True)
        assert whole.strip() == (text + added).strip()
    differences = [
        (
            rollout.sampler_logprobs[r][rollout.response_mask[r]] - replay(policy, rollout, r, 1.0)
        ).abs()
        for r in range(4)
        if rollout.sampler_logprobs is not None
    ]
    # Single precision through 450 cached steps: 1e-5 on average is far above what is found.
    assert torch.cat(differences).mean() < 1e-5
