"""The section of the model that is trained."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from kleash.config.section import InputKind, Section, SettingError

Precision = Literal["float32", "bf16", "pure_bf16"]
Quantization = Literal["none", "nf4"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]


class LoraConfig(Section):
    """Train a low-rank adapter; the reference is then the same weights with the adapter off."""

    rank: PositiveInt = 16
    """Rank of the adapter."""
    alpha: PositiveInt = 32
    """Scale of the adapter; its output is multiplied by alpha / rank."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["auto"] = "auto"
    """Names of the modules to adapt; auto: what PEFT chooses for this architecture. The adapter's
    own `adapter_config.json` in a checkpoint records them."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Names of modules to train whole beside the adapter, such as `lm_head` or `embed_tokens`."""


class PolicyConfig(Section):
    """The model that is trained."""

    path: Annotated[str, InputKind.MODEL]
    """Directory of a Hugging Face causal language model, or its hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; none: its main branch."""
    adapter: Annotated[str | None, InputKind.MODEL] = None
    """Directory of a trained LoRA adapter that is merged into the weights first. Where supervised
    training left an adapter: policy and reference both begin as base + adapter."""
    precision: Precision = "float32"
    """`bf16` multiplies in bfloat16 and updates float32 weights; `pure_bf16` keeps the weights
    themselves in bfloat16, where most of a small update is rounded away. For policy, reference and
    value model alike."""
    gradient_checkpointing: bool = False
    """Keep each layer's input alone and compute the layer again for its gradient: less memory, a
    third more time in the update; for policy and value model."""
    attention: Attention = "auto"
    """Attention kernel, `auto` for the model's own choice; policy and reference use the same."""
    lora: LoraConfig | None = None
    """Train an adapter instead of all weights."""
    quantization: Quantization = "none"
    """`nf4` keeps the linear layers under the adapter in 4 bits (QLoRA; needs kleash[qlora]). A
    directory in 4 bits keeps its own settings with `nf4`, and is opened as plain matrices with
    `none`."""

    @model_validator(mode="after")
    def _only_frozen_weights_are_quantised(self) -> "PolicyConfig":
        if self.quantization == "none":
            return self
        if self.lora is None:
            raise SettingError(
                f"`policy.quantization: {self.quantization}` is for weights that stay as they are, "
                "and without `policy.lora` all of them are trained: give `policy.lora`, or set "
                "`reference.quantization` for the reference alone",
                "quantization",
            )
        if self.adapter is not None:
            raise SettingError(
                f"`policy.quantization: {self.quantization}` quantises the model at `policy.path`, "
                "and `policy.adapter` is merged into it first: save the merged model "
                "(merge_and_unload) and give it as `policy.path`",
                "quantization",
                "adapter",
            )
        return self

    @property
    def base_is_frozen(self) -> bool:
        """Whether no weight of the file is trained, nor a copy of one."""
        return self.lora is not None and not self.lora.modules_to_save
