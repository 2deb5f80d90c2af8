"""Where a checkpoint stands: what its run knows of it, and nothing where the run is another's."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from audit_models import SMALL, change, noise, write_prompts
from synthetic_run import write_synthetic_run
from tiny_models import save_model

from kleash.auditing.api import audit
from kleash.auditing.confidence_intervals import interval
from kleash.auditing.result import Audit
from kleash.auditing.run_context import CheckpointInRun, charts_over_root_kl, checkpoint_in_run
from kleash.errors import PromptError, RunError
from kleash.models.policy import Identity
from kleash.report.metric_charts import frontier_points
from kleash.storage.plan_file import make_frontier, write_frontier
from kleash.storage.run_directory import read_run

SHA = "9f2c" * 16
REFERENCE = Identity("models/sft", "copy", "float32", SHA)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Twelve steps, held-out scores at every second."""
    return write_synthetic_run(tmp_path / "run", steps=12)


def policy(run: Path, step: int) -> Identity:
    return Identity(str(run / f"checkpoints/step-{step:06d}/policy"), "loaded", "float32", "aa")


def stands(
    run: Path, step: int, reference: Identity = REFERENCE, t: float = 1.0
) -> CheckpointInRun | None:
    return checkpoint_in_run(policy(run, step), reference, temperature=t)


def test_the_score_is_that_of_the_checkpoint(run: Path) -> None:
    lines = {line["step"]: line for line in read_run(run).metrics}
    found = stands(run, 6)
    assert found is not None and (found.run, found.step) == ("run", 6)
    assert (found.score, found.score_se) == (lines[6]["heldout/scores"], 0.06)
    assert (found.gold, found.gold_se) == (lines[6]["heldout/gold"], 0.09)
    assert found.measured_on == "held-out prompts" and found.frontier == []
    assert [one.score for one in found.trail] == [lines[n]["objective/scores"] for n in range(1, 7)]
    roots = [math.sqrt(max(0, lines[n]["objective/kl_ref"])) for n in range(1, 7)]
    assert [one.root_kl for one in found.trail] == roots
    # Nobody evaluated after step 7; the rollout of step 8 was written by that very policy.
    after = stands(run, 7)
    assert after is not None and after.measured_on == "the next rollout"
    assert (after.score, after.gold) == (lines[8]["objective/scores"], None)


def test_scores_in_other_units_are_not_mixed(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text() + "score_normalisation: initial\n")
    found = stands(run, 6)
    assert found is not None and found.measured_on == "the next rollout"
    assert stands(run, 12) is None


def test_what_is_not_the_runs_own_has_no_place_in_it(run: Path, tmp_path: Path) -> None:
    assert stands(run, 6, Identity("x", "copy", "float32", "00")) is None
    assert stands(run, 6, t=0.7) is None
    for path in (tmp_path / "elsewhere/step-000006/policy", run / "checkpoints/best/policy", run):
        one = Identity(str(path), "loaded", "float32", "aa")
        assert checkpoint_in_run(one, REFERENCE, temperature=1.0) is None
    (run / "metrics.jsonl").write_text("{}\n{}\n")
    with pytest.raises(RunError, match="step"):
        stands(run, 6)


def test_the_plan_of_the_run_is_the_frontier(run: Path) -> None:
    torch.manual_seed(0)
    scores = torch.randn(20, 32)
    frontier = make_frontier(scores, prompts=range(20), about={}, betas=(2.0, 1.0, 0.01))
    write_frontier(run / "plan.json", frontier)
    found = stands(run, 6)
    known = frontier_points(row for row in frontier.rows if row.known)
    assert found is not None and 0 < len(known) < 3
    start, *rest = [(s.root_kl, s.score) for s in found.frontier]
    assert start == (0.0, pytest.approx(scores.double().mean().item()))
    assert rest == [(p.x, p.y) for p in known]


