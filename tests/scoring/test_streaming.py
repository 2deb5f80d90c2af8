"""Tiles against the obvious implementation in float64, in value, gradient, error and extremes."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scorer_cases import (
    DIFFERENTIABLE,
    PLAIN,
    assert_same,
    models_of,
    scored,
    tensors_of,
    weights_for,
)

from kleash.scoring import dense, streaming, tiles
from kleash.scoring.api import QUANTITIES, WITHOUT_GRADIENT
from kleash.scoring.forward import sum_up
from kleash.scoring.tiles import Tiles
from kleash.types import Head

shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 5),
        "words": st.integers(2, 9),
        "width": st.integers(1, 4),
        "ref_width": st.integers(1, 4),
        "pad": st.integers(0, 3),
        "ref_pad": st.integers(0, 3),
    }
)
cuts = st.builds(
    Tiles,
    rows=st.sampled_from([1, 3, 64]),
    columns=st.sampled_from([1, 3, 64]),
    keep_bytes=st.sampled_from([0, 200, 1 << 20]),
    body=st.just("plain"),
)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    cut=cuts,
    seed=st.integers(0, 2**16),
    head=st.fixed_dictionaries(
        {"scale": st.sampled_from([1.0, 0.3]), "softcap": st.sampled_from([None, 1.5])}
    ),
    temperature=st.sampled_from([1.0, 0.6]),
    bans=st.tuples(*[st.sets(st.integers(0, 8), max_size=3)] * 2),
    same_bans=st.booleans(),
)
def test_same_values_and_gradients_as_dense(shape, cut, seed, head, temperature, bans, same_bans):
    words = shape["words"]
    tensors = tensors_of(seed, **shape)
    for bias, banned in ((tensors[2], bans[0]), (tensors[5], bans[0] if same_bans else bans[1])):
        for word in banned:
            if word < words - 1:  # a word must be left
                bias[word] = -torch.inf
    for tensor in tensors:
        tensor.requires_grad_()
    targets = torch.randint(
        0, words, (shape["rows"],), generator=torch.Generator().manual_seed(seed)
    )
    kwargs = {
        "want": QUANTITIES,
        "top_k": min(2, words),
        "head": head,
        "temperature": temperature,
    }
    case = (tensors, words, targets, weights_for(shape["rows"], seed))
    # The weight of a row whose target is banned is the caller's to drop: −∞ · w has no gradient.
    expected = scored(dense, *case, **kwargs)
    assert_same(scored(streaming, *case, tiles=cut, **kwargs), expected)
    assert not any(gradient.isnan().any() for gradient in expected[1].values())


@pytest.mark.parametrize("name", QUANTITIES)
def test_each_quantity_alone_costs_and_says_the_same(name):
    tensors = [tensor.requires_grad_() for tensor in tensors_of(1, rows=4, words=8)]
    case = (tensors, 8, torch.tensor([0, 3, 7, 7]), weights_for(4))
    kwargs = {"want": [name], "top_k": 2}
    if name in WITHOUT_GRADIENT:
        scores = streaming.token_scores(
            *models_of(tensors, 8)[0],
            case[2],
            reference=models_of(tensors, 8)[1],
            tiles=PLAIN,
            **kwargs,
        )
        assert not getattr(scores, name).requires_grad
        return
    assert_same(
        scored(streaming, *case, tiles=Tiles(2, 3, body="plain"), **kwargs),
        scored(dense, *case, **kwargs),
    )


def test_gradcheck():
    tensors = [tensor.requires_grad_() for tensor in tensors_of(2, rows=2, words=5)]

    def scores(*tensors):
        (hidden, head), reference = models_of(tensors, 5, softcap=4.0)
        found = streaming.token_scores(
            hidden,
            head,
            torch.tensor([4, 0]),
            reference=reference,
            temperature=1.1,
            want=DIFFERENTIABLE,
            tiles=Tiles(1, 2, body="plain"),
        )
        return tuple(getattr(found, name) for name in DIFFERENTIABLE)

    assert torch.autograd.gradcheck(scores, tensors)


@pytest.mark.parametrize("frozen", range(6))
def test_what_is_frozen_gets_no_gradient_and_no_product(frozen, monkeypatch):
    tensors = tensors_of(3, rows=3, words=7)
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index != frozen)
    (hidden, head), reference = models_of(tensors, 7)
    scores = streaming.token_scores(
        hidden, head, torch.tensor([1, 2, 3]), reference=reference, want=["kl"], tiles=PLAIN
    )
    products = []
    mm, addmm_ = torch.mm, torch.Tensor.addmm_
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append("mm") or mm(*a, **k))
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda *a, **k: products.append("addmm") or addmm_(*a, **k)
    )
    scores.kl.sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [index == frozen for index in range(6)]
    # Two to make the tile again, two for the heads; two for the hidden states.
    assert products.count("mm") == 4 - (frozen in (1, 4))
    assert products.count("addmm") == 2 - (frozen in (0, 3))


def test_the_reference_needs_no_gradient_for_the_policy_s_logprobs():
    tensors = [tensor.requires_grad_() for tensor in tensors_of(4, rows=3, words=7)]
    (hidden, head), reference = models_of(tensors, 7)
    scores = streaming.token_scores(
        hidden, head, torch.tensor([1, 2, 3]), reference=reference, want=["logprobs", "kl"]
    )
    scores.logprobs.sum().backward(retain_graph=True)
    assert [tensor.grad is None for tensor in tensors] == [False] * 3 + [True] * 3
    before = hidden.grad.clone()
    scores.logprobs.sum().backward()
    torch.testing.assert_close(hidden.grad, 2 * before)


def test_kept_tiles_are_as_good_the_second_time():
    tensors = [tensor.requires_grad_() for tensor in tensors_of(4, rows=3, words=7)]
    (hidden, head), reference = models_of(tensors, 7)
    scores = streaming.token_scores(
        hidden,
        head,
        torch.tensor([1, 2, 3]),
        reference=reference,
        want=["kl"],
        tiles=Tiles(2, 2, keep_bytes=1 << 20, body="plain"),
    )
    first = torch.autograd.grad(scores.kl.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(scores.kl.sum(), tensors)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("want", [["ref_logprobs"], ["ref_entropy", "ref_logprobs"], ["logprobs"]])
def test_one_model_suffices_for_one_model_s_scores(want, monkeypatch):
    tensors = tensors_of(5, rows=3, words=7)
    made = []
    monkeypatch.setattr(
        "kleash.scoring.streaming.sum_up",
        lambda sides, *args, **kwargs: made.append(len(sides)) or sum_up(sides, *args, **kwargs),
    )
    for tensor in tensors:
        tensor.requires_grad_()
    case = (tensors, 7, torch.tensor([1, 2, 3]), weights_for(3))
    assert_same(scored(streaming, *case, want=want), scored(dense, *case, want=want))
    assert made == [1]


def test_a_shared_head_gets_both_sides_gradients():
    hidden, weight, _, _, _, _ = (
        tensor.requires_grad_() for tensor in tensors_of(6, rows=3, words=7)
    )
    other = (hidden.detach() + 0.3).requires_grad_()
    gradients = []
    for scorer in (dense, streaming):
        head = Head(weight)
        kl = scorer.token_scores(
            hidden, head, torch.tensor([1, 2, 3]), reference=(other, head), want=["kl"]
        ).kl
        gradients.append(torch.autograd.grad(kl.square().sum(), (weight, hidden, other)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_model_has_not_drifted_from_itself():
    hidden, weight, bias = (tensor.float() for tensor in tensors_of(7, rows=9, words=50)[:3])
    head = Head(weight, bias)
    scores = streaming.token_scores(
        hidden,
        head,
        torch.zeros(9, dtype=torch.long),
        reference=(hidden, head),
        want=QUANTITIES,
        top_k=3,
        tiles=Tiles(4, 16),
    )
    for name in ("kl", "reverse_kl", "log_ratio_variance", "top_k_kl"):
        assert torch.equal(getattr(scores, name), torch.zeros(9)), name


def rms(errors):
    return torch.cat([error.double().flatten() for error in errors]).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 30.0, 2500.0])
@pytest.mark.parametrize("near", [0.001, 0.3])
def test_no_larger_error_than_dense_in_the_same_dtype(dtype, size, near):
    rows, width, words = 24, 64, 1000
    errors = {}
    for seed in range(3):
        make = torch.Generator().manual_seed(seed)
        hidden = size * torch.randn(rows, width, generator=make)
        weight = torch.randn(words, width, generator=make) / 8
        bias = torch.randn(words, generator=make)
        ref_hidden = hidden + near * size * torch.randn(rows, width, generator=make)
        ref_weight = weight + near * 0.01 * torch.randn(words, width, generator=make)
        given = [t.to(dtype) for t in (hidden, weight, bias, ref_hidden, ref_weight, bias.clone())]
        targets = torch.randint(0, words, (rows,), generator=make)
        if size == 2500:
            assert 8000 < (given[0].float() @ given[1].float().T).abs().max() < 20000
        for name in DIFFERENTIABLE:
            cases = []
            for scorer, working in (
                (dense, torch.float64),
                (dense, dtype),
                (streaming, dtype),
            ):
                tensors = [tensor.to(working).detach().requires_grad_() for tensor in given]
                kwargs = {"tiles": Tiles(16, 256, body="plain")} if scorer is streaming else {}
                cases.append(
                    scored(
                        scorer,
                        tensors,
                        words,
                        targets,
                        {name: weights_for(rows, seed)[name].to(torch.float32)},
                        want=[name],
                        **kwargs,
                    )
                )
            truth, plain, ours = ({**values, **gradients} for values, gradients in cases)
            for part in truth:
                kind = "value" if part == name else part
                ratio = errors.setdefault((name, kind), ([], []))
                ratio[0].append(plain[part].detach().double() - truth[part].detach())
                ratio[1].append(ours[part].detach().double() - truth[part].detach())
    for (name, part), (plain, ours) in errors.items():
        # A tenth and 1e-8 for the luck of rounding: both add the same products in another order.
        assert rms(ours) <= 1.1 * rms(plain) + 1e-8, (name, part, rms(ours), rms(plain))


def test_autocast_does_not_round_the_logits():
    tensors = [tensor.float() for tensor in tensors_of(8, rows=4, words=9)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    upstream = {name: weight.float() for name, weight in weights_for(4).items()}
    case = (tensors, 9, torch.tensor([0, 1, 2, 8]), upstream)
    expected = scored(streaming, *case)
    with torch.autocast("cpu", torch.bfloat16):
        found = scored(streaming, *case)
    assert_same(found, expected, rtol=0, atol=0)


def test_dtypes_of_results_and_gradients():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        tensors = [
            tensor.to(dtype).requires_grad_() for tensor in tensors_of(9, rows=4, words=9, pad=2)
        ]
        (hidden, head), reference = models_of(tensors, 9)
        scores = streaming.token_scores(
            hidden, head, torch.tensor([0, 1, 2, 8]), reference=reference, want=["kl"]
        )
        assert scores.kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        scores.kl.sum().backward()
        assert all(tensor.grad.dtype == dtype for tensor in tensors)
        assert not tensors[1].grad[9:].any()
        assert not tensors[2].grad[9:].any()


def test_nothing_to_score_gives_no_scores_and_no_gradient():
    weight = torch.randn(3, 2, requires_grad=True)
    scores = streaming.token_scores(
        torch.zeros(0, 2),
        Head(weight),
        torch.zeros(0, dtype=torch.long),
        reference=(torch.zeros(0, 2), Head(weight.detach())),
        want=QUANTITIES,
        top_k=1,
    )
    assert all(getattr(scores, name).shape == (0,) for name in QUANTITIES)
    scores.kl.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3, 2))


def test_a_banned_target_is_minus_infinity_in_its_row_alone():
    hidden, weight, bias = tensors_of(10, rows=3, words=6)[:3]
    bias[4] = -torch.inf
    scores = streaming.token_scores(
        hidden, Head(weight, bias), torch.tensor([4, 0, 1]), want=["logprobs", "entropy"]
    )
    assert scores.logprobs.tolist()[0] == -math.inf
    assert scores.logprobs[1:].isfinite().all()
    assert scores.entropy.isfinite().all()


def test_a_softcap_lifts_a_ban():
    hidden, weight, bias = tensors_of(11, rows=3, words=6)[:3]
    bias[4] = -torch.inf
    case = (hidden, Head(weight, bias, softcap=3.0), torch.tensor([4, 0, 1]))
    ours, plain = streaming.token_scores(*case).logprobs, dense.token_scores(*case).logprobs
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, plain)


def test_a_nan_stays_in_its_row():
    tensors = tensors_of(12, rows=3, words=6)
    tensors[0][1, 0] = torch.nan
    (hidden, head), reference = models_of(tensors, 6)
    scores = streaming.token_scores(
        hidden, head, torch.tensor([0, 1, 2]), reference=reference, want=DIFFERENTIABLE
    )
    for name in ("logprobs", "kl", "reverse_kl", "entropy", "log_ratio_variance"):
        assert getattr(scores, name).isnan().tolist() == [False, True, False], name


def test_a_head_that_bans_everything_is_refused():
    head = Head(torch.zeros(3, 2), torch.full((3,), -torch.inf))
    with pytest.raises(ValueError, match="must leave a word to write"):
        streaming.token_scores(torch.zeros(1, 2), head, torch.tensor([0]))


def test_tiles_of_nothing_are_refused():
    for wrong in ({"rows": 0}, {"columns": 0}, {"keep_bytes": -1}):
        with pytest.raises(ValueError, match="expected tiles of at least one row and column"):
            replace(PLAIN, **wrong)


def test_requests_are_checked():
    with pytest.raises(ValueError, match="targets must lie in 0…2, got 3"):
        streaming.token_scores(torch.zeros(1, 2), Head(torch.zeros(3, 2)), torch.tensor([3]))


def test_memory_is_kept_only_for_what_will_be_differentiated():
    hidden, weight, bias = tensors_of(13, rows=4, words=6)[:3]
    request = {"want": ("logprobs",), "top_k": None, "tiles": Tiles(2, 2, body="plain")}
    sides = (tiles.side(hidden, Head(weight, bias), temperature=1.0, dtype=torch.float64),)
    targets = torch.zeros(4, dtype=torch.long)
    tile = 2 * 2 * 8
    for budget, tiles_kept in ((0, 0), (tile - 1, 0), (tile, 1), (3 * tile + 1, 3), (9**9, 6)):
        kept = sum_up(sides, targets, keep_bytes=budget, **request).kept
        assert len(kept) == tiles_kept


@pytest.mark.parametrize("side_without", [2, 5])
def test_a_word_that_one_side_lacks_makes_one_kl_infinite(side_without):
    tensors = tensors_of(14, rows=3, words=6)
    tensors[side_without][4] = -torch.inf
    tensors = [tensor.requires_grad_() for tensor in tensors]
    case = (tensors, 6, torch.tensor([0, 1, 2]), weights_for(3))
    values, gradients = scored(streaming, *case, tiles=Tiles(2, 2, body="plain"))
    assert_same((values, gradients), scored(dense, *case))
    assert values["kl"].isinf().all() == (side_without == 5)
    assert values["reverse_kl"].isinf().all() == (side_without == 2)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("head", [{}, {"scale": 0.3, "softcap": 1.5}])
def test_top_1_agreement_is_that_of_whole_logits_with_the_lowest_id_among_equals(head):
    """Against numpy's argmax; equal words lie in one tile and in two, before and after."""
    policy_row = [[0, 2, 1, 2, 0, 2], [5, 1, 1, 1, 1, 5], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1]]
    other_row = [[0, 2, 0, 0, 0, 0], [0, 0, 0, 0, 0, 5], [5, 4, 3, 2, 1, 0], [2, 1, 2, 2, 1, 1]]
    z, u = torch.tensor(policy_row).float(), torch.tensor(other_row).float()
    bias = torch.tensor([0.0, 0, 0, 0, 0, -torch.inf]) if not head else None
    banned = 0.0 if bias is None else bias
    agree = (z + banned).numpy().argmax(1) == (u + banned).numpy().argmax(1)
    assert set(agree.tolist()) == {False, True}
    for cut in (Tiles(2, 2, body="plain"), Tiles(3, 4, body="plain"), PLAIN):
        scores = streaming.token_scores(
            z,
            Head(torch.eye(6), bias, **head),
            torch.zeros(4, dtype=torch.long),
            reference=(u, Head(torch.eye(6), bias)),
            want=["same_top"],
            tiles=cut,
        )
        assert scores.same_top is not None and scores.same_top.tolist() == agree.tolist()


