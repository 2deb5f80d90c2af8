"""What may be audited: a path, a hub name, a `Policy`, or a loaded model with its tokenizer.

A model object stays its owner's: it is read as it is (dtype, device, adapter switched on) and given
back in the mode it came in.
"""

import contextlib
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.auditing.model_pair import ModelPair, comparable_pair, open_checkpoint
from kleash.auditing.options import IN_MEMORY, AuditDtype
from kleash.auditing.served_policy import ServedModel
from kleash.errors import ModelError
from kleash.models.fingerprint import weights_sha256
from kleash.models.lm_head import check_causal, check_head, read_head
from kleash.models.loading import number_of_words, require_special_tokens, stop_ids
from kleash.models.policy import Identity, Policy

LoadedModel = tuple[Any, Any]
"""A transformers or PEFT model and its tokenizer."""
ModelSource = str | Path | Policy | LoadedModel


@contextlib.contextmanager
def opened_pair(
    policy: ModelSource, reference: ModelSource, *, dtype: AuditDtype, device: str | None
) -> Generator[ModelPair]:
    """Both models, ready to be compared; model objects are in evaluation mode inside.

    Args:
        policy: a Hugging Face directory or hub name, the directory of an adapter, a `Policy`, or
            a transformers or PEFT model with its tokenizer.
        reference: the same.
        dtype: of the models that are opened; objects are read as they are.
        device: where to open; None: where a model object is, else "cpu".

    Raises:
        ModelError: if a model cannot be used, or the two have different tokens.
    """
    place = device or next(
        (str(found) for found in map(_device, (policy, reference)) if found is not None), "cpu"
    )
    with contextlib.ExitStack() as stack:
        models = [
            open_checkpoint(source, dtype=dtype, device=place)
            if isinstance(source, str | Path)
            else stack.enter_context(_borrowed(source))
            for source in (policy, reference)
        ]
        if models[0].device != models[1].device:
            raise ModelError(
                f"expected both models on one device, got {models[0].device} and "
                f"{models[1].device}: move one of them"
            )
        for one in models:
            if isinstance(one.model, ServedModel):
                stack.callback(one.model.engine.close)
        yield comparable_pair(*models)


def identity_of(model: Policy) -> Identity:
    """Which model exactly, the adapter that it is read with included."""
    if isinstance(model.model, ServedModel):
        return model.model.identity
    identity = model.identity()
    if model.adapter is not None:
        weights = model.model.named_parameters()
        identity = replace(identity, how="with its adapter", sha256=weights_sha256(weights))
    return replace(identity, how=IN_MEMORY) if model.path.endswith(_SUFFIX) else identity


_SUFFIX = f" ({IN_MEMORY})"


@contextlib.contextmanager
def _borrowed(source: Policy | LoadedModel) -> Generator[Policy]:
    model = source.model if isinstance(source, Policy) else _pair_of(source)[0]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield source if isinstance(source, Policy) else _policy_of(*_pair_of(source))
    finally:
        for module in training:
            module.training = True


def _pair_of(source: LoadedModel) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    match source:
        case (nn.Module() as model, PreTrainedTokenizerBase() as tokenizer):
            return model, tokenizer
        case _:
            got = cast(object, source)
            raise ModelError(
                "expected a path, a hub name, or a model with its tokenizer as (model, tokenizer), "
                f"got {type(got).__name__}"
            )


def _policy_of(given: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Policy:
    adapters = cast("dict[str, Any]", getattr(given, "peft_config", {}))
    wrapped = given if callable(getattr(given, "get_base_model", None)) else None
    model = given if wrapped is None else cast(Any, wrapped).get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"expected a transformers or PEFT model, got {type(given).__name__}: give the model "
            "that it wraps"
        )
    name = f"{model.config.name_or_path or type(model).__name__}{_SUFFIX}"
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        raise ModelError(
            f"expected an adapter of weights in {name!r}, got {type(given).__name__} that puts "
            "learnt states before the text, which cannot be scored here: give a LoRA-like adapter"
        )
    _refuse_adapted_head(model, name)
    require_special_tokens(tokenizer, name)
    words = number_of_words(tokenizer, read_head(model, 1).weight.shape[0], name)
    check_causal(model.base_model, name)
    check_head(model, read_head(model, words), name)
    return Policy(
        model=model,
        tokenizer=tokenizer,
        path=name,
        words=words,
        stop_ids=stop_ids(model, tokenizer),
        adapter=wrapped,
    )


def _refuse_adapted_head(model: PreTrainedModel, name: str) -> None:
    head = model.get_output_embeddings()
    adapted = hasattr(head, "base_layer") or hasattr(head, "modules_to_save")
    if adapted:
        raise ModelError(
            f"expected a head that is one matrix in {name!r}, got one with an adapter on it: merge "
            "it first (merge_and_unload), or give the directory of the adapter"
        )


def _device(source: ModelSource) -> torch.device | None:
    match source:
        case Policy():
            return source.device
        case (nn.Module() as model, _):
            return next((p.device for p in model.parameters()), None)
        case _:
            return None
