"""Layers while responses are written: the same products, faster, and given back as they were."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kleash.models import writing_products
from kleash.models.writing_products import MOST_ROWS, can_copy
from kleash.models.writing_products import writing_products as fast


def layer(inside: int, outside: int, *, bias: bool, learns: bool) -> nn.Sequential:
    torch.manual_seed(inside)
    made = nn.Sequential(nn.Linear(inside, outside, bias=bias))
    return made.requires_grad_(learns)


def replaced(model: nn.Module) -> bool:
    return any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 17, MOST_ROWS])
def test_products_are_those_of_float64_but_for_rounding(
    rows: int, learns: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing_products, "LARGE", 1)
    model = layer(48, 1300, bias=bias, learns=learns)
    inner = model[0]
    assert isinstance(inner, nn.Linear)
    for hidden in (torch.randn(rows, 48), torch.randn(rows, 1, 48), torch.randn(rows, 50, 48)):
        weight, shift = inner.weight.double(), inner.bias.double() if bias else None
        exact = functional.linear(hidden.double(), weight, shift)
        with torch.no_grad(), fast(model, rows=rows, tokens=64):
            assert replaced(model)
            found = model(hidden)
        assert found.shape == exact.shape
        # 48 products of float32 are added up.
        torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=1e-5)


def test_a_product_takes_neither_way_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is read by torch's own product, which is made for many rows."""
    seen: list[int] = []

    def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(hidden.shape[0])
        return original(hidden, weight, bias)

    original: Callable[..., Tensor] = functional.linear
    monkeypatch.setattr(functional, "linear", linear)
    model = layer(64, 128, bias=False, learns=True)
    with torch.no_grad(), fast(model, rows=2, tokens=64):
        model(torch.randn(MOST_ROWS + 1, 64))
        model(torch.randn(MOST_ROWS, 64))
    assert seen == ([MOST_ROWS + 1] if can_copy() else [MOST_ROWS + 1, MOST_ROWS])


def test_the_next_rollout_is_written_with_the_next_weights() -> None:
    model = layer(64, 128, bias=False, learns=True)
    hidden = torch.randn(2, 64)
    with torch.no_grad():
        with fast(model, rows=2, tokens=64):
            before = model(hidden)
        next(model.parameters()).mul_(2)
        with fast(model, rows=2, tokens=64):
            torch.testing.assert_close(model(hidden), 2 * before)


def test_layers_are_given_back_also_after_an_error() -> None:
    model = layer(64, 128, bias=False, learns=True)
    with pytest.raises(RuntimeError, match="in the middle"), fast(model, rows=2, tokens=64):
        assert replaced(model)
        raise RuntimeError("in the middle")
    assert not replaced(model)


class _Quantised(nn.Linear):
    """Multiplies in its own way."""


def test_layers_of_other_kinds_are_left_alone() -> None:
    plain = layer(64, 128, bias=False, learns=True)
    own_kind = nn.Sequential(_Quantised(64, 128))
    changed = layer(64, 128, bias=False, learns=True)
    changed[0].forward = torch.relu  # pyright: ignore[reportAttributeAccessIssue]
    before = vars(changed[0])["forward"]
    with fast(own_kind, rows=2, tokens=64), fast(changed, rows=2, tokens=64):
        assert not replaced(own_kind)
        assert vars(changed[0])["forward"] is before
    assert vars(changed[0])["forward"] is before
    half = layer(64, 128, bias=False, learns=True).bfloat16()
    frozen = layer(64, 128, bias=False, learns=False)
    for model, rows, tokens in ((half, 2, 64), (frozen, 2, 64), (plain, 99, 64), (plain, 2, 3)):
        with fast(model, rows=rows, tokens=tokens):
            assert not replaced(model)
    with torch.autocast("cpu", torch.bfloat16), fast(plain, rows=2, tokens=64):
        assert not replaced(plain)
