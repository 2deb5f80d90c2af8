"""A whole run, and the sections that are not in `leash` or `algorithm`.

Every default stands here, and every field has its sentence underneath. A value that follows from
another key is `auto` until `Config` puts in what it stands for.
"""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from kleash.algorithms.common import check_truncated
from kleash.algorithms.distill import check_distillation_leash
from kleash.algorithms.sampler_correction import (
    correction_gradient,
)
from kleash.config.algorithm import (
    AlgorithmConfig,
    DistillConfig,
    GRPOConfig,
    PPOConfig,
    TeacherConfig,
)
from kleash.config.leash import LeashConfig, PlanConfig, ReferenceConfig, TripwiresConfig
from kleash.config.policy import PolicyConfig
from kleash.config.rollout import RolloutConfig
from kleash.config.section import InputKind, Section, SettingError


class ScorerConfig(Section):
    """What gives a response a score: a sequence classifier by its path, or a Python callable."""

    path: Annotated[str | None, InputKind.MODEL] = None
    """Directory or hub name of a sequence classifier with one output."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; none: its main branch."""
    adapter: str | None = None
    """Directory of a LoRA adapter, saved with its head, that was trained on the model at `path`;
    none: the model as it is."""
    callable: Annotated[str | None, InputKind.CALLABLE] = None
    """`module:function` (or an object), called with prompts, responses and the columns that it
    names; returns a score for each response. An async function may score one response a call."""
    concurrency: PositiveInt = 8
    """Calls of an async callable under way at once."""
    timeout_s: PositiveFloat = 60.0
    """Seconds until a call of an async callable is given up."""
    retries: NonNegativeInt = 2
    """How often a failed call of an async callable is made again, after growing pauses."""
    template: str = "{prompt}{response}"
    """How a classifier reads a prompt and its response."""
    chat_template: str | None = None
    """Name of one of a classifier's chat templates, for conversations; none: its default."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Of a classifier's weights; auto: as its files say. Scores are float32."""
    microbatch_size: PositiveInt = 32
    """Texts that a classifier reads at once; changes memory, not scores."""

    def idle(self) -> dict[str, str]:
        """See `Section.idle`: what only a classifier has, or only an async callable."""
        if self.callable is not None:
            return dict.fromkeys(
                ("revision", "template", "adapter", "chat_template", "dtype", "microbatch_size"),
                "is for a classifier and does nothing for a callable",
            )
        return dict.fromkeys(
            ("concurrency", "timeout_s", "retries"),
            "is for an async callable and does nothing for a classifier",
        )

    @model_validator(mode="after")
    def _one_kind(self) -> "ScorerConfig":
        if (self.path is None) == (self.callable is None):
            raise SettingError("give exactly one of `path` and `callable`", "path", "callable")
        return self


class RewardConfig(ScorerConfig):
    """One reward model: a sequence classifier by its path, or a Python callable."""

    weight: float = 1.0
    """Weight in the sum of reward models."""


class PromptsConfig(Section):
    """The prompts to train and evaluate on."""

    train: Annotated[str, InputKind.FILE]
    """Prompts to train on: a JSONL, CSV or Parquet file, a directory of such files, or a data set
    `org/name:split`, with `prompt` text or chat `messages`; its other columns reach the reward."""
    heldout: Annotated[str | None, InputKind.FILE] = None
    """Prompts never trained on, for evaluation."""
    chat_template: str | None = None
    """Name of one of the policy's chat templates; none: its default."""


class OptimizerConfig(Section):
    """AdamW, for policy and critic; the critic's learning rate is `algorithm.value.lr`."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps the moments in 8 bits (needs kleash[8bit])."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Of weights under `policy.precision: pure_bf16`: `stochastic` rounds up or down by chance, so
    that no update is lost on average."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate of the policy."""
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

    texts: Annotated[str, InputKind.FILE]
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
    gold: ScorerConfig | None = None
    """A second opinion the policy is never trained on."""


class LoggingConfig(Section):
    """What is kept and where it is shown."""

    samples_per_step: NonNegativeInt = 2
    """Responses kept at each step: the farthest from the reference, then random ones. Each is read
    once more, for the words that both models thought likely at its tokens of largest KL."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: by `checkpoint_minutes` and after the last step only."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """Also a checkpoint after the first step that ends so many minutes after the last one: what a
    crash can cost. 0: never, as with `tripwires.then: rollback`, which goes by steps alone."""
    keep: PositiveInt = 2
    """How many checkpoints to keep, beside the one with the best held-out objective."""
    spot_check_every: NonNegativeInt = 0
    """Steps between comparisons of the streamed log-probabilities with an obvious implementation
    in float64, which for that moment holds both heads a second time, and of sampler and trainer
    over the whole vocabulary in four responses; 0: never."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Also send the metrics there, through accelerate."""


class DistributedConfig(Section):
    """Several processes, as `torchrun` or `accelerate launch` starts them."""

    strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """`ddp`: each process holds whole models and reads its rows. `fsdp`: weights, gradients and
    optimizer states are divided as well, for models that one device cannot hold. `none`: one
    process. `auto`: `ddp` where a launcher started several. Alone, a process divides nothing."""
    timeout_s: PositiveFloat = 600.0
    """Seconds that a process waits for another before the run ends; a reward callable, which the
    first process asks for all, must answer for a whole batch within them."""


