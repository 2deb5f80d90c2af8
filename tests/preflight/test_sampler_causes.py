"""A gap between sampler and trainer is planted in each way it can come about, and gets its name."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import fault_types
import pytest
import torch

from kleash.kl.sampler_gap import sampler_gap
from kleash.models.policy import Policy
from kleash.preflight.checks import sampling
from kleash.preflight.findings import Finding
from kleash.preflight.probe_batch import MICROBATCH, Trial, examine
from kleash.preflight.runtime_monitor import symptom_of
from kleash.preflight.sampler_causes import explain_gap
from kleash.rollout import scoring_pass
from kleash.training.components import Components
from kleash.types import Rollout

Plant = Callable[[pytest.MonkeyPatch, Components], None]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fault_types.material(tmp_path_factory.mktemp("world"), "llama")


@pytest.fixture
def world(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fault_types.World:
    return fault_types.clean(material, "llama", monkeypatch, tmp_path)


def trial_of(
    world: fault_types.World,
    monkeypatch: pytest.MonkeyPatch,
    plant: Plant,
    *,
    drift: float = 0.05,
    floor: float | None = None,
) -> Trial:
    """A batch that an engine with a fault wrote for a policy some way from its reference."""
    config, components = world.components()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in components.policy.parameters():
            parameter.add_(drift * torch.randn_like(parameter))
    plant(monkeypatch, components)
    torch.manual_seed(0)
    written = components.write(components.prompts, responses_per_prompt=4, microbatch=256)
    judged = components.judge(written)
    scored = components.score(judged.rollout, judged.raw_scores, microbatch=MICROBATCH)
    return examine(
        config, components, judged, scored, texts=1, at_start=drift == 0, sampler_floor=floor
    )


def by_another(change: Callable[[Policy, Components], Policy], **spec: Any) -> Plant:
    """The engine writes with another model, or at another temperature."""

    def plant(monkeypatch: pytest.MonkeyPatch, components: Components) -> None:
        original = scoring_pass.generate

        def generate(policy: Policy, prompts: Any, sampling: Any, **more: Any) -> Rollout:
            return original(change(policy, components), prompts, replace(sampling, **spec), **more)

        monkeypatch.setattr("kleash.rollout.scoring_pass.generate", generate)

    return plant


def cut(keep: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    """The engine draws from what is kept, and reports the probability within that."""

    def plant(monkeypatch: pytest.MonkeyPatch, components: Components) -> None:
        from kleash.rollout import sampling

        original = sampling._draw
        monkeypatch.setattr(
            "kleash.rollout.sampling._draw",
            lambda weights, uniform: original(torch.where(keep(weights), weights, 0.0), uniform),
        )

    return plant


def top_p(p: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def keep(weights: torch.Tensor) -> torch.Tensor:
        share = weights.double() / weights.double().sum(-1, keepdim=True)
        ordered = share.sort(-1, descending=True)
        before = ordered.values.cumsum(-1) - ordered.values
        return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, ordered.indices, before < p)

    return keep


def top_k(k: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weights: weights >= weights.topk(k).values[:, -1:]


def min_p(p: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weights: weights >= p * weights.amax(-1, keepdim=True)


def perturbed(policy: Policy, components: Components) -> Policy:
    """Weights of some other time."""
    model = deepcopy(policy.model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return replace(policy, model=model)


def of_the_start(policy: Policy, components: Components) -> Policy:
    reference: Any = components.reference
    return replace(policy, model=reference.model)


def in_format(dtype: torch.dtype) -> Callable[[Policy, Components], Policy]:
    return lambda policy, _: replace(policy, model=deepcopy(policy.model).to(dtype))  # type: ignore[arg-type]


def same(policy: Policy, components: Components) -> Policy:
    return policy


def noisy(monkeypatch: pytest.MonkeyPatch, components: Components) -> None:
    """Every log-probability is off by chance, as another kernel's are."""
    original = scoring_pass.generate

    def generate(*arguments: Any, **more: Any) -> Rollout:
        rollout = original(*arguments, **more)
        assert rollout.sampler_logprobs is not None
        noise = torch.randn(rollout.sampler_logprobs.shape, generator=torch.manual_seed(4))
        return replace(rollout, sampler_logprobs=rollout.sampler_logprobs + 0.01 * noise)

    monkeypatch.setattr("kleash.rollout.scoring_pass.generate", generate)


