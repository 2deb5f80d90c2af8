"""Drift during other trainers' runs, and the check for tests."""

from pathlib import Path

import pytest
import tiny_models
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from kleash.errors import ConfigError
from kleash.integrations.transformers import DriftAudit, assert_close
from kleash.report.html import write_report
from kleash.storage.run_directory import read_run

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers, about each other

PROMPTS = [f"w{i} w{i + 1}" for i in range(12)]
TEXTS = [f"w{i} w{i + 3} w{i + 1} w{i} w{i + 2}" for i in range(12)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift") / "base"
    return tiny_models.save_model(folder, attention_dropout=0.0)


def trainer_of(base: Path, output: Path, **changes) -> Trainer:
    """A plain Trainer that teaches the model to say w3."""
    tok = AutoTokenizer.from_pretrained(base)
    ids = tok(["w1 w3 w3 w3 w3 w3"] * 64)["input_ids"]
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    model = AutoModelForCausalLM.from_pretrained(base)
    args = TrainingArguments(**settings)
    return Trainer(model=model, args=args, train_dataset=rows, processing_class=tok)


@torch.no_grad()
def text_kl(policy, reference, texts: list[str], tok) -> float:
    """Mean nats per token of the next-token distributions along the texts, by plain models."""
    total, tokens = 0.0, 0
    for text in texts:
        ids = tok(text, return_tensors="pt")["input_ids"]
        p, q = (m.eval()(ids).logits[0, :-1].double().log_softmax(-1) for m in (policy, reference))
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(p)
    return total / tokens


def test_drift_on_texts_and_prompts_is_measured_while_a_model_is_tuned(
    base: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(base, tmp_path / "out")
    audit = DriftAudit(2, prompts=PROMPTS, texts=TEXTS, max_new_tokens=5).attach(trainer)
    trainer.train()
    assert [step for step, _ in audit.audits] == [0, 2, 4]
    tok = AutoTokenizer.from_pretrained(base)
    plain = text_kl(trainer.model, AutoModelForCausalLM.from_pretrained(base), TEXTS, tok)
    found = audit.audits[-1][1]["texts"].kl.per_token.mean
    assert found > 0.05
    assert found == pytest.approx(plain, rel=1e-4)
    run = read_run(tmp_path / "out" / "kleash")
    assert run.status == "finished" and run.meta["message"] is None
    curve = [line["heldout/kl_ref"] for line in run.metrics]
    assert curve[0] == 0 and 0 < curve[1] < curve[2]
    assert run.metrics[-1]["texts/kl_ref_per_token"] == found
    logged = [line for line in trainer.state.log_history if "kleash/heldout/kl_ref" in line]
    assert [line["step"] for line in logged] == [0, 2, 4]
    page, _ = write_report([tmp_path / "out" / "kleash"])
    assert "KL to the reference" in page.read_text(encoding="utf-8")


def test_watching_changes_nothing(base: Path, tmp_path: Path) -> None:
    losses = []
    for name in ("plain", "watched"):
        trainer = trainer_of(base, tmp_path / name)
        if name == "watched":
            DriftAudit(1, prompts=PROMPTS, max_new_tokens=3).attach(trainer)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_training_stops_where_the_drift_is_above_its_bound(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(base, tmp_path / "out", max_steps=20)
    audit = DriftAudit(1, texts=TEXTS, fail_above=0.02).attach(trainer)
    trainer.train()
    step, found = audit.audits[-1]
    assert 0 < step < 20 and trainer.state.global_step == step
    low = found["texts"].kl.per_token.low
    assert low is not None and low > 0.02
    before = audit.audits[-2][1]["texts"].kl.per_token.low
    assert before is not None and before <= 0.02
    assert audit.failed is not None and "within 0.02 nats per token" in audit.failed
    run = read_run(tmp_path / "out" / "kleash")
    assert [event.kind for event in run.events] == ["stopped"]
    assert run.meta["message"] == audit.failed


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trls_other_trainers_are_watched_too(base: Path, tmp_path: Path, kind: str) -> None:
    trl = pytest.importorskip("trl")
    shared = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
    }
    if kind == "sft":
        rows = Dataset.from_list([{"text": "w1 w3 w3 w3"}] * 32)
        make, args = trl.SFTTrainer, trl.SFTConfig(**shared)
    else:
        pair = {"prompt": "w1", "chosen": " w3 w3", "rejected": " w4 w5"}
        rows = Dataset.from_list([pair] * 32)
        make, args = trl.DPOTrainer, trl.DPOConfig(**shared)
    trainer = make(model=str(base), args=args, train_dataset=rows)
    audit = DriftAudit(2, texts=TEXTS).attach(trainer)
    trainer.train()
    tok = AutoTokenizer.from_pretrained(base)
    plain = text_kl(trainer.model, AutoModelForCausalLM.from_pretrained(base), TEXTS, tok)
    found = audit.audits[-1][1]["texts"].kl.per_token.mean
    assert found > 1e-3 and found == pytest.approx(plain, rel=1e-3)


def test_drift_of_an_adapter_is_from_its_base(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    trainer = trainer_of(base, tmp_path / "plain", learning_rate=0.05)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    wrapped = Trainer(
        model=model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
    )
    audit = DriftAudit(4, texts=TEXTS).attach(wrapped)
    wrapped.train()
    tok = AutoTokenizer.from_pretrained(base)
    plain = text_kl(
        wrapped.model.merge_and_unload(), AutoModelForCausalLM.from_pretrained(base), TEXTS, tok
    )
    found = audit.audits[-1][1]["texts"].kl.per_token.mean
    assert found > 1e-3 and found == pytest.approx(plain, rel=1e-3)


def test_what_cannot_be_watched_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected prompts or texts"):
        DriftAudit()
    with pytest.raises(ConfigError, match="every of at least 1, got 0"):
        DriftAudit(0, texts=TEXTS)
    trainer = trainer_of(base, tmp_path / "out")
    trainer.add_callback(DriftAudit(texts=TEXTS))
    with pytest.raises(ConfigError, match=r"DriftAudit\(…\)\.attach\(trainer\)"):
        trainer.train()
    trainer = trainer_of(base, tmp_path / "out")
    trainer.model.config._name_or_path = ""
    DriftAudit(texts=TEXTS).attach(trainer)
    with pytest.raises(ConfigError, match="expected a base to measure drift from"):
        trainer.train()


def test_a_model_is_asserted_to_be_close(base: Path, tmp_path: Path) -> None:
    """The three outcomes, with the bound around a KL that plain models measure."""
    other = tiny_models.save_model(tmp_path / "other", attention_dropout=0.0, seed=1)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (other, base)]
    tok = AutoTokenizer.from_pretrained(base)
    kl = text_kl(*models, TEXTS, tok)
    found = assert_close((models[0], tok), base, nats=2 * kl, texts=TEXTS)
    assert found.kl.per_token.mean == pytest.approx(kl, rel=1e-4)
    with pytest.raises(AssertionError, match=f"within {kl / 2:g} nats per token of .*base, got"):
        assert_close(other, base, nats=kl / 2, texts=TEXTS)
    with pytest.raises(AssertionError, match="too few to tell; give more prompts or texts"):
        assert_close(other, base, nats=kl, texts=TEXTS)
    with pytest.raises(ConfigError, match="nats alone, got fail_above"):
        assert_close(other, base, nats=1.0, texts=TEXTS, fail_above=1.0)
    same = assert_close(base, base, nats=1e-6, prompts=PROMPTS, max_new_tokens=4)
    assert same.kl.per_token.mean == 0