@pytest.mark.parametrize("before", [False, True])
def test_a_gradient_in_place_is_the_one_that_is_returned(before):
    tensors = [tensor.requires_grad_() for tensor in tensors_of(21, rows=5, words=7, pad=2)]
    (hidden, head), reference = models_of(tensors, 7)
    weight, targets = tensors[1], torch.tensor([1, 2, 3, 0, 6])
    start = torch.randn_like(weight).detach() if before else None
    found = []
    for where in ("returned", "in_place"):
        for tensor in tensors:
            tensor.grad = None
        weight.grad = None if start is None else start.clone()
        held, handed = weight.grad, []
        hook = weight.register_hook(handed.append)
        tiles = Tiles(2, 3, body="plain", weight_gradients=where)
        scores = streaming.token_scores(
            hidden, head, targets, reference=reference, want=["kl", "logprobs"], tiles=tiles
        )
        (scores.kl.sum() + scores.logprobs.square().sum()).backward()
        hook.remove()
        found.append([tensor.grad.clone() for tensor in tensors[:3]])
        if where == "in_place":
            assert all(gradient is None for gradient in handed)
            assert held is None or weight.grad is held
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-12)


def test_of_two_models_the_policy_alone_can_be_kept():
    tensors = [tensor.requires_grad_() for tensor in tensors_of(22, rows=4, words=6)]
    (hidden, head), reference = models_of(tensors, 6)
    case = (hidden, head, torch.tensor([1, 2, 3, 0]))
    found = []
    for cut in (PLAIN, Tiles(2, 2, keep_bytes=9**9, keep_reference=False, body="plain")):
        scores = streaming.token_scores(*case, reference=reference, want=["kl"], tiles=cut)
        kept = scores.kl.grad_fn.summed.kept
        assert {len(outs) for outs in kept.values()} == ({1} if cut.keep_bytes else set())
        found.append(torch.autograd.grad(scores.kl.sum(), tensors[:2]))
        # Given up as it was used.
        assert not kept
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=1e-12)
