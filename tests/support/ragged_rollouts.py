"""Ragged rollouts, and the same with every number outside the mask replaced."""

from dataclasses import replace

import torch

from kleash.types import Fresh, Rollout, ScoredRollout


def ragged(dtype=torch.float64, seed=0):
    """A rollout of random numbers with ragged lengths, some cut off, and fresh numbers for it."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = 8, 6
    mask = torch.arange(width)[None] < torch.tensor([6, 1, 3, 5, 2, 6, 4, 3])[:, None]
    numbers = torch.randn(7, rows, width, generator=generator, dtype=dtype)
    rollout = Rollout(
        prompt_ids=torch.ones(rows, 2, dtype=torch.long),
        prompt_mask=torch.ones(rows, 2, dtype=torch.bool),
        response_ids=torch.ones(rows, width, dtype=torch.long),
        response_mask=mask,
        ended=torch.tensor([False, True, True, True, False, True, True, False]),
        prompt_index=torch.arange(rows) // 2,
    )
    old = -numbers[0].abs()
    scored = ScoredRollout(
        rollout=rollout,
        rollout_logprobs=old,
        ref_logprobs=-numbers[1].abs(),
        kl=numbers[2].abs(),
        entropy=numbers[3].abs(),
        scores=numbers[4, :, 0],
        values=numbers[5],
        final_values=numbers[6, :, 0],
    )
    shift = 0.3 * torch.randn(3, rows, width, generator=generator, dtype=dtype)
    return scored, Fresh(old + shift[0], numbers[5] + shift[1], numbers[2].abs() + shift[2].abs())


def with_padding(data, mask, poison):
    """The same data with every per-token number outside the mask replaced."""
    changes = {
        name: torch.where(mask, value, poison)
        for name, value in vars(data).items()
        if isinstance(value, torch.Tensor) and value.shape == mask.shape
    }
    return replace(data, **changes)
