"""Padding must change nothing: models that read it are refused, the floor sees every length."""

from pathlib import Path

import numpy as np
import pytest
import tiny_architectures
import torch
from audit_models import SMALL, change, noise, write_prompts, write_texts
from tiny_models import save_model, tokenizer
from transformers import AutoModelForCausalLM, MambaConfig, PretrainedConfig, RwkvConfig

from kleash.auditing import padding
from kleash.auditing.accumulator import AuditAccumulator
from kleash.auditing.api import audit
from kleash.auditing.generation import Written
from kleash.auditing.inputs import Item, Source
from kleash.auditing.model_pair import load_pair
from kleash.auditing.padding import (
    largest_kl,
    require_padding_invariance,
    require_sampler_agreement,
)
from kleash.auditing.token_classes import token_classes
from kleash.auditing.token_records import Record
from kleash.errors import ModelError
from kleash.models.policy import load_policy
from kleash.types import Head

pytestmark = pytest.mark.filterwarnings("ignore")
"""Recurrent models announce which kernels they lack."""

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 1}


def save_recurrent(folder: Path, config: PretrainedConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rwkv(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rwkv")
    config = RwkvConfig(
        vocab_size=25, attention_hidden_size=16, intermediate_size=24, context_length=64, **SIZES
    )
    return save_recurrent(folder / "a", config, 0), save_recurrent(folder / "b", config, 1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


def test_a_model_that_reads_padding_is_refused_with_the_cause(rwkv, texts, tmp_path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    transformer = save_model(tmp_path / "llama")
    for policy, reference in (rwkv, (transformer, rwkv[0])):
        for given in ({"texts": texts}, {"prompts": prompts}):
            with pytest.raises(ModelError, match="RwkvForCausalLM reads the padding") as caught:
                audit(policy, reference, **given, **SMALL)
            assert "--batch-tokens 1" in str(caught.value)


def test_one_text_at_a_time_is_exact_for_it(rwkv, texts) -> None:
    found = audit(*rwkv, texts=texts, batch_tokens=1, keep=4)
    pair = load_pair(*rwkv)
    kls = []
    for item in Source("texts", texts).items(pair.policy.tokenizer, None):
        ids = torch.tensor([[*item.prompt_ids, *item.response_ids]])
        with torch.no_grad():
            p, q = (
                side.model(input_ids=ids).logits[0, len(item.prompt_ids) - 1 : -1].double()
                for side in (pair.policy, pair.reference)
            )
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1).numpy())
    assert found.kl.per_token.mean == pytest.approx(np.concatenate(kls).mean(), abs=1e-5)


def test_a_model_that_leaves_padding_alone_is_the_same_at_any_batch_size(tmp_path, texts) -> None:
    config = MambaConfig(vocab_size=25, state_size=4, pad_token_id=2, **SIZES)
    pair = [save_recurrent(tmp_path / str(seed), config, seed) for seed in (0, 1)]
    means = [
        audit(*pair, texts=texts, batch_tokens=size, keep=4).kl.per_token.mean
        for size in (1, 100, 8192)
    ]
    assert max(means) - min(means) < 1e-5 and min(means) > 0.1


HYBRIDS = ("mamba2", "jamba", "bamba", "granitemoehybrid", "zamba", "minimax", "qwen3_next", "lfm2")


@pytest.mark.parametrize("kind", [*HYBRIDS, "recurrent_gemma"])
def test_a_state_beside_attention_is_read_the_same_or_refused(
    kind: str, tmp_path: Path, texts: Path
) -> None:
    """One text at a time, which no padding can touch, against one large batch."""
    base = tiny_architectures.save(tmp_path / "base", kind)
    pair = change(base, tmp_path / "tuned", noise), base
    alone = audit(*pair, texts=texts, batch_tokens=1, keep=1).kl.per_token.mean
    assert alone > 0.1
    if kind in HYBRIDS:
        together = audit(*pair, texts=texts, batch_tokens=8192, keep=1).kl.per_token.mean
        assert together == pytest.approx(alone, abs=1e-5)
        load_policy(base)
        return
    with pytest.raises(ModelError, match="RecurrentGemmaForCausalLM reads the padding"):
        audit(*pair, texts=texts, batch_tokens=8192, keep=1)
    with pytest.raises(ModelError, match="expected padding to change nothing for RecurrentGemma"):
        load_policy(base)


def record(number: int, length: int) -> Record:
    ids = np.full(length, 5)
    numbers = {
        name: np.full(length, 0.1, dtype=np.float32)
        for name in ("kl", "reverse_kl", "logprobs", "ref_logprobs", "entropy", "ref_entropy")
    }
    return Record(
        number, number, None, True, ids, ids, same_top=np.zeros(0, dtype=np.uint8), **numbers
    )


def test_the_floor_is_of_lengths_as_they_come() -> None:
    """Batches come longest first, so the first responses are the longest."""
    classes = token_classes(tokenizer(), 25)
    means = []
    for seed in range(50):
        account = AuditAccumulator("policy", classes, keep=40, seed=seed)
        account.add(record(number, 200 - number) for number in range(200))
        drawn = account.drawn(8)
        assert len({r.number for r in drawn}) == 8
        means.append(np.mean([len(r.ids) for r in drawn]))
    # Of 1 … 200: mean 100.5, standard deviation 57.7 of one, 20 of the mean of eight.
    assert abs(np.mean(means) - 100.5) < 4 * 20.4 / np.sqrt(50)


@pytest.mark.parametrize(("shift", "refused"), [(0.0, False), (1e-4, False), (0.1, True)])
def test_responses_of_another_distribution_are_refused(tmp_path, shift, refused) -> None:
    model = load_pair(save_model(tmp_path / "a"), tmp_path / "a").policy
    records = [record(0, 3), record(1, 4)]
    for ragged in (False, True):
        written = [
            Written(
                Item(n, (3,) * (1 + n * ragged), tuple(r.ids.tolist())),
                torch.from_numpy(r.logprobs) + shift,
            )
            for n, r in enumerate(records)
        ]
        if not refused:
            require_sampler_agreement(written, records, model, forward=True)
            continue
        cause = "it reads the padding" if ragged else "cached states are not those"
        with pytest.raises(ModelError, match=f"got 0.0048.* between sampler and scoring .*{cause}"):
            require_sampler_agreement(written, records, model, forward=True)


@pytest.mark.parametrize("size", [1e-4, 0.1, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_bound_lies_above_the_exact_kl_and_reaches_it_within_its_constants(size, softcap):
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 5, generator=make, dtype=torch.float64)
    one = torch.randn(40, 5, generator=make, dtype=torch.float64)
    other = one + size * torch.randn(40, 5, generator=make, dtype=torch.float64)
    head = Head(weight, scale=0.7, softcap=softcap, vocab_size=10)
    logits = [0.7 * (h @ weight[:10].T) for h in (one, other)]
    if softcap is not None:
        logits = [softcap * torch.tanh(z / softcap) for z in logits]
    log_p, log_q = (z.log_softmax(-1) for z in logits)
    exact = float((log_p.exp() * (log_p - log_q)).sum(-1).max())
    bound = largest_kl(one, other, head)
    assert exact <= bound
    if softcap is None:
        assert bound < 40 * exact


def test_a_sound_model_is_checked_for_padding_without_a_product_with_the_vocabulary(
    tmp_path, texts, monkeypatch
) -> None:
    model = load_pair(save_model(tmp_path / "a"), tmp_path / "a").policy
    items = list(Source("texts", texts).items(model.tokenizer, None))
    read: list[int] = []
    whole = padding._together_and_alone
    monkeypatch.setattr(padding, "_kl_of", None)
    monkeypatch.setattr(
        padding, "_together_and_alone", lambda *given: read.append(1) or whole(*given)
    )
    require_padding_invariance(items, model, budget=8192)
    assert read == [1]
