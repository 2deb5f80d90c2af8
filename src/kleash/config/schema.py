"""One run, written down: the sections of a configuration, their defaults, and how they are read.

A configuration is YAML, or dotted overrides on the command line, or both; the overrides win.
Every field has its sentence underneath. Unknown keys are errors that name the nearest key.
Configurations stop at the door: `train` and `assembly` take them apart into tensors and numbers.
"""

from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kleash.config.leash import (
    LeashConfig,
    PlanConfig,
    ReferenceConfig,
    Section,
    TripwiresConfig,
)

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]


class LoraConfig(Section):
    """Train a low-rank adapter; the reference is then the same weights with the adapter off."""

    rank: PositiveInt = 16
    """Rank of the adapter."""
    alpha: PositiveInt = 32
    """Scale of the adapter; its output is multiplied by alpha / rank."""
    targets: list[str] | None = None
    """Names of the modules to adapt; none: what peft chooses for this architecture."""
    modules_to_save: list[str] | None = None
    """Names of modules to train whole beside the adapter, such as `lm_head` or `embed_tokens`."""


class PolicyConfig(Section):
    """The model that is trained."""

    path: str
    """Directory of a Hugging Face causal language model, or its hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; none: its main branch."""
    adapter: str | None = None
    """Directory of a trained LoRA adapter that is merged into the weights first. Where supervised
    training left an adapter: policy and reference both begin as base + adapter."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    attention: Attention = "auto"
    """Attention kernel, `auto` for the model's own choice; policy and reference use the same."""
    lora: LoraConfig | None = None
    """Train an adapter instead of all weights."""


class RewardConfig(Section):
    """One reward model: a sequence classifier by its path, or a Python callable."""

    path: str | None = None
    """Directory or hub name of a sequence classifier with one output."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; none: its main branch."""
    callable: str | None = None
    """`module:function`; called with lists of prompts and responses, returns a score for each."""
    weight: float = 1.0
    """Weight in the sum of reward models."""
    template: str | None = None
    """How a classifier reads a prompt and its response; none: `{prompt}{response}`."""

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardConfig":
        if (self.path is None) == (self.callable is None):
            raise ValueError("give exactly one of `path` and `callable`")
        if self.callable is not None and (self.template or self.revision):
            raise ValueError(
                "`template` and `revision` are for a classifier and do nothing for a callable"
            )
        return self


class PromptsConfig(Section):
    """What the policy answers."""

    train: str
    """JSONL or Parquet file with `prompt` text or chat `messages`."""
    heldout: str | None = None
    """Prompts never trained on, for evaluation."""


class RolloutConfig(Section):
    """How the policy writes."""

    prompts_per_step: PositiveInt = 64
    """Prompts of one step."""
    responses_per_prompt: PositiveInt = 1
    """Responses to each prompt; standard errors are clustered by prompt."""
    max_new_tokens: PositiveInt = 64
    """Length limit of a response."""
    temperature: PositiveFloat = 1.0
    """Divides the logits in sampling and in both scorings alike."""
    truncated: Literal["score", "penalise", "drop", "bootstrap"] = "score"
    """A response cut by the limit: score it as it stands, subtract a penalty, leave it out of the
    update, or continue it with the value of its last state."""
    missing_eos_penalty: PositiveFloat | None = None
    """Subtracted from the score of a truncated response when `truncated: penalise`."""
    microbatch_size: PositiveInt = 64
    """Responses scored at once; changes memory and speed, not results."""

    @model_validator(mode="after")
    def _penalty_belongs(self) -> "RolloutConfig":
        if (self.truncated == "penalise") != (self.missing_eos_penalty is not None):
            raise ValueError(
                "`missing_eos_penalty` goes with `truncated: penalise` and with nothing else, got "
                f"truncated: {self.truncated}, missing_eos_penalty: {self.missing_eos_penalty}"
            )
        return self


