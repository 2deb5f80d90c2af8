"""`kleash.score` against the models' own logits, in every place where a loop could go wrong."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import kleash
from kleash.errors import ModelError, NonFiniteError

IDS = torch.tensor([[0, 0, 5, 9, 7, 12], [4, 8, 11, 6, 0, 0], [3, 9, 9, 10, 5, 7]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


def opened(
    folder: Path,
    kind: Any = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> Any:
    path = tiny_models.save_model(folder / f"{kind}{seed}", kind, seed=seed, **settings)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def own_logprobs(model: Any, row: int) -> Tensor:
    """Of one text alone, without padding: [token, vocab], of all tokens but the first."""
    text = IDS[row][MASK[row].bool()]
    return model(text[None]).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("kind", tiny_models.ARCHITECTURES)
def test_every_number_is_that_of_the_models_own_logits(kind: Any, tmp_path: Path) -> None:
    model, reference = (opened(tmp_path, kind, seed=seed, dtype=torch.float32) for seed in range(2))
    with torch.no_grad():
        scores = kleash.score(model, reference, IDS, MASK)
        for row in range(len(IDS)):
            text = IDS[row][MASK[row].bool()]
            p, q = own_logprobs(model, row), own_logprobs(reference, row)
            kept = scores.mask[row]
            expected = {
                "logprobs": p.gather(1, text[1:, None])[:, 0],
                "ref_logprobs": q.gather(1, text[1:, None])[:, 0],
                "kl": (p.exp() * (p - q)).sum(-1),
                "entropy": -(p.exp() * p).sum(-1),
            }
            for name, numbers in expected.items():
                assert torch.allclose(getattr(scores, name)[row][kept], numbers, atol=1e-5), name
                assert not getattr(scores, name)[row][~kept].any()
    assert scores.mask.sum(1).tolist() == [3, 3, 5]


def test_gradients_are_those_of_the_models_own_logits_and_spare_the_reference(
    tmp_path: Path,
) -> None:
    model, reference = opened(tmp_path), opened(tmp_path, seed=1)
    scores = kleash.score(model, reference, IDS, MASK)
    (scores.kl.sum() + 2 * scores.logprobs.sum()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(p.grad is None for p in reference.parameters())
    model.zero_grad()
    for row in range(len(IDS)):
        text = IDS[row][MASK[row].bool()]
        p, q = own_logprobs(model, row), own_logprobs(reference, row).detach()
        ((p.exp() * (p - q)).sum() + 2 * p.gather(1, text[1:, None]).sum()).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-9), name
    with torch.no_grad():
        assert not kleash.score(model, reference, IDS, MASK).kl.requires_grad


def test_a_response_mask_chooses_and_a_temperature_divides(tmp_path: Path) -> None:
    model, reference = opened(tmp_path), opened(tmp_path, seed=1)
    chosen = torch.zeros_like(MASK)
    chosen[0, 4:], chosen[2, 3] = 1, 1
    with torch.no_grad():
        scores = kleash.score(model, reference, IDS, MASK, response_mask=chosen, temperature=2.0)
        logits = model(IDS[2][None]).logits[0, 2] / 2
    assert scores.mask.tolist() == chosen.bool().tolist()
    assert float(scores.logprobs[2, 3]) == pytest.approx(float(logits.log_softmax(-1)[10]))
    assert not scores.kl[~chosen.bool()].any() and bool((scores.kl[chosen.bool()] > 0).all())


# Of transformers, about a property that peft reads.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_turned_off_for_the_reference_and_on_again(tmp_path: Path) -> None:
    base = opened(tmp_path)
    plain = copy.deepcopy(base)
    adapted: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    scores = kleash.score(adapted, "adapter_off", IDS, MASK)
    expected = kleash.score(adapted, plain, IDS, MASK)
    assert bool((scores.kl[scores.mask] > 1e-4).all())
    assert torch.allclose(scores.kl, expected.kl, atol=1e-9)
    scores.kl.sum().backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)


def test_a_head_padded_beyond_its_words_is_cut(tmp_path: Path) -> None:
    model = opened(tmp_path)
    wider = opened(tmp_path, seed=1, rows=model.config.vocab_size + 5)
    with pytest.raises(ValueError, match="must have the same words, got 25 and 30"):
        kleash.score(model, wider, IDS, MASK)
    scores = kleash.score(model, wider, IDS, MASK, words=model.config.vocab_size)
    q = wider(IDS[2][None]).logits[0, :-1, : model.config.vocab_size].log_softmax(-1)
    expected = q.gather(1, IDS[2][1:, None])[:, 0]
    assert torch.allclose(scores.ref_logprobs[2][scores.mask[2]], expected, atol=1e-9)


def test_the_head_of_a_model_is_live_and_compared_with_its_own_logits(tmp_path: Path) -> None:
    model = opened(tmp_path, "granite")
    model.train()
    head = kleash.Head.of(model)
    assert model.training and head.weight is model.get_output_embeddings().weight
    assert head.scale == pytest.approx(1 / 3)
    other = opened(tmp_path, seed=3)
    forward = other.forward

    def shifted(*given: Any, **named: Any) -> Any:
        out = forward(*given, **named)
        out.logits = out.logits * 1.5
        return out

    other.forward = shifted
    with pytest.raises(ModelError, match="transforms its logits in a way kleash does not"):
        kleash.Head.of(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": MASK[:, :5]}, r"attention_mask of shape \[3, 6\], got \[3, 5\]"),
        ({"response_mask": MASK[:2]}, r"response_mask of shape \[3, 6\], got \[2, 6\]"),
        ({"attention_mask": MASK * 2}, "True and False or 1 and 0"),
        ({"attention_mask": MASK * torch.tensor([1, 1, 1, 0, 1, 1])}, "one stretch .* got 2 in"),
        ({"attention_mask": MASK * 0}, "one stretch .* got 0 in row 0"),
        ({"response_mask": torch.ones_like(MASK)}, "got padding or the first token .* row 0, tok"),
        ({"input_ids": IDS + 20}, r"token ids in 0…24, got 25 at row 0, token 2"),
        ({"words": 99}, r"words in 1…25, the rows of the head, got 99"),
        ({"reference": "adapter_off"}, "PEFT model and reference='adapter_off', got Llama"),
        ({"reference": torch.nn.Linear(2, 2).eval()}, "PEFT model as the reference, got Linear"),
        ({"model": torch.nn.Linear(2, 2)}, "PEFT model as the model, got Linear"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = opened(tmp_path)
    given = {"model": model, "reference": model, "input_ids": IDS, "attention_mask": MASK}
    with pytest.raises((ValueError, ModelError), match=message):
        kleash.score(**{**given, **changes})


def test_nan_is_refused_and_named(tmp_path: Path) -> None:
    model = opened(tmp_path)
    broken = copy.deepcopy(model)
    kleash.score(model, broken, IDS, MASK)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"got NaN as ref_logprobs at token 3 of response 0"):
        kleash.score(model, broken, IDS, MASK)


def test_a_reference_with_dropout_on_is_refused(tmp_path: Path) -> None:
    model = opened(tmp_path)
    reference = copy.deepcopy(model).train()
    with pytest.raises(ModelError, match=r"evaluation mode, got LlamaForCausalLM in training mode"):
        kleash.score(model, reference, IDS, MASK)
