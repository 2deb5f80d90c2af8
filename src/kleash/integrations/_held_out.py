"""How far a model in training is from its base on held-out prompts or texts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kleash.auditing import Audit, audit
from kleash.auditing.api import Texts
from kleash.auditing.model_pair import open_checkpoint
from kleash.errors import ConfigError
from kleash.integrations._models import ReferenceSource, unwrap_adapter
from kleash.models.policy import Policy
from kleash.training.metrics import Number


@dataclass
class HeldOut:
    """Held-out material and the base that it is read with.

    Attributes:
        prompts: the policy answers them, and the KL(π‖π_ref) of its answers is measured.
        texts: both models read them.
        reference: a checkpoint or a model; None: the checkpoint that the model was loaded from.
        options: of `kleash.audit`, for prompts and texts alike.
    """

    prompts: Texts | None
    texts: Texts | None
    reference: ReferenceSource | None
    options: Mapping[str, Any]
    _opened: Policy | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Refuse what holds nothing.

        Raises:
            ConfigError: if there are neither prompts nor texts.
        """
        if self.prompts is None and self.texts is None:
            raise ConfigError("expected prompts or texts that were held out, got neither")

    @property
    def names(self) -> list[str]:
        """What is read."""
        given = {"prompts": self.prompts, "texts": self.texts}
        return [name for name, what in given.items() if what is not None]

    def measure(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Audit]:
        """Audit the model as it is now, by what was read: "prompts", "texts".

        Raises:
            ConfigError: if no reference can be found.
            ModelError: if a model cannot be used.
            PromptError: if the material cannot.
        """
        reference = self._reference(model, tokenizer)
        given: dict[str, Any] = {"prompts": self.prompts, "texts": self.texts}
        return {
            name: audit((model, tokenizer), reference, **{name: what}, **self.options)
            for name, what in given.items()
            if what is not None
        }

    def _reference(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
        source = self.reference
        if source is not None and not isinstance(source, str | Path):
            return source, tokenizer
        if self._opened is None:
            wrapped, inner = unwrap_adapter(model)
            device = str(next(inner.parameters()).device)
            path = source or _base_of(wrapped, inner)
            self._opened = open_checkpoint(path, dtype="float32", device=device)
        return self._opened


def measures_of(audits: Mapping[str, Audit]) -> dict[str, Number]:
    """Numbers by key: `heldout/kl_ref` on prompts, `texts/…` on texts, per response and token."""
    found: dict[str, Number] = {}
    for name, one in audits.items():
        prefix = "heldout" if name == "prompts" else "texts"
        for per, value in (("", one.kl.per_response), ("_per_token", one.kl.per_token)):
            found[f"{prefix}/kl_ref{per}"] = value.mean
            found[f"{prefix}/kl_ref{per}_se"] = value.standard_error
    return found


def _base_of(wrapped: Any, inner: Any) -> str:
    if wrapped is not None:
        config = next(iter(wrapped.peft_config.values()))
        path = str(config.base_model_name_or_path or "")
    else:
        path = str(inner.config.name_or_path or "")
    if not path:
        raise ConfigError(
            "expected a base to measure drift from, got a model that was not loaded from a "
            "checkpoint: name one with reference=PATH, or give a model"
        )
    return path
