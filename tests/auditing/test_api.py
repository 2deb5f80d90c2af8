"""The audit end to end on small models: every number against the dense path."""

import itertools
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from audit_models import SMALL, bf16, change, int8, noise, pruned, write_prompts, write_texts
from tiny_models import ARCHITECTURES, save_model, tokenizer
from transformers import AutoModelForCausalLM

import kleash
from kleash.auditing.accumulator import AuditAccumulator
from kleash.auditing.api import audit
from kleash.auditing.inputs import Item, Source, pack, windows
from kleash.auditing.model_pair import ModelPair, load_pair, open_checkpoint
from kleash.auditing.result import Audit
from kleash.auditing.token_classes import TOKEN_CLASSES, classify, token_classes
from kleash.auditing.token_records import score_items
from kleash.errors import ModelError, PromptError, RunError


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def moved(base, tmp_path_factory) -> Path:
    return change(base, tmp_path_factory.mktemp("moved") / "model-2", noise)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


# ---- the numbers ---------------------------------------------------------------------------------


def dense(pair: ModelPair, prompt_ids, ids) -> dict[str, np.ndarray]:
    """The models' own logits, in float64, one response at a time."""
    sides = []
    for side in (pair.policy, pair.reference):
        whole = torch.tensor([[*prompt_ids, *ids]])
        with torch.no_grad():
            logits = side.model(input_ids=whole).logits[0, len(prompt_ids) - 1 : -1]
        logits = logits[:, : side.words].double()
        sides.append(logits.log_softmax(-1).numpy())
    p, q = sides
    rows, at = np.arange(len(ids)), np.array(ids)
    return {
        "kl": (np.exp(p) * (p - q)).sum(-1),
        "reverse_kl": (np.exp(q) * (q - p)).sum(-1),
        "logprobs": p[rows, at],
        "ref_logprobs": q[rows, at],
        "entropy": -(np.exp(p) * p).sum(-1),
        "ref_entropy": -(np.exp(q) * q).sum(-1),
        "same_top": (p.argmax(-1) == q.argmax(-1)).astype(np.uint8),
    }


