"""A model writes responses to prompts, always the same ones for the same seed and batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.auditing.inputs import Item
from kleash.auditing.served_policy import ServedModel
from kleash.models.policy import Policy
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec, generate


@dataclass(frozen=True, eq=False)
class Written:
    """A response, and log π of its tokens as the sampler computed it, in nats."""

    item: Item
    logprobs: Float[Tensor, " token"]


def write_responses(
    writer: Policy,
    items: Sequence[Item],
    *,
    responses_per_prompt: int,
    spec: SamplingSpec,
    seed: str,
) -> list[Written]:
    """Let a model answer a batch of prompts.

    Args:
        writer: the model.
        items: the prompts.
        responses_per_prompt: responses to each; they are adjacent in the result.
        spec: how to sample.
        seed: names the batch. The global random state is left as it was.

    Returns:
        The items with their responses, and how likely the sampler held each token.
    """
    rows = [item for item in items for _ in range(responses_per_prompt)]
    prompts = [Prompt("", item.prompt_ids, item.cluster) for item in rows]
    batch = batch_prompts(prompts, pad_id=writer.pad_id, device=writer.device)
    cuda = [writer.device] if writer.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(_number(seed))
        served = writer.model if isinstance(writer.model, ServedModel) else None
        rollout = served.write(batch, spec) if served else generate(writer, batch, spec)
    assert rollout.sampler_logprobs is not None
    written: list[Written] = []
    for row, item in enumerate(rows):
        mask = rollout.response_mask[row]
        ids = tuple(rollout.response_ids[row][mask].tolist())
        response = replace(item, response_ids=ids, ended=bool(rollout.ended[row]))
        written.append(Written(response, rollout.sampler_logprobs[row][mask].cpu()))
    return written


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=7).digest(), "big")
