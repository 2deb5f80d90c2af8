"""A language model without its head: tokens in, hidden states out, padding without effect.

Left out: the head (`lm_head`), and checks of a model's own behaviour (`probing`).
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from kleash.errors import ModelError
from kleash.models.precision import Precision, computing, for_head
from kleash.models.recomputation import recomputing
from kleash.models.sharding import release, states_of


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The part of a language model that gives hidden states.

    `base_model` is the model itself where a class names another attribute than it has (Llama 4's
    text model); the trunk is then the part that holds the input embeddings.

    Raises:
        ModelError: if no part of the model is one.
    """
    if model.base_model is not model:
        return model.base_model
    embedding = model.get_input_embeddings()
    for child in model.children():
        if child is not embedding and any(part is embedding for part in child.modules()):
            return child
    raise ModelError(
        f"expected a language model made of a trunk and a head, got {type(model).__name__}, which "
        "has no part that gives hidden states: take another architecture"
    )


@torch.no_grad()
def start(model: PreTrainedModel, device: torch.device) -> None:
    """Read one token: by its first reading a divided model learns what belongs together."""
    states_of(
        model, trunk_of(model), {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device)}
    )
    release(model)


def trunk_states(
    trunk: nn.Module,
    prompt_ids: Int[Tensor, "batch prompt"],
    prompt_mask: Bool[Tensor, "batch prompt"],
    response_ids: Int[Tensor, "batch token"],
    response_mask: Bool[Tensor, "batch token"],
    *,
    model: nn.Module | None = None,
    weights: Mapping[str, Tensor] | None = None,
    precision: Precision = "float32",
) -> Float[Tensor, "batch token+1 hidden"]:
    """Hidden states of the response part of [left-padded prompt | right-padded response].

    Position ids count the real tokens of a row from 0, so a row's numbers do not depend on how
    far it is padded; no more columns are computed than the longest row has tokens. The state that
    predicts response token 0 belongs to the last prompt token.

    Args:
        trunk: the model without its head.
        prompt_ids: prompts, padded on the left.
        prompt_mask: True on their tokens.
        response_ids: responses, padded on the right.
        response_mask: True on their tokens.
        model: whose trunk it is; it may be divided among processes.
        weights: parameters and buffers to read with instead of the trunk's own, by name.
        precision: in which the trunk computes; see `precision`.
    """
    ids = torch.cat([prompt_ids, response_ids], dim=1)
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    place = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    padded = not bool(mask.all())
    longest = int(place.max()) + 1 if padded else ids.shape[1]
    moved = longest < ids.shape[1]
    if moved:
        # A short prompt's row begins with padding, a short response's ends with it: moved to the
        # left, rows are as wide as the longest of them, not as longest prompt and longest response.
        order = mask.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    # A causal model sees no padding behind a text, and attention is faster without a mask.
    if padded and not bool(mask[:, 0].all()):
        inputs["attention_mask"] = mask.long()
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if "position_ids" in inspect.signature(trunk.forward).parameters:
        inputs["position_ids"] = positions
    with computing(ids.device, precision), recomputing(trunk):
        if weights is None:
            states = states_of(trunk if model is None else model, trunk, inputs)
        else:
            states = functional_call(trunk, dict(weights), (), inputs)[0]
    first = prompt_ids.shape[1] - 1
    if moved:
        # Beyond a row's end: the state of its last token once more, which nothing reads.
        index = place[:, first:, None].expand(-1, -1, states.shape[-1])
        return for_head(states.gather(1, index), precision)
    return for_head(states[:, first:], precision)
