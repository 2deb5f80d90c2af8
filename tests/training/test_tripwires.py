"""Bounds on a rollout, against the same numbers put together by numpy."""

import numpy as np
import pytest
import torch

from kleash.errors import TripwireError
from kleash.training.tripwires import check_entropy, check_kl


def rollout(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers on responses of many lengths; NaN beyond them, which nobody may look at."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (16,), generator=generator)
    mask = torch.arange(8) < lengths[:, None]
    numbers = torch.rand(16, 8, generator=generator) * 3
    return torch.where(mask, numbers, float("nan")), mask


@pytest.mark.parametrize("seed", range(5))
def test_the_kl_trips_beyond_its_mean_and_names_the_worst(seed: int) -> None:
    kl, mask = rollout(seed)
    each = [np.float64(kl[i][mask[i]].numpy().sum()) for i in range(16)]
    mean = float(np.mean(each))
    check_kl(kl, mask, stop_kl=mean * 1.0001)
    with pytest.raises(TripwireError, match="beyond the bound stop_kl of") as caught:
        check_kl(kl, mask, stop_kl=mean * 0.9999)
    row = int(np.argmax(each))
    assert caught.value.wire == "stop_kl"
    assert caught.value.response == row
    assert caught.value.token == int(np.argmax(kl[row][mask[row]].numpy()))


@pytest.mark.parametrize("seed", range(5))
def test_the_entropy_trips_below_its_mean_and_names_the_least(seed: int) -> None:
    entropy, mask = rollout(seed)
    mean = float(entropy[mask].double().mean())
    check_entropy(entropy, mask, min_entropy=mean * 0.9999)
    with pytest.raises(TripwireError, match="below the bound min_entropy of") as caught:
        check_entropy(entropy, mask, min_entropy=mean * 1.0001)
    each = [float(entropy[i][mask[i]].double().mean()) for i in range(16)]
    row = int(np.argmin(each))
    assert caught.value.wire == "min_entropy"
    assert caught.value.response == row
    assert caught.value.token == int(np.argmin(entropy[row][mask[row]].numpy()))


def test_a_number_that_is_none_is_within_no_bound() -> None:
    nan, mask = torch.full((1, 1), float("nan")), torch.ones(1, 1) > 0
    with pytest.raises(TripwireError):
        check_kl(nan, mask, stop_kl=1e9)
    with pytest.raises(TripwireError):
        check_entropy(nan, mask, min_entropy=1e-9)
