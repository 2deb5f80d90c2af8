"""In which numbers a model is kept, and in which it computes.

    float32     weights, optimiser and arithmetic in float32
    bf16        weights and optimiser in float32, matrix products of the trunk in bfloat16
    pure_bf16   the weights themselves in bfloat16, and with them the optimiser's moments

An update of AdamW is about as large as the learning rate; next to a weight of 0.1 two neighbouring
bfloat16 numbers are 0.0005 apart. So `bf16` keeps what is updated in float32 and saves where it
costs nothing: products, activations, and weights that never move. In all three, log-probabilities,
KL and sums over the vocabulary are float32 or wider, for policy, reference and sampler alike: one
law. Left out: float16, whose gradients underflow without a loss scale.
"""

import contextlib
from collections.abc import Generator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

Precision = Literal["float32", "bf16", "pure_bf16"]


def weights_dtype(precision: Precision, *, frozen: bool) -> Literal["float32", "bfloat16"]:
    """Type in which a policy's file is loaded.

    Args:
        precision: of the run.
        frozen: whether no weight of the file is trained, not even a copy of one: then `bf16` keeps
            them in bfloat16. An adapter's own matrices are float32 whatever this says.

    Example:
        >>> weights_dtype("bf16", frozen=False), weights_dtype("bf16", frozen=True)
        ('float32', 'bfloat16')
    """
    half = precision == "pure_bf16" or (precision == "bf16" and frozen)
    return "bfloat16" if half else "float32"


def compute_dtype(precision: Precision) -> torch.dtype:
    """Type of the trunk's products."""
    return torch.float32 if precision == "float32" else torch.bfloat16


def mixed_precision_policy(precision: Precision) -> MixedPrecisionPolicy:
    """What `fully_shard` is given for the matrices of decoder layers.

    They are gathered in bfloat16, so that half of the bytes are sent and held, and autocast finds
    them rounded as it would round them. The slices keep the type of the weights, so the optimiser
    updates float32; gradients are added over processes in float32, whichever type they were
    computed in. What goes into a layer is left as it is: the stream between layers stays float32.
    """
    if precision == "float32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


@contextlib.contextmanager
def computing(device: torch.device, precision: Precision) -> Generator[None]:
    """Within, a trunk's matrix products are in the precision's type.

    The same under FSDP2, whose layers are gathered as bfloat16 already: a product has the same
    factors, however many processes there are.

    Args:
        device: where its inputs are.
        precision: only `bf16` changes anything; the other two compute in the weights' own type.
    """
    if precision != "bf16":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield


def for_head(
    states: Float[Tensor, "*rows hidden"], precision: Precision
) -> Float[Tensor, "*rows hidden"]:
    """A trunk's states in the type in which the head multiplies them.

    On a GPU bfloat16, whose products are summed in float32 and not rounded after it; on a CPU,
    where torch would round every logit to bfloat16, as they are, for a product in float32.
    """
    return states.bfloat16() if precision != "float32" and states.is_cuda else states
