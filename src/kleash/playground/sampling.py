"""Have a policy reply to questions, outside any training run."""

from collections.abc import Sequence

import torch

from kleash.models.policy import Policy
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.scoring_pass import SamplingSpec, generate, response_texts
from kleash.types import Rollout


def write_replies(
    policy: Policy,
    prompts: Sequence[str],
    *,
    seed: int,
    max_new_tokens: int,
    microbatch: int = 512,
) -> tuple[list[str], Rollout]:
    """Sample one reply to each prompt at temperature 1, nothing cut off.

    Args:
        policy: who writes.
        prompts: the questions; equal ones share a `prompt_index`.
        seed: decides the samples; the global random state is left as it was.
        max_new_tokens: where a reply that does not end by itself is broken off.
        microbatch: how many are written at a time.

    Returns:
        The replies as text without special tokens, and as tokens.
    """
    numbers = {text: number for number, text in enumerate(dict.fromkeys(prompts))}
    rows = [
        Prompt(content=text, ids=tuple(policy.tokenizer(text).input_ids), index=numbers[text])
        for text in prompts
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rollout = generate(
            policy,
            batch_prompts(rows, pad_id=policy.pad_id, device=policy.device),
            SamplingSpec(max_new_tokens=max_new_tokens),
            microbatch=microbatch,
        )
    texts = response_texts(policy.tokenizer, rollout)
    return [text.strip() for text in texts], rollout
