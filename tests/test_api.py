"""The public functions: a run from Python, looked at from Python."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_run
import yaml
from training_material import material as material
from training_material import settings
from transformers import AutoModelForCausalLM, AutoTokenizer

import kleash
from kleash.config.loading import dump_config
from kleash.errors import ConfigError, PromptError


class Recorder:
    """A callback that keeps what it is given."""

    def __init__(self) -> None:
        self.rollouts: list[int] = []
        self.steps: list[float] = []
        self.checkpoints: list[Path] = []

    def on_rollout(self, event) -> None:
        self.rollouts.append(event.step)

    def on_step(self, event) -> None:
        self.steps.append(event.metrics["objective/kl_ref"])

    def on_checkpoint(self, event) -> None:
        self.checkpoints.append(event.path)


def longer(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    return [float(len(text)) for text in completions]


def test_a_run_from_a_mapping_is_the_run_from_a_file(material: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(dump_config(settings(material, tmp_path / "one")))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**tree, "output": str(tmp_path / "two")}))
    seen = Recorder()
    ours = kleash.train(tree, callbacks=[seen], check=False, steps=2)
    theirs = kleash.train(file, check=False, steps=2)
    assert (ours.status, theirs.status) == ("finished", "finished")
    assert small_run.numbers(ours.path) == small_run.numbers(theirs.path)
    assert seen.rollouts == [1, 2]
    assert seen.steps == [line["objective/kl_ref"] for line in ours.metrics[1:]]
    assert seen.checkpoints[-1] == ours.policy_path.parent
    assert ours.report().is_file()


def test_a_trained_policy_is_audited_as_a_model_object(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run", steps=2)
    run = kleash.train(config, check=False)
    trained = AutoModelForCausalLM.from_pretrained(run.policy_path)
    tokenizer = AutoTokenizer.from_pretrained(run.policy_path)
    path = config.policy.path
    found = kleash.audit((trained, tokenizer), path, ["w1 w2", "w3"], max_new_tokens=4)
    again = kleash.audit(str(run.policy_path), path, ["w1 w2", "w3"], max_new_tokens=4)
    assert found.kl.per_response.mean == pytest.approx(again.kl.per_response.mean, abs=1e-6)


def test_a_reward_in_memory_is_the_one_that_is_trained_on(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run", steps=1)
    run = kleash.train(config, reward={"long": longer}, check=False)
    assert "reward/long" in run.metrics[-1]
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    assert written["reward_models"]["long"]["callable"].endswith(":longer")


def test_prompts_in_memory_are_the_prompts_of_the_file(material: Path, tmp_path: Path) -> None:
    theirs = kleash.train(settings(material, tmp_path / "file", steps=2), check=False)
    rows = {
        name: [json.loads(line) for line in (material / f"{name}.jsonl").read_text().splitlines()]
        for name in ("prompts", "heldout")
    }
    tree = yaml.safe_load(dump_config(settings(material, tmp_path / "memory", steps=2)))
    del tree["prompts"]
    given: dict[str, Any] = {"prompts": rows["prompts"], "heldout": rows["heldout"]}
    ours = kleash.train(tree, **given, check=False)
    assert small_run.numbers(ours.path) == small_run.numbers(theirs.path)
    with pytest.raises(PromptError, match=r"rows of `prompts\.train` in memory, .* got none"):
        kleash.train(ours.path / "config.yaml", check=False, steps=3)
    assert kleash.train(tree, **given, check=False, steps=3).metrics[-1]["step"] == 3
    with pytest.raises(PromptError, match="prompt"):
        kleash.train(tree, **{**given, "prompts": []}, check=False, output=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_reward_in_memory_leaves_paths_relative_to_the_file(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = yaml.safe_load(dump_config(settings(material, tmp_path / "run", steps=1)))
    tree["prompts"] = {"train": "prompts.jsonl", "heldout": "heldout.jsonl"}
    del tree["reward_models"]
    (material / "beside.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    assert kleash.train(material / "beside.yaml", reward=longer, check=False).status == "finished"


def test_a_callback_without_a_method_that_is_called_is_refused(
    material: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"on_start, on_rollout, .* got object"):
        kleash.train(settings(material, tmp_path / "run"), callbacks=[object()])
    assert not (tmp_path / "run").exists()


def test_a_check_and_a_plan_write_nothing(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run")
    assert kleash.check(config, quick=True).findings
    frontier = kleash.plan(config, budgets=[0.1], **{"plan.prompts": 3, "plan.responses": 8})
    assert len(frontier.prompts) == 3
    assert not (tmp_path / "run").exists()


def test_everything_public_is_listed_and_found() -> None:
    assert set(kleash.__all__) <= set(dir(kleash))
    assert all(getattr(kleash, name) is not None for name in kleash.__all__)


def test_importing_it_loads_no_torch() -> None:
    program = "import sys, kleash; dir(kleash); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
