"""A budget of KL for a loop of one's own: `BudgetBeta` with its memory, fed by tensors.

    leash = BudgetLeash(target_kl=2.0)
    beta = leash.step(kl, scores, prompt_index)         once per rollout
    json.dumps(leash.to_json())                         into the checkpoint

Users know the class as `kleash.Leash`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.kl.control.budget import BudgetBeta, initial_beta
from kleash.kl.control.state import BetaState, Measurement
from kleash.kl.statistics import clustered_mean, variance_of


class BudgetLeash:
    """Moves β so that the mean KL of a response meets a budget.

    Attributes:
        target_kl: the budget, in nats per response.
        state: what the controller remembers; None before the first step, unless β was given.

    Example:
        >>> leash = BudgetLeash(target_kl=2.0)
        >>> prompts = torch.tensor([0, 0, 1, 1])
        >>> scores = torch.tensor([0.0, 1.0, 1.0, 2.0])
        >>> first = leash.step(torch.zeros(4), scores, prompts)
        >>> round(first, 4)                           # sd(score)/√(2·target)
        0.3536
        >>> for _ in range(4):
        ...     beta = leash.step(torch.full((4,), 5.0), scores, prompts)
        >>> beta > first
        True
        >>> BudgetLeash.from_json(leash.to_json()).beta == beta
        True
    """

    def __init__(self, target_kl: float, *, initial_beta: float | None = None) -> None:
        """Set a budget.

        Args:
            target_kl: KL to hold, in nats per response.
            initial_beta: β at the start, in the unit of the scores per nat; None: that of the
                spread of the first scores.

        Raises:
            ValueError: if a number is not positive and finite.
        """
        self.target_kl = target_kl
        self._initial = initial_beta
        self.state: BetaState | None = None
        controller = self._controller(1.0 if initial_beta is None else initial_beta)
        if initial_beta is not None:
            self.state = controller.init()

    @property
    def beta(self) -> float:
        """β in force.

        Raises:
            ValueError: if no rollout was measured yet and no β given.
        """
        if self.state is None:
            raise ValueError("β is known after the first step, got none: call step, or give one")
        return self.state.beta

    def step(
        self,
        kl: Float[Tensor, " batch"] | Float[Tensor, "batch token"],
        scores: Float[Tensor, " ..."],
        prompt_index: Int[Tensor, " ..."] | None = None,
    ) -> float:
        r"""Take in one rollout, and say which β to train on it with.

        The scores must be in the unit that β is a price in: what the policy gradient multiplies.
        Where a loop divides them by the standard deviation of their group (GRPO), they are to be
        given divided; otherwise β starts, and moves, as if the reward were so much larger.

        Args:
            kl: KL of each response, Σ_t KL_t, in nats; or of each token, 0 outside the response.
            scores: of each response, in the unit of training.
            prompt_index: which prompt each response answers; None: each its own. Scores are
                compared, and standard errors clustered, by prompt.

        Returns:
            β, in the unit of the scores per nat.

        Raises:
            ValueError: if numbers are not finite, shapes do not fit, or the first scores do not
                vary and so imply no β.
        """
        spent = kl.detach().double()
        spent = spent.sum(-1) if spent.dim() == 2 else spent
        index = torch.arange(len(spent)) if prompt_index is None else prompt_index.cpu()
        spent, scores = spent.cpu(), scores.detach().double().cpu()
        _check(spent, scores, index)
        variance = variance_of(scores, index)
        if self.state is None:
            self._initial = initial_beta(self.target_kl, math.sqrt(variance or 0.0))
            self.state = self._controller(self._initial).init()
        assert self._initial is not None, "a state has come from some β"
        found = clustered_mean(spent, index)
        error = math.nan if found.standard_error is None else found.standard_error
        reading = Measurement(found.mean, error, found.n, variance)
        self.state = self._controller(self._initial).update(self.state, reading)
        return self.state.beta

    def to_json(self) -> dict[str, Any]:
        """Everything it knows, in plain values: `from_json` goes on from there."""
        state = None if self.state is None else asdict(self.state)
        return {"target_kl": self.target_kl, "initial_beta": self._initial, "state": state}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "BudgetLeash":
        """The leash that `to_json` wrote down.

        Raises:
            ValueError: if it is none.
        """
        try:
            leash = cls(saved["target_kl"], initial_beta=saved["initial_beta"])
            state = saved["state"]
            leash.state = None if state is None else BetaState(**state)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"expected what Leash.to_json wrote, got something else: {error!r}"
            ) from error
        return leash

    def _controller(self, initial: float) -> BudgetBeta:
        return BudgetBeta(target_kl=self.target_kl, initial=initial)


def _check(spent: Tensor, scores: Tensor, index: Tensor) -> None:
    if not spent.shape == scores.shape == index.shape:
        raise ValueError(
            "expected a KL, a score and a prompt for every response, got shapes "
            f"{list(spent.shape)}, {list(scores.shape)} and {list(index.shape)}"
        )
    for name, numbers in (("KL", spent), ("score", scores)):
        bad = (~numbers.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"expected a finite {name} of every response, got {float(numbers[bad[0]])} for "
                f"response {bad[0]} (and {len(bad) - 1} more): β was not moved"
            )
