"""Gradients of one minibatch whose rows are divided among processes, for a test to compare."""

from dataclasses import replace
from typing import Any, cast

import tiny_models
import torch
from oracles import TabularModel, gradient_models, scored_rollout
from transformers import AutoModelForCausalLM

import kleash.training.components
from kleash.algorithms.ppo import PPOSettings, prepare
from kleash.algorithms.rloo import RLOOSettings
from kleash.algorithms.rloo import prepare as prepare_rloo
from kleash.mesh import Mesh
from kleash.models.batching import TokenBudget
from kleash.models.policy import Policy
from kleash.models.reward_model import NoReward
from kleash.models.sharded_loading import start
from kleash.models.sharding import Sharding, blueprint, device_mesh, materialise, shard, whole
from kleash.rollout.sampling import SamplingSpec
from kleash.rollout.scoring_pass import score
from kleash.scoring.tiles import default_tiles
from kleash.training.components import Components
from kleash.types import Experience, Rollout

PLACEMENTS = ("reward_k1", "exact", "exact_weighted", "mixed")
"""Whose expected gradient is that of the objective."""
BETA = 0.3


class TableOfValues(torch.nn.Module):
    """A value for each state of a tabular model."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(torch.cat([values, values.new_zeros(1)]))

    def state_values(self, *part: torch.Tensor) -> torch.Tensor:
        return part[-1] @ self.values


def unevenly(rollout: Rollout, size: int) -> list[torch.Tensor]:
    """Most rows to the first process, few to the second, none to the others."""
    rows = torch.arange(len(rollout.response_ids)).flip(0)
    if size == 1:
        return [rows]
    few = len(rows) // 5
    return [rows[few:], rows[:few], *(rows[:0] for _ in range(size - 2))]


def tabular_gradient(placement: str, mesh: Mesh) -> torch.Tensor:
    """Of PPO's expected loss over all strings of a world, in a table of logits."""
    models = gradient_models()
    world = models.world
    policy, reference = (TabularModel(world, t) for t in (models.policy, models.reference))
    baseline = world.random_logits(6)[:, 0]
    settings = PPOSettings(
        whiten_advantages=False,
        value_clip_range=None,
        lam=1.0,
        placement=cast(Any, placement),
        mixing=0.3 if placement == "mixed" else None,
    )
    scored = scored_rollout(
        world,
        world.rollout,
        policy=models.policy,
        reference=models.reference,
        scores=world.random_scores(5),
        values=baseline,
    )
    batch = prepare(scored, BETA, settings)
    # The loss is linear in advantages and weights: probabilities on them make it an expectation.
    p = world.probabilities(models.policy)[:, None]
    pathwise = None if batch.pathwise is None else batch.pathwise * p
    batch = replace(batch, advantages=batch.advantages * p, pathwise=pathwise)
    value = TableOfValues(baseline)
    components = components_of(cast(Any, policy), reference, value, settings, mesh)
    components.backward_of_minibatch(batch, microbatch=7)
    components.add_gradients()
    # A loss is divided by the tokens of its minibatch, and an expectation is not.
    return cast(torch.Tensor, policy.logits.grad) * int(batch.mask.sum())


def tabular(mesh: Mesh) -> dict[str, Any]:
    """`tabular_gradient` of every placement, as lists."""
    torch.set_default_dtype(torch.float64)
    kleash.training.components.balanced_rows = unevenly
    return {name: tabular_gradient(name, mesh).tolist() for name in PLACEMENTS}


def language_model(mesh: Mesh) -> list[float]:
    """Gradients of a language model with an exact KL in the loss; of several processes divided."""
    torch.set_default_dtype(torch.float64)
    kleash.training.components.balanced_rows = unevenly
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    model, other = (
        AutoModelForCausalLM.from_config(tiny_models.config("llama", 20, **small)).double().eval()
        for _ in range(2)
    )
    reference = Policy(other, cast(Any, None), "", words=20, stop_ids=())
    policy = Policy(model, cast(Any, None), "", words=20, stop_ids=())
    batch, settings = _experience(policy, reference)
    if mesh.size > 1:
        device = torch.device("cpu")
        sharding = Sharding(device_mesh(device, mesh.size), device)
        structure = blueprint(model)
        shard(model, sharding.mesh)
        materialise(model, device)
        start(model, device)
        policy = replace(policy, sharding=sharding, structure=structure)
    components = components_of(policy, reference, None, settings, mesh)
    # Of rows of 5 to 9 tokens: one microbatch alone, several and unequally many when divided.
    limit = len(batch.mask) if mesh.size == 1 else TokenBudget(20)
    components.backward_of_minibatch(batch, microbatch=limit)
    components.add_gradients()
    gradients = [whole(cast(torch.Tensor, p.grad)).flatten() for p in components.parameters()]
    return torch.cat(gradients).tolist()


def _experience(policy: Policy, reference: Policy) -> tuple[Experience, RLOOSettings]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 20, (12, 9), generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (12, 1), generator=generator)
    rollout = Rollout(
        prompt_ids=ids[:, :4],
        prompt_mask=torch.ones(12, 4, dtype=torch.bool),
        response_ids=ids[:, 4:],
        response_mask=mask,
        ended=mask[:, -1],
        prompt_index=torch.arange(12) // 2,
    )
    scores = torch.randn(12, generator=generator)
    scored = score(rollout, policy=policy, reference=reference, scores=scores)
    settings = RLOOSettings(placement="exact")
    return prepare_rloo(scored, BETA, settings), settings


def components_of(
    policy: Policy, reference: Any, value: Any, settings: PPOSettings | RLOOSettings, mesh: Mesh
) -> Components:
    if not isinstance(policy, Policy):
        policy.__dict__["sharding"] = None
    parameters = [*policy.parameters(), *([] if value is None else value.parameters())]
    return Components(
        policy=policy,
        reference=reference,
        original=reference,
        value=value,
        reward=NoReward(),
        gold=None,
        prompts=[],
        heldout=[],
        groups=[],
        heldout_groups=[],
        pretraining=None,
        sampling=SamplingSpec(),
        settings=settings,
        optimizer=torch.optim.SGD(parameters, lr=1.0),
        tiles=default_tiles(torch.device("cpu")),
        mesh=mesh,
    )
