"""From a configuration to the objects a run works with: the one door configurations pass.

Everything that can be wrong with paths, models, prompts and reward models is found here, before a
run directory exists. Left out: anything that happens more than once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from kleash.algorithms.dispatch import Settings
from kleash.algorithms.grpo import GRPOSettings
from kleash.algorithms.ppo import PPOSettings
from kleash.algorithms.rloo import RLOOSettings
from kleash.config.leash import LeashConfig
from kleash.config.schema import Config, OptimizerConfig, RewardConfig
from kleash.errors import ConfigError, PromptError
from kleash.kl.control.controllers import (
    AdaptiveBeta,
    BetaController,
    BudgetBeta,
    FixedBeta,
    ScheduledBeta,
)
from kleash.kl.control.groups import OTHERS, Leash, group_of
from kleash.kl.planning.initial_beta import Start
from kleash.models.lora import AdapterSpec
from kleash.models.policy import Policy, check_compatible, freeze_copy, load_policy, load_reference
from kleash.models.reference_offload import (
    FrozenReference,
    OffloadedReference,
    open_cache,
    underlying,
)
from kleash.models.reward_model import (
    PLAIN_TEMPLATE,
    CallableReward,
    ClassifierReward,
    RewardModel,
    WeightedSum,
)
from kleash.models.value_model import ValueFunction, ValueHead, load_value_model
from kleash.models.vocabulary import require_known_ids
from kleash.rollout.prompts import Prompt, read_prompts
from kleash.rollout.scoring_pass import SamplingSpec
from kleash.scoring.tiles import Tiles, default_tiles
from kleash.storage.plan_file import Frontier
from kleash.training.pretraining_mix import PretrainingMix, read_texts
from kleash.training.process_group import WorkerGroup, is_distributed, own_gpu
from kleash.types import Rollout


@dataclass(frozen=True, eq=False)
class Components:
    """Everyone who takes part in a run, and the numbers they work by."""

    policy: Policy
    reference: FrozenReference
    """What the leash is tied to."""
    original: FrozenReference
    """What it was tied to at first; the same unless the anchor moves."""
    value: ValueFunction | None
    """The critic; None where the algorithm has none."""
    reward: WeightedSum
    gold: RewardModel | None
    """A second opinion on held-out responses; nobody is ever trained on it."""
    prompts: list[Prompt]
    heldout: list[Prompt]
    groups: Sequence[str]
    """Whose leash each of the prompts is on, by its number in the file."""
    heldout_groups: Sequence[str]
    pretraining: PretrainingMix | None
    sampling: SamplingSpec
    settings: Settings
    """The numbers of the algorithm, which also say which one it is."""
    optimizer: torch.optim.AdamW
    tiles: Tiles
    """How the update walks over the logits, and how many of them it keeps."""
    frontier: Frontier | None = None
    """What the reference's responses hold possible, where they were asked."""
    workers: WorkerGroup | None = None
    """The other processes that lend a hand; None: there are none."""

    def groups_of(self, rollout: Rollout) -> list[str]:
        """Whose leash each response to training prompts is on."""
        numbers = cast("list[int]", rollout.prompt_index.tolist())
        return [self.groups[number] for number in numbers]


def assemble(config: Config) -> Components:
    """Load and check everything a run needs.

    Raises:
        ConfigError: the device or a setting cannot be used.
        ModelError, PromptError, RewardError: what they say.
    """
    device = choose_device(config.device)
    policy = _policy(config, device)
    reference = _reference(config, policy, device)
    # Added tokens that the reference lacks have probability 0 for both.
    policy = replace(policy, words=underlying(reference).words)
    sampling = SamplingSpec(
        max_new_tokens=config.rollout.max_new_tokens, temperature=config.rollout.temperature
    )
    prompts = _prompts(config.prompts.train, policy, sampling)
    heldout = _prompts(config.prompts.heldout, policy, sampling) if config.prompts.heldout else []
    _require_every_group(prompts, config.leash, config.prompts.train)
    rewards = {
        name: (_reward(reward, device), reward.weight)
        for name, reward in config.reward_models.items()
    }
    gold = None if config.heldout.gold is None else _reward(config.heldout.gold, device)
    value = _value(config, policy, device) if config.algorithm == "ppo" else None
    optimizer = _optimizer(config.optimizer, policy, value)
    return Components(
        policy=policy,
        reference=reference,
        original=reference,
        value=value,
        reward=WeightedSum(rewards),
        gold=gold,
        prompts=prompts,
        heldout=heldout,
        groups=_groups(prompts, config.leash, config.prompts.train),
        heldout_groups=_groups(heldout, config.leash, config.prompts.heldout or ""),
        pretraining=_pretraining(config, policy),
        sampling=sampling,
        settings=_settings(config),
        optimizer=optimizer,
        tiles=replace(default_tiles(device), keep_bytes=config.ppo.keep_logits_mib << 20),
    )


