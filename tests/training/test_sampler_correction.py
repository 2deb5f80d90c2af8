"""A run whose sampler writes by another law: what is logged, corrected, kept and resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import small_run
import torch
from small_run import numbers, policy_weights, save_material, two_words
from training_hooks import interrupt_after

from kleash.config.schema import Config
from kleash.errors import ScoringError
from kleash.rollout import scoring_pass
from kleash.training.loop import train
from kleash.types import Rollout

LAYER = {
    "algorithm": {"name": "rloo"},
    "rollout": {"prompts_per_step": 4, "responses_per_prompt": 2},
}
CORRECTED = {"correction": "sequence_truncated", "correction_clip": 1.5}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    return save_material(folder, prompts=two_words(range(8)), heldout=two_words(range(10, 13)))


@pytest.fixture
def hot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine writes at 1.3 times the temperature that is scored, and says so."""
    original = scoring_pass.generate

    def generate(policy: Any, prompts: Any, spec: Any, **more: Any) -> Rollout:
        return original(policy, prompts, replace(spec, temperature=1.3 * spec.temperature), **more)

    monkeypatch.setattr("kleash.rollout.scoring_pass.generate", generate)


def settings(material: Path, output: Path, **rollout: Any) -> Config:
    layer = {**LAYER, "rollout": {**LAYER["rollout"], **rollout}}
    return small_run.settings(material, output, layer, prompts={"heldout": None})


@pytest.mark.usefixtures("hot")
def test_a_corrected_run_says_what_it_did_and_resumes_to_the_same(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = numbers(train(settings(material, tmp_path / "whole", **CORRECTED)))
    floor = whole[0]["rollout/kl_sampler_per_token"]
    assert floor > 1e-3
    assert {line["rollout/kl_sampler_floor"] for line in whole} == {floor}
    for line in whole:
        assert 0 < line["rollout/correction_effective_samples"] < 1
        assert 0 <= line["rollout/correction_clipped"] <= 1
        assert line["rollout/kl_sampler_per_token_se"] > 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(settings(material, tmp_path / "cut", **CORRECTED))
    assert numbers(train(settings(material, tmp_path / "cut", **CORRECTED))) == whole
    for name, weight in policy_weights(tmp_path / "whole").items():
        assert torch.equal(weight, policy_weights(tmp_path / "cut")[name])


@pytest.mark.usefixtures("hot")
def test_the_correction_changes_the_update_and_nothing_else_of_the_first_step(
    material: Path, tmp_path: Path
) -> None:
    plain, weighed = (
        numbers(train(settings(material, tmp_path / name, **more)))[0]
        for name, more in (("plain", {}), ("weighed", CORRECTED))
    )
    assert "rollout/correction_clipped" not in plain
    assert plain["objective/kl_ref"] == weighed["objective/kl_ref"]
    assert plain["objective/trained_reward"] == weighed["objective/trained_reward"]
    assert plain["optim/grad_norm"] != weighed["optim/grad_norm"]


def test_a_spot_check_reads_both_laws_over_the_whole_vocabulary(
    material: Path, tmp_path: Path
) -> None:
    config = small_run.settings(
        material, tmp_path / "run", LAYER, logging={"spot_check_every": 2}, steps=2
    )
    first, second = [line for line in numbers(train(config)) if line["step"] > 0]
    assert "rollout/kl_sampler_exact_per_token" not in first
    for key in ("kl_sampler_exact_per_token", "kl_sampler_exact_reverse_per_token"):
        assert 0 <= cast(float, second[f"rollout/{key}"]) < 1e-9


def test_a_batch_of_which_nothing_is_left_is_refused_and_the_run_stops(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = scoring_pass.generate

    def generate(*arguments: Any, **more: Any) -> Rollout:
        rollout = original(*arguments, **more)
        assert rollout.sampler_logprobs is not None
        return replace(rollout, sampler_logprobs=rollout.sampler_logprobs - 9)

    monkeypatch.setattr("kleash.rollout.scoring_pass.generate", generate)
    with pytest.raises(ScoringError, match=r"within 1/2 and 2 .*step 1 was not made"):
        train(settings(material, tmp_path / "run", correction="masked"))
    assert list((tmp_path / "run" / "refused").iterdir())