def compare(pair: ModelPair) -> None:
    items = [
        Item(n, (3, 4 + n), tuple((5 * n + k) % 20 + 3 for k in range(2 + 3 * n))) for n in range(4)
    ]
    records = score_items(items, pair, first_number=0, temperature=1.0, budget=40, agreement=True)
    assert max(record.kl.max() for record in records) > 1e-6
    for item, record in zip(items, records, strict=True):
        for name, expected in dense(pair, item.prompt_ids, item.response_ids).items():
            np.testing.assert_allclose(getattr(record, name), expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("how", [noise, int8, bf16, pruned])
def test_every_architecture_against_the_dense_path(tmp_path, kind, how) -> None:
    """Gemma 2 has a soft cap, Cohere and Granite a logit scale, Qwen 2 tied heads, Phi a bias."""
    folder = save_model(tmp_path / "a", kind)
    compare(load_pair(change(folder, tmp_path / "b", how), folder))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_and_padded_vocabularies(tmp_path, tied: bool) -> None:
    one = save_model(tmp_path / "a", tie_word_embeddings=tied)
    # Padded to a round number, wider, and of another width.
    two = save_model(tmp_path / "b", rows=64, seed=5, tie_word_embeddings=tied, hidden_size=32)
    compare(load_pair(two, one))
    compare(load_pair(one, two))


def test_a_lora_adapter_on_its_base(tmp_path, base, prompts) -> None:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    pair = load_pair(tmp_path / "adapter", base)
    compare(pair)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected, found = (
            model.eval()(input_ids=ids).logits,
            pair.policy.model(input_ids=ids).logits,
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (
        audit(tmp_path / "adapter", tmp_path / "adapter", prompts, **SMALL).kl.per_token.mean == 0
    )
    assert load_pair(base, tmp_path / "adapter").reference.path.endswith("adapter")


def test_an_adapter_that_cannot_be_used_is_refused(tmp_path, base) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names its base"):
        open_checkpoint(folder, dtype="float32", device="cpu")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"})
    )
    with pytest.raises(
        ModelError, match=r"expected an adapter saved by peft in .*no adapter_model.safetensors"
    ):
        open_checkpoint(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_against_itself_is_exactly_zero(tmp_path, kind, prompts, texts) -> None:
    folder = save_model(tmp_path / "a", kind)
    for found in (
        audit(folder, folder, prompts, both=True, **SMALL),
        audit(folder, folder, texts=texts, keep=4),
    ):
        for part in found.parts:
            for name in ("kl", "reverse_kl"):
                measure = part.measures[name]
                assert (measure.per_token.mean, measure.per_response.high) == (0.0, 0.0)
            assert part.verdict == "identical" and set(part.percentiles.values()) == {0.0}
            assert all(one.kl.mean == 0 for one in (*part.positions, *part.classes, *part.groups))
        assert "Both checkpoints hold the same weights." in found.notes
        assert not any("resolvable" in note for note in found.notes)


def test_a_padded_copy_is_exactly_zero_too(tmp_path, prompts) -> None:
    one = save_model(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(one)
    model.resize_token_embeddings(48)
    model.save_pretrained(tmp_path / "b")
    tokenizer().save_pretrained(tmp_path / "b")
    found = audit(tmp_path / "b", one, prompts, **SMALL)
    assert found.parts[0].verdict == "identical" and found.kl.per_token.mean == 0.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(base, moved, prompts, dtype) -> None:
    zero, far = (audit(a, base, prompts, dtype=dtype, **SMALL) for a in (base, moved))
    assert zero.parts[0].verdict == "identical" and far.parts[0].verdict == "resolved"
    assert far.policy.dtype == dtype and 0 <= far.parts[0].floor < 1e-3


def test_rounding_is_called_not_resolvable(base, tmp_path, prompts) -> None:
    def barely(_name: str, parameter: torch.Tensor) -> None:
        parameter.mul_(1 + 1e-7)

    found = audit(change(base, tmp_path / "b", barely), base, prompts, **SMALL)
    assert found.parts[0].verdict == "not resolvable"
    assert any("Not resolvable" in note for note in found.notes)


# ---- what is said of them ------------------------------------------------------------------------


def test_breakdowns_add_up(base, moved, prompts) -> None:
    found = audit(moved, base, prompts, both=True, responses_per_prompt=2, **SMALL)
    assert [part.by for part in found.parts] == ["policy", "reference"]
    for part in found.parts:
        head = part.measures[part.headline]
        assert (part.responses, part.prompts) == (80, 40)
        whole = head.per_token.mean * part.tokens
        assert whole == pytest.approx(head.per_response.mean * part.responses)
        for shares in (part.positions, part.classes, part.groups):
            assert sum(one.tokens for one in shares) == part.tokens
            assert sum(one.kl.mean * one.tokens for one in shares) == pytest.approx(whole, rel=1e-6)
            assert sum(one.share for one in shares) == pytest.approx(1, rel=1e-6)
        assert sum(count for _, count in part.histogram) == part.tokens
        worst = [sample for sample in part.samples if sample.kind == "worst"]
        assert [s.kl for s in worst] == sorted((s.kl for s in worst), reverse=True)
        assert part.worst_tokens[0].kl == pytest.approx(part.percentiles["max"])
        assert {one.name for one in part.groups} == {"a", "b"}
        sign = 1 if part.by == "policy" else -1
        assert sign * (part.measures["entropy"].per_token.mean) != 0
        k1, k3 = part.measures["k1"].per_token, part.measures["k3"].per_token
        for one in (k1, k3):
            assert abs(one.mean - head.per_token.mean) < 5 * one.standard_error


def test_what_was_wanted_is_what_the_dense_path_wants(base, moved, prompts) -> None:
    found = audit(moved, base, prompts, **SMALL)
    pair = load_pair(moved, base)
    tok = pair.policy.tokenizer
    part = found.parts[0]
    moved_mass = torch.zeros(pair.policy.words, dtype=torch.float64)
    randoms = 0
    for sample in part.samples:
        prompt = tok(sample.prompt)["input_ids"]
        ids = tok(sample.response)["input_ids"]
        rows = []
        for side in (pair.policy, pair.reference):
            with torch.no_grad():
                logits = side.model(input_ids=torch.tensor([[*prompt, *ids]])).logits
            rows.append(logits[0, len(prompt) - 1 : -1, : side.words].double().softmax(-1))
        for at, wanted in enumerate(sample.policy_top):
            values, order = rows[0][at].topk(5)
            assert wanted.ids == order.tolist()
            assert wanted.probabilities == pytest.approx(values.tolist(), rel=1e-3)
        for at, wanted in enumerate(sample.reference_top):
            assert wanted.ids == rows[1][at].topk(5).indices.tolist()
        if sample.kind == "random":
            randoms += 1
            moved_mass += (rows[0] - rows[1]).sum(0)
    assert randoms and {str(i) for i, _ in (*part.gained, *part.lost)} <= found.token_texts.keys()
    assert all(mass > 0 for _, mass in (*part.gained, *part.lost))


def test_perplexity_and_agreement_of_texts(base, moved, texts) -> None:
    found = audit(moved, base, texts=texts, keep=4)
    pair = load_pair(moved, base)
    sums, tokens = {"logprobs": 0.0, "ref_logprobs": 0.0, "same_top": 0.0, "kl": 0.0}, 0
    for item in Source("texts", texts).items(pair.policy.tokenizer, pair.context):
        values = dense(pair, item.prompt_ids, item.response_ids)
        tokens += len(item.response_ids)
        for name in sums:
            sums[name] += float(values[name].sum())
    (part,) = found.parts
    assert part.tokens == tokens
    expected = math.exp(-sums["logprobs"] / tokens)
    assert part.perplexity["policy"].mean == pytest.approx(expected, rel=1e-5)
    expected = math.exp(-sums["ref_logprobs"] / tokens)
    assert part.perplexity["reference"].mean == pytest.approx(expected, rel=1e-5)
    low, high = part.perplexity["policy"].low, part.perplexity["policy"].high
    assert low < part.perplexity["policy"].mean < high
    assert part.measures["same_top"].per_token.mean == pytest.approx(sums["same_top"] / tokens)
    assert part.measures["kl"].per_token.mean == pytest.approx(sums["kl"] / tokens, abs=1e-6)


def test_given_responses_carry_their_caveat(base, moved, tmp_path) -> None:
    file = tmp_path / "responses.jsonl"
    rows = [{"prompt": f"w{n // 2}", "response": f"w{n} w3"} for n in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = audit(moved, base, responses=file, keep=4)
    assert (found.parts[0].responses, found.parts[0].prompts, found.parts[0].tokens) == (6, 3, 12)
    assert found.notes[0].startswith("The responses were given.")
    for row, message in (
        ({"prompt": "w1"}, "the key 'response'"),
        ({"response": "w1"}, "the key 'prompt'"),
        ({"prompt": "w1", "response": " "}, "at least one token"),
    ):
        file.write_text(json.dumps(row))
        with pytest.raises(PromptError, match=message):
            audit(moved, base, responses=file)


def test_a_long_document_is_cut_to_the_context(base, moved, tmp_path) -> None:
    file = tmp_path / "book.txt"
    file.write_text(" ".join(f"w{n % 20}" for n in range(150)))
    found = audit(moved, base, texts=file, keep=4)
    # 64 positions each; the first token of a stretch is given.
    assert (found.parts[0].responses, found.parts[0].tokens) == (3, 147)
    assert any("one document" in note for note in found.notes)


def test_notebooks_and_data_frames(base, moved, prompts) -> None:
    found = kleash.audit(moved, base, ["w1 w2", "w3", "w4 w5"], **SMALL)
    frame = found.to_pandas()
    row = frame[(frame.quantity == "kl") & (frame.per == "token")].iloc[0]
    assert row["mean"] == found.kl.per_token.mean and row["n"] == 3
    page = found._repr_html_()
    assert page.count("<tr>") == len(frame) + 1
    hostile = replace(found, policy=replace(found.policy, path="<script>x</script>"))
    assert "<script>" not in hostile._repr_html_()
    assert Audit.from_json(found.to_json()) == found
    infinite = replace(found, parts=[replace(found.parts[0], floor=math.inf)])
    assert Audit.from_json(infinite.to_json()) == infinite


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": "kleash.audit/0"}', '{"schema": "kleash.audit/1"}']
)
def test_what_is_no_audit_is_refused(text) -> None:
    with pytest.raises(RunError, match="expected"):
        Audit.from_json(text)


# ---- small parts ---------------------------------------------------------------------------------


def test_windows_keep_clusters_whole_and_batches_keep_the_budget() -> None:
    items = [Item(n // 3, (1,), (2,) * (n % 5 + 1)) for n in range(20)]
    found = list(windows(items, 4))
    assert [item for window in found for item in window] == items
    assert all(a[-1].cluster < b[0].cluster for a, b in itertools.pairwise(found))
    batches = pack(items, lambda item: len(item.response_ids), 8)
    assert sorted(map(id, (i for b in batches for i in b))) == sorted(map(id, items))
    assert all(len(b) * max(len(i.response_ids) for i in b) <= 8 for b in batches)


def test_classes_of_tokens() -> None:
    tok = tokenizer()
    classes = [TOKEN_CLASSES[c] for c in token_classes(tok, len(tok))]
    assert classes[0] == "special" and classes[-1] == "word start"
    assert classify("Ġ,", marked=True, hashed=False) == "punctuation"
    assert classify("##ing", marked=False, hashed=True) == "word inside"
    assert classify("ing", marked=False, hashed=True) == "word start"
    assert classify("Ċ", marked=True, hashed=False) == "whitespace"


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0])
def test_percentiles_are_within_one_percent(base, moved, scale: float) -> None:
    pair = load_pair(moved, base)
    items = [Item(n, (3,), tuple((n + k) % 20 + 3 for k in range(30))) for n in range(40)]
    records = score_items(items, pair, first_number=0, temperature=1.0, budget=500, agreement=False)
    records = [replace(record, kl=record.kl * np.float32(scale)) for record in records]
    account = AuditAccumulator(
        "policy", token_classes(pair.policy.tokenizer, pair.policy.words), keep=3, seed=0
    )
    account.add(records)
    account.close_window()
    every = np.concatenate([record.kl for record in records])
    for share in (0.5, 0.9, 0.99):
        expected = np.quantile(every, share, method="inverted_cdf")
        assert account.percentile(share) == pytest.approx(expected, rel=0.01)
    assert account.largest_token == every.max()
