"""One reading for scoring and the first update: the gradient of two, and when there are two."""

from collections.abc import Generator
from contextlib import contextmanager
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

from kleash.algorithms import dispatch, grpo, ppo, rloo
from kleash.algorithms.common import select, trained_rows
from kleash.config.algorithm import RLOOConfig
from kleash.config.schema import Config, OptimizerConfig
from kleash.kl.placements import DIFFERENTIATES_KL
from kleash.mesh import ALONE
from kleash.models.batching import Limit, TokenBudget
from kleash.models.policy import Policy, Reference
from kleash.models.value_model import ValueHead
from kleash.rollout import scoring_pass
from kleash.training.components import Components
from kleash.training.kept_reading import SharedReading
from kleash.training.loop import train
from kleash.training.optimization import PolicyUpdater, epoch_order
from kleash.types import Rollout

ALGORITHMS = ("ppo", "grpo", "rloo")
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
    everything = torch.arange(len(world.rollout.response_mask))
    scored, kept = scoring_pass.score_and_keep(
        world.rollout, everything, policy=policy, reference=reference, scores=scores, value=value
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


def drawn_order(components: Components, rollout: Rollout) -> torch.Tensor:
    torch.manual_seed(3)
    return epoch_order(trained_rows(rollout, components.settings.truncated))


SPLITS: dict[str, tuple[int, Limit, Limit, int]] = {
    "the whole rollout": (1, 12, 12, 8),
    "a minibatch of several": (2, 12, 12, 4),
    "a microbatch of several": (2, 5, 3, 3),
    "a budget of tokens": (2, TokenBudget(40), TokenBudget(22), 2),
}
"""Minibatches, microbatches in scoring and in the update, and the rows that are kept of 8."""


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
    # Some rows of a minibatch are kept, and the others are read a second time.
    split = SPLITS["a microbatch of several"]
    assert difference_of(components, rollout, *split) < 1e-12


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_in_float32_the_gradient_differs_by_rounding(algorithm: str) -> None:
    components, rollout = language_models(algorithm, truncated="drop", placement="exact")
    components.policy.model.float()
    cast(Any, components.reference).model.float()
    for name, split in SPLITS.items():
        assert difference_of(components, rollout, *split) < 1e-6, name


def difference_of(
    components: Components,
    rollout: Rollout,
    minibatches: int,
    scoring: Limit,
    updating: Limit,
    shared: int,
) -> float:
    """‖one reading − two readings‖ / ‖two readings‖ of the first update's gradient."""
    scores = torch.randn(12, generator=torch.Generator().manual_seed(2)).double()
    prepare = dispatch.algorithm_of(components.settings).prepare
    twice = prepare(components.score(rollout, scores, microbatch=5), BETA, components.settings)
    order = drawn_order(components, rollout)
    minibatch = order.chunk(minibatches)[0]
    said = components.backward_of_minibatch(select(twice, minibatch), microbatch=3)
    expected = gradients(components)

    reading = SharedReading(components, minibatches, scoring, updating)
    rows = reading.rows(rollout, order)
    assert rows is not None
    assert len(rows) == shared
    scored, kept = reading.score(rollout, scores, rows)
    assert not any(t.requires_grad for t in vars(scored).values() if isinstance(t, torch.Tensor))
    differentiates = components.settings.placement in DIFFERENTIATES_KL
    assert (kept.kl is not None) == differentiates
    for name in ("rollout_logprobs", "ref_logprobs", "kl", "entropy"):
        torch.testing.assert_close(getattr(scored, name), getattr(twice.scored, name))
    once = select(prepare(scored, BETA, components.settings), minibatch)
    # The rows that are left over are read a second time.
    with counted_rows(components) as read:
        again = components.backward_of_minibatch(once, microbatch=updating, kept=kept)
    assert sum(read) == len(minibatch) - shared
    found = gradients(components)
    if shared == len(minibatch):
        assert again.ratio_error == 0
    assert max(again.ratio_error, said.ratio_error) < 1e-5
    return float((found - expected).norm() / expected.norm())


@contextmanager
def counted_rows(components: Components) -> Generator[list[int]]:
    """How many rows the policy reads each time."""
    read: list[int] = []
    trunk = cast(nn.Module, components.policy.model.get_decoder())

    def count(_: nn.Module, given: Any, named: dict[str, Any]) -> None:
        read.append(len(given[0] if given else next(iter(named.values()))))

    handle = trunk.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield read
    finally:
        handle.remove()


def test_what_cannot_be_kept() -> None:
    components, rollout = language_models("rloo")
    order = drawn_order(components, rollout)
    rows = SharedReading(components, 1, 12, 12).rows(rollout, order)
    assert rows is not None
    assert sorted(rows.tolist()) == list(range(12))
    # Scoring would read more at once than it may.
    assert SharedReading(components, 1, 11, 12).rows(rollout, order) is None
    assert SharedReading(components, 2, 5, 12).rows(rollout, order) is None
    assert SharedReading(components, 2, 6, 12).rows(rollout, order) is not None
    several = replace(components, mesh=replace(ALONE, size=2))
    assert SharedReading(several, 1, 12, 12).rows(rollout, order) is None


def test_an_update_refuses_an_order_of_other_rows() -> None:
    components, rollout = language_models("rloo", truncated="drop")
    scored = components.score(rollout, torch.zeros(12), microbatch=12)
    experience = dispatch.algorithm_of(components.settings).prepare(
        scored, BETA, components.settings
    )
    config = Config.model_construct(
        algorithm=RLOOConfig(minibatches=1), steps=1, optimizer=OptimizerConfig()
    )
    components.optimizer.param_groups[0]["peak_lr"] = 1.0
    with pytest.raises(ValueError, match="expected an order of the rows"):
        PolicyUpdater(components, config).update(experience, done=0, order=torch.arange(12))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    return save_material(folder, prompts=two_words(range(8)), heldout=two_words(range(10, 13)))


@pytest.mark.parametrize(
    ("epochs", "minibatches", "microbatch"), [(1, 1, 64), (2, 2, 64), (1, 2, 3)]
)
def test_a_run_reads_once_and_learns_the_same(
    material: Path,
    tmp_path: Path,
    epochs: int,
    minibatches: int,
    microbatch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(name: str) -> list[dict[str, Any]]:
        passes = {"epochs": epochs, "minibatches": minibatches, "microbatch_size": microbatch}
        return numbers(train(small_run.settings(material, tmp_path / name, {"algorithm": passes})))

    once = run("once")

    def never(*_: object) -> None:
        return None

    monkeypatch.setattr("kleash.training.kept_reading.SharedReading.rows", never)
    twice = run("twice")
    # The first step reads the policy twice, and says how far the two readings are apart; later
    # ones where a minibatch has rows beside those that were kept.
    whole = microbatch == 64
    assert [line.get("policy/ratio_first_error") is None for line in once[1:]] == [
        False,
        *[whole] * 3,
    ]
    assert all(line["policy/ratio_first_error"] < 1e-5 for line in twice[1:])
    for ours, theirs in zip(once[1:], twice[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss/policy", "loss/value", "optim/grad_norm", "objective/kl_ref"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6)


def test_where_a_spot_check_is_due_the_policy_is_read_twice(material: Path, tmp_path: Path) -> None:
    lines = numbers(
        train(small_run.settings(material, tmp_path / "run", {"logging": {"spot_check_every": 3}}))
    )[1:]
    read_twice = [line["policy/ratio_first_error"] is not None for line in lines]
    assert read_twice == [True, False, True, False]
