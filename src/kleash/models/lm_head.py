"""Reading a model's head, hidden state → logits, as data, and checking that it was read right.

Architectures differ in what they do after the matrix product: nothing (Llama), a multiplier
(Cohere, Falcon-H1), a divisor (Granite), a soft cap (Gemma 2, RecurrentGemma). What is known is
read from the configuration; what is not known is found by comparing with the model's own logits,
and refused.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from kleash.errors import ModelError
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
        scale=_product(config, _MULTIPLIERS) / _product(config, _DIVISORS),
        softcap=next((cap for cap in caps if cap is not None), None),
        vocab_size=-1 if words == weight.shape[0] else words,
    )


def apply_head(head: Head, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
    """Logits of every row of the head, in float32, for checks on a handful of states.

    Training goes through `scoring`, which never holds the logits of a batch.
    """
    logits = hidden.float() @ head.weight.float().T
    if head.bias is not None:
        logits = logits + head.bias.float()
    logits = head.scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


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


def _product(settings: object, names: Sequence[str]) -> float:
    values = (getattr(settings, name, None) for name in names)
    return math.prod((float(value) for value in values if value is not None), start=1.0)
