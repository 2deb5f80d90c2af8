"""How much of an update survives rounding: closed forms, and numpy's half precision."""

from pathlib import Path

import numpy as np
import pytest
import small_run
import torch

from kleash.errors import PreflightError
from kleash.preflight import runner
from kleash.preflight.checks.precision import surviving_update_share
from kleash.training.loop import train

ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""From 1 to the next number."""


@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize(
    ("ulps", "share"),
    # Rounded away; rounded up, which counts as itself; kept; half an ulp goes to the even number.
    [(0.4, 0.0), (0.5, 0.0), (0.6, 1.0), (1.0, 1.0), (1.25, 0.8), (3.0, 1.0)],
)
def test_one_size_of_update(dtype: torch.dtype, ulps: float, share: float) -> None:
    before = torch.ones(4, dtype=dtype)
    after = before.double() + ulps * ULP[dtype]
    assert surviving_update_share(before, after, dtype) == pytest.approx(share)
    # Downwards from −1 it is the same.
    assert surviving_update_share(-before, -after, dtype) == pytest.approx(share)


@pytest.mark.parametrize("dtype", ULP)
def test_updates_of_every_size_up_to_an_ulp(dtype: torch.dtype) -> None:
    """Those of (½, 1) of an ulp survive: ∫_½^1 x dx / ∫_0^1 x dx = 3/4."""
    sizes = (torch.arange(100_000).double() + 0.5) / 100_000
    after = 1 + sizes * ULP[dtype]
    share = surviving_update_share(torch.ones_like(after), after, dtype)
    assert share == pytest.approx(0.75, abs=1e-4)


def test_numpys_half_precision_rounds_alike() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=10_000).astype(np.float16)
    after = before.astype(np.float32) + generator.normal(size=10_000).astype(np.float32) * 5e-4
    wanted = after.astype(np.float64) - before
    kept = (after.astype(np.float16).astype(np.float64) - before) * np.sign(wanted)
    expected = np.minimum(kept, np.abs(wanted)).sum() / np.abs(wanted).sum()
    found = surviving_update_share(torch.from_numpy(before), torch.from_numpy(after), torch.float16)
    assert 0.3 < expected < 0.95
    assert found == pytest.approx(expected, rel=1e-9)


def test_nothing_to_change_and_nothing_to_lose() -> None:
    weights = torch.randn(5)
    assert surviving_update_share(weights, weights, torch.float32) == 1.0
    assert surviving_update_share(weights, weights + 0.1, torch.float32) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"expected weights that torch\.bfloat16 can hold"):
        surviving_update_share(torch.tensor([0.1]), torch.tensor([0.2]), torch.bfloat16)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    return small_run.save_material(
        folder, prompts=small_run.two_words(range(8)), heldout=small_run.two_words(range(10, 14))
    )


def test_a_run_whose_updates_would_be_lost_is_refused(material: Path, tmp_path: Path) -> None:
    policy = {"path": str(material / "policy"), "precision": "pure_bf16"}
    config = small_run.settings(material, tmp_path / "run", policy=policy, optimizer={"lr": 1e-6})
    said = r"precision\.survival: With policy\.precision: pure_bf16"
    with pytest.raises(PreflightError, match=said):
        train(config, preflight=runner.require_sound)
    assert not (tmp_path / "run").exists()


LORA = {"rank": 2, "targets": ["q_proj"]}


@pytest.mark.parametrize(
    ("policy", "rate", "kept_in"),
    [
        ({"precision": "pure_bf16"}, 0.5, "bfloat16"),
        ({"precision": "pure_bf16", "lora": LORA}, 1e-5, "float32"),
        ({"precision": "bf16"}, 1e-5, "float32"),
        ({"precision": "bf16", "lora": {**LORA, "modules_to_save": ["lm_head"]}}, 1e-5, "float32"),
        ({}, 1e-5, "float32"),
    ],
)
def test_what_can_learn_is_let_be(
    policy: dict, rate: float, kept_in: str, material: Path, tmp_path: Path
) -> None:
    changes = {"policy": policy, "optimizer": {"lr": rate}}
    config = small_run.settings(material, tmp_path / "run", **changes)
    found = next(f for f in runner.check(config, quick=True).findings if "precision" in f.name)
    assert found.verdict == "ok"
    share, said = found.measured.split(" in ", 1)
    assert 0.99 <= float(share) <= 1
    assert said == f"{kept_in} at a learning rate of {rate:g}"