class Config(Section):
    """A whole run."""

    algorithm: AlgorithmConfig = PPOConfig()
    policy: PolicyConfig
    reference: ReferenceConfig = ReferenceConfig()
    teacher: TeacherConfig | None = None
    """With `algorithm: distill`: the teacher, where there is a leash to another model beside it;
    none: the model of `reference` is the teacher."""
    reward_models: dict[str, RewardConfig] = Field(default_factory=dict)
    """Reward models by name; the score is their weighted sum. Every algorithm needs one but
    `distill`, which takes none."""
    score_normalisation: Literal["none", "running", "initial"] = "none"
    """Leave scores as they are; or standardise them by the statistics of all scores so far, or by
    those of responses written before the first update. Never applied to the sum with KL."""
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    leash: LeashConfig
    tripwires: TripwiresConfig = TripwiresConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    pretraining: PretrainingConfig | None = None
    heldout: HeldoutConfig = HeldoutConfig()
    plan: PlanConfig = PlanConfig()
    logging: LoggingConfig = LoggingConfig()
    distributed: DistributedConfig = DistributedConfig()
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

    def idle(self) -> dict[str, str]:
        """See `Section.idle`: the evaluation, where there are no prompts for it."""
        if self.prompts.heldout is None:
            return {"heldout": "does nothing without `prompts.heldout`"}
        return {}

    @model_validator(mode="after")
    def _put_in_what_auto_stands_for(self) -> "Config":
        algorithm = self.algorithm.with_min_effective_samples(self.leash.placement)
        if isinstance(algorithm, PPOConfig) and algorithm.value.lr == "auto":
            value = algorithm.value.model_copy(update={"lr": self.optimizer.lr})
            algorithm = algorithm.model_copy(update={"value": value})
        reference = self.reference.resolved(
            adapter=self.policy.lora is not None, quantization=self.policy.quantization
        )
        if isinstance(algorithm, DistillConfig) and self.teacher is None:
            # No student begins at its teacher.
            reference = reference.model_copy(update={"reference_differs": True})
        # Nothing has seen this object yet; later it is frozen.
        object.__setattr__(self, "algorithm", algorithm)
        object.__setattr__(self, "reference", reference)
        return self

    @model_validator(mode="after")
    def _minibatches_fit(self) -> "Config":
        minibatches, responses = self.algorithm.minibatches, self.responses_per_step
        if responses % minibatches:
            raise SettingError(
                f"`algorithm.minibatches: {minibatches}` does not divide the {responses} responses "
                "of a step",
                "algorithm.minibatches",
            )
        return self

    @model_validator(mode="after")
    def _algorithm_fits(self) -> "Config":
        name = self.algorithm.name
        if isinstance(self.algorithm, GRPOConfig) and self.score_normalisation != "none":
            raise SettingError(
                f"with `algorithm: {name}` `score_normalisation` does nothing (each group is "
                "normalised by itself): leave it out",
                "score_normalisation",
            )
        if isinstance(self.algorithm, DistillConfig):
            self._require_distillation()
            self._require_distillation_leash()
            return self
        if self.teacher is not None:
            raise SettingError(
                f"`teacher` is for `algorithm: distill`, got `algorithm: {name}`: leave it out",
                "teacher",
                "algorithm.name",
            )
        if not self.reward_models:
            raise SettingError(
                "give at least one of `reward_models`, got none to learn from", "reward_models"
            )
        if isinstance(self.algorithm, PPOConfig):
            return self
        if self.rollout.responses_per_prompt < 2:
            raise SettingError(
                f"`algorithm: {name}` compares the responses to one prompt: give "
                "`rollout.responses_per_prompt` of 2 or more",
                "algorithm.name",
                "rollout.responses_per_prompt",
            )
        try:
            check_truncated(self.rollout.truncated, self.rollout.missing_eos_penalty, critic=False)
        except ValueError as error:
            raise SettingError(f"with `algorithm: {name}` {error}", "rollout.truncated") from None
        if self.leash.placement == "mixed":
            raise SettingError(
                "`leash.placement: mixed` finds its coefficient by a critic's advantages, and "
                f"`algorithm: {name}` has none: take `reward_k1` or `exact`",
                "leash.placement",
            )
        return self

    def _require_distillation(self) -> None:
        """Refuse what distillation has no use for, and what it lacks.

        Raises:
            SettingError: naming the keys.
        """
        rollout, leash, reference = self.rollout, self.leash, self.reference
        faults: list[tuple[bool, str, tuple[str, ...]]] = [
            (
                bool(self.reward_models),
                "`algorithm: distill` learns from the teacher alone: leave out `reward_models`, or "
                "take another algorithm, with the teacher as its reference",
                ("reward_models", "algorithm.name"),
            ),
            (
                self.score_normalisation != "none",
                "`algorithm: distill` has no scores for `score_normalisation`: leave it out",
                ("score_normalisation",),
            ),
            (
                rollout.truncated not in ("score", "drop"),
                "with `algorithm: distill` a response that the limit cut is learnt from as it "
                f"stands (`score`) or not at all (`drop`), got `truncated: {rollout.truncated}`",
                ("rollout.truncated",),
            ),
            (
                rollout.correction != "none",
                "with `algorithm: distill` there are no advantages for `rollout.correction` to "
                "weigh: leave it out",
                ("rollout.correction",),
            ),
            (
                self.teacher is None and reference.path is None,
                "`algorithm: distill` needs a teacher: give it as `reference.path`, or as "
                "`teacher.path` beside a leash to the reference",
                ("reference.path", "teacher"),
            ),
            (
                self.teacher is None and leash.placement != "measure",
                "`algorithm: distill` with the teacher as the reference has no other leash: give "
                "`leash: {beta: 0, placement: measure}`, or name the teacher in `teacher.path`",
                ("leash.placement", "teacher"),
            ),
            (
                self.teacher is None and leash.reanchor_every is not None,
                "`leash.reanchor_every` would replace the teacher by the student: leave it out, or "
                "name the teacher in `teacher.path`",
                ("leash.reanchor_every",),
            ),
            (
                leash.target_kl_per_token is not None,
                "`leash.target_kl_per_token` is counted in the lengths of scored responses, which "
                "`algorithm: distill` does not draw: give `target_kl`",
                ("leash.target_kl_per_token",),
            ),
            (
                leash.beta is None and leash.schedule is None and leash.initial_beta == "auto",
                "with `algorithm: distill` no scores say where a moving β starts: give "
                "`leash.initial_beta`, in nats of divergence per nat",
                ("leash.initial_beta",),
            ),
        ]
        for found, sentence, keys in faults:
            if found:
                raise SettingError(sentence, *keys)

    def _require_distillation_leash(self) -> None:
        """A leash beside a teacher is a term of the loss.

        Raises:
            SettingError: it charges rewards.
        """
        try:
            check_distillation_leash(self.leash.placement)
        except ValueError as error:
            raise SettingError(f"`leash.placement`: {error}", "leash.placement") from None

    @model_validator(mode="after")
    def _ahead_fits(self) -> "Config":
        rollout, leash = self.rollout, self.leash
        if not rollout.ahead:
            return self
        if rollout.engine == "vllm" and rollout.vllm.url is None:
            raise SettingError(
                "`rollout.ahead: 1` writes while the policy learns, and vLLM in the trainer's own "
                "process shares its random numbers: give `rollout.vllm.url` of a server, or take "
                "`engine: hf`",
                "rollout.ahead",
                "rollout.vllm.url",
            )
        if rollout.correction == "none":
            raise SettingError(
                "`rollout.ahead: 1` learns from responses of the weights before the last update: "
                "give a `rollout.correction`, such as `sequence_truncated`",
                "rollout.ahead",
                "rollout.correction",
            )
        clip = rollout.correction_clip
        gradient = correction_gradient(rollout.correction, clip, leash.placement)
        if gradient.kind == "token-local" and not leash.allow_biased:
            raise SettingError(
                f"`rollout.ahead: 1` with `correction: {rollout.correction}` biases the gradient "
                f"of `leash.placement: {leash.placement}` ({gradient.why}): take `correction: "
                "sequence_truncated` or `placement: exact_weighted`, or set leash.allow_biased",
                "rollout.correction",
                "leash.placement",
            )
        return self

    @model_validator(mode="after")
    def _reference_fits(self) -> "Config":
        if self.reference.kind == "adapter_off" and self.policy.lora is None:
            raise SettingError(
                "`reference.kind: adapter_off` needs `policy.lora`", "reference.kind"
            )
        if self.reference.kind == "cached" and self.leash.reanchor_every is not None:
            raise SettingError(
                "`reference.kind: cached` keeps the numbers of one reference, and "
                "`leash.reanchor_every` moves it: take one of them",
                "reference.kind",
                "leash.reanchor_every",
            )
        return self

    @model_validator(mode="after")
    def _quantization_fits(self) -> "Config":
        policy, reference = self.policy.quantization, self.reference.quantization
        key = "reference.quantization" if policy == "none" else "policy.quantization"
        if self.reference.kind == "adapter_off" and policy != reference:
            raise SettingError(
                f"`reference.kind: adapter_off` reads the policy's own weights, whose "
                f"`quantization` is {policy}, got `reference.quantization: {reference}`: leave it "
                "out, or take `reference.kind: copy`",
                "reference.quantization",
                "reference.kind",
            )
        if policy == reference == "none":
            return self
        if self.distributed.strategy == "fsdp":
            raise SettingError(
                f"`{key}: nf4` keeps weights that FSDP does not divide: take "
                "`distributed.strategy: ddp`, in which each process holds them whole in 4 bits",
                key,
                "distributed.strategy",
            )
        if policy != "none" and self.rollout.engine == "vllm":
            raise SettingError(
                "`policy.quantization: nf4` cannot be handed to vLLM, whose weights would be "
                "others than those that are trained: take `rollout.engine: hf`",
                "policy.quantization",
                "rollout.engine",
            )
        return self

    @model_validator(mode="after")
    def _rounding_fits(self) -> "Config":
        if self.optimizer.rounding == "stochastic" and self.policy.precision != "pure_bf16":
            raise SettingError(
                "`optimizer.rounding: stochastic` is for weights in bfloat16, and "
                f"`policy.precision: {self.policy.precision}` updates float32: leave it out",
                "optimizer.rounding",
            )
        return self

    @model_validator(mode="after")
    def _tripwires_fit(self) -> "Config":
        stop = self.tripwires.stop_kl
        target = min(leash.target_kl or 0.0 for leash in self.leash.each().values())
        if stop is not None and stop <= target:
            raise SettingError(
                f"`tripwires.stop_kl: {stop:g}` is within the target of {target:g}",
                "tripwires.stop_kl",
            )
        if self.tripwires.then == "rollback":
            if not self.logging.checkpoint_every:
                raise SettingError(
                    "`tripwires.then: rollback` needs `logging.checkpoint_every`", "tripwires.then"
                )
            if self.leash.beta == 0:
                raise SettingError(
                    "`tripwires.then: rollback` raises β, which is 0 for good", "tripwires.then"
                )
        return self

    @property
    def responses_per_step(self) -> int:
        """Responses of one rollout."""
        return self.rollout.prompts_per_step * self.rollout.responses_per_prompt
