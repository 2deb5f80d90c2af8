"""A policy on the disk: what plain transformers and peft open there is the policy that was held.

    all weights trained        the model
    an adapter                 the adapter, whose settings name the base (its absolute path)
    an adapter on an adapter   the whole model, both adapters in its weights, because no adapter
                               alone can say "base + the other adapter"; beside it, for resuming,
                               the tensors of the new adapter in `adapter_state/`

In half precision the third is written in float32: rounding would lose most of a small adapter.

Every checkpoint is verified. The first of a process is opened with plain transformers and peft, in
main memory, and the log-probabilities of a few texts are compared with those of the policy that is
held. That costs a second copy of the model for some seconds. Later ones differ in their numbers
alone, so only these are compared, tensor by tensor, with what is held. Where an architecture stores
its tensors under other names, or two adapters were put into one model, each is opened.
"""

import importlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kleash.errors import ModelError, RunError
from kleash.mesh import Mesh
from kleash.models.lm_head import as_scored
from kleash.models.loading import load_config, quiet, switch_off_dropout
from kleash.models.merging import MERGING_TOLERANCE, is_adapter, require_same
from kleash.models.precision import Precision
from kleash.models.probing import first_lines, probe_texts, text_logprobs
from kleash.models.quantization import (
    compute_in,
    opening,
    quantised_layers,
    save_settings,
    stored_settings,
)
from kleash.models.sharded_loading import fits, read_slices, weight_files
from kleash.models.sharding import gather_ends, is_sharded, own, own_part, release, whole

_STATE = Path("adapter_state") / "adapter.safetensors"
_SAME, _OTHER_DEVICE, _ROUNDED = 1e-5, 1e-3, 2e-2
"""Largest differences of log-probabilities, relative to the largest of them (at least 1): of one
arithmetic, of another device's, and of half precision against float32."""
_OPENED: WeakSet[nn.Module] = WeakSet()
"""Models whose first checkpoint was opened and found right."""


