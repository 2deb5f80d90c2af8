"""A trained adapter becomes part of the weights, and what comes out is compared with what went in.

The model that an adapter was trained as is base + adapter, unmerged. Merging must not change it:

* a matrix that embedding and head share is two matrices once an adapter touches one of them; they
  are separated before merging, and share again only if they are still equal;
* rows that were added for new tokens are taken from the adapter's directory;
* in half precision the sum is made in float32 and rounded once;
* log-probabilities of a few texts before and after must agree, or it is an error.

Left out: adapters that are no change of weights (prompts, prefixes), which are refused.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from kleash.errors import ModelError
from kleash.models.loading import quiet
from kleash.models.lora import compilers_kept, require_peft
from kleash.models.probing import first_lines, own_code, probe_texts, text_logprobs

_WEIGHTS = "adapter_model.safetensors"
_SETTINGS = "adapter_config.json"
MERGING_TOLERANCE = 1e-4
"""Largest difference of log-probabilities that the rounding of a merge may make in float32,
relative to the largest of them (at least 1)."""


def is_adapter(path: str | Path) -> bool:
    """Whether a path is the directory of a peft adapter and not of a whole model."""
    return (Path(path) / _SETTINGS).is_file()


def adapter_settings(directory: str | Path) -> Mapping[str, Any]:
    """An adapter's settings, as peft saved them.

    Raises:
        ModelError: there are none, they cannot be read, or name code to import.
    """
    try:
        found = json.loads((Path(directory) / _SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"expected an adapter saved by peft in {str(directory)!r}, got no {_SETTINGS} that "
            f"can be read: {first_lines(error)}"
        ) from error
    if found.get("megatron_config") is not None:
        raise ModelError(
            f"expected an adapter of plain weights in {str(directory)!r}, got one whose settings "
            "name a module to import (megatron_core): remove megatron_config from it"
        )
    return cast("dict[str, Any]", found)


def merge_adapter(
    model: PreTrainedModel, directory: str | Path, *, words: int | None = None
) -> PreTrainedModel:
    r"""Make a trained adapter part of the weights; for LoRA, W ← W + (alpha/rank)·B·A.

    Args:
        model: the base the adapter was trained on, in float32; changed in place.
        directory: where peft saved it.
        words: the comparison reads tokens below this; None: all rows of the embedding.

    Raises:
        ModelError: there is no adapter in safetensors there, it is for another model, it cannot
            be merged, or the merged model is another than base + adapter.
    """
    if not (Path(directory) / _WEIGHTS).is_file():
        raise ModelError(
            f"expected an adapter saved by peft in {str(directory)!r}, got no {_WEIGHTS} there: "
            "give its directory, with weights as safetensors"
        )
    _require_mergeable(adapter_settings(directory), directory)
    _take_added_rows(model, directory)
    tied = tied_names(model)
    loaded = _load_onto(model, directory)
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    device = next(model.parameters()).device
    include = _trained_tokens(loaded)
    ids = probe_texts(min(words or rows, rows), include=include, device=device)
    before = _unmerged(loaded, ids, rows, directory)
    _separate(model)
    merged = _merged(loaded, directory)
    _share_again(merged, tied)
    with own_code(merged, directory):
        after = text_logprobs(merged, ids, rows)
    require_same(before, after, MERGING_TOLERANCE, f"the adapter in {str(directory)!r}, merged,")
    return merged.eval().requires_grad_(True)  # peft had frozen the base


def require_same(before: torch.Tensor, after: torch.Tensor, tolerance: float, what: str) -> None:
    """Check that two models gave the same log-probabilities.

    Args:
        before: of the model as it is held.
        after: of the model as it would be read.
        tolerance: largest difference, relative to the largest log-probability (at least 1).
        what: the second model, for the message.

    Raises:
        ModelError: if they did not.
    """
    same = before == after
    if before.shape == after.shape and bool(same.all()):
        return
    worst = float(torch.where(same, 0.0, before - after).abs().max())
    finite = before[before.isfinite()].abs()
    largest = max(1.0, float(finite.max()) if finite.numel() else 1.0)
    if not worst <= tolerance * largest:
        raise ModelError(
            f"expected {what} to be the model it stands for, got log-probabilities that differ by "
            f"{worst:.3g} nats (at most {tolerance * largest:.1g}): nothing can be measured on it"
        )


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one and the same, a list for each that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _require_mergeable(settings: Mapping[str, Any], directory: str | Path) -> None:
    kind, peft = settings.get("peft_type"), require_peft()
    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    if kind not in known:
        raise ModelError(
            f"expected an adapter of a kind that peft knows in {str(directory)!r}, got {kind!r}"
        )
    prompts = issubclass(known[kind], peft.PromptLearningConfig)
    if prompts or kind in ("ADAPTION_PROMPT", "XLORA"):
        raise ModelError(
            f"expected an adapter that changes weights in {str(directory)!r}, got {kind}, which "
            "adds inputs to a model and cannot be merged into its weights: take LoRA, DoRA, IA3 "
            "or trainable tokens"
        )


def _take_added_rows(model: PreTrainedModel, directory: str | Path) -> None:
    """Give the model as many rows as the matrices in the adapter's file have.

    Raises:
        ModelError: there are more rows, and not every matrix of them is in the file.
    """
    try:
        with safe_open(Path(directory) / _WEIGHTS, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(_not_for(model, directory, error)) from error
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    head = model.get_output_embeddings()
    rows = embedding.weight.shape[0]
    wanted = {rows}
    missing: list[str] = []
    for module in {id(m): m for m in (embedding, head) if m is not None}.values():
        name = next(n for n, found in model.named_modules() if found is module)
        stored = [
            shape[0]
            for key, shape in shapes.items()
            if key.replace(".base_layer", "").endswith(f".{name}.weight")
        ]
        wanted |= set(stored)
        if not stored and not (module is head and _is_tied(model)):
            missing.append(name)
    wanted -= {rows}
    if not wanted:
        return
    if missing or len(wanted) > 1:
        raise ModelError(
            f"expected the rows of every added token in {str(directory)!r}, got a vocabulary of "
            f"{sorted(wanted)} instead of {rows} and no {' or '.join(missing) or 'one size'}: they "
            "would be random numbers; save the adapter with save_embedding_layers=True"
        )
    with quiet():
        model.resize_token_embeddings(wanted.pop(), mean_resizing=False)


def _is_tied(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)


def _load_onto(model: PreTrainedModel, directory: str | Path) -> Any:
    """The peft model around base + adapter, every tensor of the file in its place.

    Raises:
        ModelError: the adapter is for another model.
    """
    peft = require_peft()
    try:
        with compilers_kept(), quiet(), torch.random.fork_rng(), warnings.catch_warnings():
            # Of ties, and of names on their way out. What matters is checked below.
            warnings.simplefilter("ignore")
            # A key that the model lacks is a warning there; here it is another model's adapter.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            loaded = peft.PeftModel.from_pretrained(model, str(directory))
            unexpected = loaded.load_adapter(str(directory), "default").unexpected_keys
        if unexpected:
            raise ValueError(f"weights that this model has no place for, {unexpected[0]!r}")
    # The adapter's file comes from others, and peft's dozens of tuners raise what they like.
    except Exception as error:
        raise ModelError(_not_for(model, directory, error)) from error
    return loaded.eval()


def _not_for(model: nn.Module, directory: str | Path, error: Exception) -> str:
    reason = first_lines(error) or type(error).__name__
    return f"expected an adapter for {type(model).__name__} in {str(directory)!r}, got: {reason}"


def _trained_tokens(loaded: Any) -> list[int]:
    """Tokens whose rows alone an adapter changes: the comparison must read them."""
    settings = loaded.peft_config["default"]
    found = getattr(settings, "token_indices", None) or []
    more = getattr(settings, "trainable_token_indices", None) or []
    more = [i for ids in more.values() for i in ids] if isinstance(more, dict) else more
    return [int(i) for i in (*found, *more)][:256]


def _unmerged(loaded: Any, ids: torch.Tensor, rows: int, directory: str | Path) -> torch.Tensor:
    """What base + adapter, as it was trained, says of the texts.

    Raises:
        ModelError: it cannot read a text by itself (it waits for the number of a task, say).
    """
    try:
        return text_logprobs(loaded.get_base_model(), ids, rows)
    # Dozens of tuners, each with errors of its own.
    except Exception as error:
        raise ModelError(
            f"expected an adapter that reads a text by itself in {str(directory)!r}, got "
            f"{_kind_of(loaded)}: {type(error).__name__}: {first_lines(error)}"
        ) from error


def _kind_of(loaded: Any) -> str:
    kind = loaded.peft_config["default"].peft_type
    return str(getattr(kind, "value", kind))


def _separate(model: nn.Module) -> None:
    """Give every module parameters of its own."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in seen:
                own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, own)
            seen.add(id(parameter))


def _merged(loaded: Any, directory: str | Path) -> PreTrainedModel:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ties; see `_share_again`
            return cast(PreTrainedModel, loaded.merge_and_unload(safe_merge=True))
    except (NotImplementedError, AttributeError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"expected an adapter that can be merged into weights in {str(directory)!r}, got "
            f"{_kind_of(loaded)}: {first_lines(error) or type(error).__name__}"
        ) from error


def _share_again(model: PreTrainedModel, tied: list[list[str]]) -> None:
    """Let parameters that were one be one again where they are equal; say so where they are not.

    A configuration that still calls them tied would throw one of them away at the next opening.
    """
    apart = False
    for first, *others in tied:
        kept = model.get_parameter(first)
        for name in others:
            if torch.equal(model.get_parameter(name), kept):
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, kept)
            else:
                apart = True
    for config in (model.config, model.config.get_text_config()):
        if tied:
            config.tie_word_embeddings = not apart
