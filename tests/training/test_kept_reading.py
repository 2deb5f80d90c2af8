"""One reading for scoring and the first update: the gradient of two, and when there are two."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import small_run
import tiny_models
import torch
from oracles import TabularModel, gradient_models
from shared_gradients import BETA, PLACEMENTS, TableOfValues, components_of
from small_run import numbers, save_material, two_words
from torch import nn
from transformers import AutoModelForCausalLM

from kleash.algorithms import grpo, ppo, rloo
from kleash.algorithms.common import kept_rows, select
from kleash.kl.placements import DIFFERENTIATES_KL
from kleash.mesh import ALONE
from kleash.models.policy import Policy, Reference
from kleash.models.value_model import ValueHead
from kleash.rollout import scoring_pass
from kleash.training.components import Components
from kleash.training.kept_reading import WholeReading
from kleash.training.loop import train
from kleash.types import Experience, Rollout

WHOLE = 10**6
"""A microbatch that takes everything."""
ALGORITHMS: dict[str, Any] = {"ppo": ppo, "grpo": grpo, "rloo": rloo}
SETTINGS: dict[str, Any] = {
    "ppo": ppo.PPOSettings,
    "grpo": grpo.GRPOSettings,
    "rloo": rloo.RLOOSettings,
}
ALL_PLACEMENTS = (*PLACEMENTS, "loss_k2", "reward_k3", "measure")


@pytest.fixture
def double() -> Generator[None]:
    """New numbers are in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.usefixtures("double")
def test_the_gradient_is_that_of_the_objective(placement: str) -> None:
    """Over all strings of a world, with their probabilities as weights."""
    models = gradient_models()
    world, scores = models.world, models.world.random_scores(5)
    table = models.policy.clone().requires_grad_()
    (true,) = torch.autograd.grad(-world.objective(table, models.reference, scores, BETA), table)
    policy, reference = (TabularModel(world, t) for t in (models.policy, models.reference))
    reference.requires_grad_(False)
    settings = ppo.PPOSettings(
        whiten_advantages=False,
        value_clip_range=None,
        lam=1.0,
        placement=cast(Any, placement),
        mixing=0.3 if placement == "mixed" else None,
    )
    value = TableOfValues(world.random_logits(6)[:, 0])
    scored, kept = scoring_pass.score_and_keep(
        world.rollout, policy=policy, reference=reference, scores=scores, value=value
    )
    batch = ppo.prepare(scored, BETA, settings)
    p = world.probabilities(models.policy)[:, None]
    pathwise = None if batch.pathwise is None else batch.pathwise * p
    batch = replace(batch, advantages=batch.advantages * p, pathwise=pathwise)
    # A loss is divided by the tokens of its minibatch, and an expectation is not.
    ppo.loss(batch, kept, settings, tokens=1).total.backward()
    found = cast(torch.Tensor, policy.logits.grad)
    assert float((found - true).norm() / true.norm()) < 1e-10


def language_models(algorithm: str, **settings: Any) -> tuple[Components, Rollout]:
    """A tied language model, its reference, and responses, every third of which did not end."""
    torch.manual_seed(0)
    config = tiny_models.config("llama", 20, num_hidden_layers=2, tie_word_embeddings=True)
    model, other = (AutoModelForCausalLM.from_config(config).double().eval() for _ in range(2))
    tokenizer = tiny_models.tokenizer()
    policy = Policy(model, tokenizer, "", words=20, stop_ids=())
    reference = Reference(other.requires_grad_(False), tokenizer, "", 20, "")
    value = None
    if algorithm == "ppo":
        value = ValueHead(policy.hidden_size, features="trunk")
        nn.init.normal_(value.outer.weight)
    made = SETTINGS[algorithm](**settings)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 20, (12, 9), generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (12, 1), generator=generator)
    rollout = Rollout(
        prompt_ids=ids[:, :4],
        prompt_mask=torch.ones(12, 4, dtype=torch.bool),
        response_ids=ids[:, 4:],
        response_mask=mask,
        ended=torch.arange(12) % 3 > 0,
        prompt_index=torch.arange(12) // 4,
    )
    return components_of(policy, reference, value, made, ALONE), rollout


def gradients(components: Components) -> torch.Tensor:
    found = [cast(torch.Tensor, p.grad).flatten().clone() for p in components.parameters()]
    for parameter in components.parameters():
        parameter.grad = None
    return torch.cat(found)


def shuffled(experience: Experience) -> torch.Tensor:
    """The rows of a minibatch as an epoch has them."""
    rows = kept_rows(experience)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("placement", ALL_PLACEMENTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.usefixtures("double")
def test_one_reading_gives_the_gradient_of_two(algorithm: str, placement: str) -> None:
    components, rollout = language_models(
        algorithm,
        placement=placement,
        mixing=0.3 if placement == "mixed" else None,
        truncated="drop",
        allow_biased=True,
    )
    scores = torch.randn(12, generator=torch.Generator().manual_seed(2))
    prepare = ALGORITHMS[algorithm].prepare
    twice = prepare(components.score(rollout, scores, microbatch=5), BETA, components.settings)
    rows = shuffled(twice)
    said = components.backward_of_minibatch(select(twice, rows), microbatch=3)
    expected = gradients(components)
    scored, kept = WholeReading(components).score(rollout, scores)
    assert not scored.rollout_logprobs.requires_grad
    assert (kept.kl is not None) == (placement in DIFFERENTIATES_KL)
    once = prepare(scored, BETA, components.settings)
    again = components.backward_of_minibatch(
        select(once, rows), microbatch=WHOLE, kept=select(kept, rows)
    )
    found = gradients(components)
    assert float((found - expected).norm() / expected.norm()) < 1e-12
    assert again.ratio_error == 0
    assert said.ratio_error < 1e-12


def test_a_rollout_is_read_at_once_where_one_microbatch_takes_it() -> None:
    components, rollout = language_models("rloo")
    assert WholeReading(components).fits(rollout, (12, 12))
    assert not WholeReading(components).fits(rollout, (12, 11))
    assert not WholeReading(components).fits(rollout, (11, 12))
    several = replace(components, mesh=replace(ALONE, size=2))
    assert not WholeReading(several).fits(rollout, (12, 12))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    return save_material(folder, prompts=two_words(range(8)), heldout=two_words(range(10, 13)))


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_reads_once_and_learns_the_same(
    material: Path, tmp_path: Path, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> list[dict[str, Any]]:
        passes = {"algorithm": {"epochs": epochs, "minibatches": 1}}
        return numbers(train(small_run.settings(material, tmp_path / name, passes)))

    once = run("once")

    def never(*_: object) -> bool:
        return False

    monkeypatch.setattr("kleash.training.kept_reading.WholeReading.fits", never)
    twice = run("twice")
    # The first step reads the policy twice, and says how far the two readings are apart.
    assert [line.get("policy/ratio_first_error") is None for line in once[1:]] == [
        False,
        *[True] * 3,
    ]
    assert all(line["policy/ratio_first_error"] < 1e-5 for line in twice[1:])
    for ours, theirs in zip(once[1:], twice[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss/policy", "loss/value", "optim/grad_norm", "objective/kl_ref"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6)


def test_where_a_spot_check_is_due_the_policy_is_read_twice(material: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"logging": {"spot_check_every": 3}, "algorithm": {"minibatches": 1}}
    lines = numbers(train(small_run.settings(material, tmp_path / "run", changes)))[1:]
    read_twice = [line["policy/ratio_first_error"] is not None for line in lines]
    assert read_twice == [True, False, True, False]
