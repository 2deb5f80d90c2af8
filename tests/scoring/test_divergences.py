"""Streamed divergences against sums over all logits in float64, in value and gradient."""

import math

import pytest
import torch
from scorer_cases import PLAIN, tensors_of
from torch import Tensor

from kleash.scoring.divergence_blocks import BLOCK_BYTES
from kleash.scoring.divergences import Divergence, Frozen, token_divergences
from kleash.scoring.tiles import Side, Tiles
from kleash.types import Head

NAMES: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "jensen_shannon")
WORDS, ROWS = 13, 7
SMALL = Tiles(rows=3, columns=4, body="plain")


def log_softmax(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    logits = hidden.double() @ head.weight[: head.words].double().T
    if head.bias is not None:
        logits = logits + head.bias[: head.words].double()
    logits = head.scale * logits
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits / temperature).log_softmax(-1)


def dense(name: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """By its definition; torch's own xlogy knows what 0 · log 0 is."""
    p, q = log_p.exp(), log_q.exp()
    m = (p + q) / 2

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return (torch.special.xlogy(one, one) - torch.special.xlogy(one, other)).sum(-1)

    match name:
        case "reverse_kl":
            return kl(p, q)
        case "forward_kl":
            return kl(q, p)
        case "jensen_shannon":
            return (kl(p, m) + kl(q, m)) / 2


def student_and_frozen(seed: int, **head) -> tuple[list[Tensor], Head, list[tuple[Tensor, Head]]]:
    hidden, weight, bias, *teacher = tensors_of(seed, rows=ROWS, words=WORDS, pad=2, ref_pad=5)
    start = tensors_of(seed + 1, rows=ROWS, words=WORDS, width=4)[:3]
    student = [each.requires_grad_() for each in (hidden, weight, bias)]
    frozen = [
        (teacher[0], Head(teacher[1], teacher[2], vocab_size=WORDS)),
        (start[0], Head(start[1], start[2], scale=0.7)),
    ]
    return student, Head(weight, bias, vocab_size=WORDS, **head), frozen


@pytest.mark.parametrize("head", [{}, {"scale": 1.7, "softcap": 2.5}], ids=["plain", "softcapped"])
@pytest.mark.parametrize("names", [*((n,) for n in NAMES), NAMES[::2], NAMES[1:], NAMES[:2]])
@pytest.mark.parametrize("tiles", [SMALL, PLAIN], ids=["tiled", "whole"])
def test_values_and_gradients_are_those_of_all_logits(
    names: tuple[Divergence, ...], head: dict[str, float], tiles: Tiles
) -> None:
    student, policy, models = student_and_frozen(3, **head)
    targets = torch.arange(ROWS) % WORDS
    weights = torch.randn(len(names) + 1, ROWS, generator=torch.Generator().manual_seed(9)).double()
    frozen = [Frozen(*model, name) for model, name in zip(models, names, strict=False)]
    found = token_divergences(student[0], policy, targets, frozen, temperature=1.3, tiles=tiles)
    log_p = log_softmax(student[0], policy, 1.3)
    expected = [
        dense(name, log_p, log_softmax(*model, 1.3))
        for model, name in zip(models, names, strict=False)
    ]
    logprobs = log_p.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.logprobs, logprobs, rtol=0, atol=1e-10)
    for ours, theirs in zip(found.divergences, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)

    def gradients(first: Tensor, others: list[Tensor]) -> tuple[Tensor, ...]:
        total = sum((w * v).sum() for w, v in zip(weights, [first, *others], strict=True))
        return torch.autograd.grad(total, student)

    ours = gradients(found.logprobs, list(found.divergences))
    for one, other in zip(ours, gradients(logprobs, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_a_divergence_alone_has_the_gradient_of_it_alone() -> None:
    student, policy, models = student_and_frozen(5)
    targets = torch.zeros(ROWS, dtype=torch.long)
    frozen = [Frozen(*model, "jensen_shannon") for model in models]
    found = token_divergences(student[0], policy, targets, frozen, tiles=SMALL)
    log_p = log_softmax(student[0], policy, 1.0)
    for number, model in enumerate(models):
        expected = dense("jensen_shannon", log_p, log_softmax(*model, 1.0))
        for one, other in zip(
            torch.autograd.grad(found.divergences[number].sum(), student, retain_graph=True),
            torch.autograd.grad(expected.sum(), student, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_float32_is_as_near_to_the_truth_as_all_logits_in_float32() -> None:
    student, policy, models = student_and_frozen(7)
    targets = torch.zeros(ROWS, dtype=torch.long)

    def single(head: Head) -> Head:
        return Head(head.weight.detach().float(), head.bias.detach().float(), vocab_size=WORDS)

    pairs = [(hidden.float(), single(head)) for hidden, head in models]
    small = student[0].detach().float()
    for name in NAMES:
        two = [Frozen(*pair, name) for pair in pairs]
        found = token_divergences(small, single(policy), targets, two, tiles=SMALL)
        log_p = log_softmax(small, single(policy), 1.0)
        for ours, pair in zip(found.divergences, pairs, strict=True):
            truth = dense(name, log_p, log_softmax(*pair, 1.0))
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), truth, rtol=3e-6, atol=1e-6)


def test_a_banned_word_makes_a_kl_infinite_and_jensen_shannon_finite() -> None:
    student, policy, models = student_and_frozen(11)
    targets = torch.zeros(ROWS, dtype=torch.long)
    hidden, head = models[0]
    bias = head.bias.clone()
    bias[4] = -math.inf
    banning = (hidden, Head(head.weight, bias, vocab_size=WORDS))
    for names, one, infinite in (
        (("reverse_kl", "reverse_kl"), banning, True),
        (("forward_kl", "reverse_kl"), banning, False),
        (("jensen_shannon", "reverse_kl"), banning, False),
    ):
        frozen = [Frozen(*one, names[0]), Frozen(*models[1], names[1])]
        found = token_divergences(student[0], policy, targets, frozen, tiles=SMALL)
        log_p = log_softmax(student[0], policy, 1.0)
        expected = dense(names[0], log_p, log_softmax(*one, 1.0))
        assert bool(expected.isinf().all()) is infinite
        torch.testing.assert_close(found.divergences[0], expected, rtol=0, atol=1e-10)
        gradient = torch.autograd.grad(found.divergences[0].sum(), student, allow_unused=True)
        if infinite:
            assert all(each is None or not bool(each.any()) for each in gradient)
        else:
            true = torch.autograd.grad(expected.sum(), student)
            for ours, theirs in zip(gradient, true, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_far_apart_distributions_reach_the_bound_of_jensen_shannon() -> None:
    head = Head(torch.eye(3, dtype=torch.float64))
    student = torch.tensor([[500.0, 0.0, -500.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    teacher = torch.tensor([[-500.0, 0.0, 500.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    frozen = [Frozen(teacher, head, "jensen_shannon")]
    found = token_divergences(student, head, torch.tensor([0, 1]), frozen).divergences[0]
    torch.testing.assert_close(found, torch.tensor([math.log(2), 0.0]).double())


def test_no_gradient_reaches_a_frozen_model() -> None:
    student, policy, models = student_and_frozen(13)
    watched = [each.requires_grad_() for hidden, head in models for each in (hidden, head.weight)]
    for names in (("reverse_kl",), ("jensen_shannon", "forward_kl")):
        frozen = [Frozen(*model, name) for model, name in zip(models, names, strict=False)]
        targets = torch.zeros(ROWS, dtype=torch.long)
        found = token_divergences(student[0], policy, targets, frozen)
        torch.stack(found.divergences).sum().backward()
    assert all(each.grad is None for each in watched)
    assert student[0].grad is not None


def test_what_cannot_be_compared_is_refused() -> None:
    student, policy, models = student_and_frozen(15)
    targets = torch.zeros(ROWS, dtype=torch.long)
    with pytest.raises(ValueError, match="at least one frozen model to compare with, got none"):
        token_divergences(student[0], policy, targets, [])
    with pytest.raises(ValueError, match=r"must be one of reverse_kl, .* got 'hellinger'"):
        other = Frozen.__new__(Frozen)
        object.__setattr__(other, "hidden", models[0][0])
        object.__setattr__(other, "head", models[0][1])
        object.__setattr__(other, "divergence", "hellinger")
        token_divergences(student[0], policy, targets, [other])
    hidden, head = models[1]
    fewer = Frozen(hidden, Head(head.weight[:-1]), "jensen_shannon")
    with pytest.raises(ValueError, match="must have the same words, got 13 and 12"):
        token_divergences(student[0], policy, targets, [fewer])


@pytest.mark.parametrize("head", [{}, {"scale": 1.7, "softcap": 2.5}], ids=["plain", "softcapped"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [3, ROWS], ids=["three blocks", "one block"])
def test_a_gradient_made_in_the_walk_forward_is_that_of_all_logits(
    name: Divergence, head: dict[str, float], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BLOCK_BYTES, "cpu", rows * 2 * WORDS * 8)
    student, policy, models = student_and_frozen(13, **head)
    log_p, log_q = (log_softmax(*pair, 1.3) for pair in ((student[0], policy), models[0]))
    expected, targets = dense(name, log_p, log_q), torch.arange(ROWS) % WORDS
    logprobs, slope = log_p.gather(1, targets[:, None])[:, 0], torch.arange(1.0, 1.0 + ROWS)
    losses = {
        "alike": lambda logp, values: values.mean(),
        "by row": lambda logp, values: (slope * values).sum(),
        "with the log-probabilities": lambda logp, values: (values + slope * logp).mean(),
    }
    for loss in losses.values():
        found = token_divergences(
            student[0],
            policy,
            targets,
            [Frozen(*models[0], name)],
            temperature=1.3,
            tiles=SMALL,
            gradient="forward",
        )
        torch.testing.assert_close(found.logprobs, logprobs, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.divergences[0], expected, rtol=0, atol=1e-10)
        total = loss(found.logprobs, found.divergences[0])
        true = torch.autograd.grad(loss(logprobs, expected), student, retain_graph=True)
        # Twice: what was made forward is good for one walk, and the second makes its own.
        for _ in range(2):
            ours = torch.autograd.grad(total, student, retain_graph=True)
            for one, other in zip(ours, true, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_a_gradient_made_forward_multiplies_each_tile_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, policy, models = student_and_frozen(17)
    targets = torch.zeros(ROWS, dtype=torch.long)
    made: list[tuple[int, ...]] = []
    product = Side.product

    def counted(self: Side, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        made.append(tuple(out.shape))
        return product(self, left, right, out)

    monkeypatch.setattr(Side, "product", counted)
    multiplied = {}
    for gradient in ("forward", "backward"):
        made.clear()
        found = token_divergences(
            student[0],
            policy,
            targets,
            [Frozen(*models[0], "jensen_shannon")],
            tiles=PLAIN,
            gradient=gradient,
        )
        found.divergences[0].mean().backward()
        multiplied[gradient] = made.count((ROWS, WORDS))
    # Student and teacher once each; or in both walks forward and in the one back.
    assert multiplied == {"forward": 2, "backward": 6}


def test_a_head_that_is_not_trained_gets_no_gradient_in_the_walk_forward() -> None:
    student, policy, models = student_and_frozen(19)
    head = Head(policy.weight.detach(), policy.bias.detach(), vocab_size=WORDS)
    frozen = [Frozen(*models[0], "reverse_kl")]
    targets = torch.zeros(ROWS, dtype=torch.long)
    found = token_divergences(student[0], head, targets, frozen, tiles=SMALL, gradient="forward")
    found.divergences[0].sum().backward()
    log_p = log_softmax(student[0], head, 1.0)
    true = dense("reverse_kl", log_p, log_softmax(*models[0], 1.0))
    expected = torch.autograd.grad(true.sum(), student[0])[0]
    torch.testing.assert_close(student[0].grad, expected, rtol=1e-9, atol=1e-10)
    assert head.weight.grad is None


def test_a_head_in_half_precision_is_summed_up_before_it_is_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 2 * 2 * WORDS * 4)
    student, policy, models = student_and_frozen(23)
    hidden = student[0].detach().float()
    weight = policy.weight.detach().bfloat16().requires_grad_()
    targets = torch.zeros(ROWS, dtype=torch.long)
    gradients = []
    for gradient in ("forward", "backward"):
        found = token_divergences(
            hidden,
            Head(weight, vocab_size=WORDS),
            targets,
            [Frozen(models[0][0].float(), Head(models[0][1].weight.float()[:WORDS]), "forward_kl")],
            tiles=SMALL,
            gradient=gradient,
        )
        gradients.append(torch.autograd.grad(found.divergences[0].sum(), weight)[0])
    assert torch.equal(*gradients)


def test_the_walk_forward_refuses_two_models_and_leaves_infinite_rows_without_gradient() -> None:
    student, policy, models = student_and_frozen(29)
    targets = torch.zeros(ROWS, dtype=torch.long)
    frozen = [Frozen(*model, "reverse_kl") for model in models]
    with pytest.raises(ValueError, match=r'gradient="forward" is for one frozen model, got 2'):
        token_divergences(student[0], policy, targets, frozen, gradient="forward")
    bias = models[0][1].bias.clone()
    bias[4] = -math.inf
    banning = Frozen(models[0][0], Head(models[0][1].weight, bias, vocab_size=WORDS), "reverse_kl")
    found = token_divergences(
        student[0], policy, targets, [banning], tiles=SMALL, gradient="forward"
    )
    assert bool(found.divergences[0].isinf().all())
    gradient = torch.autograd.grad(found.divergences[0].sum(), student, allow_unused=True)
    assert all(each is None or not bool(each.any()) for each in gradient)