class PPOConfig(Section):
    """How the policy climbs. What speaks of a critic, λ or whitening is PPO's alone; the rest is
    that of GRPO and RLOO too, which make the same clipped updates."""

    epochs: PositiveInt = 2
    """Passes over a rollout."""
    minibatches: PositiveInt = 2
    """Optimiser steps in one pass."""
    microbatch_size: PositiveInt = 64
    """Responses in one backward pass; changes memory and speed, not the gradient."""
    keep_logits_mib: NonNegativeInt = 512
    """MiB of logits kept from forward to backward; the others are computed a second time. Changes
    memory and speed, not the gradient."""
    clip_range: PositiveFloat = 0.2
    """ε of the clipped policy loss."""
    min_effective_samples: float | None = Field(default=None, ge=0, lt=1)
    """Least share of a minibatch's tokens that the prefix weights Π π/π_rollout may leave
    effective; below it the policy is too far from the one that wrote, and the rest of the updates
    to this rollout is left out (`policy/updates` counts those made). None: 0.5 where the placement
    `exact_weighted` has the weights in its loss, otherwise no bound."""
    value_clip_range: PositiveFloat | None = 0.2
    """ε of the clipped value loss; none: not clipped."""
    value_coef: PositiveFloat = 0.1
    """Weight of the value loss."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token. 1 keeps the objective the sum that it says it is."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the rollout."""


_OF_PPO = ("value_clip_range", "value_coef", "gamma", "lam", "whiten_advantages")
"""What GRPO and RLOO have no use for."""


class ValueConfig(Section):
    """The critic."""

    kind: Literal["trunk_detached", "trunk", "model"] = "trunk_detached"
    """A head on the policy's trunk, without or with gradient into it, or a model of its own."""
    path: str | None = None
    """Where a model of its own starts: a policy or reward-model directory."""

    @model_validator(mode="after")
    def _path_belongs(self) -> "ValueConfig":
        if (self.kind == "model") != (self.path is not None):
            raise ValueError("`value.path` goes with `value.kind: model`, and with nothing else")
        return self


class OptimizerConfig(Section):
    """AdamW, for policy and critic."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate of the policy."""
    value_lr: PositiveFloat | None = None
    """Peak learning rate of the critic; none: that of the policy."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients longer than this are scaled to it."""
    schedule: Literal["constant", "linear"] = "constant"
    """Constant, or linear to zero over the run."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the rate rises linearly from a tenth of its peak."""


class PretrainingConfig(Section):
    """InstructGPT's pretraining mix (PPO-ptx): likelihood of ordinary text beside the reward."""

    texts: str
    """JSONL or Parquet file with `text`."""
    coefficient: PositiveFloat = 27.8
    """γ: weight of the mean negative log-likelihood per token."""
    texts_per_minibatch: PositiveInt = 8
    """Texts drawn for each optimiser step."""
    max_tokens: PositiveInt = 256
    """A text is cut to this many tokens."""


class HeldoutConfig(Section):
    """Evaluation on prompts that are never trained on."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0: before the first update and after the last only."""
    responses_per_prompt: PositiveInt = 1
    """Responses to each held-out prompt."""
    gold: RewardConfig | None = None
    """A second opinion the policy is never trained on."""


class LoggingConfig(Section):
    """What is kept and where it is shown."""

    samples_per_step: NonNegativeInt = 2
    """Responses kept at each step: the farthest from the reference, then random ones. Each is read
    once more, for the words that both models thought likely at its tokens of largest KL."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: the last step only."""
    keep: PositiveInt = 2
    """How many checkpoints to keep, beside the one with the best held-out objective."""
    spot_check_every: NonNegativeInt = 0
    """Steps between comparisons of the streamed log-probabilities with an obvious implementation
    in float64, which for that moment holds both heads a second time; 0: never."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Also send the metrics there, through accelerate."""


