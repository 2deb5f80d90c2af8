"""Reading a model's head, hidden state → logits, as data, and checking that it was read right.

Architectures differ in what they do after the matrix product: nothing (Llama), a multiplier
(Cohere, Falcon-H1), a divisor (Granite), a soft cap (Gemma 2, RecurrentGemma). What is known is
read from the configuration; what is not known is found by comparing with the model's own logits,
and refused.
"""

import contextlib
import math
import weakref
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from kleash.errors import ModelError
from kleash.models.precision import Precision, computing
from kleash.models.trunk import trunk_of
from kleash.types import Head

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names by which configurations keep what is done to the logits. A name that means something else
in some architecture does no harm: every head is compared with the model's own logits."""


def read_head(model: PreTrainedModel, words: int) -> Head:
    """Read the head of a causal language model; its tensors are the live parameters.

        z = scale · (W h + b),   then   z ← softcap · tanh(z / softcap)   if soft-capped

    Args:
        model: the language model.
        words: number of rows that stand for text (`loading.number_of_words`).

    Raises:
        ModelError: if the model has no output matrix.
    """
    layer = _in_use(model.get_output_embeddings())
    if not isinstance(layer, nn.Module) or not isinstance(getattr(layer, "weight", None), Tensor):
        raise ModelError(
            f"expected a language model with an output matrix, got {type(model).__name__} without: "
            "take a causal language model"
        )
    weight = cast(Tensor, layer.weight)
    bias = getattr(layer, "bias", None)
    config = model.config.get_text_config()
    caps = [getattr(config, name, None) for name in _CAPS]
    return Head(
        weight=weight,
        bias=bias if isinstance(bias, Tensor) else None,
        scale=_factor(config, _MULTIPLIERS) / _factor(config, _DIVISORS),
        softcap=next((cap for cap in caps if cap is not None), None),
        vocab_size=-1 if words == weight.shape[0] else words,
    )


_checked: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()
"""Models whose head was compared with their own logits."""


def unwrapped(model: nn.Module, role: str = "model") -> PreTrainedModel:
    """The transformers model itself, without the PEFT model around it.

    Raises:
        ModelError: if it is neither of the two, or a prompt-learning adapter.
    """
    adapters = cast("dict[str, Any]", getattr(model, "peft_config", None) or {})
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        raise ModelError(
            f"expected an adapter of weights on the {role}, got {type(model).__name__} that puts "
            "learnt states before the text, which cannot be scored here: use a LoRA-like adapter"
        )
    inner = cast(Any, model).get_base_model() if adapters else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"expected a transformers or PEFT model as the {role}, got {type(inner).__name__}: "
            "give the model that it wraps"
        )
    return inner


def read_checked_head(model: PreTrainedModel, *, words: int | None = None) -> Head:
    """Read the head; the first time a model is seen, compare it with the model's own logits.

    The comparison is made in evaluation mode, and the modules' modes are given back.

    Args:
        model: the language model.
        words: number of rows that stand for text; None: all of them.

    Raises:
        ModelError: if the model has no output matrix, an adapter on it, or transforms its logits
            in a way that is not known here.
    """
    if hasattr(model.get_output_embeddings(), "base_layer"):
        raise ModelError(
            f"expected a head that is one matrix, got one with an adapter on it in "
            f"{type(model).__name__}: leave the output matrix out of the adapter's modules"
        )
    rows = read_head(model, 1).weight.shape[0]
    if words is not None and not 0 < words <= rows:
        raise ModelError(f"expected words in 1…{rows}, the rows of the head, got {words}")
    head = read_head(model, rows if words is None else words)
    if model not in _checked:
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            check_head(model, head, model.config.name_or_path or type(model).__name__)
        finally:
            for module in training:
                module.training = True
        _checked.add(model)
    return head


