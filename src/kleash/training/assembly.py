"""From a configuration to the objects a run works with.

Everything that can be wrong with paths, models, prompts and reward models is found here, before a
run directory exists.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

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
    TeacherConfig,
    ValueConfig,
)
from kleash.config.leash import LeashConfig, ReferenceConfig
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
from kleash.mesh import Mesh, is_distributed, own_gpu
from kleash.models.async_calls import CallLimits
from kleash.models.callable_reward import CallableReward, as_reward_model
from kleash.models.frozen_weights import shrink_frozen
from kleash.models.lora import AdapterSpec
from kleash.models.policy import (
    Policy,
    Reference,
    check_compatible,
    freeze_copy,
    load_policy,
    load_reference,
)
from kleash.models.precision import weights_dtype
from kleash.models.recomputation import enable_recomputation
from kleash.models.reference_offload import (
    FrozenReference,
    OffloadedReference,
    open_cache,
    underlying,
)
from kleash.models.reward_model import (
    ClassifierReward,
    NoReward,
    RewardModel,
    WeightedSum,
)
from kleash.models.sharding import Sharding, device_mesh, is_sharded, shard
from kleash.models.trunk import trunk_of
from kleash.models.value_model import ValueFunction, ValueHead, ValueModel, load_value_model
from kleash.rollout.scoring_pass import SamplingSpec
from kleash.scoring.tiles import default_tiles
from kleash.training.components import Components
from kleash.training.engines import open_engine
from kleash.training.optimizers import make_optimizer
from kleash.training.pretraining_mix import PretrainingMix, read_texts
from kleash.training.prompt_assembly import (
    groups_of_prompts,
    prompts_of,
    require_every_group,
    source_of,
)
from kleash.training.teacher import distill_settings, load_teacher

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
    _require_fitting(config, mesh)
    device = choose_device(config.device)
    sharding = None
    if config.distributed.strategy == "fsdp" and mesh.size > 1:
        sharding = Sharding(device_mesh(device, mesh.size), device)
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
    named = config.prompts.chat_template
    train = source_of(config.prompts.train, "train", rows or {})
    held = source_of(config.prompts.heldout, "heldout", rows or {})
    prompts = prompts_of(train or [], policy, sampling, named)
    heldout = prompts_of(held, policy, sampling, named) if held else []
    require_every_group(prompts, config.leash, config.prompts.train)
    rewards = _rewards(config.reward_models, given or {}, device)
    gold = None if config.heldout.gold is None else _reward(config.heldout.gold, device)
    critic = config.algorithm.value if isinstance(config.algorithm, PPOConfig) else None
    value = None
    if critic is not None:
        value = _value(critic, policy, device, start=config.policy, seed=config.seed)
        if sharding is not None and isinstance(value, ValueModel):
            shard(value, sharding.mesh, precision=sharding.precision)
    optimizer = _optimizer(config.optimizer, critic, policy, value)
    engine = open_engine(config.rollout, policy, [*prompts, *heldout])
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


def load_models(
    policy_section: PolicyConfig,
    reference_section: ReferenceConfig,
    device: torch.device,
    *,
    teacher_section: TeacherConfig | None = None,
    sharding: Sharding | None = None,
    mesh: Mesh | None = None,
) -> tuple[Policy, FrozenReference, Reference | None]:
    """The policy of a run at its start, its reference, and its teacher if that is another model.

    Tokens that one of them lacks have probability 0 for all.

    Raises:
        ModelError: they cannot be used, or not together.
    """
    policy = _policy(policy_section, device, sharding)
    teacher = load_teacher(teacher_section, policy_section, policy, device)
    if teacher is not None:
        policy = replace(policy, words=teacher.words)
    mesh = Mesh() if mesh is None else mesh
    reference = _reference(reference_section, policy_section, policy, device, mesh)
    policy = replace(policy, words=underlying(reference).words)
    if teacher is not None:
        teacher = replace(teacher, words=policy.words)
    return policy, reference, teacher


def _require_fitting(config: Config, mesh: Mesh) -> None:
    """Every process has something to do, and a way to do it.

    Raises:
        ConfigError: there are several for a strategy of one, or more than responses of a step.
    """
    if mesh.size > 1 and config.distributed.strategy == "none":
        raise ConfigError(
            f"expected one process with `distributed.strategy: none`, got {mesh.size}: take ddp or "
            "fsdp, or start without a launcher"
        )
    if mesh.size > 1 and config.rollout.engine != "hf":
        raise ConfigError(
            f"expected `rollout.engine: hf` with several processes, got "
            f"{config.rollout.engine!r} with {mesh.size}: an engine that writes by itself serves "
            "one process; start one, or leave the engine out"
        )
    both = config.policy.adapter is not None and config.policy.lora is not None
    if mesh.size > 1 and config.distributed.strategy == "fsdp" and both:
        raise ConfigError(
            "expected `policy.adapter` or `policy.lora` with `distributed.strategy: fsdp`, got "
            "both, whose checkpoints are whole models: merge the adapter into a model of its own "
            "first, or take ddp"
        )
    if mesh.size > 1 and isinstance(config.algorithm, DistillConfig):
        raise ConfigError("`algorithm: distill` does not go with several processes: run one")
    if mesh.size > config.responses_per_step:
        raise ConfigError(
            f"expected at most as many processes as the {config.responses_per_step} responses of a "
            f"step, got {mesh.size}: start fewer, or raise rollout.prompts_per_step"
        )


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one (of several processes each its own), else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{own_gpu()}" if is_distributed() else "cuda"
    elif is_distributed() and name != "cpu":
        raise ConfigError(f"with several processes each takes a GPU of its own, got {name!r}: auto")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"expected a device this machine has, got {name!r}: {reason}") from None
    return device


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


def _policy(section: PolicyConfig, device: torch.device, sharding: Sharding | None) -> Policy:
    lora = section.lora
    adapter = None
    if lora is not None:
        targets = () if lora.targets == "auto" else tuple(lora.targets)
        adapter = AdapterSpec(
            rank=lora.rank,
            alpha=lora.alpha,
            targets=targets,
            modules_to_save=tuple(lora.modules_to_save),
        )
    policy = load_policy(
        section.path,
        dtype=weights_dtype(section.precision, frozen=section.base_is_frozen),
        device=str(device),
        attention=section.attention,
        adapter=adapter,
        revision=section.revision,
        merge=section.adapter,
        sharding=sharding,
    )
    if section.gradient_checkpointing:
        enable_recomputation(trunk_of(policy.model))
    return replace(policy, precision=section.precision)


def _reference(
    wanted: ReferenceConfig, start: PolicyConfig, policy: Policy, device: torch.device, mesh: Mesh
) -> FrozenReference:
    """The reference, where the configuration wants it to live."""
    own = wanted.path is None
    kind = wanted.kind
    if kind == "adapter_off" or (kind == "copy" and own and policy.adapter is None):
        return freeze_copy(policy)
    # What the policy was loaded from, if no path is given: base and merged adapter, nothing new.
    source = start if wanted.path is None else wanted
    reference = load_reference(
        cast(str, source.path),
        dtype=weights_dtype(start.precision, frozen=start.base_is_frozen),
        device="cpu" if kind == "cpu_offload" else str(device),
        attention=start.attention,
        revision=source.revision,
        merge=source.adapter,
        sharding=None if kind == "cpu_offload" else policy.sharding,
    )
    if not is_sharded(reference.model):
        shrink_frozen(reference.model, start.precision)
    words = check_compatible(policy, reference).words
    reference = replace(reference, words=words, precision=start.precision)
    match kind:
        case "cpu_offload":
            return OffloadedReference(reference, device)
        case "cached":
            opened = mesh.first(lambda: open_cache(reference, cast(str, wanted.cache)))
            return opened if mesh.size == 1 else opened.of_process(mesh.rank, mesh.size)
        case "copy":
            return reference
        case "auto":
            raise AssertionError("a Config says what `reference.kind: auto` stands for")


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
        device=str(device),
        revision=scorer.revision,
        adapter=scorer.adapter,
        chat_template=scorer.chat_template,
    )


def _value(
    critic: ValueConfig, policy: Policy, device: torch.device, *, start: PolicyConfig, seed: int
) -> ValueFunction:
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
