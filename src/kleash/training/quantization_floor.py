"""What quantising only one of policy and reference costs: the KL that no training made.

    floor = E_{y∼π_start} Σ_t KL(π_start(·|y_<t) ‖ π_ref(·|y_<t))

Policy and reference are then one model in two kinds of numbers, so the exact KL before the first
update is the floor, and the KL of every later step has it in it. Where both are quantised alike it
is 0: both are the quantised model, and how far that is from the full weights only an audit says.
"""

from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kleash.config.leash import ReferenceConfig
from kleash.config.policy import PolicyConfig
from kleash.kl.statistics import Estimate, clustered_mean, clustered_ratio, response_kl
from kleash.types import ScoredRollout


@dataclass(frozen=True)
class QuantizationFloor:
    """Exact KL of the policy before its first update to a reference that is quantised otherwise."""

    per_response: Estimate
    """Nats."""
    per_token: Estimate
    """Nats."""


def quantization_floor(
    kl: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    prompt_index: Int[Tensor, " batch"],
) -> QuantizationFloor:
    """The floor, from responses that the policy wrote before its first update.

    Args:
        kl: exact KL per token to the reference, in nats.
        mask: True on the tokens of the response.
        prompt_index: which prompt each response answers.
    """
    sums = response_kl(kl, mask)
    return QuantizationFloor(
        clustered_mean(sums, prompt_index),
        clustered_ratio(sums, mask.sum(-1).double(), prompt_index),
    )


def has_floor(policy: PolicyConfig, reference: ReferenceConfig) -> bool:
    """Whether policy and reference are one model of which one is quantised, or otherwise."""
    return reference.path is None and policy.quantization != reference.quantization


def quantization_meta(
    policy: PolicyConfig, reference: ReferenceConfig, first: ScoredRollout | None = None
) -> dict[str, Any]:
    """What run.json says of it; empty where nothing is quantised.

    Args:
        policy: its section of the configuration.
        reference: its section.
        first: the rollout of the first step, where the floor is measured; None: not yet.
    """
    if policy.quantization == reference.quantization == "none":
        return {}
    said: dict[str, Any] = {"policy": policy.quantization, "reference": reference.quantization}
    if reference.kind == "adapter_off":
        said["kl_floor"] = 0.0
    elif first is not None and has_floor(policy, reference):
        rollout = first.rollout
        floor = quantization_floor(first.kl, rollout.response_mask, rollout.prompt_index)
        said["kl_floor"] = asdict(floor)
    return {"quantization": said}
