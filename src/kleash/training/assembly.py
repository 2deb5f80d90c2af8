"""From a configuration to the objects a run works with.

Everything that can be wrong with paths, models, prompts and reward models is found here, before a
run directory exists.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch

from kleash.algorithms.dispatch import Settings
from kleash.algorithms.grpo import GRPOSettings
from kleash.algorithms.ppo import PPOSettings
from kleash.algorithms.rloo import RLOOSettings
from kleash.config.algorithm import (
    DistillConfig,
    GRPOConfig,
    PPOConfig,
    RLOOConfig,
    ValueConfig,
)
from kleash.config.leash import LeashConfig
from kleash.config.rollout import RolloutConfig
from kleash.config.schema import (
    Config,
    OptimizerConfig,
    PolicyConfig,
    PretrainingConfig,
    RewardConfig,
    ScorerConfig,
)
from kleash.errors import ConfigError
from kleash.kl.control.controllers import (
    AdaptiveBeta,
    BetaController,
    BudgetBeta,
    FixedBeta,
    ScheduledBeta,
)
from kleash.kl.control.groups import Leash
from kleash.kl.planning.initial_beta import Start
from kleash.mesh import Mesh
from kleash.models.async_calls import CallLimits
from kleash.models.callable_reward import CallableReward, as_reward_model
from kleash.models.policy import (
    Policy,
)
from kleash.models.recomputation import enable_recomputation
from kleash.models.reward_model import (
    ClassifierReward,
    NoReward,
    RewardModel,
    WeightedSum,
)
from kleash.models.sharding import Sharding, device_mesh, shard
from kleash.models.value_model import ValueFunction, ValueHead, load_value_model
from kleash.rollout.scoring_pass import SamplingSpec
from kleash.scoring.tiles import default_tiles
from kleash.training.components import Components
from kleash.training.engines import open_engine
from kleash.training.model_assembly import choose_device, load_models
from kleash.training.optimizers import make_optimizer
from kleash.training.pretraining_mix import PretrainingMix, read_texts
from kleash.training.prompt_assembly import (
    groups_of_prompts,
    prompt_sets,
    require_every_group,
)
from kleash.training.teacher import distill_settings

Reward = Callable[..., Any] | RewardModel
"""A reward given in memory: a function, an object, an async function, or a reward model."""


def assemble(
    config: Config,
    given: Mapping[str, Reward] | None = None,
    rows: Mapping[str, Sequence[object]] | None = None,
    *,
    mesh: Mesh | None = None,
) -> Components:
    """Load and check everything a run needs.

    Args:
        config: the run.
        given: rewards in memory, which take the place of what `reward_models` names.
        rows: prompts in memory, `train` and `heldout`, which take the place of the files.
        mesh: the processes of the run; by default this one alone.

    Raises:
        ConfigError: the device or a setting cannot be used.
        ModelError, PromptError, RewardError: what they say.
    """
    mesh = Mesh() if mesh is None else mesh
    _require_fitting(
        mesh.size,
        config.distributed.strategy,
        policy=config.policy,
        colocated=config.rollout.engine != "hf" and config.rollout.vllm.url is None,
        ahead=config.rollout.ahead == 1,
        responses=config.responses_per_step,
    )
    device = choose_device(config.device)
    divided = config.distributed.strategy == "fsdp" and mesh.size > 1
    sharding = None
    if divided:
        sharding = Sharding(device_mesh(device, mesh.size), device, config.policy.precision)
    policy, reference, teacher = load_models(
        config.policy,
        config.reference,
        device,
        teacher_section=config.teacher,
        sharding=sharding,
        mesh=mesh,
    )
    sampling = SamplingSpec(
        max_new_tokens=config.rollout.max_new_tokens, temperature=config.rollout.temperature
    )
    prompts, heldout = prompt_sets(config.prompts, rows or {}, policy, sampling)
    require_every_group(prompts, config.leash, config.prompts.train)
    rewards = _rewards(config.reward_models, given or {}, device)
    gold = None if config.heldout.gold is None else _reward(config.heldout.gold, device)
    critic = config.algorithm.value if isinstance(config.algorithm, PPOConfig) else None
    value = _value(critic, policy, start=config.policy, seed=config.seed, sharding=sharding)
    optimizer = _optimizer(config.optimizer, critic, policy, value)
    engine = open_engine(config.rollout, policy, [*prompts, *heldout], mesh=mesh)
    return Components(
        policy=policy,
        reference=reference,
        original=reference,
        value=value,
        reward=WeightedSum(rewards) if rewards else NoReward(),
        gold=gold,
        prompts=prompts,
        heldout=heldout,
        groups=groups_of_prompts(prompts, config.leash, config.prompts.train),
        heldout_groups=groups_of_prompts(heldout, config.leash, config.prompts.heldout or ""),
        pretraining=_pretraining(config.pretraining, policy),
        sampling=sampling,
        settings=settings_of(config.algorithm, config.leash, config.rollout),
        optimizer=optimizer,
        tiles=replace(default_tiles(device), keep_bytes=config.algorithm.keep_logits_mib << 20),
        engine=engine,
        teacher=teacher,
        mesh=mesh,
    )


def _require_fitting(
    size: int,
    strategy: Literal["auto", "none", "ddp", "fsdp"],
    *,
    policy: PolicyConfig,
    colocated: bool,
    ahead: bool,
    responses: int,
) -> None:
    """Every process has something to do, and a way to do it.

    Raises:
        ConfigError: there are several for a strategy of one, or more than responses of a step.
    """
    if size > 1 and strategy == "none":
        raise ConfigError(
            f"expected one process with `distributed.strategy: none`, got {size}: take ddp or "
            "fsdp, or start without a launcher"
        )
    if size > 1 and colocated:
        raise ConfigError(
            f"expected a server of its own with several processes, got rollout.engine: vllm in the "
            f"process of the trainer with {size} of them: start one with `kleash serve-rollouts` "
            "and give its address as rollout.vllm.url, or take rollout.engine: hf"
        )
    if size > 1 and ahead:
        raise ConfigError(
            f"expected one process with rollout.ahead: 1, got {size}: start one, or set "
            "rollout.ahead: 0"
        )
    both = policy.adapter is not None and policy.lora is not None
    if size > 1 and strategy == "fsdp" and both:
        raise ConfigError(
            "expected `policy.adapter` or `policy.lora` with `distributed.strategy: fsdp`, got "
            "both, whose checkpoints are whole models: merge the adapter into a model of its own "
            "first, or take ddp"
        )
    if size > responses:
        raise ConfigError(
            f"expected at most as many processes as the {responses} responses of a "
            f"step, got {size}: start fewer, or raise rollout.prompts_per_step"
        )


def target_per_response(leash: LeashConfig, response_length: float | None) -> float | None:
    """The budget in nats per response; None where there is none.

    A target per token is that of a response as long as the reference's.
    """
    if leash.target_kl_per_token is None:
        return leash.target_kl
    assert response_length is not None
    return leash.target_kl_per_token * response_length


def make_leash(
    leash: LeashConfig, *, starts: Mapping[str, Start], responses_per_step: int
) -> Leash:
    """A controller for each group that has a target, or the one for all; see `make_controller`."""
    return Leash(
        {
            name: make_controller(
                own, start=starts.get(name), responses_per_step=responses_per_step
            )
            for name, own in leash.each().items()
        }
    )


def make_controller(
    leash: LeashConfig, *, start: Start | None, responses_per_step: int
) -> BetaController:
    """The controller a leash asks for.

    Args:
        leash: its section of the configuration.
        start: where β starts if the section names no place; needed where β moves.
        responses_per_step: what a schedule counts a step as.
    """
    if leash.beta is not None:
        return FixedBeta(leash.beta)
    if leash.schedule is not None:
        points = [(step * responses_per_step, beta) for step, beta in leash.schedule]
        return ScheduledBeta(tuple(points))
    if start is None:
        # Who passes no start has a number here.
        start = Start(cast(float, leash.initial_beta), "given")
    # The configuration has checked that a target is there.
    target = cast(float, target_per_response(leash, start.response_length))
    initial = start.beta
    match leash.controller:
        case "budget":
            return BudgetBeta(target_kl=target, initial=initial, plant_gain=start.plant_gain)
        case "ziegler_paper":
            return AdaptiveBeta(target_kl=target, initial=initial, gain="paper")
        case "ziegler_code":
            return AdaptiveBeta(
                target_kl=target, initial=initial, gain="code", horizon=leash.horizon
            )


def _rewards(
    sections: Mapping[str, RewardConfig], given: Mapping[str, Reward], device: torch.device
) -> dict[str, tuple[RewardModel, float]]:
    """Each reward model with its weight; one given in memory goes before what its section names."""
    return {
        name: (
            as_reward_model(given[name]) if name in given else _reward(section, device),
            section.weight,
        )
        for name, section in sections.items()
    }


def _reward(scorer: ScorerConfig, device: torch.device) -> RewardModel:
    if scorer.callable is not None:
        limits = CallLimits(scorer.concurrency, scorer.timeout_s, scorer.retries)
        return CallableReward(scorer.callable, limits)
    return ClassifierReward(
        cast(str, scorer.path),
        template=scorer.template,
        dtype=scorer.dtype,
        device=str(device),
        batch_size=scorer.microbatch_size,
        revision=scorer.revision,
        adapter=scorer.adapter,
        chat_template=scorer.chat_template,
    )


def _value(
    critic: ValueConfig | None,
    policy: Policy,
    *,
    start: PolicyConfig,
    seed: int,
    sharding: Sharding | None,
) -> ValueFunction | None:
    if critic is None:
        return None
    device = policy.device
    if critic.kind == "model":
        value = load_value_model(
            cast(str, critic.path),
            policy,
            precision=start.precision,
            device=str(device),
            attention=start.attention,
        )
        if start.gradient_checkpointing:
            enable_recomputation(value.trunk)
        if sharding is not None:
            shard(value, sharding.mesh, precision=sharding.precision)
        return value
    # The head's random numbers come from the run's seed, whatever was drawn while loading.
    torch.manual_seed(seed)
    return ValueHead(policy.hidden_size, features=critic.kind).to(device)


def _pretraining(mix: PretrainingConfig | None, policy: Policy) -> PretrainingMix | None:
    if mix is None:
        return None
    return PretrainingMix(
        texts=read_texts(mix.texts, policy.tokenizer, max_tokens=mix.max_tokens),
        coefficient=mix.coefficient,
        texts_per_minibatch=mix.texts_per_minibatch,
    )


def settings_of(
    algorithm: PPOConfig | GRPOConfig | RLOOConfig | DistillConfig,
    leash: LeashConfig,
    rollout: RolloutConfig,
) -> Settings:
    """The numbers of the algorithm that a configuration asks for."""
    if isinstance(algorithm, DistillConfig):
        return distill_settings(algorithm, leash, rollout)
    common: dict[str, Any] = {
        "clip_range": algorithm.clip_range,
        "placement": leash.placement,
        # `mixed` begins as `reward_k1`; the loop then estimates c from each rollout.
        "mixing": 0.0 if leash.placement == "mixed" else None,
        "allow_biased": leash.allow_biased,
        "truncated": rollout.truncated,
        "missing_eos_penalty": rollout.missing_eos_penalty,
        "correction": rollout.correction,
        "correction_clip": None if rollout.correction == "none" else rollout.correction_clip,
    }
    match algorithm:
        case PPOConfig():
            return PPOSettings(
                **common,
                gamma=algorithm.gamma,
                lam=algorithm.lam,
                value_clip_range=algorithm.value_clip_range,
                value_coef=algorithm.value_coef,
                whiten_advantages=algorithm.whiten_advantages,
            )
        case GRPOConfig():
            return GRPOSettings(**common, epsilon=algorithm.epsilon)
        case RLOOConfig():
            return RLOOSettings(**common)


def _optimizer(
    settings: OptimizerConfig,
    critic: ValueConfig | None,
    policy: Policy,
    value: ValueFunction | None,
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": policy.parameters(), "lr": settings.lr, "peak_lr": settings.lr}
    ]
    if critic is not None and value is not None:
        value_lr = cast(float, critic.lr)
        groups.append({"params": list(value.parameters()), "lr": value_lr, "peak_lr": value_lr})
    return make_optimizer(
        groups,
        name=settings.name,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        rounding=settings.rounding,
    )


def learning_rate_factor(settings: OptimizerConfig, *, step: int, steps: int) -> float:
    """What the peak learning rates are multiplied by in a step; a function of the step alone.

    Args:
        settings: the optimiser's section.
        step: steps finished so far.
        steps: steps of the whole run.
    """
    warmup = settings.warmup_steps
    # From a tenth of the peak to the peak, as InstructGPT warms up.
    rise = 1.0 if step >= warmup else 0.1 + 0.9 * step / warmup
    fall = 1.0 if settings.schedule == "constant" else max(0.0, 1 - step / steps)
    return rise * fall
