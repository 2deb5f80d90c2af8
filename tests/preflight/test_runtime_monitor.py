"""The doctor: silent on clean batches, and on ill ones it names what made them ill."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import fault_types
import planted_faults
import pytest
import torch
from scipy.stats import norm, t

from kleash.config.schema import Config
from kleash.kl.statistics import Estimate
from kleash.preflight import runtime_monitor
from kleash.preflight.probe_batch import MICROBATCH
from kleash.preflight.runtime_monitor import symptom_of
from kleash.rollout.prompts import Prompt
from kleash.storage.run_directory import read_run
from kleash.training.callbacks import RolloutEvent
from kleash.training.components import Components
from kleash.training.loop import train
from kleash.training.responses import JudgedResponses
from kleash.types import Rollout, ScoredRollout


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fault_types.material(tmp_path_factory.mktemp("world"), "llama")


@pytest.fixture
def world(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fault_types.World:
    return fault_types.clean(material, "llama", monkeypatch, tmp_path)


def batch(components: Components, *, seed: int = 0) -> tuple[JudgedResponses, ScoredRollout]:
    torch.manual_seed(seed)
    return judged_and_scored(components, components.prompts, per_prompt=4)


def judged_and_scored(
    components: Components, prompts: list[Prompt], *, per_prompt: int
) -> tuple[JudgedResponses, ScoredRollout]:
    written = components.write(prompts, responses_per_prompt=per_prompt, microbatch=256)
    judged = components.judge(written)
    return judged, components.score(judged.rollout, judged.raw_scores, microbatch=MICROBATCH)


def event_of(
    world: fault_types.World,
    run: tuple[Config, Components],
    batch: tuple[JudgedResponses, ScoredRollout],
    *,
    step: int,
) -> RolloutEvent:
    return RolloutEvent(
        step=step,
        config=run[0],
        components=run[1],
        judged=batch[0],
        scored=batch[1],
        folder=world.folder,
        append_event=lambda event: None,
    )


def drifted(components: Components) -> Components:
    """The policy some nats from its reference, as it is while training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in components.policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return components


def first(scored: ScoredRollout) -> torch.Tensor:
    """1 at the first token of each response."""
    ones = torch.zeros_like(scored.kl)
    ones[:, 0] = 1
    return ones


def ill(scored: ScoredRollout) -> ScoredRollout:
    """A KL of −1 nat in every response."""
    return replace(scored, ref_logprobs=scored.rollout_logprobs + first(scored))


def symptom(scored: ScoredRollout) -> str:
    return symptom_of(scored, dtype=torch.float32) or ""


def test_a_clean_batch_has_no_symptom(world: fault_types.World) -> None:
    _, components = world.components()
    for seed in range(3):
        assert symptom(batch(components, seed=seed)[1]) == ""
    drifted(components)
    for seed in range(5):
        _, scored = batch(components, seed=seed)
        assert float(scored.kl.sum(-1).mean()) > 0.1
        assert symptom(scored) == ""


def test_each_number_that_cannot_be_is_a_symptom(world: fault_types.World) -> None:
    _, scored = batch(drifted(world.components()[1]))
    mask, rollout = scored.rollout.response_mask, scored.rollout
    assert rollout.sampler_logprobs is not None
    elsewhere = replace(rollout, sampler_logprobs=rollout.sampler_logprobs + 0.01 * mask)
    assert "kl_sampler" in symptom(replace(scored, rollout=elsewhere))
    assert "below 0 by more than its noise" in symptom(ill(scored))
    surplus = replace(scored, ref_logprobs=scored.ref_logprobs - 20 * first(scored))
    assert "Sampled and exact KL differ" in symptom(surplus)
    sharper = replace(scored, entropy=scored.entropy + 20 * first(scored))
    assert "surprise and their entropy differ" in symptom(sharper)


def test_a_few_responses_say_nothing_of_their_noise(world: fault_types.World) -> None:
    _, components = world.components()
    torch.manual_seed(0)
    _, scored = judged_and_scored(components, components.prompts[:2], per_prompt=2)
    assert symptom(ill(scored)) == ""


CAUSES = [
    ("top-k left over", "top-k"),
    ("a repetition penalty left over", "repetition penalty"),
    ("another temperature in the sampler", "drawn at a temperature"),
    ("stale weights in the sampler", "another model"),
    ("positions restart at the response", "Position ids are wrong"),
    ("no attention mask", "Padding on the left"),
    ("dropout in the policy", "Dropout is on in the policy"),
]


@pytest.mark.parametrize(("name", "cause"), CAUSES)
def test_an_ill_batch_gets_its_cause(
    world: fault_types.World, caplog: pytest.LogCaptureFixture, name: str, cause: str
) -> None:
    """The policy has drifted; then the fault sets in."""
    (fault,) = [fault for fault in planted_faults.FAULTS if fault.name == name]
    world.meddle.append(drifted)
    fault.plant(world)
    run = world.components()
    event = event_of(world, run, batch(run[1]), step=7)
    with caplog.at_level(logging.WARNING, logger="kleash"):
        found = runtime_monitor.examine_batch(event)
    assert any(cause in finding.cause for finding in found), found
    assert caplog.messages[0].startswith("step 7: ")
    record = json.loads((world.folder / "diagnoses" / "step-000007.json").read_text())
    assert record["symptom"] in caplog.messages[0]
    assert (world.folder / "diagnoses" / "step-000007.safetensors").is_file()


