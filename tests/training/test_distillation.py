"""Runs of `algorithm: distill`: the teacher as reference, and beside a leash; whole and cut."""

import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny_models
import torch
import yaml
from ranks import Ranks
from small_run import numbers, two_words
from transformers import AutoModelForCausalLM

import kleash
from kleash.cli.plan import PlanRequest, plan
from kleash.config.loading import dump_config, parse_config
from kleash.config.schema import Config
from kleash.errors import ConfigError, ModelError, UsageError
from kleash.report.html import write_report
from kleash.storage.run_directory import read_run
from kleash.training.loop import Trainer

WORDS = 20


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distillation")
    small_run.save_material(folder, prompts=two_words(range(6)), heldout=two_words(range(7, 10)))
    # Another width of heads, as larger models have; and an added token that only it has.
    more = tiny_models.tokenizer(WORDS)
    more.add_tokens(["[EXTRA]"])
    tiny_models.save_model(folder / "teacher", "qwen2", tok=more, rows=len(more) + 7, seed=1)
    tiny_models.save_model(folder / "other", tok=tiny_models.tokenizer(WORDS + 3), seed=1)
    return folder


def settings(material: Path, output: Path, **changes: Any) -> Config:
    layer: dict[str, Any] = {
        "algorithm": {"name": "distill"},
        "reference": {"path": str(material / "teacher")},
        "leash": {"placement": "measure", "beta": 0.0},
        "heldout": {"every": 2},
        "optimizer": {"lr": 1e-2},
    }
    tree = yaml.safe_load(dump_config(small_run.settings(material, output)))
    del tree["reward_models"], tree["algorithm"]
    for overrides in (layer, changes):
        for key, value in overrides.items():
            merges = key in tree and isinstance(value, dict) and key != "algorithm"
            tree[key] = {**tree[key], **value} if merges else value
    return parse_config(tree, where="the test")


def beside_a_leash(material: Path, output: Path, **changes: Any) -> Config:
    layer = {
        "teacher": {"path": str(material / "teacher")},
        "reference": {"path": None},
        "leash": {
            "beta": None,
            "target_kl": 0.3,
            "initial_beta": 0.5,
            "placement": "exact_weighted",
        },
        "algorithm": {"name": "distill", "gradient": "sequence", "divergence": "jensen_shannon"},
    }
    return settings(material, output, **{**layer, **changes})


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jensen_shannon"])
def test_a_student_comes_nearer_to_its_teacher(
    divergence: str, material: Path, tmp_path: Path
) -> None:
    algorithm = {"name": "distill", "divergence": divergence, "epochs": 1}
    config = settings(material, tmp_path / "run", algorithm=algorithm, steps=12)
    run = read_run(Trainer(config).fit())
    assert run.status == "finished"
    first, last = run.metrics[0], run.metrics[-1]
    for key in ("heldout/reverse_kl", "heldout/forward_kl"):
        assert last[key] < 0.8 * first[key], key
    for line in run.metrics[1:]:
        # The reference is the teacher: what is distilled is what the run measures anyway.
        assert line["distill/reverse_kl"] == pytest.approx(line["objective/kl_ref"], rel=1e-6)
        assert line["objective/accounting_residual"] == 0
        assert not {"objective/rlhf_reward", "loss/policy"} & line.keys()
    assert "loss/distill" in run.metrics[1]
    assert run.meta["objective"].startswith("minimise E[Σ ")


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def test_both_directions_are_those_of_the_models_own_logits(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run", steps=1, optimizer={"lr": 1e-9})
    run = read_run(Trainer(config).fit())
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(material / name).double().eval()
        for name in ("policy", "teacher")
    )
    words = len(tiny_models.tokenizer(WORDS))
    tokenizer = tiny_models.tokenizer(WORDS)
    reverse, forward = [], []
    for sample in run.samples:
        if sample.kind == "heldout" and sample.step == 1:
            ids = tokenizer(sample.prompt + " " + " ".join(sample.tokens))["input_ids"]
            start = len(ids) - len(sample.tokens)
            log_p, log_q = (
                logits_of(model, ids)[start - 1 : -1, :words].log_softmax(-1)
                for model in (student, teacher)
            )
            reverse.append(float((log_p.exp() * (log_p - log_q)).sum()))
            forward.append(float((log_q.exp() * (log_q - log_p)).sum()))
    assert len(reverse) == 3
    last = run.metrics[-1]
    assert last["heldout/reverse_kl"] == pytest.approx(sum(reverse) / 3, rel=1e-4)
    assert last["heldout/forward_kl"] == pytest.approx(sum(forward) / 3, rel=1e-4)