def learning(components: Components) -> list[nn.Parameter]:
    """Everything that learns, in the optimiser's order."""
    return [p for group in components.optimizer.param_groups for p in group["params"]]


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
        start = Start(cast(float, leash.initial_beta), "given")
    # The configuration has checked that a target is there.
    target = cast(float, target_per_response(leash, start.response_length))
    initial = start.beta
    match leash.controller or "budget":
        case "budget":
            return BudgetBeta(target_kl=target, initial=initial, plant_gain=start.plant_gain)
        case "ziegler_paper":
            return AdaptiveBeta(target_kl=target, initial=initial, gain="paper")
        case "ziegler_code":
            horizon = leash.horizon or 10_000
            return AdaptiveBeta(target_kl=target, initial=initial, gain="code", horizon=horizon)


def _policy(config: Config, device: torch.device) -> Policy:
    lora = config.policy.lora
    adapter = (
        None
        if lora is None
        else AdapterSpec(rank=lora.rank, alpha=lora.alpha, targets=tuple(lora.targets or ()))
    )
    return load_policy(
        config.policy.path,
        dtype=config.policy.dtype,
        device=str(device),
        attention=config.policy.attention,
        adapter=adapter,
        revision=config.policy.revision,
        merge=config.policy.adapter,
    )


def _reference(config: Config, policy: Policy, device: torch.device) -> FrozenReference:
    """The reference, where the configuration wants it to live."""
    wanted = config.reference
    own = wanted.path is None
    kind = wanted.kind or ("adapter_off" if own and policy.adapter is not None else "copy")
    if kind == "adapter_off" or (kind == "copy" and own and policy.adapter is None):
        return freeze_copy(policy)
    # What the policy was loaded from, if no path is given: base and merged adapter, nothing new.
    source = config.policy if wanted.path is None else wanted
    reference = load_reference(
        cast(str, source.path),
        dtype=config.policy.dtype,
        device="cpu" if kind == "cpu_offload" else str(device),
        attention=config.policy.attention,
        revision=source.revision,
        merge=source.adapter,
    )
    reference = replace(reference, words=check_compatible(policy, reference).words)
    match kind:
        case "cpu_offload":
            return OffloadedReference(reference, device)
        case "cached":
            return open_cache(reference, cast(str, wanted.cache))
        case "copy":
            return reference


def _prompts(path: str, policy: Policy, sampling: SamplingSpec) -> list[Prompt]:
    prompts = read_prompts(
        path,
        policy.tokenizer,
        context=policy.context,
        max_new_tokens=sampling.max_new_tokens,
    )
    for prompt in prompts:
        where = f"prompt {prompt.index + 1} of {path!r}"
        require_known_ids(prompt.ids, policy.words, policy.tokenizer, where)
    return prompts


def _groups(prompts: Sequence[Prompt], leash: LeashConfig, path: str) -> list[str]:
    """Whose leash each prompt is on.

    Raises:
        PromptError: a group has no target.
    """
    leashes = leash.each()
    groups = [group_of(prompt.group, leashes) for prompt in prompts]
    without = sorted(
        {
            "without a group" if prompt.group is None else f"of {prompt.group!r}"
            for prompt, group in zip(prompts, groups, strict=True)
            if group not in leashes
        }
    )
    if without:
        raise PromptError(
            f"expected a target for every prompt in {path!r}, got none for those "
            f"{', '.join(without)}: name each group in leash.groups, or give leash.target_kl for "
            "all others"
        )
    return groups


