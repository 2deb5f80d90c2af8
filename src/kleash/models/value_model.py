"""Value functions: what score is still to be expected in a state.

Two kinds, one shape: a head on the policy's own hidden states, or a model of its own, which may
start from a reward model (as InstructGPT's did) or from the policy's checkpoint.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kleash.errors import ModelError
from kleash.models.lm_head import check_causal, read_head
from kleash.models.loading import (
    Attention,
    load_causal_lm,
    load_classifier,
    load_config,
    load_tokenizer,
)
from kleash.models.policy import Policy, compare_tokenizers
from kleash.models.precision import Precision, weights_dtype
from kleash.models.probing import check_padding_of_states, own_code
from kleash.models.trunk import trunk_of, trunk_states

Features = Literal["trunk_detached", "trunk"]


@runtime_checkable
class ValueFunction(Protocol):
    """Anything that gives a value to each state of a response."""

    def state_values(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        response_ids: Int[Tensor, "batch token"],
        response_mask: Bool[Tensor, "batch token"],
        trunk: Float[Tensor, "batch token+1 hidden"],
    ) -> Float[Tensor, "batch token+1"]:
        """Value before each token and, at index `length`, after the last, in units of score.

        `trunk` holds the policy's hidden states of the same rows, for those who build on them.
        """
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters that learn."""
        ...


class ValueHead(nn.Module):
    """A small network on the policy's hidden states.

        V(h) = w · tanh(A h + a) + b,      A of 2·hidden rows, w and b 0 at the start

    It begins as V = 0, which is the mean of a normalised score, and not as noise.
    """

    def __init__(self, hidden_size: int, *, features: Features = "trunk_detached"):
        """Make a head.

        Args:
            hidden_size: width of the policy's hidden states.
            features: "trunk_detached" leaves the policy alone; "trunk" lets the value loss shape
                it too, which moves it away from the reference for a reason other than the reward.
        """
        super().__init__()
        self.features: Features = features
        self.inner = nn.Linear(hidden_size, 2 * hidden_size)
        self.outer = nn.Linear(2 * hidden_size, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def state_values(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        response_ids: Int[Tensor, "batch token"],
        response_mask: Bool[Tensor, "batch token"],
        trunk: Float[Tensor, "batch token+1 hidden"],
    ) -> Float[Tensor, "batch token+1"]:
        """See `ValueFunction`; computed in the head's own dtype (float32)."""
        states = trunk.detach() if self.features == "trunk_detached" else trunk
        inner = torch.tanh(self.inner(states.to(self.inner.weight.dtype)))
        return self.outer(inner).squeeze(-1)


class ValueModel(nn.Module):
    """A language model's trunk with one linear output, separate from the policy."""

    def __init__(self, trunk: nn.Module, layer: nn.Linear, *, precision: Precision = "float32"):
        """Put a value layer on a trunk; `load_value_model` makes both."""
        super().__init__()
        self.trunk = trunk
        self.layer = layer
        self.precision: Precision = precision

    def state_values(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        response_ids: Int[Tensor, "batch token"],
        response_mask: Bool[Tensor, "batch token"],
        trunk: Float[Tensor, "batch token+1 hidden"],
    ) -> Float[Tensor, "batch token+1"]:
        """See `ValueFunction`; the policy's states are not used."""
        states = trunk_states(
            self.trunk,
            prompt_ids,
            prompt_mask,
            response_ids,
            response_mask,
            model=self,
            precision=self.precision,
        )
        return self.layer(states.to(self.layer.weight.dtype)).squeeze(-1)


def load_value_model(
    path: str | Path,
    policy: Policy,
    *,
    precision: Precision = "float32",
    device: str = "cpu",
    attention: Attention = "auto",
) -> ValueModel:
    """Start a value model from a checkpoint.

    A sequence classifier of one output (a reward model) gives its trunk *and* its layer, so that
    the first values are the rewards of unfinished texts; a language model gives its trunk under a
    layer that starts at 0.

    Args:
        path: a Hugging Face directory or hub name, with the policy's tokenizer.
        policy: whose responses it will value.
        precision: of the trunk; the value layer is always float32.
        device: a torch device.
        attention: implementation of attention; "auto" leaves the choice to the library.

    Raises:
        ModelError: if the checkpoint cannot be used, has another vocabulary than the policy, looks
            ahead (a value may depend on what is written, not on what will be), or reads padding.
    """
    compare_tokenizers(policy.tokenizer, load_tokenizer(path), "value model", str(path))
    dtype = weights_dtype(precision, frozen=False)
    names = load_config(path).architectures or [""]
    if names[0].endswith("ForSequenceClassification"):
        model = load_classifier(path, dtype=dtype, device=device, attention=attention)
        layer = _score_layer(model, path)
    else:
        model = load_causal_lm(path, dtype=dtype, device=device, attention=attention)
        layer = nn.Linear(read_head(model, 1).weight.shape[1], 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    value = ValueModel(trunk_of(model), layer.to(device=device), precision=precision)
    with own_code(model, path):
        check_causal(value.trunk, path)
        check_padding_of_states(value.trunk, policy.words, path)
    return value


def _score_layer(model: nn.Module, path: str | Path) -> nn.Linear:
    score = getattr(model, "score", None)
    weight = getattr(score, "weight", None)
    if not isinstance(weight, Tensor):
        raise ModelError(
            f"expected a classifier on a causal language model (with a `score` layer) in "
            f"{str(path)!r}, got {type(model).__name__}: it cannot value unfinished texts"
        )
    bias = getattr(score, "bias", None)
    layer = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias if isinstance(bias, Tensor) else torch.zeros(1))
    return layer
