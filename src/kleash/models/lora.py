"""LoRA adapters: a new one to train, and one of before that becomes part of the weights.

Left out: adapters kept side by side. Where supervised training left an adapter and a new one is
trained, the old one is merged into the weights before anything else; policy and reference then
share one base, and switching the new one off is the reference, whatever was merged.
"""

import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kleash.errors import ModelError

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA adapter to train instead of the whole model."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ()
    """Names of the linear layers to adapt; empty: those peft knows for the architecture."""


def add_adapter(model: PreTrainedModel, spec: AdapterSpec) -> Any:
    """Put a LoRA adapter into a model; it starts as no change at all.

    Raises:
        ModelError: a target is the head or no linear layer, or peft is not installed.
    """
    heads = [t for t in spec.targets if t.split(".")[-1] in ("lm_head", "embed_out", "output")]
    if heads:
        raise ModelError(
            f"expected an adapter on inner layers, got target {heads[0]!r}: the head is shared "
            "with the reference and read directly, so it cannot carry one"
        )
    peft = _peft()
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets) or None,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # peft asks transformers for a name that is on its way out: theirs to settle.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = peft.get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        layers = {
            name.split(".")[-1]
            for name, module in model.base_model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        raise ModelError(
            f"expected adapter targets among the linear layers of {type(model).__name__}, got: "
            f"{reason.removesuffix('.')}; take some of {', '.join(sorted(layers))}"
        ) from error
    return wrapped.eval()


def merge_adapter(model: PreTrainedModel, directory: str | Path) -> PreTrainedModel:
    r"""Add a trained adapter to the weights: W ← W + (alpha/rank)·B·A, rounded to the dtype of W.

    Args:
        model: the base the adapter was trained on; changed in place.
        directory: where peft saved it.

    Raises:
        ModelError: there is no adapter in safetensors there, or it is for another model.
    """
    if not (Path(directory) / _WEIGHTS).is_file():
        raise ModelError(
            f"expected an adapter saved by peft in {str(directory)!r}, got no {_WEIGHTS} there: "
            "give its directory, with weights as safetensors"
        )
    peft = _peft()
    try:
        with warnings.catch_warnings():
            # A key that the model lacks is a warning there; here it is another model's adapter.
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", FutureWarning)
            loaded = peft.PeftModel.from_pretrained(model, str(directory))
            merged = cast(PreTrainedModel, loaded.merge_and_unload())
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UserWarning) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"expected an adapter for {type(model).__name__} in {str(directory)!r}, got: {reason}"
        ) from error
    return merged.eval().requires_grad_(True)  # peft had frozen the base


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ModelError(
            "expected the package peft for an adapter, got none installed: "
            "pip install 'kleash[lora]'"
        ) from error