EXPLAINED: list[tuple[str, Plant, str, str]] = [
    ("hot", by_another(same, temperature=1.02), "temperature", "at temperature 1.02 and the"),
    ("cold", by_another(same, temperature=0.5), "temperature", "at temperature 0.5 and the"),
    ("top-p", cut(top_p(0.99)), "cut", "as top-p, at about 0.99"),
    ("half", cut(top_p(0.5)), "cut", "as top-p, at about 0.5"),
    ("top-k", cut(top_k(12)), "cut", "as top-k, of 12 words"),
    ("min-p", cut(min_p(0.05)), "cut", "as min-p, at about 0.0"),
    ("start", by_another(of_the_start), "start weights", "those that the run began with"),
    ("bf16", by_another(in_format(torch.bfloat16)), "number format", "computes in bfloat16"),
    ("fp16", by_another(in_format(torch.float16)), "number format", "computes in float16"),
    ("stale", by_another(perturbed), "stale weights", "before the first update and is"),
    ("kernel", noisy, "stale weights", "before the first update and is"),
]


@pytest.mark.parametrize(
    ("plant", "name", "says"), [row[1:] for row in EXPLAINED], ids=[row[0] for row in EXPLAINED]
)
def test_each_planted_gap_gets_its_cause(
    world: fault_types.World,
    monkeypatch: pytest.MonkeyPatch,
    plant: Plant,
    name: str,
    says: str,
) -> None:
    """Both agreed before the first update: whatever is not explained token by token is weights."""
    found = explain_gap(trial_of(world, monkeypatch, plant, floor=1e-12))
    assert found.name == name, found
    assert says in found.cause


def test_the_same_noise_before_the_first_update_is_the_kernels(
    world: fault_types.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for drift, floor in ((0.0, None), (0.05, 6e-5)):
        found = explain_gap(trial_of(world, monkeypatch, noisy, drift=drift, floor=floor))
        assert found.name == "kernels", found
        monkeypatch.undo()


def test_what_is_neither_small_nor_known_to_be_new_is_not_guessed_at(
    world: fault_types.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = explain_gap(trial_of(world, monkeypatch, by_another(perturbed)))
    assert found.name == "unknown" and "another model" in found.cause


def test_two_tokens_explain_nothing(
    world: fault_types.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temperature fits any one token."""
    world.set("rollout.max_new_tokens", 1)
    trial = trial_of(world, monkeypatch, by_another(same, temperature=0.5), floor=1e-12)
    assert explain_gap(trial).name == "temperature"
    few = torch.arange(4)
    from kleash.algorithms.common import select

    written = replace(trial.written.responses, rollout=select(trial.rollout, few))
    trial = replace(
        trial,
        written=replace(trial.written, responses=written),
        scored=select(trial.scored, few),
    )
    assert explain_gap(trial).name == "unknown"


def test_rounding_is_a_warning_where_it_is_corrected_for(
    world: fault_types.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = by_another(in_format(torch.bfloat16))
    assert ratio(world, monkeypatch, plant).verdict == "fail"
    monkeypatch.undo()
    world.set("rollout.correction", "sequence_truncated")
    assert ratio(world, monkeypatch, plant).verdict == "warn"
    monkeypatch.undo()
    assert ratio(world, monkeypatch, by_another(same, temperature=1.1)).verdict == "fail"


def ratio(world: fault_types.World, monkeypatch: pytest.MonkeyPatch, plant: Plant) -> Finding:
    return sampling.ratio(trial_of(world, monkeypatch, plant, floor=1e-12))


def test_a_gap_is_a_symptom_once_it_leaves_the_floor_it_had(
    world: fault_types.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = trial_of(world, monkeypatch, by_another(in_format(torch.bfloat16)))
    scored, rollout = trial.scored, trial.rollout
    assert rollout.sampler_logprobs is not None
    laws = (scored.rollout_logprobs, rollout.sampler_logprobs, rollout.response_mask)
    gap = sampler_gap(*laws, rollout.prompt_index).per_token.mean

    def symptom(floor: float | None) -> str | None:
        coarse = replace(
            scored, rollout=replace(rollout, sampler_logprobs=laws[0] + 8 * (laws[1] - laws[0]))
        )
        return symptom_of(coarse, dtype=torch.float32, sampler_floor=floor)

    assert "kl_sampler" in (symptom(None) or "")
    assert "kl_sampler" in (symptom(gap) or "")
    assert symptom(64 * gap) is None
