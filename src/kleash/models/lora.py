"""A LoRA adapter to train instead of the whole model.

Left out: adapters kept side by side. Where supervised training left an adapter and a new one is
trained, the old one is merged into the weights first (`merging`); policy and reference then share
one base, and switching the new one off is the reference, whatever was merged.
"""

import contextlib
import os
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kleash.errors import ModelError
from kleash.models.optional_packages import require_package

_HEAD = (
    "expected an adapter on inner layers, got target {}: the head is read directly and cannot "
    "carry low-rank matrices; train it whole with modules_to_save"
)


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA adapter to train instead of the whole model."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ()
    """Names of the linear layers to adapt; empty: those peft knows for the architecture."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside it, on a copy: `lm_head`, `embed_tokens`."""


def add_adapter(model: PreTrainedModel, spec: AdapterSpec, *, revision: str | None = None) -> Any:
    """Put a LoRA adapter into a model; it starts as no change at all.

    Args:
        model: the base; changed in place.
        spec: the adapter.
        revision: of the base's hub name, for the adapter's settings.

    Raises:
        ModelError: a target is the head or no linear layer, or peft is not installed.
    """
    heads = [t for t in spec.targets if t.split(".")[-1] in ("lm_head", "embed_out", "output")]
    if heads:
        raise ModelError(_HEAD.format(repr(heads[0])))
    peft = require_peft()
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets) or None,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        modules_to_save=list(spec.modules_to_save) or None,
        revision=revision,
    )
    try:
        with warnings.catch_warnings():
            # peft asks transformers for a deprecated name; nothing to change here.
            warnings.simplefilter("ignore", FutureWarning)
            # Head and embedding are read as they are, and checked whenever they are merged.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            # GPT-2 keeps its matrices transposed; peft sees that, and says so.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            wrapped = peft.get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        layers = {
            name.split(".")[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        raise ModelError(
            f"expected adapter targets among the linear layers of {type(model).__name__}, got: "
            f"{reason.removesuffix('.')}; take some of {', '.join(sorted(layers))}"
        ) from error
    if hasattr(model.get_output_embeddings(), "lora_A"):
        raise ModelError(_HEAD.format("the head, by a name that ends alike"))
    _require_saved(model, spec)
    return wrapped.eval()


def _require_saved(model: PreTrainedModel, spec: AdapterSpec) -> None:
    """Every module to be trained whole is there.

    Raises:
        ModelError: one is not: peft looks for it without a word.
    """
    names = {name.split(".")[-2] for name, _ in model.named_modules() if ".modules_to_save" in name}
    for wanted in spec.modules_to_save:
        if wanted.split(".")[-1] not in names:
            raise ModelError(
                f"expected modules_to_save among the modules of {type(model).__name__}, got "
                f"{wanted!r}, which it has not: take lm_head or embed_tokens"
            )


@contextlib.contextmanager
def compilers_kept() -> Generator[None]:
    """The environment's C and C++ compilers as they were, after peft opens an adapter.

    peft sets `CXX` to gcc while it builds a kernel for BOFT, and leaves it so where that fails;
    what torch.compile makes from then on cannot be loaded, for gcc links no C++ library.
    """
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def require_peft() -> Any:
    """The package peft.

    Raises:
        ModelError: it is not installed.
    """
    return require_package("peft", "an adapter", "lora")