class Config(Section):
    """A whole run."""

    algorithm: Literal["ppo", "grpo", "rloo"] = "ppo"
    """How advantages come about: from a critic; or, without one, from the other responses to the
    same prompt, in units of their spread (grpo: so is β) or as they are (rloo)."""
    policy: PolicyConfig
    reference: ReferenceConfig = ReferenceConfig()
    reward_models: dict[str, RewardConfig] = Field(min_length=1)
    """Reward models by name; the score is their weighted sum."""
    score_normalisation: Literal["none", "running", "initial"] = "none"
    """Leave scores as they are; or standardise them by the statistics of all scores so far, or by
    those of responses written before the first update. Never applied to the sum with KL."""
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    leash: LeashConfig
    tripwires: TripwiresConfig = TripwiresConfig()
    ppo: PPOConfig = PPOConfig()
    value: ValueConfig = ValueConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    pretraining: PretrainingConfig | None = None
    heldout: HeldoutConfig = HeldoutConfig()
    plan: PlanConfig = PlanConfig()
    logging: LoggingConfig = LoggingConfig()
    steps: PositiveInt = 100
    """Rollouts, each followed by its update."""
    seed: NonNegativeInt = 0
    """Seed of every random number."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""
    output: str
    """The run directory to make."""
    world: NonNegativeInt | None = None
    """Seed of the embedded world to build first; `{world}` in a path is then its directory."""

    @model_validator(mode="after")
    def _parts_agree(self) -> "Config":
        if self.rollout.truncated == "drop" and self.ppo.minibatches > self.responses_per_step:
            raise ValueError("more minibatches than responses")
        if self.responses_per_step % self.ppo.minibatches:
            raise ValueError(
                f"`ppo.minibatches: {self.ppo.minibatches}` does not divide the "
                f"{self.responses_per_step} responses of a step"
            )
        evaluates = self.prompts.heldout is not None
        if not evaluates and self.heldout != HeldoutConfig():
            raise ValueError("`heldout` does nothing without `prompts.heldout`")
        return self

    @model_validator(mode="after")
    def _algorithm_uses_all(self) -> "Config":
        if self.algorithm == "ppo":
            return self
        name, ppo, untouched = self.algorithm, self.ppo, PPOConfig()
        idle = [f"ppo.{key}" for key in _OF_PPO if getattr(ppo, key) != getattr(untouched, key)]
        idle += ["value"] if self.value != ValueConfig() else []
        idle += ["optimizer.value_lr"] if self.optimizer.value_lr is not None else []
        if name == "grpo" and self.score_normalisation != "none":
            idle.append("score_normalisation (each group is normalised by itself)")
        if idle:
            raise ValueError(
                f"with `algorithm: {name}` these do nothing: {', '.join(idle)}; leave them out"
            )
        if self.rollout.responses_per_prompt < 2:
            raise ValueError(
                f"`algorithm: {name}` compares the responses to one prompt: give "
                "`rollout.responses_per_prompt` of 2 or more"
            )
        if self.rollout.truncated == "bootstrap":
            raise ValueError(
                f"`rollout.truncated: bootstrap` needs a critic, and `algorithm: {name}` has none"
            )
        if self.leash.placement == "mixed":
            raise ValueError(
                "`leash.placement: mixed` finds its coefficient by a critic's advantages, and "
                f"`algorithm: {name}` has none: take `reward_k1` or `exact`"
            )
        return self

    @model_validator(mode="after")
    def _leash_holds(self) -> "Config":
        if self.reference.kind == "adapter_off" and self.policy.lora is None:
            raise ValueError("`reference.kind: adapter_off` needs `policy.lora`")
        if self.reference.kind == "cached" and self.leash.reanchor_every is not None:
            raise ValueError(
                "`reference.kind: cached` keeps what one reference says, and "
                "`leash.reanchor_every` moves it: take one of them"
            )
        stop = self.tripwires.stop_kl
        target = min(leash.target_kl or 0.0 for leash in self.leash.each().values())
        if stop is not None and stop <= target:
            raise ValueError(f"`tripwires.stop_kl: {stop:g}` is within the target of {target:g}")
        if self.tripwires.then == "rollback":
            if not self.logging.checkpoint_every:
                raise ValueError("`tripwires.then: rollback` needs `logging.checkpoint_every`")
            if self.leash.beta == 0:
                raise ValueError("`tripwires.then: rollback` raises β, which is 0 for good")
        return self

    @property
    def responses_per_step(self) -> int:
        """Responses of one rollout."""
        return self.rollout.prompts_per_step * self.rollout.responses_per_prompt
