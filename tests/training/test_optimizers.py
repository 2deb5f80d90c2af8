"""Optimisers against torch's own AdamW, the law of large numbers, and a restart."""

import importlib.util
import io
import re
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from training_hooks import interrupt_after

from kleash.errors import ConfigError
from kleash.training.loop import train
from kleash.training.optimizers import (
    make_optimizer,
    moment_bytes,
    round_by_chance,
    set_learning_rates,
    trained_parameters,
)

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao (kleash[8bit]) is not installed"
)


def groups(weights: list[torch.nn.Parameter], rate: float) -> list[dict[str, Any]]:
    return [{"params": weights, "lr": rate, "peak_lr": rate}]


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    make = torch.Generator().manual_seed(0)
    shapes = ((64, 128), (70,))
    return [torch.nn.Parameter(torch.randn(s, generator=make).to(dtype)) for s in shapes]


def walk(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int
) -> None:
    make = torch.Generator().manual_seed(1)
    drift = [torch.randn(p.shape, generator=make) for p in parameters]
    for _ in range(steps):
        for parameter, mean in zip(parameters, drift, strict=True):
            noise = torch.randn(parameter.shape, generator=make)
            parameter.grad = (mean + 0.5 * noise).to(parameter.dtype)
        optimizer.step()


def test_rounding_by_chance_is_right_on_average_and_gives_neighbours() -> None:
    x = torch.tensor([1 + 2**-9, -3.003, 1e-20, 0.0, 2.0, 65000.0])
    rounded = round_by_chance(x.expand(20_000, -1), torch.Generator().manual_seed(0)).double()
    nearest = x.bfloat16().double()
    ulp = 2.0 ** (x.double().abs().clamp(min=1e-300).log2().floor() - 7)
    assert bool(((rounded - x.double()).abs() < ulp).all())
    assert torch.equal(rounded[:, 3:5], nearest[3:5].expand(20_000, -1))
    # A Bernoulli's standard error is half an ulp over the root of the count at most.
    assert bool(((rounded.mean(0) - x.double()).abs() <= 5 * 0.5 * ulp / 20_000**0.5).all())
    assert {len(column.unique()) for column in rounded.T} == {1, 2}


def test_stochastic_steps_go_where_float32_goes_and_nearest_ones_do_not() -> None:
    exact, by_chance, nearest = weights(), weights(torch.bfloat16), weights(torch.bfloat16)
    with torch.no_grad():
        exact[0].copy_(by_chance[0])
    start = exact[0].detach().clone()
    rate, steps = 1e-5, 60
    walk(torch.optim.AdamW(exact, lr=rate, betas=(0.9, 0.95), weight_decay=0), exact, steps)
    for parameters, rounding in ((by_chance, "stochastic"), (nearest, "nearest")):
        walk(make_optimizer(groups(parameters, rate), rounding=rounding), parameters, steps)
    wanted = exact[0].detach() - start
    shares = [
        float(((p[0].detach().float() - start) * wanted).sum() / wanted.square().sum())
        for p in (by_chance, nearest)
    ]
    assert shares[0] == pytest.approx(1, abs=0.15)
    assert shares[1] < 0.1


def test_a_float32_tensor_beside_them_is_updated_as_by_adamw() -> None:
    one, other = weights(), weights()
    walk(make_optimizer(groups(one, 1e-3), rounding="stochastic", weight_decay=0.1), one, 5)
    walk(make_optimizer(groups(other, 1e-3), weight_decay=0.1), other, 5)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def restarted(name: str, rounding: str, dtype: torch.dtype) -> bool:
    """Whether a step after writing and reading the state is bit for bit the one without."""
    parameters = weights(dtype)
    optimizer = make_optimizer(groups(parameters, 1e-3), name=name, rounding=rounding)  # pyright: ignore
    walk(optimizer, parameters, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    other = make_optimizer(groups(again, 1e-3), name=name, rounding=rounding)  # pyright: ignore
    other.load_state_dict(torch.load(file, weights_only=True))
    for opt, own in ((optimizer, parameters), (other, again)):
        set_learning_rates(opt, 0.5)
        walk(opt, own, 2)
    return all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))


