"""Which tokens two models share: the pairs people have, and the pairs that mean nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from transformers import AutoModelForCausalLM

from kleash.errors import ModelError, PromptError
from kleash.models.loading import number_of_words
from kleash.models.policy import check_compatible, freeze_copy, load_policy, load_reference
from kleash.models.vocabulary import (
    require_known_ids,
    require_shared_ending,
    shared_vocabulary,
)

WORDS = 25
"""Tokens of the tests' tokenizer."""


def with_added(*tokens: str, special: bool = True):
    tok = tiny_models.tokenizer()
    tok.add_tokens(list(tokens), special_tokens=special)
    return tok


def shared(ours, theirs):
    return shared_vocabulary(ours, theirs, words=(len(ours), len(theirs)), path="ref")


def test_one_added_token_is_left_out_and_named() -> None:
    found = shared(with_added("[PAD]"), tiny_models.tokenizer())
    assert (found.words, found.policy_only, found.reference_only) == (WORDS, ("[PAD]",), ())
    assert "Only the policy has '[PAD]'" in found.notes[0]
    found = shared(tiny_models.tokenizer(), with_added("<a>", "<b>", special=False))
    assert (found.words, found.reference_only) == (WORDS, ("<a>", "<b>"))


def test_the_same_id_with_another_added_token_is_left_out_on_both_sides() -> None:
    found = shared(with_added("[PAD]", "<x>"), with_added("<pad2>", "<x>"))
    assert found.words == WORDS
    assert (found.policy_only, found.reference_only) == (("[PAD]", "<x>"), ("<pad2>", "<x>"))


def test_an_end_token_of_ones_own_is_said_and_one_the_other_lacks_is_refused() -> None:
    ours, theirs = tiny_models.tokenizer(), tiny_models.tokenizer()
    ours.eos_token = "<assistant>"
    found = shared(ours, theirs)
    assert (found.words, len(found.notes)) == (WORDS, 1)
    assert "'<assistant>' in the policy and '<eos>' in the reference" in found.notes[0]
    require_shared_ending(ours, (1, 4, 50256), found, "policy")
    chat = with_added("<end>")
    chat.eos_token = "<end>"
    with pytest.raises(ModelError, match=r"got '<end>' \(id 25\), which only it has"):
        require_shared_ending(chat, (1, 25), shared(chat, theirs), "policy")


@pytest.mark.parametrize(
    "theirs",
    [
        tiny_models.tokenizer(words=21),
        tiny_models.tokenizer(pad="<eos>"),
        # An added token renamed below the basic vocabulary would leave nothing to compare.
        tiny_models.tokenizer(pad="<other>"),
    ],
)
def test_other_basic_vocabularies_stay_refused(theirs) -> None:
    with pytest.raises(ModelError, match="take models of one tokenizer"):
        shared(tiny_models.tokenizer(), theirs)


def test_added_tokens_without_a_row_are_no_harm_until_one_occurs(tmp_path: Path) -> None:
    folder = tiny_models.save_model(tmp_path / "a")
    tok = with_added("<image>")
    tok.save_pretrained(folder)
    policy = load_policy(folder)
    assert policy.words == WORDS and policy.tokenizer.get_vocab()["<image>"] == WORDS
    check_compatible(policy, load_reference(folder))
    ids = policy.tokenizer("w1 <image> w2")["input_ids"]
    with pytest.raises(PromptError, match=r"on line 3, got '<image>' \(id 25, of 25\)"):
        require_known_ids(ids, policy.words, policy.tokenizer, "line 3")
    # A whole tokenizer of another model, or an end token without a row, is another matter.
    with pytest.raises(ModelError, match="resize the model's embeddings"):
        number_of_words(tok, WORDS - 1, "a")
    tok.eos_token = "<image>"
    with pytest.raises(ModelError, match="resize the model's embeddings"):
        number_of_words(tok, WORDS, "a")


def test_a_padding_token_without_a_row_is_never_read(tmp_path: Path) -> None:
    folder = tiny_models.save_model(tmp_path / "a")
    tok = with_added("[PAD]")
    tok.pad_token = "[PAD]"
    tok.save_pretrained(folder)
    assert load_policy(folder).pad_id < WORDS


def test_check_compatible_gives_what_both_can_produce(tmp_path: Path) -> None:
    base = tiny_models.save_model(tmp_path / "a")
    tuned = AutoModelForCausalLM.from_pretrained(base)
    tok = with_added("[PAD]")
    tuned.resize_token_embeddings(len(tok))
    tuned.save_pretrained(tmp_path / "b")
    tok.save_pretrained(tmp_path / "b")
    policy, reference = load_policy(tmp_path / "b"), load_reference(base)
    assert (policy.words, reference.words) == (WORDS + 1, WORDS)
    assert check_compatible(policy, reference).words == WORDS
    # As training does: both are then read over the same ids.
    held = replace(policy, words=WORDS)
    assert held.head.words == reference.head.words
    assert check_compatible(held, freeze_copy(held)).notes == []
    assert "[PAD]" in check_compatible(held, reference).notes[0]
