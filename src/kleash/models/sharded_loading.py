"""Opening a divided model, so that no process ever holds more of it than its slices.

The model is made without weights, gets its adapter, and is divided; then each process reads its
slices from the safetensors files. Where the names in the files are not the model's own (weights
that an architecture joins, an adapter merged before training), or the model is a hub name, each
process opens the whole model in main memory first, and keeps its slices.
"""

import contextlib
import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kleash.models.frozen_weights import shrink_frozen
from kleash.models.loading import Attention, Dtype, load_config, quiet, switch_off_dropout
from kleash.models.lora import AdapterSpec, add_adapter
from kleash.models.sharding import (
    Sharding,
    blueprint,
    materialise,
    own,
    own_part,
    shard,
)
from kleash.models.trunk import start


@dataclass(frozen=True, eq=False)
class ShardedModel:
    """A divided model, and what copies of it need."""

    model: PreTrainedModel
    adapter: Any
    structure: nn.Module
    by_slices: bool
    """Whether each process read its slices alone."""


def open_sharded(
    path: str | Path,
    *,
    dtype: Dtype,
    attention: Attention,
    sharding: Sharding,
    whole: Callable[[], PreTrainedModel],
    spec: AdapterSpec | None = None,
    revision: str | None = None,
    merged: bool = False,
    frozen: bool = False,
) -> ShardedModel:
    """Open a causal language model divided.

    Args:
        path: a Hugging Face directory or hub name.
        dtype: of the weights.
        attention: implementation of attention.
        sharding: among whom.
        whole: opens the model in main memory, where slices cannot be read.
        spec: an adapter to put into it; None: none.
        revision: of a hub name.
        merged: whether an adapter is merged into the weights first.
        frozen: whether no weight of it will move; they are then kept as `shrink_frozen` says.

    Raises:
        ModelError: as `loading.load_causal_lm`.
    """
    files = None if merged else weight_files(Path(path))
    model = None
    if files is not None:
        model = _without_weights(path, dtype, attention, revision)
        if model is not None and not fits(model, files):
            model = None
    empty = model is not None
    opened = whole() if model is None else model
    with _stand_ins(opened) if empty else contextlib.nullcontext():
        adapter = None if spec is None else add_adapter(opened, spec, revision=revision)
    if frozen:
        shrink_frozen(opened, sharding.precision)
    structure = blueprint(opened)
    shard(opened, sharding.mesh, precision=sharding.precision)
    materialise(opened, sharding.device)
    if empty:
        read_slices(opened, cast("dict[str, Path]", files))
    start(opened, sharding.device)
    return ShardedModel(opened, adapter, structure, by_slices=empty)


def weight_files(directory: Path) -> dict[str, Path] | None:
    """Which safetensors file of a directory holds each tensor; None: there are no such files."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: directory / file for name, file in names.items()}
    if not single.is_file():
        return None
    with safe_open(single, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), single)


def fits(model: nn.Module, files: Mapping[str, Path]) -> bool:
    """Whether files hold every weight of a model under its own name, and nothing else."""
    known = plain_names(model)
    stored = {id(tensor) for name in files for tensor in known.get(name, ())}
    wanted = {id(tensor) for tensors in known.values() for tensor in tensors}
    return files.keys() <= known.keys() and wanted == stored


def plain_names(model: nn.Module) -> dict[str, list[Tensor]]:
    """The weights of a model under the names they have without an adapter, whose own are left out.

    A module that is trained whole beside an adapter has two of each: its original and the copy.
    """
    found: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if "lora_" not in name:
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            found.setdefault(plain.replace(".modules_to_save.default", ""), []).append(tensor)
    return found


@torch.no_grad()
def read_slices(
    model: nn.Module, files: Mapping[str, Path], wanted: Mapping[str, list[Tensor]] | None = None
) -> None:
    """Fill a divided model from files, of which each process reads its slices alone.

    Args:
        model: with memory for its slices.
        files: which file holds each tensor.
        wanted: the weights by their names in the files; by default the plain names.
    """
    known = plain_names(model) if wanted is None else wanted
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                for tensor in known.get(name, ()):
                    scalar = tensor.dim() == 0
                    source = opened.get_tensor(name) if scalar else opened.get_slice(name)
                    own(tensor).copy_(own_part(tensor, source))


def _without_weights(
    path: str | Path, dtype: Dtype, attention: Attention, revision: str | None
) -> PreTrainedModel | None:
    """A model whose weights lie on the meta device and whose buffers are real."""
    config = load_config(path, revision=revision)
    kind = config.dtype if dtype == "auto" else getattr(torch, dtype)
    how = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        with quiet(), weights_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=kind, **how)
    # The code of several hundred architectures; opening the whole model says what is wrong.
    except Exception:
        return None
    switch_off_dropout(model)
    return cast(PreTrainedModel, model)


@contextlib.contextmanager
def weights_on_meta() -> Generator[None]:
    """Weights of modules that are made inside go to the meta device; buffers do not."""
    register: Callable[..., None] = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            held = cast(Any, self)._parameters
            held[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@contextlib.contextmanager
def _stand_ins(model: nn.Module) -> Generator[None]:
    """Weights that have a device and a shape but no memory, for an adapter that looks at them.

    An adapter's own weights are drawn as beside real ones: on the meta device they would not be.
    """
    before = {id(p): p for p in model.parameters() if p.is_meta}
    names = list(_places(model))
    filled: dict[int, nn.Parameter] = {}
    for module, name, parameter in names:
        if id(parameter) in before:
            zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            stand_in = filled.setdefault(id(parameter), nn.Parameter(zero, parameter.requires_grad))
            cast(Any, module)._parameters[name] = stand_in
    back = {id(stand_in): before[key] for key, stand_in in filled.items()}
    try:
        yield
    finally:
        for module, name, parameter in list(_places(model)):
            if id(parameter) in back:
                empty = back[id(parameter)].requires_grad_(parameter.requires_grad)
                cast(Any, module)._parameters[name] = empty
            elif parameter.stride() != parameter.contiguous().stride() or 0 in parameter.stride():
                # A copy of a stand-in, made for a module that is trained whole.
                copied = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
                cast(Any, module)._parameters[name] = copied


def _places(model: nn.Module) -> Generator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in cast(Any, module)._parameters.items():
            if parameter is not None:
                yield module, name, parameter
