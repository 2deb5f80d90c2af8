"""The section that says how responses are written, and by what."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from kleash.algorithms.common import Truncated, check_truncated
from kleash.algorithms.sampler_correction import Correction, check_correction
from kleash.config.section import (
    Section,
    SettingError,
    idle_microbatch_size,
    microbatch_limit,
)
from kleash.models.batching import Limit


class VLLMConfig(Section):
    """vLLM as the engine that writes: in the trainer's process, or a server of its own."""

    url: str | None = None
    """Address of a server that `kleash serve-rollouts` started, such as `http://127.0.0.1:8000`;
    none: vLLM runs in the trainer's own process, on its device. A server takes the three keys
    below from this file too."""
    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """Part of a GPU's memory that the engine may take; without effect on a CPU."""
    kv_cache_gib: PositiveFloat | None = None
    """GiB of keys and values that the engine keeps; none: what is left of its part of a GPU, and 1
    on a CPU."""
    enforce_eager: bool = False
    """Begin at once, without compiling the model first: slower writing, much faster start."""
    timeout_s: PositiveFloat = 600.0
    """Seconds until one answer of a server is given up."""

    def idle(self) -> dict[str, str]:
        """See `Section.idle`: what only a server has."""
        if self.url is None:
            return {"timeout_s": "is for a server and does nothing without `url`"}
        return {}


class RolloutConfig(Section):
    """How the policy writes."""

    engine: Literal["hf", "vllm"] = "hf"
    """What writes: the policy itself through transformers, or vLLM, which is given the weights
    after every update; see docs/rollouts.md."""
    vllm: VLLMConfig = VLLMConfig()

    prompts_per_step: PositiveInt = 64
    """Prompts of one step."""
    responses_per_prompt: PositiveInt = 1
    """Responses to each prompt; standard errors are clustered by prompt."""
    max_new_tokens: PositiveInt = 64
    """Length limit of a response."""
    temperature: PositiveFloat = 1.0
    """Divides the logits in sampling and in both scorings alike."""
    truncated: Truncated = "score"
    """A response cut by the limit: score it as it stands, subtract a penalty, leave it out of the
    update, or continue it with the value of its last state."""
    missing_eos_penalty: PositiveFloat | None = None
    """Subtracted from the score of a truncated response when `truncated: penalise`."""
    microbatch_size: PositiveInt = 64
    """Responses scored at once; changes memory and speed, not results."""
    microbatch_tokens: PositiveInt | None = None
    """Tokens scored at once, prompts and padding among them: responses of similar length, as many
    as fit. In place of `microbatch_size`; none: that decides. Changes memory and speed, not
    results."""
    correction: Correction = "none"
    """How the update weighs tokens by r = π_trainer/π_sampler, where the sampler's law is not quite
    the trainer's: not at all; each token by its own r, cut off at the clip; each response by the
    product of its r, cut off at the clip; or each token by its r, and tokens with r beyond the clip
    or its inverse left out. docs/placements.md has the gradient of each."""
    correction_clip: float | None = 2.0
    """Largest weight of a correction, above 1; none: no bound, with which `sequence_truncated` is
    unbiased."""
    ahead: Literal[0, 1] = 0
    """1: the next rollout is written while this one is learnt from, by the weights before the
    update. It is then off-policy by one update, which `correction` has to undo."""

    @property
    def microbatch(self) -> Limit:
        """What is scored at once at most: responses, or tokens."""
        return microbatch_limit(self.microbatch_size, self.microbatch_tokens)

    def idle(self) -> dict[str, str]:
        """See `Section.idle`: an engine or a size that is not used, a clip that weighs nothing."""
        idle = idle_microbatch_size(self.microbatch_tokens)
        if self.engine == "hf":
            idle["vllm"] = "is for `engine: vllm`"
        if self.correction == "none":
            idle["correction_clip"] = "does nothing with `correction: none`"
        return idle

    @model_validator(mode="after")
    def _penalty_belongs(self) -> "RolloutConfig":
        try:
            check_truncated(self.truncated, self.missing_eos_penalty, critic=True)
        except ValueError as error:
            raise SettingError(str(error), "missing_eos_penalty", "truncated") from None
        return self

    @model_validator(mode="after")
    def _clip_belongs(self) -> "RolloutConfig":
        try:
            check_correction(self.correction, self.correction_clip)
        except ValueError as error:
            raise SettingError(str(error), "correction_clip", "correction") from None
        return self
