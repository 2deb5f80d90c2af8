"""Ways to score a batch of tokens, side by side: bare products, the peers' way, kleash's way."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kleash.scoring import streaming
from kleash.scoring.api import Quantity
from kleash.scoring.tiles import Tiles
from kleash.types import Head

EVERYTHING: tuple[Quantity, ...] = (
    "logprobs",
    "ref_logprobs",
    "kl",
    "reverse_kl",
    "entropy",
    "ref_entropy",
    "log_ratio_variance",
)
TILE = 1024


@dataclass(frozen=True)
class Case:
    """Random hidden states of two models that are near each other, their heads, and targets."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    targets: Tensor

    @property
    def reference(self) -> tuple[Tensor, Head]:
        """The reference as scorers take it."""
        return self.ref_hidden, Head(self.ref_weight)

    def differentiable(self) -> "Case":
        """The same, the policy's side asking for gradients."""
        return replace(
            self,
            hidden=self.hidden.detach().requires_grad_(),
            weight=self.weight.detach().requires_grad_(),
        )


def make_case(tokens: int, width: int, words: int) -> Case:
    """Logits of standard deviation 3; two heads of their own, as after some training."""
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=make)
    weight = torch.randn(words, width, generator=make).mul_(3 / width**0.5)
    return Case(
        hidden=hidden,
        weight=weight,
        ref_hidden=hidden + 0.05 * torch.randn(tokens, width, generator=make),
        ref_weight=weight.clone(),
        targets=torch.randint(0, words, (tokens,), generator=make),
    )


def bare_products(case: Case, products: int = 2) -> None:
    """Only the matrix products, tiled: two forward; six with recomputation and two gradients."""
    tokens, words = case.hidden.shape[0], case.weight.shape[0]
    memory = torch.empty(2, TILE * TILE)
    grad_hidden = torch.zeros_like(case.hidden) if products == 6 else None
    grad_weight = torch.empty_like(case.weight) if products == 6 else None
    for _ in range(1 if products == 2 else 2):
        for column in range(0, words, TILE):
            cols = slice(column, min(column + TILE, words))
            for row in range(0, tokens, TILE):
                rows = slice(row, min(row + TILE, tokens))
                shape = (rows.stop - rows.start, cols.stop - cols.start)
                x, y = (one[: shape[0] * shape[1]].view(shape) for one in memory)
                torch.mm(case.hidden[rows], case.weight[cols].T, out=x)
                torch.mm(case.ref_hidden[rows], case.ref_weight[cols].T, out=y)
    if grad_hidden is None or grad_weight is None:
        return
    for column in range(0, words, TILE):
        cols = slice(column, min(column + TILE, words))
        for row in range(0, tokens, TILE):
            rows = slice(row, min(row + TILE, tokens))
            x = memory[0][: (rows.stop - rows.start) * (cols.stop - cols.start)]
            x = x.view(rows.stop - rows.start, -1)
            grad_hidden[rows].addmm_(x, case.weight[cols])
            torch.addmm(
                grad_weight[cols], x.T, case.hidden[rows], beta=min(row, 1), out=grad_weight[cols]
            )


def k1_materialised(case: Case) -> Tensor:
    """The peers' estimate: all logits of one model after the other, gather − logsumexp."""
    scores: list[Tensor] = []
    for hidden, weight in ((case.hidden, case.weight), (case.ref_hidden, case.ref_weight)):
        logits = hidden @ weight.T
        scores.append(logits.gather(1, case.targets[:, None])[:, 0] - logits.logsumexp(1))
        del logits
    return scores[0] - scores[1]


def kl_materialised(case: Case) -> Tensor:
    """The exact KL from log-softmax of all logits of both models."""
    logp = torch.log_softmax(case.hidden @ case.weight.T, dim=1)
    logq = torch.log_softmax(case.ref_hidden @ case.ref_weight.T, dim=1)
    return (logp.exp() * (logp - logq)).sum(1)


def streamed(tiles: Tiles, want: tuple[Quantity, ...] = EVERYTHING) -> Callable[[Case], object]:
    """Scores streamed with these tiles."""

    def run(case: Case) -> object:
        return streaming.token_scores(
            case.hidden,
            Head(case.weight),
            case.targets,
            reference=case.reference,
            want=want,
            tiles=tiles,
        )

    return run


def backward_of(score: Callable[[Case], Tensor]) -> Callable[[Case], object]:
    """Forward, and backward to the policy's hidden states and head."""

    def run(case: Case) -> object:
        case = case.differentiable()
        return torch.autograd.grad(score(case).mean(), (case.hidden, case.weight))

    return run


def kl_streamed(tiles: Tiles) -> Callable[[Case], Tensor]:
    """The exact KL alone, streamed, to be differentiated."""

    def run(case: Case) -> Tensor:
        kl = streaming.token_scores(
            case.hidden,
            Head(case.weight),
            case.targets,
            reference=case.reference,
            want=("kl",),
            tiles=tiles,
        ).kl
        assert kl is not None
        return kl

    return run