def test_a_leash_holds_beside_the_teacher_and_the_report_shows_both(
    material: Path, tmp_path: Path
) -> None:
    run = read_run(Trainer(beside_a_leash(material, tmp_path / "run", steps=3)).fit())
    first, last = run.metrics[1], run.metrics[-1]
    assert first["objective/kl_ref"] == pytest.approx(0.0, abs=1e-4)
    assert first["distill/reverse_kl"] > 0.5
    assert last["objective/kl_ref"] > 0.01
    assert {"loss/kl", "loss/distill", "controller/beta_next"} <= last.keys()
    assert run.meta["teacher"]["path"].endswith("teacher")
    page = write_report([run.path], into=tmp_path)[0].read_text(encoding="utf-8")
    for key in ("distill/reverse_kl", "distill/forward_kl", "loss/distill"):
        assert key in page, key


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(material: Path, tmp_path: Path) -> None:
    whole = Trainer(beside_a_leash(material, tmp_path / "whole")).fit()

    class Stop:
        def on_step(self, event: Any) -> None:
            if event.step == 3:
                raise KeyboardInterrupt

    cut = beside_a_leash(material, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        Trainer(cut, callbacks=[Stop()]).fit()
    again = Trainer(cut).fit()
    assert numbers(again) == numbers(whole)
    assert all(
        torch.equal(one, small_run.policy_weights(whole)[name])
        for name, one in small_run.policy_weights(again).items()
    )


def test_a_run_goes_on_with_its_own_teacher_alone(material: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(material / "teacher", tmp_path / "teacher")
    changes: dict[str, Any] = {"teacher": {"path": str(teacher)}}
    Trainer(beside_a_leash(material, tmp_path / "run", steps=2, **changes)).fit()
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] += 1
    model.save_pretrained(teacher)
    with pytest.raises(ModelError, match=r"expected the teacher that .* began with"):
        Trainer(beside_a_leash(material, tmp_path / "run", steps=4, **changes)).fit()


def test_a_tripwire_stops_it(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run", tripwires={"stop_kl": 1e-3})
    with pytest.raises(kleash.errors.KleashError, match="stop_kl"):
        Trainer(config).fit()
    assert read_run(tmp_path / "run").status == "failed"


def test_it_is_checked_without_the_checks_of_scores(material: Path, tmp_path: Path) -> None:
    found = kleash.check(settings(material, tmp_path / "run"), quick=True)
    assert found.fails == ()
    names = {finding.name for finding in found.findings}
    assert "logprobs.streaming" in names and "objective.score_spread" not in names
    assert not any(name.startswith("reward_model") for name in names)


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(
    material: Path, tmp_path: Path
) -> None:
    for config in (
        settings(material, tmp_path / "run", reference={"path": str(material / "other")}),
        beside_a_leash(material, tmp_path / "run", teacher={"path": str(material / "other")}),
    ):
        with pytest.raises(ModelError, match="have the policy's vocabulary, got token 'w20'"):
            Trainer(config).fit()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_models": {"r": {"callable": "a:b"}}}, "learns from the teacher alone"),
        ({"reference": {"path": None}}, "needs a teacher: give it as `reference.path`"),
        ({"leash": {"beta": 0.1, "placement": "exact"}}, "teacher as the reference has no other"),
        ({"leash": {"reanchor_every": 2}}, "would replace the teacher by the student"),
        ({"rollout": {"truncated": "penalise", "missing_eos_penalty": 1.0}}, "got `truncated: pen"),
        ({"rollout": {"correction": "token_truncated"}}, "no advantages for `rollout.correction`"),
        ({"score_normalisation": "running"}, "no scores for `score_normalisation`"),
        ({"algorithm": {"name": "distill", "clip_range": 0.2}}, "clip_range"),
        ({"algorithm": {"name": "rloo"}, "teacher": {"path": "t"}}, "is for `algorithm: distill`"),
        ({"algorithm": {"name": "ppo"}}, "at least one of `reward_models`"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    changes: dict[str, Any], message: str, material: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(material, tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("leash", "message"),
    [
        ({"placement": "reward_k1"}, "distillation has no rewards: use 'exact_weighted'"),
        ({"initial_beta": "auto"}, "no scores say where a moving β starts"),
        ({"target_kl": None, "target_kl_per_token": 0.1}, "counted in the lengths of scored"),
    ],
)
def test_a_leash_that_cannot_be_is_refused(
    leash: dict[str, Any], message: str, material: Path, tmp_path: Path
) -> None:
    given = {"beta": None, "target_kl": 0.3, "initial_beta": 0.5, "placement": "exact_weighted"}
    with pytest.raises(ConfigError, match=message):
        beside_a_leash(material, tmp_path / "run", leash={**given, **leash})


def test_there_is_nothing_to_plan(material: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is nothing to plan"):
        plan(settings(material, tmp_path / "run"), PlanRequest((), ()))


@pytest.fixture(scope="module")
def ranks() -> Generator[Ranks]:
    started = Ranks()
    yield started
    started.close()


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [(settings, "ddp"), (settings, "fsdp"), (beside_a_leash, "fsdp")],
)
def test_two_processes_distil_as_one(
    kind: Callable[..., Config], strategy: str, material: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Three responses a minibatch: a process of a divided model has to read one for nothing."""
    algorithm = {"name": "distill", "microbatch_size": 1}
    rollout = {"prompts_per_step": 6, "microbatch_size": 1}
    changes = {"steps": 2, "rollout": rollout, "algorithm": algorithm}
    alone = read_run(Trainer(kind(material, tmp_path / "alone", **changes)).fit())
    divided = {**changes, "distributed": {"strategy": strategy}}
    together = read_run(ranks.train(kind(material, tmp_path / "run", **divided)))
    assert {s.response for s in together.samples} == {s.response for s in alone.samples}
    keys = [key for key in alone.metrics[-1] if key.startswith(("distill/", "objective/", "loss/"))]
    assert "distill/reverse_kl" in keys and "loss/distill" in keys
    for ours, theirs in zip(together.metrics[1:], alone.metrics[1:], strict=True):
        known = {key: theirs[key] for key in keys if theirs.get(key) is not None}
        assert len(known) > 3
        assert {key: ours[key] for key in known} == pytest.approx(known, rel=1e-5, abs=1e-6)
