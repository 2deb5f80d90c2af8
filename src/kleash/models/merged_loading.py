"""A model with an adapter in its weights, where training left one, and its tokenizer."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.errors import ModelError
from kleash.models.loading import Attention, Dtype, load_causal_lm, load_config, load_tokenizer
from kleash.models.lora import AdapterSpec
from kleash.models.merging import merge_adapter
from kleash.models.quantization import Quantization, dequantised, is_quantised, settings_beside
from kleash.models.sharded_loading import ShardedModel, open_sharded
from kleash.models.sharding import Sharding


def open_divided(
    path: str | Path,
    merge: str | None,
    dtype: Dtype,
    attention: Attention,
    revision: str | None,
    sharding: Sharding,
    adapter: AdapterSpec | None = None,
    *,
    frozen: bool = False,
) -> ShardedModel:
    """`open_sharded`, with whole models opened by `load_merged`."""
    return open_sharded(
        path,
        dtype=dtype,
        attention=attention,
        sharding=sharding,
        whole=lambda: load_merged(path, merge, dtype, "cpu", attention, revision),
        spec=adapter,
        revision=revision,
        merged=merge is not None,
        frozen=frozen,
    )


def load_merged(
    path: str | Path,
    merge: str | None,
    dtype: Dtype,
    device: str,
    attention: Attention,
    revision: str | None,
    quantization: Quantization = "none",
) -> PreTrainedModel:
    """A causal language model, the adapter in a directory merged into it if one is named.

    An adapter that was trained on a quantised base is merged into what those four bits stand for,
    in plain matrices: into the weights before they were quantised it would be another model.

    Raises:
        ModelError: as `load_causal_lm` and `merge_adapter`; an adapter is to be merged and the
            weights to be quantised.
    """
    if merge is None:
        return load_causal_lm(
            path,
            dtype=dtype,
            device=device,
            attention=attention,
            revision=revision,
            quantization=quantization,
        )
    if quantization != "none":
        raise ModelError(
            f"expected a model to quantise at {str(path)!r}, got one that the adapter in {merge!r} "
            "is to be merged into: save the merged model (merge_and_unload) and give it as path"
        )
    wanted = load_config(path, revision=revision).dtype if dtype == "auto" else _DTYPES[dtype]
    half = wanted in (torch.bfloat16, torch.float16)
    model = load_causal_lm(
        path,
        dtype="float32",
        # In main memory, which is the larger one, while it takes twice its memory.
        device="cpu" if half else device,
        attention=attention,
        revision=revision,
        quantization=settings_beside(merge) or "none",
    )
    if is_quantised(model):
        model = dequantised(model, torch.float32)
    model = merge_adapter(model, merge)
    return cast(Any, _rounded(model, wanted)).to(device) if half else model


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with its parameters in half precision, but for those it keeps in float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def tokenizer_of(
    path: str | Path, merge: str | None, revision: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; that of the adapter merged into it, where there is one."""
    if merge is None:
        return load_tokenizer(path, revision=revision)
    own = Path(merge)
    if any((own / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return load_tokenizer(own)
    tokenizer = load_tokenizer(path, revision=revision)
    template = own / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer
