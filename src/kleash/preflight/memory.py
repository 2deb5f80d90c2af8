"""What a run needs of each device and of the network, from the model's configuration alone.

Weights, gradients and moments are counted on a model without storage. Activations are measured on
tensors that have shapes and no numbers: forward and backward of two small depths run as they would,
every storage is followed from its making to its end, and the rest of the depth is added by the
slope. What the KL over the vocabulary, the sampler and the engines of several processes take is
counted from their shapes. Left out: what the libraries themselves take (about 0.4 GiB on a CPU,
1 GiB with a CUDA context), fragmentation, and the reward models.

Under FSDP, for layers of L numbers and ends (embedding, last norm, head) of E, N processes:

    a whole pass       E of the policy, of the reference and of the critic; the head's gradient
    a layer's forward  L gathered, and L in the buffer it came in
    a layer's backward L gathered, L in the next one's buffer; the gradient of L, and that of the
                       layer before in the buffer of its sum
    the pass's end     the gradients of E, twice: as they were made, and in the buffer of their sum
    writing            everything
"""

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from kleash.mesh import BUCKET_BYTES
from kleash.models.lora import AdapterSpec, add_adapter
from kleash.models.precision import Precision, computing, weights_dtype
from kleash.models.quantization import BITS
from kleash.models.recomputation import enable_recomputation, recomputing
from kleash.models.sharding import repeated_layers
from kleash.models.trunk import trunk_of
from kleash.models.writing_products import LEAST_TOKENS, MOST_ROWS
from kleash.scoring.tiles import default_tiles
from kleash.training.optimizers import OptimizerName

Strategy = Literal["none", "ddp", "fsdp"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SAMPLED_WORD = 28
"""Bytes a word of the vocabulary and row while a token is drawn: logits twice in float32, their
exponentials, and what `rollout.sampling` makes of them (float32 twice, float64 sums, a choice)."""


@dataclass(frozen=True)
class Workload:
    """What memory depends on beside the model's shape."""

    precision: Precision = "float32"
    optimizer: OptimizerName = "adamw"
    gradient_checkpointing: bool = False
    adapter: AdapterSpec | None = None
    reference: bool = True
    """Whether the reference is a copy on the device; not with an adapter off, nor offloaded."""
    quantized: bool = False
    """Whether the linear layers under the adapter are in 4 bits."""
    quantized_reference: bool = False
    """The same of the reference."""
    update_reads_reference: bool = True
    """Whether the loss differentiates the KL to it; scoring alone reads it otherwise."""
    critic: bool = False
    """Whether a value model of the policy's size is trained beside it."""
    update_rows: int = 8
    """Responses read at once in the update."""
    rollout_rows: int = 64
    """Responses written at once; 0: something else writes them."""
    prompt_tokens: int = 256
    response_tokens: int = 256
    keep_logits: int = 0
    """Bytes of logits kept for backward (`algorithm.keep_logits_mib`)."""
    microbatches: int = 2
    """Backward passes of an optimiser step: from the second on gradients lie there."""
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def tokens(self) -> int:
        """Of one row at its longest."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, and bytes where types are mixed."""

    parameters: int
    trainable: int
    weight_bytes: int
    """In the types that training keeps them in."""
    trainable_bytes: int
    layers: int
    largest_layer: int
    """Parameters of the largest decoder layer: what FSDP gathers at once."""
    linear: int
    """Parameters in linear layers of the trunk, an adapter's left out: what is quantised."""
    largest_matrix: int
    """Parameters of the largest of them, which is whole for a moment where it is quantised."""
    layer_trainable: int
    """Those of them that are trained."""
    outside: int
    """Parameters outside the decoder layers, which FSDP gathers for a whole pass."""
    outside_trainable: int
    """Those of them that are trained."""
    vocab: int
    hidden: int
    cache_numbers: int
    """Keys and values of one token in all layers."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, at the highest point of each act of a step."""

    weights: int
    gradients: int
    """Held from the first backward pass of an optimiser step until it is made."""
    optimizer: int
    reference: int
    critic: int
    """Its weights and moments; its gradients are among the others."""
    gathered: int
    """What FSDP has whole from a pass's beginning to its end: ends, and the head's gradient."""
    layers: int
    """What FSDP has whole while it goes backwards through a layer; of 4 bits a matrix."""
    activations: int
    """What the update's forward pass keeps for its backward pass."""
    backward: int
    """What a layer's backward pass holds beside it."""
    rounded: int
    """Matrices that autocast rounded and keeps until the forward pass is over."""
    head: int
    """Tiles of logits, hidden states and their gradients."""
    generation: int
    """Keys, values, logits and weights to write with, while nothing of the update is there."""
    scoring: int
    """Ends of all models, a layer and tiles, while responses are read before the update."""
    exchange: int
    """Whole gradients and the buffer of their sum, when the update's activations are gone."""
    accumulated: int
    """Of `gradients`, those that are there at the update's highest point."""

    @property
    def steady(self) -> int:
        """What stays from step to step; gradients are given back after each update."""
        return self.weights + self.optimizer + self.reference + self.critic

    @property
    def peak(self) -> int:
        """The highest point: of the update, of its end, or of the writing."""
        inside = max(self.layers + self.backward, self.head, self.rounded)
        update = self.accumulated + self.gathered + self.activations + inside
        end = self.gradients + self.exchange
        return self.steady + max(update, end, self.scoring, self.generation)


def predict(
    model_config: PretrainedConfig,
    load: Workload,
    *,
    strategy: Strategy = "none",
    world_size: int = 1,
) -> Memory:
    """Bytes of each device.

        fsdp: (weights + gradients + moments + reference) / N + what is gathered at a moment
        ddp:  all of it on each, and a bucket of gradients while they are exchanged

    Args:
        model_config: of the model; its weights are not needed.
        load: the run.
        strategy: how processes share.
        world_size: their number.

    Raises:
        ValueError: several processes that share nothing, or fewer than one.
    """
    if world_size < 1 or (strategy == "none" and world_size > 1):
        raise ValueError(f"expected ddp or fsdp for several processes, got {world_size} of them")
    size = model_size(model_config, load)
    divided = strategy == "fsdp"
    shards = world_size if divided else 1
    gradients, critic = size.trainable_bytes, 0
    if load.critic:
        whole = model_size(model_config, replace(load, adapter=None, quantized=False))
        critic = whole.weight_bytes + _moment_bytes(whole, load)
        gradients += whole.trainable_bytes
    kept, backward = activation_bytes(model_config, load, gathered=divided)
    head = _head_bytes(size, load)
    return Memory(
        weights=size.weight_bytes // shards,
        gradients=gradients // shards,
        optimizer=_moment_bytes(size, load) // shards,
        reference=_reference_bytes(size, load) // shards,
        critic=critic // shards,
        gathered=_pass_bytes(size, load, update=True) if divided else 0,
        layers=_layer_bytes(size, load, divided=divided),
        # The critic has the policy's shape, and both wait for one backward pass.
        activations=kept * (2 if load.critic else 1),
        backward=backward,
        rounded=0 if divided else _autocast_bytes(size, load) * load.gradient_checkpointing,
        # The last layer's gathering is kept until something else is gathered.
        head=head + (size.largest_layer * _width(load) if divided else 0),
        generation=_generation_bytes(size, load, divided=divided),
        scoring=_pass_bytes(size, load, update=False) + 2 * size.largest_layer * _width(load) + head
        if divided
        else head,
        exchange=_exchange_bytes(size, load, strategy, world_size),
        accumulated=gradients // shards if load.microbatches > 1 else 0,
    )


def model_size(model_config: PretrainedConfig, load: Workload) -> ModelSize:
    """Count a model that has shapes and no storage."""
    with torch.device("meta"):
        model = _build(model_config, load)
    trunk = trunk_of(model)
    layers = [m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer)]
    outer = [one for one in layers if not any(one is not o and one in o.modules() for o in layers)]
    sizes = [_numbers(one.parameters()) for one in outer]
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    trainable = [p for p in model.parameters() if p.requires_grad]
    learning = [_numbers(p for p in one.parameters() if p.requires_grad) for one in outer]
    linear = [
        module.weight
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "lora_" not in name
    ]
    saved = sum(p.numel() * (p.itemsize - BITS / 8) for p in linear) if load.quantized else 0
    depth = int(text.num_hidden_layers)
    return ModelSize(
        parameters=_numbers(model.parameters()),
        trainable=_numbers(trainable),
        weight_bytes=sum(p.numel() * p.itemsize for p in model.parameters()) - int(saved),
        trainable_bytes=sum(p.numel() * p.itemsize for p in trainable),
        layers=depth,
        largest_layer=max(sizes, default=0),
        linear=_numbers(linear),
        largest_matrix=max((p.numel() for p in linear), default=0),
        layer_trainable=max(learning, default=0),
        outside=_numbers(model.parameters()) - sum(sizes),
        outside_trainable=_numbers(trainable) - sum(learning),
        vocab=int(text.vocab_size),
        hidden=int(text.hidden_size),
        cache_numbers=2 * depth * kept * width,
    )