def _require_every_group(prompts: Sequence[Prompt], leash: LeashConfig, path: str) -> None:
    """Every target is some prompt's.

    Raises:
        PromptError: one is nobody's.
    """
    leashes = leash.each()
    unused = sorted(leashes.keys() - {group_of(prompt.group, leashes) for prompt in prompts})
    if unused == [OTHERS]:
        raise PromptError(
            f"expected prompts in {path!r} for leash.target_kl, got only such as have a target in "
            "leash.groups: leave target_kl out"
        )
    if unused:
        known = sorted({prompt.group for prompt in prompts if prompt.group is not None})
        raise PromptError(
            f"expected prompts of every group of leash.groups in {path!r}, got none of {unused}: "
            f"the groups there are {known}"
        )


def _reward(config: RewardConfig, device: torch.device) -> RewardModel:
    if config.callable is not None:
        return CallableReward(config.callable)
    return ClassifierReward(
        cast(str, config.path),
        template=config.template or PLAIN_TEMPLATE,
        device=str(device),
        revision=config.revision,
    )


def _value(config: Config, policy: Policy, device: torch.device) -> ValueFunction:
    if config.value.kind == "model":
        return load_value_model(
            cast(str, config.value.path),
            policy,
            device=str(device),
            attention=config.policy.attention,
        )
    # The head's random numbers come from the run's seed, whatever was drawn while loading.
    torch.manual_seed(config.seed)
    return ValueHead(policy.hidden_size, features=config.value.kind).to(device)


def _pretraining(config: Config, policy: Policy) -> PretrainingMix | None:
    mix = config.pretraining
    if mix is None:
        return None
    return PretrainingMix(
        texts=read_texts(mix.texts, policy.tokenizer, max_tokens=mix.max_tokens),
        coefficient=mix.coefficient,
        texts_per_minibatch=mix.texts_per_minibatch,
    )


def _settings(config: Config) -> Settings:
    common: dict[str, Any] = {
        "clip_range": config.ppo.clip_range,
        "placement": config.leash.placement,
        # `mixed` begins as `reward_k1`; the loop then estimates c from each rollout.
        "mixing": 0.0 if config.leash.placement == "mixed" else None,
        "allow_biased": config.leash.allow_biased,
        "truncated": config.rollout.truncated,
        "missing_eos_penalty": config.rollout.missing_eos_penalty,
    }
    try:
        match config.algorithm:
            case "ppo":
                return PPOSettings(
                    **common,
                    gamma=config.ppo.gamma,
                    lam=config.ppo.lam,
                    value_clip_range=config.ppo.value_clip_range,
                    value_coef=config.ppo.value_coef,
                    whiten_advantages=config.ppo.whiten_advantages,
                )
            case "grpo":
                return GRPOSettings(**common)
            case "rloo":
                return RLOOSettings(**common)
    except ValueError as error:
        raise ConfigError(
            f"expected a sound `leash.placement`, or `leash.allow_biased: true`, got: {error}"
        ) from None


def _optimizer(
    config: OptimizerConfig, policy: Policy, value: ValueFunction | None
) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = [
        {"params": policy.parameters(), "lr": config.lr, "peak_lr": config.lr}
    ]
    if value is not None:
        value_lr = config.value_lr or config.lr
        critic = list(value.parameters())
        groups.append({"params": critic, "lr": value_lr, "peak_lr": value_lr})
    return torch.optim.AdamW(
        groups,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,  # one pass over the weights, and no temporaries as large as they are
    )


def learning_rate_factor(config: OptimizerConfig, *, step: int, steps: int) -> float:
    """What the peak learning rates are multiplied by in a step; a function of the step alone.

    Args:
        config: the optimiser's section.
        step: steps finished so far.
        steps: steps of the whole run.
    """
    warmup = config.warmup_steps
    # From a tenth of the peak to the peak, as InstructGPT warms up.
    rise = 1.0 if step >= warmup else 0.1 + 0.9 * step / warmup
    fall = 1.0 if config.schedule == "constant" else max(0.0, 1 - step / steps)
    return rise * fall
