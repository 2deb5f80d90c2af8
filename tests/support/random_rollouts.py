"""Rollouts of random numbers with ragged lengths."""

import torch

from kleash.types import Rollout, ScoredRollout


def scored(batch: int = 6, token: int = 5, *, per_prompt: int = 1, seed: int = 0) -> ScoredRollout:
    """A ragged rollout of random numbers; what lies outside the responses is NaN."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, token + 1, (batch,), generator=g)
    mask = torch.arange(token) < lengths[:, None]
    ids = torch.zeros(batch, token, dtype=torch.long)

    def numbers() -> torch.Tensor:
        return torch.where(mask, -torch.rand(batch, token, generator=g), torch.nan)

    logprobs = numbers()
    rollout = Rollout(
        prompt_ids=ids[:, :1],
        prompt_mask=torch.ones(batch, 1, dtype=torch.bool),
        response_ids=ids,
        response_mask=mask,
        ended=torch.arange(batch) % 2 == 0,
        prompt_index=torch.arange(batch) // per_prompt,
        sampler_logprobs=logprobs + torch.where(mask, 0.01, torch.nan),
    )
    return ScoredRollout(
        rollout=rollout,
        rollout_logprobs=logprobs,
        ref_logprobs=numbers(),
        kl=-numbers(),
        entropy=-numbers(),
        scores=torch.randn(batch, generator=g),
        values=torch.where(mask, 0.1, torch.nan),
    )
