"""Weights in four bits: a frozen reference, or the frozen base under an adapter (QLoRA).

bitsandbytes keeps the matrices of linear layers as NF4, 64 numbers to a scale, and the products
are made with what they stand for:

    y = x Ŵᵀ,    Ŵ = scale · code    in the type of the run (float32, or bfloat16 with `bf16`)

Head, embedding and norms stay as they are, so log-probabilities and KL are computed as ever, of a
model whose weights are Ŵ. The same model in plain matrices is `dequantised`.

bitsandbytes has a second product for CPUs with AVX512-BF16: it rounds inputs, weights and scales to
bfloat16, in whatever type the run computes, and gives no gradient. It is switched off, and a layer
that used it all the same is an error. Left out: eight bits by LLM.int8(), which rounds activations
too and chooses the columns that it spares by the whole batch, so that a response's numbers would
depend on those beside it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kleash.errors import ModelError
from kleash.models.optional_packages import require_package

Quantization = Literal["none", "nf4"]
"""How frozen weights of linear layers are kept."""
SETTINGS = "quantization_config.json"
"""Beside an adapter: how the base that it was trained on was quantised."""
BITS = 4.5
"""Of a weight: four, and a scale in float32 for every 64."""


def require_library() -> Any:
    """The package bitsandbytes.

    Raises:
        ModelError: it is not installed.
    """
    return require_package("bitsandbytes", "quantised weights", "qlora")


def new_settings(compute: torch.dtype) -> dict[str, Any]:
    """Settings of `nf4` as transformers writes them, without those that it leaves as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    ).to_dict()


def stored_settings(shape: PretrainedConfig, path: str | Path) -> dict[str, Any] | None:
    """How the weights of a checkpoint were quantised by bitsandbytes; None: they were not.

    Other libraries' checkpoints are left to transformers.

    Raises:
        ModelError: in eight bits.
    """
    found = getattr(shape, "quantization_config", None)
    if found is None:
        return None
    settings: dict[str, Any] = dict(found if isinstance(found, Mapping) else found.to_dict())
    if settings.get("quant_method") not in (None, "bitsandbytes", "bitsandbytes_4bit"):
        eight = settings.get("quant_method") == "bitsandbytes_8bit"
        if not eight:
            return None
        settings["load_in_8bit"] = True
    if settings.get("load_in_8bit"):
        raise ModelError(
            f"expected weights in 4 bits or none quantised in {str(path)!r}, got load_in_8bit: "
            "LLM.int8() rounds activations by the whole batch, so no text has numbers of its own; "
            "give the model that it was made from, with quantization: nf4 if memory is short"
        )
    return settings if settings.get("load_in_4bit") else None


def settings_beside(adapter: str | Path) -> dict[str, Any] | None:
    """How the base was quantised that an adapter was trained on; None: it was not.

    Raises:
        ModelError: the file that says so cannot be read.
    """
    file = Path(adapter) / SETTINGS
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not found.get("load_in_4bit"):
            raise ValueError("no settings of four bits")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"expected the settings of a base in 4 bits in {str(file)!r}, got: {error}; copy it "
            "from where the adapter was trained, or remove it if its base was not quantised"
        ) from error
    return cast("dict[str, Any]", found)


def save_settings(model: PreTrainedModel, adapter: str | Path) -> None:
    """Write beside an adapter how its base is quantised, if it is."""
    if is_quantised(model):
        settings = cast(Any, model.config).quantization_config.to_dict()
        text = json.dumps(settings, indent=1, sort_keys=True)
        (Path(adapter) / SETTINGS).write_text(text + "\n", encoding="utf-8")


def opening(
    settings: Mapping[str, Any], *, stored: bool, device: str, compute: torch.dtype
) -> dict[str, Any]:
    """What `from_pretrained` is given for a model in four bits.

    Args:
        settings: how its weights are or will be quantised.
        stored: whether they are in the checkpoint; then nothing need be said of them.
        device: where it is to be.
        compute: type of the products.
    """
    given: dict[str, Any] = {"device_map": {"": device}}
    if not stored:
        wanted = {k: v for k, v in settings.items() if k != "quant_method" and k[0] != "_"}
        wanted["bnb_4bit_compute_dtype"] = compute
        given["quantization_config"] = BitsAndBytesConfig(**wanted)
    return given


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers in four bits, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state"):
            yield name, module


def is_quantised(model: nn.Module) -> bool:
    """Whether a model has layers in four bits."""
    return next(quantised_layers(model), None) is not None


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Products of quantised layers are made in this type, forward and backward alike.

    Raises:
        ModelError: the head is quantised.
    """
    head = model.get_output_embeddings()
    for _, layer in quantised_layers(model):
        if layer is head:
            raise ModelError(
                f"expected a head in full precision, got one in 4 bits in {type(model).__name__}: "
                "every log-probability is read from it; quantise the model without its head "
                "(llm_int8_skip_modules)"
            )
        layer.compute_dtype = dtype
        layer.compute_type_is_set = True
        # The gradient is multiplied by what a weight stands for in this type.
        layer.weight.quant_state.dtype = dtype
        layer.support_avx512bf16_for_cpu = False
    settings = getattr(model.config, "quantization_config", None)
    if isinstance(settings, BitsAndBytesConfig):
        settings.bnb_4bit_compute_dtype = dtype


def keep_rest_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters that are not quantised get this type, which a quantised checkpoint overrules.

    But for those that the architecture keeps in float32.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def require_exact_products(model: nn.Module) -> None:
    """After a first reading: no layer went over to the product in bfloat16 without a gradient.

    Raises:
        ModelError: one did.
    """
    for name, layer in quantised_layers(model):
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ModelError(
                f"expected products of the weights that are held in {name!r}, got bitsandbytes' "
                "own in bfloat16, which have no gradient: install the bitsandbytes of kleash[qlora]"
            )


@torch.no_grad()
def dequantised(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with plain matrices: each is what its four bits stand for, in `dtype`."""
    compute_in(model, torch.float32)
    dequantize = require_library().functional.dequantize_4bit
    for name, layer in list(quantised_layers(model)):
        weight = dequantize(layer.weight.data, layer.weight.quant_state)
        with torch.device("meta"):
            if layer.source_cls is Conv1D:
                plain: Any = Conv1D(layer.out_features, layer.in_features)
                weight = weight.T.contiguous()
            else:
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = nn.Parameter(weight.to(dtype))
        plain.bias = layer.bias
        model.set_submodule(name, plain.train(layer.training))
    found = cast(Any, model)
    found.hf_quantizer.remove_quantization_config(model)
    vars(model).pop("is_loaded_in_4bit", None)
    # How the codes were read; saving would try to undo it.
    found._weight_conversions = [
        one for one in found._weight_conversions or [] if not _reads_codes(one)
    ] or None
    return model.requires_grad_(True)


def _reads_codes(conversion: Any) -> bool:
    return any(
        type(operation).__module__ == "transformers.integrations.bitsandbytes"
        for operation in getattr(conversion, "operations", ())
    )


def scales_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What quantised weights need beside their codes to be numbers, by the weights' names."""
    for name, layer in quantised_layers(model):
        state = layer.weight.quant_state
        parts = {**state.as_dict(), "offset": state.offset}
        for part, held in parts.items():
            if isinstance(held, Tensor):
                yield f"{name}.weight.{part}", held