def _numbers(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def activation_bytes(
    model_config: PretrainedConfig, load: Workload, *, gathered: bool = False
) -> tuple[int, int]:
    """Bytes that the forward pass of a microbatch keeps, and most bytes that backward adds.

    Args:
        model_config: of the model.
        load: the run.
        gathered: whether FSDP gathers the layers, with `bf16` in bfloat16: autocast then makes no
            rounded copies of their matrices, which are kept with the activations otherwise.
    """
    depth = int(model_config.get_text_config().num_hidden_layers)
    few, more = 2, 3
    if depth <= more:
        kept, peak = _measured(model_config, load, gathered)
        return kept, peak - kept
    kept, peak = _measured(_of_depth(model_config, few), load, gathered)
    slope = _measured(_of_depth(model_config, more), load, gathered)[0] - kept
    return kept + (depth - few) * slope, peak - kept


def _measured(model_config: PretrainedConfig, load: Workload, gathered: bool) -> tuple[int, int]:
    """Bytes kept after the forward pass, and most bytes at once, of tensors without numbers."""
    with torch.device("meta"):
        trunk = trunk_of(_build(model_config, load))
    if gathered and load.precision == "bf16":
        for parameter in (p for layer in repeated_layers(trunk) for p in layer.parameters()):
            parameter.data = parameter.data.bfloat16() if parameter.dim() > 1 else parameter.data
    with FakeTensorMode(allow_non_fake_inputs=True):
        _place_on_cpu(trunk)
        if load.gradient_checkpointing:
            enable_recomputation(trunk)
        for parameter in trunk.parameters():
            # They are counted apart, and there from the second microbatch on.
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        width = int(model_config.get_text_config().hidden_size)
        shape = (load.update_rows, load.tokens)
        dtype = next(trunk.parameters()).dtype
        embedded = torch.zeros(*shape, width, dtype=dtype, requires_grad=True)
        inputs: dict[str, Any] = {
            "inputs_embeds": embedded,
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "use_cache": False,
        }
        there = [t for p in trunk.parameters() for t in (p, p.grad) if t is not None]
        with _LiveStorages([*there, *trunk.buffers(), embedded, *inputs.values()]) as live:
            with computing(embedded.device, load.precision), recomputing(trunk):
                states = trunk(**inputs)[0]
            kept = live.now
            states.backward(torch.ones_like(states))
        return kept, live.peak


def _place_on_cpu(trunk: nn.Module) -> None:
    """Give parameters and buffers a device to compute on; under a fake mode still no numbers."""
    made: dict[int, Any] = {}
    for module in trunk.modules():
        for named in cast(Any, (module._parameters, module._buffers)):  # pyright: ignore[reportPrivateUsage]
            for name, tensor in named.items():
                if tensor is not None and id(tensor) not in made:
                    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
                    learns = tensor.requires_grad
                    made[id(tensor)] = (
                        nn.Parameter(zeros, requires_grad=learns)
                        if isinstance(tensor, nn.Parameter)
                        else zeros
                    )
                if tensor is not None:
                    named[name] = made[id(tensor)]


class _LiveStorages(TorchDispatchMode):
    """Follows the bytes of every storage made within."""

    def __init__(self, there: Iterable[object]) -> None:
        """Follow all but the tensors that are there already, of which there may be views."""
        super().__init__()
        self.now = self.peak = 0
        self._there = [t.untyped_storage() for t in there if isinstance(t, Tensor)]
        self._known = {id(storage) for storage in self._there}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _build(model_config: PretrainedConfig, load: Workload) -> PreTrainedModel:
    dtype = _DTYPES[weights_dtype(load.precision, frozen=_frozen(load))]
    made = cast(Any, AutoModelForCausalLM).from_config(copy.deepcopy(model_config), dtype=dtype)
    model = cast(PreTrainedModel, made)
    if load.adapter is not None:
        add_adapter(model, load.adapter)
    return model.eval()


def _of_depth(model_config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with fewer layers; where kinds of layers take turns, the first of them."""
    shallow = copy.deepcopy(model_config)
    text = shallow.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shallow


def gathered_bytes(size: ModelSize, load: Workload) -> int:
    """Bytes of the whole model as FSDP gathers it: layers in the type that they compute in."""
    return (size.parameters - size.outside) * _width(load) + _outside_bytes(size, load)


def _width(load: Workload) -> int:
    """Bytes of a number that is computed with."""
    return 4 if load.precision == "float32" else 2


def _outside_bytes(size: ModelSize, load: Workload) -> int:
    """Embedding, last norm and head, which are gathered in their own type."""
    return size.outside * _DTYPES[weights_dtype(load.precision, frozen=_frozen(load))].itemsize


def _pass_bytes(size: ModelSize, load: Workload, *, update: bool) -> int:
    """What FSDP gathers once for a pass: ends; in an update the gradient of a head is whole too."""
    found = _outside_bytes(size, load) * (1 + load.critic)
    if load.reference and (load.update_reads_reference or not update):
        found += _outside_bytes(size, load)
    if update and size.outside_trainable >= size.vocab * size.hidden:
        width = _DTYPES[weights_dtype(load.precision, frozen=_frozen(load))].itemsize
        found += width * size.vocab * size.hidden
    return found


def _layer_bytes(size: ModelSize, load: Workload, *, divided: bool) -> int:
    """A layer, the next one's buffer, the layer's gradients, and the buffer of the last sum."""
    width = _width(load)
    if not divided:
        # What four bits stand for is made for one product at a time.
        return size.largest_matrix * width if load.quantized else 0
    return 2 * size.largest_layer * width + size.layer_trainable * (width + 4)


def _exchange_bytes(size: ModelSize, load: Workload, strategy: Strategy, world_size: int) -> int:
    if world_size == 1 or strategy == "none":
        return 0
    if strategy == "ddp":
        return min(size.trainable_bytes, BUCKET_BYTES)
    # As they were made and in the buffer, in float32, while the other models' ends are still there.
    sums = 2 * 4 * size.outside_trainable
    read = load.reference and load.update_reads_reference
    others = int(read) + int(load.critic)
    return sums + others * _outside_bytes(size, load)


def _frozen(load: Workload) -> bool:
    """Whether no weight of the model's file is trained."""
    return load.adapter is not None and not load.adapter.modules_to_save


def _moment_bytes(size: ModelSize, load: Workload) -> int:
    return 2 * size.trainable if load.optimizer == "adamw_8bit" else 2 * size.trainable_bytes


def _reference_bytes(size: ModelSize, load: Workload) -> int:
    """Of a copy; with `bf16` its layers are in bfloat16 (`models.frozen_weights`)."""
    if not load.reference:
        return 0
    base = size.parameters - (0 if load.adapter is None else size.trainable)
    if load.quantized_reference:
        return (base - size.linear) * _width(load) + int(size.linear * BITS / 8)
    if load.precision == "bf16":
        return (base - size.outside) * _width(load) + _outside_bytes(size, load)
    return base * _width(load)


def _autocast_bytes(size: ModelSize, load: Workload) -> int:
    """Copies in bfloat16 that autocast makes of the layers' matrices, if those are in float32."""
    if load.precision != "bf16" or _frozen(load):
        return 0
    return 2 * (size.parameters - size.outside)


def _head_bytes(size: ModelSize, load: Workload) -> int:
    """Tiles and states; the gradient of a weight that is whole is added to where it lies."""
    rows = load.update_rows * load.response_tokens
    tiles = default_tiles(torch.device("cpu"))
    tile = 4 * min(tiles.rows, rows) * min(tiles.columns, size.vocab)
    states = rows * size.hidden * 4
    # Of both models: states, the selected ones, and of the policy's a gradient; two tiles each.
    return min(load.keep_logits, 8 * rows * size.vocab) + 4 * tile + 5 * states


def _generation_bytes(size: ModelSize, load: Workload, *, divided: bool) -> int:
    if load.rollout_rows == 0:
        return 0
    cache = load.rollout_rows * load.tokens * size.cache_numbers * _width(load)
    weights = gathered_bytes(size, load) if divided else _autocast_bytes(size, load)
    few = load.rollout_rows <= MOST_ROWS and load.response_tokens >= LEAST_TOKENS
    learns = load.precision == "float32" and load.adapter is None
    if few and learns and load.device == "cpu":
        # Copies of what learns in another order: `models.writing_products`.
        weights += 4 * (size.parameters - size.outside + size.vocab * size.hidden)
    return weights + cache + load.rollout_rows * size.vocab * _SAMPLED_WORD
