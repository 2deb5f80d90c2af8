"""The loop on tiny models: it runs, it adds up, it resumes, and it refuses in one sentence."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from small_run import numbers, weights
from training_hooks import before_each_step, interrupt_after
from training_material import mark_unfinished, settings
from training_material import material as material  # the fixture

from kleash.errors import (
    ConfigError,
    KleashError,
    ModelError,
    NonFiniteError,
    RewardError,
    RunError,
    ScoringError,
)
from kleash.kl.planning.frontier import NoRow
from kleash.report.metric_charts import chart_groups
from kleash.scoring import float64_check
from kleash.storage.plan_file import read_frontier
from kleash.storage.run_directory import Run, read_run
from kleash.training.components import Components
from kleash.training.loop import train
from kleash.training.session import Session


def test_a_run_leaves_everything_that_a_report_needs(material: Path, tmp_path: Path) -> None:
    path = train(settings(material, tmp_path / "run"), argv=["kleash", "train"])
    run = read_run(path)
    assert run.status == "finished"
    assert run.meta["argv"] == ["kleash", "train"]
    assert len(run.meta["reference"]["sha256"]) == 64
    assert [line["step"] for line in run.metrics] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in run.metrics if "heldout/scores" in line] == [0, 2, 4]
    # Before the first update the policy is the reference, whichever way it is measured.
    assert run.metrics[1]["objective/kl_ref"] == pytest.approx(0, abs=1e-9)
    assert cast(float, run.metrics[4]["objective/kl_ref"]) > 1e-4
    # The policy is read twice in the first step; later its first update has the graph of scoring.
    errors = [line["policy/ratio_first_error"] for line in run.metrics[1:]]
    assert cast(float, errors[0]) < 1e-5
    assert errors[1:] == [None, None, None]
    for line in run.metrics[1:]:
        assert abs(cast(float, line["rollout/kl_sampler"])) < 1e-4
        assert cast(float, line["objective/accounting_residual"]) < 1e-5
        score, charge, reward = (
            cast(float, line[f"objective/{key}"])
            for key in ("trained_scores", "charge", "trained_reward")
        )
        assert reward == pytest.approx(score - charge, abs=1e-5)
        # Placement reward_k1, all responses trained on.
        k1 = cast(float, line["objective/kl_ref_k1"])
        assert charge == pytest.approx(0.1 * k1, abs=1e-6)
        assert "kl" not in line
    assert {sample.kind for sample in run.samples} == {"worst", "random", "heldout"}
    assert sorted(p.name for p in run.path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "run.json",
        "samples.jsonl",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"leash": {"placement": "exact"}},
        {"leash": {"placement": "mixed"}},
        {"leash": {"beta": 0.0, "placement": "measure"}},
        {"leash": {"placement": "loss_k3", "allow_biased": True}},
        {"leash": {"beta": None, "target_kl": 1.0}, "score_normalisation": "initial"},
        {"leash": {"beta": None, "target_kl": 0.05}, "plan": {"responses": 128}},
        {"leash": {"beta": None, "target_kl_per_token": 0.05}},
        {"leash": {"beta": None, "target_kl_per_token": 0.05, "initial_beta": 0.2}},
        {"leash": {"beta": None, "schedule": [[0, 0.4], [2, 0.1], [3, 0.1]]}},
        {"leash": {"beta": None, "target_kl": 1.0, "controller": "ziegler_paper"}},
        {
            "leash": {
                "beta": None,
                "target_kl": 1.0,
                "controller": "ziegler_code",
                "initial_beta": 0.2,
            },
            "score_normalisation": "running",
        },
        {"rollout": {"truncated": "bootstrap", "responses_per_prompt": 2}},
        {"rollout": {"truncated": "penalise", "missing_eos_penalty": 1.0}},
        {
            "algorithm": {"value": {"kind": "trunk"}},
            "optimizer": {"schedule": "linear", "warmup_steps": 2},
        },
        {"policy": {"lora": {"rank": 2, "targets": ["q_proj"]}}},
    ],
    ids=lambda changes: "-".join(
        str(value)
        for change in changes.values()
        for value in (change.values() if isinstance(change, dict) else [change])
    ),
)
def test_interrupted_and_resumed_is_the_run_that_was_not(
    material: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(settings(material, tmp_path / "whole", **changes))

    config = settings(material, tmp_path / "broken", **changes)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert read_run(tmp_path / "broken").status == "interrupted"
    train(config)

    assert numbers(tmp_path / "broken") == numbers(whole)
    if "lora" not in changes.get("policy", {}):
        ours, theirs = weights(tmp_path / "broken"), weights(whole)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_starts_from_its_plan_and_is_measured_by_it(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(
        material,
        tmp_path / "run",
        reward_models={"w3": {"callable": "reward_functions:even"}},
        leash={"beta": None, "target_kl": 0.1},
        plan={"responses": 128},
        steps=8,
    )
    run = read_run(train(config))
    plan = read_frontier(run.path / "plan.json")
    start = run.meta["start"]
    row = plan.budgets[0]
    assert start["source"] == "plan" and row.known and not isinstance(row, NoRow)
    assert start["beta"] == row.beta.value
    first = cast(float, run.metrics[1]["objective/beta"])
    assert first == row.beta.value
    said = capsys.readouterr().out
    assert f"β starts at {row.beta.value:.4g}: the plan's for leash.target_kl 0.1" in said
    assert f"β from {row.beta.value:.4g}, moved to hold" in said
    told = [line for line in run.metrics if "objective/kl_efficiency" in line]
    assert told and "objective/kl_efficiency" not in run.metrics[1]
    for line in told:
        kl, score = (cast(float, line[f"objective/{k}"]) for k in ("kl_ref", "scores"))
        possible = plan.possible_gain(kl)
        assert possible is not None
        assert line["objective/kl_efficiency"] == (score - plan.mean_score) / possible
    names = [name for chart in score_charts(run) for name in chart]
    assert "the optimum, as planned" in names


def test_beta_follows_its_schedule(material: Path, tmp_path: Path) -> None:
    leash = {"beta": None, "schedule": [[0, 0.4], [2, 0.1], [3, 0.1]]}
    run = read_run(train(settings(material, tmp_path / "run", leash=leash)))
    betas = [line["objective/beta"] for line in run.metrics[1:]]
    assert betas == pytest.approx([0.4, 0.25, 0.1, 0.1])
    assert "along its schedule" in run.meta["objective"]


def test_a_target_per_token_is_that_of_a_response_of_the_references_length(
    material: Path, tmp_path: Path
) -> None:
    leash = {"beta": None, "target_kl_per_token": 0.02}
    run = read_run(train(settings(material, tmp_path / "run", leash=leash)))
    length = run.meta["start"]["response_length"]
    assert 1 < length <= 6
    assert "0.02 nats per token" in run.meta["objective"]
    for line in run.metrics[1:]:
        target, tokens = (cast(float, line[k]) for k in ("objective/target_kl", "rollout/length"))
        assert target == pytest.approx(0.02 * tokens)
    per_token = run.metrics[-1]["objective/kl_ref_per_token"]
    state = sorted((run.path / "checkpoints").iterdir())[-1] / "state.json"
    # What the controller read: the KL per token, of a response as long as the reference's.
    assert json.loads(state.read_text())["betas"]["others"]["kl"] == pytest.approx(
        per_token * length
    )


def score_charts(run: Run) -> list[list[str]]:
    groups = chart_groups([run], ["run"])
    return [
        [one.name for one in c.series] for _, charts in groups for c in charts if "√" in c.title
    ]


@pytest.mark.parametrize(
    ("changes", "source", "words"),
    [
        ({"leash": {"beta": None, "target_kl": 9.0}}, "edge", "the last β that the plan knows"),
        (
            {"leash": {"beta": None, "target_kl": 9.0}, "plan": {"responses": 3}},
            "spread",
            "from the spread of the reference's scores",
        ),
        (
            {
                "leash": {"beta": None, "target_kl": 9.0},
                "reference": {"path": "other", "reference_differs": True},
            },
            "spread",
            "does not start at the reference",
        ),
    ],
)
def test_a_start_that_is_not_the_plans_is_said_in_the_log(
    material: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    source: str,
    words: str,
) -> None:
    if "reference" in changes:
        changes["reference"]["path"] = str(material / "other")
    even = {"reward_models": {"w3": {"callable": "reward_functions:even"}}}
    run = read_run(train(settings(material, tmp_path / "run", steps=1, **changes, **even)))
    assert run.meta["start"]["source"] == source and run.meta["start"]["reason"]
    assert words in capsys.readouterr().out.replace("\n", " ")
    assert (run.path / "plan.json").exists() == ("reference" not in changes)


@pytest.mark.parametrize("normalisation", ["none", "initial"])
def test_scores_that_never_vary_are_refused_before_anything_begins(
    material: Path, tmp_path: Path, normalisation: str
) -> None:
    config = settings(
        material,
        tmp_path / "run",
        reward_models={"w3": {"callable": "reward_functions:flat"}},
        leash={"beta": None, "target_kl": 1.0},
        score_normalisation=normalisation,
    )
    with pytest.raises(RewardError, match="before the first update: "):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_value_model_of_its_own_and_a_pretraining_mix(material: Path, tmp_path: Path) -> None:
    config = settings(
        material,
        tmp_path / "run",
        algorithm={"value": {"kind": "model", "path": str(material / "reward")}},
        reward_models={"rm": {"path": str(material / "reward"), "weight": 0.5}},
        pretraining={"texts": str(material / "texts.jsonl"), "texts_per_minibatch": 2},
    )
    metrics = read_run(train(config)).metrics
    likelihoods = [cast(float, line["loss/pretraining"]) for line in metrics[1:]]
    assert likelihoods[-1] < likelihoods[0]


def test_the_gradient_does_not_depend_on_the_microbatch(material: Path, tmp_path: Path) -> None:
    paths = [
        train(
            settings(
                material,
                tmp_path / "-".join(map(str, size.values())),
                algorithm=size,
                steps=1,
                # Plain gradient descent would show it as well; Adam's first step is ±lr, so that
                # a gradient of the wrong scale would hide: look at its norm instead.
            )
        )
        for size in (
            {"microbatch_size": 1},
            {"microbatch_size": 3},
            {"microbatch_tokens": 19},
            {"microbatch_size": 8},
        )
    ]
    norms = [numbers(path)[1]["optim/grad_norm"] for path in paths]
    assert norms[:3] == pytest.approx(norms[3:] * 3, rel=1e-5)


def test_keeping_logits_changes_no_number(material: Path, tmp_path: Path) -> None:
    kept, again = (
        train(settings(material, tmp_path / str(mib), algorithm={"keep_logits_mib": mib}))
        for mib in (1, 0)
    )
    assert numbers(kept) == numbers(again)
    first, second = weights(kept), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_spot_check_finds_scores_that_are_wrong(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = settings(material, tmp_path / "right", logging={"spot_check_every": 1}, steps=2)
    assert read_run(train(right)).status == "finished"
    true_scores = float64_check.streaming.token_scores

    def off(*request: Any, **more: Any) -> Any:
        scores = true_scores(*request, **more)
        assert scores.ref_logprobs is not None
        return replace(scores, ref_logprobs=scores.ref_logprobs - 1e-4)

    monkeypatch.setattr(float64_check.streaming, "token_scores", off)
    wrong = settings(material, tmp_path / "wrong", logging={"spot_check_every": 2})
    with pytest.raises(ScoringError, match="got ref_logprobs"):
        train(wrong)
    assert len(read_run(tmp_path / "wrong").metrics) == 2  # step 0, and step 1, unchecked


def test_measuring_costs_the_run_nothing_but_time(material: Path, tmp_path: Path) -> None:
    """β = 0 goes the same way whether the placement is said to measure or to charge."""
    paths = [
        train(settings(material, tmp_path / placement, leash={"beta": 0, "placement": placement}))
        for placement in ("measure", "reward_k1")
    ]
    first, second = (weights(path) for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_tighter_leash_stays_nearer(material: Path, tmp_path: Path) -> None:
    far = [
        cast(
            float,
            read_run(
                train(
                    settings(
                        material,
                        tmp_path / str(beta),
                        leash={"beta": beta},
                        steps=12,
                        heldout={"every": 0},
                    )
                )
            ).metrics[-1]["objective/kl_ref"],
        )
        for beta in (10.0, 1.0, 0.0)
    ]
    assert far == sorted(far)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"policy": {"path": "/nowhere"}}, ModelError, "expected a model at '/nowhere'"),
        ({"prompts": {"train": "/nowhere.jsonl"}}, KleashError, "expected a prompt file"),
        ({"device": "cuda:7"}, ConfigError, "a device this machine has, got 'cuda:7'"),
        (
            {"leash": {"placement": "loss_k1"}},
            ConfigError,
            "placement 'loss_k1' has a zero gradient",
        ),
        (
            {"reward_models": {"w3": {"callable": "reward_functions:of_no_use"}}},
            RewardError,
            "to return .* scores, one per response",
        ),
        (
            {"reward_models": {"w3": {"callable": "reward_functions:not_a_number"}}},
            RewardError,
            "response ",
        ),
        (
            {"reward_models": {"w3": {"callable": "reward_functions:raises"}}},
            RewardError,
            r"ZeroDivisionError: no such response, raised at .*reward_functions\.py:\d+ in raises",
        ),
        ({"logging": {"trackers": ["wandb"]}}, ConfigError, "'wandb' is not installed"),
    ],
)
def test_what_shows_at_the_start_begins_nothing(
    material: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    changes = {"score_normalisation": "initial", **changes}
    with pytest.raises(error, match=sentence):
        train(settings(material, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_another_reference_stops_before_anything_is_learnt(material: Path, tmp_path: Path) -> None:
    reference = {"path": str(material / "other")}
    with pytest.raises(ModelError, match="the reference is not the policy this run starts from"):
        train(settings(material, tmp_path / "run", reference=reference))
    assert read_run(tmp_path / "run").status == "failed"
    meant = reference | {"reference_differs": True}
    path = train(settings(material, tmp_path / "meant", reference=meant))
    assert cast(float, read_run(path).metrics[1]["objective/kl_ref"]) > 0.01


def test_an_output_that_is_taken(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run", steps=1)
    train(config)
    with pytest.raises(RunError, match="already holds this run, finished"):
        train(config)
    with pytest.raises(RunError, match="already holds a run of another configuration"):
        train(settings(material, tmp_path / "run", seed=2))


def test_resuming_needs_the_reference_it_began_with(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run", steps=2)
    train(config)
    state = tmp_path / "run" / "checkpoints" / "step-000002" / "state.json"
    text = state.read_text()
    first = json.loads(text)["reference"]["sha256"]
    state.write_text(text.replace(first, "0" * 64))
    mark_unfinished(tmp_path / "run")
    rewrite_manifest(state.parent)
    with pytest.raises(RunError, match="tied to another reference"):
        train(config)


def rewrite_manifest(directory: Path) -> None:
    from kleash.storage.atomic_directories import _write_manifest

    (directory / "manifest.json").unlink()
    _write_manifest(directory)


def test_a_reference_that_changes_stops_the_run(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meddling(session: Session) -> None:
        with torch.no_grad():
            next(session.components.reference.model.parameters()).add_(1e-3)
        session.state = replace(session.state, step=max(session.state.step, 1))

    before_each_step(monkeypatch, meddling)
    with pytest.raises(RunError, match="the reference changed while training"):
        train(settings(material, tmp_path / "run"))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, torch.Tensor] = {}
    seen: list[Any] = []
    backward = Components.backward_of_minibatch

    def poisoned(components: Any, minibatch: Any, **numbers: Any) -> Any:
        passed = backward(components, minibatch, **numbers)
        seen.append(components)
        before.update(
            {n: p.detach().clone() for n, p in components.policy.model.named_parameters()}
        )
        next(iter(components.policy.parameters())).grad[0] = float("inf")
        return passed

    monkeypatch.setattr(Components, "backward_of_minibatch", poisoned)
    with pytest.raises(NonFiniteError, match="the update was refused"):
        train(settings(material, tmp_path / "run"))
    after = dict(seen[0].policy.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_full_disk_is_one_sentence_and_the_run_stays_readable(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kleash.training.state.save_tensors", full)
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*: the disk is full"):
        train(settings(material, tmp_path / "run"))
    run = read_run(tmp_path / "run")
    assert run.status == "failed"
    assert "the disk is full" in run.meta["message"]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_metrics_reach_tensorboard(material: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(settings(material, tmp_path / "run", logging={"trackers": ["tensorboard"]}, steps=2))
    (folder,) = {event.parent for event in (tmp_path / "run").rglob("events.out.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = [event.value for event in events.Scalars("objective/kl_ref")]
    written = [line["objective/kl_ref"] for line in numbers(tmp_path / "run")[1:]]
    assert logged == pytest.approx(written, rel=1e-6)