def test_a_restart_draws_the_same() -> None:
    assert restarted("adamw", "stochastic", torch.bfloat16)


def test_rates_follow_their_peaks() -> None:
    optimizer = make_optimizer(groups(weights(), 0.2))
    set_learning_rates(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def bytes_of(moment: torch.Tensor) -> int:
    """Of a plain tensor, or of all tensors that one of torchao's consists of."""
    if not hasattr(moment, "codes"):
        return moment.numel() * moment.element_size()
    parts = [getattr(moment, name) for name in ("codes", "scale", "qmap")]
    return sum(part.numel() * part.element_size() for part in parts)


def test_moments_are_counted_by_their_type() -> None:
    large, small, odd = torch.zeros(64, 64), torch.zeros(100), torch.zeros(4097)
    assert moment_bytes([large, small, odd], "adamw") == 8 * (4096 + 100 + 4097)
    # 4096 codes, 16 scales and a table of 256 numbers, twice.
    eight = 2 * (4096 + 16 * 4 + 256 * 4)
    assert moment_bytes([large, small, odd], "adamw_8bit") == eight + 8 * (100 + 4097)
    assert moment_bytes([large.bfloat16()], "adamw") == 4 * 4096


@needs_torchao
def test_eight_bits_go_where_float32_goes_in_a_quarter_of_the_memory() -> None:
    with torch.compiler.set_stance("force_eager"):
        one, other = weights(), weights()
        start = one[0].detach().clone()
        eight = make_optimizer(groups(one, 1e-3), name="adamw_8bit")
        walk(eight, one, 20)
        full = make_optimizer(groups(other, 1e-3))
        walk(full, other, 20)
        wanted, made = other[0].detach() - start, one[0].detach() - start
        assert (made - wanted).norm() < 0.05 * wanted.norm()
        state = eight.state[one[0]]
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        size = sum(m.codes.numel() + 4 * m.scale.numel() for m in moments)  # pyright: ignore
        assert size <= 2.1 * one[0].numel()
        for optimizer, name in ((eight, "adamw_8bit"), (full, "adamw")):
            parameters = trained_parameters(optimizer)
            held = sum(
                bytes_of(optimizer.state[p][moment])
                for p in parameters
                for moment in ("exp_avg", "exp_avg_sq")
            )
            assert moment_bytes(parameters, name) == held
        assert restarted("adamw_8bit", "nearest", torch.float32)
        set_learning_rates(eight, 0.5)
        assert float(eight.param_groups[0]["lr"]) == pytest.approx(5e-4)


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(ConfigError, match=re.escape("pip install 'kleash[8bit]'")):
        make_optimizer(groups(weights(), 1e-3), name="adamw_8bit")


def test_stochastic_rounding_of_float32_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`optimizer.rounding: stochastic` is for weights in"):
        small_run.settings(tmp_path, tmp_path / "run", optimizer={"rounding": "stochastic"})


@pytest.mark.parametrize(
    ("policy", "optimizer"),
    [
        ({"precision": "bf16", "lora": {"rank": 2}}, {}),
        ({"precision": "pure_bf16"}, {"rounding": "stochastic"}),
    ],
)
def test_an_interrupted_run_in_half_precision_goes_on_as_if_nothing_had_been(
    policy: dict, optimizer: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = small_run.two_words(range(8))
    material = small_run.save_material(tmp_path / "m", prompts=texts, heldout=texts[:2])
    changes = {"policy": policy, "optimizer": optimizer, "steps": 3}
    whole = train(small_run.settings(material, tmp_path / "whole", **changes))
    config = small_run.settings(material, tmp_path / "resumed", **changes)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert small_run.numbers(train(config)) == small_run.numbers(whole)
    kls = [line["objective/kl_ref"] for line in small_run.numbers(whole)[1:]]
    assert kls[0] == 0 < kls[-1]
    expected, found = (small_run.policy_weights(path) for path in (whole, tmp_path / "resumed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
