"""A model writes responses to prompts, always the same ones for the same seed and batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from kleash.auditing.inputs import Item
from kleash.models.policy import Policy
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec, generate


def write_responses(
    writer: Policy,
    items: Sequence[Item],
    *,
    responses_per_prompt: int,
    spec: SamplingSpec,
    seed: str,
) -> list[Item]:
    """Let a model answer a batch of prompts.

    Args:
        writer: the model.
        items: the prompts.
        responses_per_prompt: answers to each; they stand together in the result.
        spec: how to sample.
        seed: names the batch. The global random state is left as it was.

    Returns:
        The items with their responses.
    """
    rows = [item for item in items for _ in range(responses_per_prompt)]
    prompts = [Prompt("", item.prompt_ids, item.cluster) for item in rows]
    batch = batch_prompts(prompts, pad_id=writer.pad_id, device=writer.device)
    cuda = [writer.device] if writer.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(_number(seed))
        rollout = generate(writer, batch, spec)
    return [
        replace(
            item,
            response_ids=tuple(rollout.response_ids[row][rollout.response_mask[row]].tolist()),
            ended=bool(rollout.ended[row]),
        )
        for row, item in enumerate(rows)
    ]


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=7).digest(), "big")