def save_policy(
    directory: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    words: int,
    adapter: Any = None,
    base: str = "",
    merged: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a policy in Hugging Face format, as safetensors, and verify what was written.

    Args:
        directory: where to; made if missing.
        model: the language model, an adapter's layers in it if there is one.
        tokenizer: its tokenizer.
        words: token ids that stand for text.
        adapter: the peft model around it; None: all weights are the policy's own.
        base: path or hub name of the base, where there is an adapter.
        merged: whether another adapter was merged into the base before.
        tensors: of a divided model, its weights as `gather_weights` put them together.

    Raises:
        ModelError: what was written does not open as the policy that is held.
    """
    directory = Path(directory)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties and names; what was written is verified
        if adapter is None:
            model.save_pretrained(directory, state_dict=None if tensors is None else dict(tensors))
        elif merged:
            _merged_copy(model).save_pretrained(directory)
            (directory / _STATE).parent.mkdir(parents=True, exist_ok=True)
            save_file(_adapter_tensors(adapter), directory / _STATE)
        else:
            settings = adapter.peft_config["default"]
            settings.base_model_name_or_path = _findable(base)
            adapter.save_pretrained(
                str(directory),
                save_embedding_layers=False,
                state_dict=None if tensors is None else dict(tensors),
            )
            cast(Any, model.generation_config).save_pretrained(directory)
            save_settings(model, directory)
        tokenizer.save_pretrained(str(directory))
    if tensors is None:
        verify_policy(directory, model, words=words, adapter=adapter)


def gather_weights(model: PreTrainedModel, adapter: Any, *, keep: bool) -> dict[str, Tensor]:
    """The weights of a divided policy, whole and in main memory; all processes together.

    Each is gathered by itself, so that no device holds more than one of them.

    Args:
        model: the language model.
        adapter: the peft model around it, whose base is left out; None: all weights.
        keep: whether this process keeps them; the others only take part.

    Returns:
        By the names of the model's own state; nothing where they are not kept.
    """
    release(model)
    held = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if adapter is None or "lora_" in name or ".modules_to_save." in name
    }
    found: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, tensor in held.items():
        if id(tensor) not in copies:
            full = whole(tensor.detach())
            copies[id(tensor)] = full.cpu() if keep else full.new_empty(0)
            del full
        found[name] = copies[id(tensor)]
    if not keep:
        return {}
    # Names as peft sees them from around the model.
    inside = "" if adapter is None else "base_model.model."
    return {f"{inside}{name}": tensor for name, tensor in found.items()}


def verify_sharded(
    directory: Path,
    model: PreTrainedModel,
    mesh: Mesh,
    *,
    words: int,
    precision: Precision = "float32",
) -> None:
    """As `verify_policy`, of a divided model; only its first checkpoint is opened and compared.

    Both are read in the precision of the run: layers that are gathered in bfloat16 compute in
    nothing else, and plain transformers under autocast rounds the same factors.

    Args:
        directory: what was written.
        model: the divided model.
        mesh: the processes; each of them takes part.
        words: token ids that stand for text.
        precision: in which the model computes.

    Raises:
        ModelError: what was written does not open as the policy that is held, in every process.
    """
    if model in _OPENED:
        return
    ids = probe_texts(words)
    device, dtype = next(model.parameters()).device, _dtype(model)
    gather_ends(model)
    with as_scored(model, precision):
        ours = text_logprobs(model, ids.to(device), words)
    release(model)

    def compare() -> None:
        opened = _open(directory, model)
        with as_scored(opened, precision):
            theirs = text_logprobs(opened, ids, words)
        half = precision == "bf16" or dtype in (torch.bfloat16, torch.float16)
        tolerance = _SAME if device.type == "cpu" else _ROUNDED if half else _OTHER_DEVICE
        what = f"the checkpoint in {str(directory)!r}, opened with plain transformers,"
        require_same(ours, theirs, tolerance, what)

    mesh.agree(lambda: compare() if mesh.is_first else None)
    _OPENED.add(model)


def verify_policy(
    directory: Path, model: PreTrainedModel, *, words: int, adapter: Any = None
) -> None:
    """Check that what is in a directory is the policy that is held; see the top of this file.

    Raises:
        ModelError: it is not, or it does not open.
    """
    whole = not is_adapter(directory)
    held = model.state_dict() if adapter is None else _adapter_tensors(adapter)
    merged = adapter is not None and whole
    known = _compare_tensors(directory / _STATE if merged else directory, held)
    if model in _OPENED and known and not merged:
        return
    _compare_opened(directory, model, words=words, merged=merged)
    _OPENED.add(model)


def restore_policy(directory: Path, model: PreTrainedModel, *, adapter: Any = None) -> None:
    """Give a policy the weights that `save_policy` wrote.

    Raises:
        RunError: the directory holds another model, or cannot be read.
    """
    if is_sharded(model):
        _restore_sharded(directory, model, adapter)
        return
    source = directory / _STATE if (directory / _STATE).is_file() else None
    files = sorted(directory.glob("*.safetensors")) if source is None else [source]
    device = str(next(model.parameters()).device)
    tensors: dict[str, Tensor] = {}
    try:
        for file in files:
            tensors |= load_file(file, device=device)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{directory} cannot be read: {first_lines(error)}") from error
    if adapter is not None:
        expected = _adapter_tensors(adapter)
        _require_names(directory, expected.keys() - tensors.keys(), tensors.keys() - expected)
        importlib.import_module("peft").set_peft_model_state_dict(adapter, tensors)
        return
    known = model.state_dict(keep_vars=True)
    if not tensors.keys() <= known.keys() and (directory / "config.json").is_file():
        # Some architectures store their tensors under other names, which opening translates.
        tensors = dict(_open(directory, model).state_dict())
    # Tied weights are stored once, under one of their names.
    stored = {known[name].data_ptr() for name in tensors if name in known}
    missing = {name for name, tensor in known.items() if tensor.data_ptr() not in stored}
    _require_names(directory, missing, tensors.keys() - known.keys())
    model.load_state_dict(tensors, strict=False)


def _restore_sharded(directory: Path, model: PreTrainedModel, adapter: Any) -> None:
    """Each process reads its slices of what `save_policy` wrote."""
    release(model)
    state = directory / _STATE
    try:
        if adapter is not None:
            file = state if state.is_file() else directory / "adapter_model.safetensors"
            with safe_open(file, framework="pt") as opened:
                files = dict.fromkeys(opened.keys(), file)
            wanted = {name: [t] for name, t in adapter_parameters(adapter).items()}
            _require_names(directory, wanted.keys() - files.keys(), files.keys() - wanted.keys())
            read_slices(model, files, wanted)
            return
        files = weight_files(directory) or {}
        if fits(model, files):
            read_slices(model, files)
        else:
            _copy_slices(directory, model, _open(directory, model))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{directory} cannot be read: {first_lines(error)}") from error


@torch.no_grad()
def _copy_slices(directory: Path, model: PreTrainedModel, opened: PreTrainedModel) -> None:
    """For architectures whose files have names that opening translates."""
    known, theirs = model.state_dict(keep_vars=True), opened.state_dict()
    _require_names(directory, known.keys() - theirs.keys(), theirs.keys() - known.keys())
    for name, tensor in known.items():
        own(tensor).copy_(own_part(tensor, theirs[name]))


def adapter_parameters(adapter: Any) -> dict[str, Tensor]:
    """An adapter's own parameters by the names in its file."""
    return dict(
        importlib.import_module("peft").get_peft_model_state_dict(
            adapter,
            state_dict=adapter.state_dict(keep_vars=True),
            save_embedding_layers=False,
        )
    )


def _require_names(directory: Path, missing: set[str], unknown: set[str]) -> None:
    if missing or unknown:
        raise RunError(
            f"{directory} holds another model: weights missing {sorted(missing)[:3]}, unknown "
            f"{sorted(unknown)[:3]}"
        )


def _findable(base: str) -> str:
    """A base's path from everywhere; a hub name as it is."""
    return str(Path(base).resolve()) if Path(base).exists() else base


def _adapter_tensors(adapter: Any) -> dict[str, Tensor]:
    """An adapter's tensors under the names of its file."""
    state = importlib.import_module("peft").get_peft_model_state_dict(
        adapter, save_embedding_layers=False
    )
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


@torch.no_grad()
def _merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model in main memory, the adapter in its weights; the held one is not touched."""
    tensors: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    layers = dict(model.named_modules())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if "lora_" in name or ".original_module." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        layer: Any = layers.get(name.rpartition(".base_layer.")[0])
        if layer is not None and name.endswith(".base_layer.weight"):
            delta = layer.get_delta_weight("default")
            tensors[plain] = (_whole(tensor) + _whole(delta)).cpu()
        else:
            # A tied matrix that no adapter touches stays one.
            tensors[plain] = copies.setdefault(id(tensor), _whole(tensor).cpu())
    config = model.config.__class__.from_dict(model.config.to_dict())
    head, embedding = _names_of_ends(model)
    if head in tensors and embedding in tensors:
        apart = tensors[head].data_ptr() != tensors[embedding].data_ptr()
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = part.tie_word_embeddings and not apart
    with torch.device("meta"):
        copy = type(model)(config)
    copy.load_state_dict(tensors, strict=False, assign=True)
    copy.generation_config = model.generation_config
    copy.tie_weights()
    copy.config.dtype = next(copy.parameters()).dtype
    return copy


def _names_of_ends(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the head's and the embedding's matrices without an adapter."""
    found: list[str] = []
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        found.append(next(name for name, one in model.named_modules() if one is module))
    return f"{found[0]}.weight", f"{found[1]}.weight"


def _whole(tensor: Tensor) -> Tensor:
    """In float32, if it was in half precision."""
    own = tensor.detach()
    return own.float() if own.dtype in (torch.bfloat16, torch.float16) else own


def _compare_tensors(source: Path, held: Mapping[str, Tensor]) -> bool:
    """Compare files with what is held, tensor by tensor; False: they use other names.

    Raises:
        ModelError: a tensor differs or is missing.
    """
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    stored: set[int] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name not in held:
                    return False
                ours = held[name].detach()
                if not torch.equal(opened.get_tensor(name), ours.cpu()):
                    raise ModelError(
                        f"expected the weights that are held in {str(file)!r}, got other numbers "
                        f"for {name!r}: the checkpoint is not the trained model"
                    )
                stored.add(ours.data_ptr())
    missing = [name for name, ours in held.items() if ours.data_ptr() not in stored]
    if missing:
        raise ModelError(
            f"expected every weight that is held in {str(source)!r}, got none for {missing[0]!r}: "
            "the checkpoint is not the trained model"
        )
    return True


def _compare_opened(directory: Path, model: PreTrainedModel, *, words: int, merged: bool) -> None:
    ids = probe_texts(words)
    device, dtype = next(model.parameters()).device, _dtype(model)
    ours = text_logprobs(model, ids.to(device), words)
    theirs = text_logprobs(_open(directory, model, merged=merged), ids, words)
    tolerance = MERGING_TOLERANCE if merged else _SAME
    if device.type != "cpu":
        tolerance = _OTHER_DEVICE
    if dtype in (torch.bfloat16, torch.float16) and (merged or device.type != "cpu"):
        tolerance = _ROUNDED
    what = f"the checkpoint in {str(directory)!r}, opened with plain transformers,"
    require_same(ours, theirs, tolerance, what)


def _open(directory: Path, like: PreTrainedModel, *, merged: bool = False) -> PreTrainedModel:
    """Open a directory as anyone would, with the attention and dtype of the model that is held."""
    settings: dict[str, Any] = {
        "dtype": torch.float32 if merged else _dtype(like),
        "attn_implementation": cast(Any, like.config)._attn_implementation,
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    try:
        with quiet(), warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            if is_adapter(directory):
                made = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
                path, revision = made["base_model_name_or_path"], made.get("revision") or "main"
                base = _open_base(path, revision, like, settings)
                peft = importlib.import_module("peft")
                opened = peft.PeftModel.from_pretrained(base, str(directory)).get_base_model()
            else:
                opened = AutoModelForCausalLM.from_pretrained(str(directory), **settings)
    # Whatever it is that stops a checkpoint from being opened, the checkpoint is no use.
    except Exception as error:
        raise ModelError(
            f"expected a checkpoint that opens in {str(directory)!r}, got "
            f"{type(error).__name__}: {first_lines(error)}"
        ) from error
    switch_off_dropout(opened)
    return cast(PreTrainedModel, opened)


def _open_base(
    path: str, revision: str, like: PreTrainedModel, settings: Mapping[str, Any]
) -> PreTrainedModel:
    """The base of an adapter, quantised as that of the model that is held."""
    layer = next((layer for _, layer in quantised_layers(like)), None)
    if layer is None:
        return AutoModelForCausalLM.from_pretrained(path, revision=revision, **settings)
    config = load_config(path, revision=None if Path(path).is_dir() else revision)
    how = opening(
        cast(Any, like.config).quantization_config.to_dict(),
        stored=stored_settings(config, path) is not None,
        device="cpu",
        compute=layer.compute_dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(path, revision=revision, **settings, **how)
    compute_in(base, layer.compute_dtype)
    return base


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the weights, those of an adapter and quantised ones left out."""
    return next(
        p.dtype
        for name, p in model.named_parameters()
        if "lora_" not in name and p.is_floating_point()
    )