def apply_head(head: Head, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
    """Logits of every row of the head, in float32, for checks on a handful of states.

    Training goes through `scoring`, which never holds the logits of a batch.
    """
    logits = hidden.float() @ head.weight.float().T
    if head.bias is not None:
        logits = logits + head.bias.float()
    logits = head.scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@contextlib.contextmanager
def unrounded_logits(model: PreTrainedModel, precision: Precision) -> Generator[None]:
    """Within, a model's own `forward` gives the logits that scoring computes, in float32.

    By itself a head in bfloat16 rounds each logit to 8 bits: next to 20 by up to 0.06 nats, and
    the sampler would write by another law than the one that is scored.

    Args:
        model: the language model, whose output layer is replaced meanwhile.
        precision: with `float32` nothing is replaced.
    """
    layer = _in_use(model.get_output_embeddings())
    if precision == "float32" or not isinstance(layer, nn.Module):
        yield
        return
    weight = cast(Tensor, layer.weight).detach()
    bias = cast("Tensor | None", getattr(layer, "bias", None))
    # Once, not for every token.
    weight = weight.bfloat16() if weight.is_cuda else weight.float()

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return _product(hidden, weight, None if bias is None else bias.detach().float())

    cast(Any, layer).forward = forward
    try:
        yield
    finally:
        del cast(Any, layer).forward


@contextlib.contextmanager
def as_scored(model: PreTrainedModel, precision: Precision) -> Generator[None]:
    """Within, a model's own `forward` and `generate` follow the law that scoring computes."""
    trunk = trunk_of(model)
    device = next(trunk.parameters()).device
    with computing(device, precision), unrounded_logits(model, precision):
        yield


def _product(
    hidden: Float[Tensor, "*rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
) -> Float[Tensor, "*rows vocab"]:
    if not hidden.is_cuda:
        return functional.linear(hidden.float(), weight, bias)
    rows = hidden.reshape(-1, hidden.shape[-1]).bfloat16()
    logits = torch.mm(rows, weight.T, out_dtype=torch.float32)
    logits = logits if bias is None else logits + bias
    return logits.view(*hidden.shape[:-1], -1)


def check_head(model: PreTrainedModel, head: Head, path: str | Path) -> None:
    """Check on one small batch that head ∘ hidden states are the model's own logits.

    A bias of −∞, which bans a word, is the model's own; other numbers that are not finite are not.

    Raises:
        ModelError: if they are not: the head holds numbers that are not finite, or the
            architecture transforms its logits in a way that is not known here, and every
            log-probability would be wrong.
    """
    _require_finite(head, path)
    ids: Int[Tensor, "batch token"] = torch.arange(8, device=head.weight.device).view(2, 4)
    ids = ids % head.words
    with torch.no_grad():
        hidden = trunk_of(model)(input_ids=ids, use_cache=False)[0]
        own = model(input_ids=ids, use_cache=False).logits.float()
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ModelError(
            f"expected a head on the hidden states for {type(model).__name__} in {str(path)!r}, "
            f"got states of width {hidden.shape[-1]} and a head of width {head.weight.shape[1]}: "
            "this architecture transforms its states before the head; use another one"
        )
    with torch.no_grad():
        ours = apply_head(head, hidden)
    # In half precision the model rounds the logits themselves, to 3 significant digits.
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 2e-2
    worst = float("inf")
    if own.shape == ours.shape:
        worst = torch.where(own == ours, 0.0, own - ours).abs().max().item()
    finite = own[own.isfinite()].abs()
    if not finite.numel() or not worst <= tolerance * max(finite.max().item(), 1e-3):
        raise ModelError(
            f"expected logits = head(hidden states) for {type(model).__name__} in {str(path)!r}, "
            f"got a difference of {worst:.3g}: this architecture transforms its logits in a way "
            "kleash does not know; use another one"
        )


def _require_finite(head: Head, path: str | Path) -> None:
    rows = {"weight": head.weight}
    if head.bias is not None:
        rows["bias"] = torch.where(head.bias == -torch.inf, 0.0, head.bias)[:, None]
    for name, values in rows.items():
        bad = (~values.isfinite()).any(dim=1).nonzero()
        if len(bad):
            row = int(bad[0])
            value = values[row][~values[row].isfinite()][0].item()
            raise ModelError(
                f"expected a head of finite numbers in {str(path)!r}, got {value} in row {row} of "
                f"its {name} ({len(bad)} rows in all): the checkpoint is damaged; a word is banned "
                "by a bias of −inf"
            )


def check_causal(trunk: nn.Module, path: str | Path) -> None:
    """Check that a state does not change when a later token does.

    Raises:
        ModelError: if it does: the model reads both ways, and no next-token distribution or value
            of an unfinished text can be had from it.
    """
    device = next(trunk.parameters()).device
    texts = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1]], device=device)
    with torch.no_grad():
        first, second = trunk(input_ids=texts)[0][:, :3].float()
    if not (first - second).abs().max() <= 1e-4 * first.abs().max():
        raise ModelError(
            f"expected a causal model in {str(path)!r}, got {type(trunk).__name__}, whose states "
            "depend on later tokens (an encoder): take a decoder"
        )


def _in_use(layer: object) -> object:
    """Of a head that is trained whole beside an adapter: the copy, or with the adapter off the
    original."""
    copies = getattr(layer, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return layer
    wrapper = cast(Any, layer)
    return wrapper.original_module if wrapper.disable_adapters else copies["default"]


def _factor(settings: object, names: Sequence[str]) -> float:
    values = (getattr(settings, name, None) for name in names)
    return math.prod((float(value) for value in values if value is not None), start=1.0)