@pytest.mark.parametrize("freedom", [3, 7, 25, 63, 1000])
def test_the_noise_of_few_prompts_is_students(freedom: int) -> None:
    estimate = Estimate(mean=0.0, standard_error=1.0, n=freedom + 1, clusters=freedom + 1)
    allowed = runtime_monitor._noise(estimate, 0.0)
    exact = t.isf(norm.sf(5.0), freedom)
    # The approximation errs on the side of silence, and only where prompts are few.
    assert exact * 0.99 < allowed < exact * (1.05 if freedom > 5 else 1.5)


@pytest.mark.parametrize("rare", [1e-6, 1e-4, 1e-3, 1e-2, 0.05])
def test_the_variance_of_rare_words_follows_from_their_entropy(rare: float) -> None:
    """Two words, one of them nearly certain: entropy and variance of the surprise by hand."""
    p = torch.tensor([1 - rare, rare], dtype=torch.float64)
    entropy = -(p * p.log()).sum()
    variance = (p * (-p.log() - entropy).square()).sum()
    found = runtime_monitor._rare_variance(entropy.reshape(1, 1))
    assert 0.9 <= float(found / variance) <= 2


def test_a_batch_without_any_of_its_rare_words_is_well() -> None:
    """Words of probability 0.3 % in 2,000 batches of 32 × 20: often none, and then no spread."""
    torch.manual_seed(0)
    rare, shape = 0.003, (32, 20)
    mask, ids = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.long)
    rollout = Rollout(ids, mask, ids, mask, mask[:, 0], torch.arange(32))
    entropy = -(rare * math.log(rare) + (1 - rare) * math.log(1 - rare))
    zero, loud = torch.zeros(shape), 0
    for _ in range(2000):
        drawn = torch.rand(shape) < rare
        logprobs = torch.where(drawn, math.log(rare), math.log(1 - rare))
        scored = ScoredRollout(
            rollout, logprobs, logprobs, zero, zero + entropy, torch.zeros(shape[0])
        )
        loud += symptom_of(scored, dtype=torch.float32) is not None
    assert loud == 0


def test_looking_leaves_the_random_numbers_alone(world: fault_types.World) -> None:
    config, components = world.components()
    written, scored = batch(drifted(components))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    event = event_of(world, (config, components), (written, ill(scored)), step=1)
    runtime_monitor.examine_batch(event)
    assert torch.equal(state, torch.get_rng_state())


def test_only_the_first_batches_are_examined(
    world: fault_types.World, caplog: pytest.LogCaptureFixture
) -> None:
    config, components = world.components()
    written, scored = batch(components)
    (world.folder / "diagnoses").mkdir()
    for step in range(5):
        (world.folder / "diagnoses" / f"step-{step:06d}.json").write_text("{}")
    event = event_of(world, (config, components), (written, ill(scored)), step=6)
    assert runtime_monitor.examine_batch(event) == []
    assert "The first batches like it are in diagnoses/" in caplog.text
    assert len(list((world.folder / "diagnoses").iterdir())) == 5
    # A run that goes over an earlier step again tells of it as it did the first time.
    caplog.clear()
    runtime_monitor.examine_batch(replace(event, step=4))
    assert "step 4: " in caplog.text and "The first batches" not in caplog.text
    assert len(list((world.folder / "diagnoses").glob("*.json"))) == 5


def test_a_batch_of_the_weights_before_is_not_held_to_the_present_ones(
    world: fault_types.World,
) -> None:
    config, components = world.components()
    written, scored = batch(components)
    event = event_of(world, (config, components), (written, ill(scored)), step=2)
    assert runtime_monitor.examine_batch(replace(event, written_ahead=True)) == []
    assert not (world.folder / "doctor").exists()


def test_a_run_that_falls_ill_says_so_and_goes_on(
    world: fault_types.World, caplog: pytest.LogCaptureFixture
) -> None:
    world.tree |= {"steps": 2, "output": str(world.folder / "run")}
    asked: list[int] = []

    class Shifted(runtime_monitor.RuntimeMonitor):
        def on_rollout(self, event: RolloutEvent) -> None:
            asked.append(event.step)
            rollout = event.scored.rollout
            off = replace(rollout, sampler_logprobs=rollout.sampler_logprobs - 0.1)
            super().on_rollout(replace(event, scored=replace(event.scored, rollout=off)))

    path = train(world.config(), callbacks=[Shifted()])
    assert asked == [1, 2]
    assert "kl_sampler" in caplog.text
    assert len(list((path / "diagnoses").glob("*.json"))) == 2
    alarms = read_run(path).events
    assert [(event.step, event.kind) for event in alarms] == [(1, "alarm"), (2, "alarm")]
    assert all("kl_sampler" in event.sentence for event in alarms)