def test_charts_put_audited_kl_on_the_axis(run: Path) -> None:
    early, late = stands(run, 4), stands(run, 8)
    assert early is not None and late is not None
    four, nine = (interval(kl, 0.1, n=9, clusters=9) for kl in (4.0, 9.0))
    score, gold = charts_over_root_kl([(four, early), (nine, late)])
    assert [one.name for one in score.series] == ["audited", "steps of the run, by its own KL"]
    assert [(p.x, p.y) for p in score.series[0].points] == [(2.0, early.score), (3.0, late.score)]
    assert len(score.series[1].points) == 8 and "held-out prompts" in score.sample
    assert [(p.x, p.y) for p in gold.series[0].points] == [(2.0, early.gold), (3.0, late.gold)]
    (alone,) = charts_over_root_kl([(four, early)])
    assert alone.title == "Score against √KL" and charts_over_root_kl([]) == []


def test_an_audit_finds_the_run_of_its_policy(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    run = write_synthetic_run(tmp_path / "run", steps=4)
    checkpoint = run / "checkpoints" / "step-000004" / "policy"
    change(base, checkpoint, noise)
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    found = audit(checkpoint, base, prompts, **SMALL)
    assert found.standing is None  # held to another reference
    meta = json.loads((run / "run.json").read_text())
    meta["reference"]["sha256"] = found.reference.sha256
    (run / "run.json").write_text(json.dumps(meta))
    found = audit(checkpoint, base, prompts, **SMALL)
    assert found.standing is not None and found.standing.step == 4
    assert Audit.from_json(found.to_json()).standing == found.standing
    responses = tmp_path / "responses.jsonl"
    responses.write_text(json.dumps({"prompt": "w1", "response": "w2 w3"}))
    assert audit(checkpoint, base, responses=responses, **SMALL).standing is None
    (run / "config.yaml").unlink()
    found = audit(checkpoint, base, prompts, **SMALL)
    assert found.standing is None
    assert any("run of this checkpoint could not be read" in note for note in found.notes)


@pytest.fixture
def sampled(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A checkpoint of a run that wrote 5 tokens at a temperature of 0.7, its base, and prompts."""
    base = save_model(tmp_path / "base")
    run = write_synthetic_run(tmp_path / "run", steps=4)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["rollout"] = {"max_new_tokens": 5, "temperature": 0.7}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = run / "checkpoints" / "step-000004" / "policy"
    change(base, checkpoint, noise)
    return checkpoint, base, write_prompts(tmp_path / "prompts.jsonl")


def test_a_checkpoint_brings_the_sampling_of_its_run(sampled) -> None:
    checkpoint, base, prompts = sampled
    for pair in ((checkpoint, base), (base, checkpoint)):
        found = audit(*pair, prompts, keep=4)
        assert (found.settings["max_new_tokens"], found.settings["temperature"]) == (5, 0.7)
        assert max(len(s.tokens) for s in found.parts[0].samples) == 5
        assert not any("Sampled otherwise" in note for note in found.notes)
    with pytest.raises(PromptError, match="max_new_tokens = 64"):
        audit(base, base, prompts, keep=4)  # The general default, which this context cannot hold.


def test_the_directory_of_a_run_is_its_newest_checkpoint(sampled) -> None:
    checkpoint, base, prompts = sampled
    run = checkpoint.parents[2]
    change(base, run / "checkpoints" / "step-000002" / "policy", noise)
    found = audit(run, base, prompts, keep=4)
    assert found.policy.path == str(checkpoint)
    assert found.to_json() == audit(checkpoint, base, prompts, keep=4).to_json()
    assert audit(run, run, prompts, keep=4).kl.per_token.mean == 0
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match="expected a checkpoint in"):
        audit(run, base, prompts, keep=4)


def test_sampling_other_than_the_runs_is_said(sampled) -> None:
    checkpoint, base, prompts = sampled
    found = audit(checkpoint, base, prompts, max_new_tokens=8, temperature=1.0, keep=4)
    assert (found.settings["max_new_tokens"], found.settings["temperature"]) == (8, 1.0)
    (note,) = [one for one in found.notes if "Sampled otherwise" in one]
    assert "max_new_tokens = 8 here and 5 in the run" in note
    assert "temperature = 1 here and 0.7 in the run" in note
    # Given texts are not sampled: nothing to follow.
    found = audit(checkpoint, base, texts=["w1 w2 w3"], keep=1)
    assert found.settings["temperature"] == 1.0
    assert not any("Sampled otherwise" in one for one in found.notes)
