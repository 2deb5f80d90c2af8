"""Why a budget is not spent: said where the KL has been under its target for too long.

A KL far under its target is none of the controller's faults as long as it lowers β; what then
holds the policy back is how fast it learns, or how little the scores differ. The closed form tells
the two apart: the optimum of the present β would spend KL* ≈ Var(r)/(2β²).
"""

import math

from kleash.kl.control.state import BetaState

PATIENCE = 8
"""Readings in a row under the target that need no explanation: the controller's settling time."""
_LAGS = 2.0
"""Times its KL that the optimum of β would spend, from which on a policy lags behind it."""


def explain_shortfall(
    state: BetaState, target_kl: float, score_sd: float | None, *, patience: int = PATIENCE
) -> str | None:
    """Why the KL stays under its target; None where it does not, or is about to arrive.

    Said at every `patience`-th reading in a row that is significantly under the target, unless the
    KL arrives within as many readings at the speed that it has.

    Args:
        state: after the reading.
        target_kl: the budget, in nats per response.
        score_sd: standard deviation of the scores of this rollout, in the units of β; None if
            unknown.
        patience: readings that need no explanation.

    Returns:
        One sentence with the numbers that it rests on.

    Example:
        >>> state = BetaState(0.5, level=0.2, under=9, speed=0.01)
        >>> explain_shortfall(state, 1.0, score_sd=0.8).partition(": ")[0]
        'the KL has been under the budget of 1 nats per response for 9 steps (0.2 on average)'
        >>> explain_shortfall(BetaState(0.5, level=0.9, under=9, speed=0.05), 1.0, 0.8) is None
        True
    """
    level, waited = state.level, state.under
    if level is None or waited <= patience or waited % patience != 1 % patience:
        return None
    speed, missing = state.speed, math.sqrt(target_kl) - math.sqrt(level)
    if speed * patience >= missing:
        return None
    head = (
        f"the KL has been under the budget of {target_kl:g} nats per response for {waited} steps "
        f"({level:.3g} on average)"
    )
    if state.bounded:
        return f"{head}: β stands at its bound, {state.beta:.4g}"
    if score_sd is None or score_sd == 0:
        return (
            f"{head}: the scores of this step do not differ, so the score has no more to give at "
            "any β; look at the reward, or lower the budget"
        )
    reach = score_sd**2 / (2 * state.beta**2)
    if reach >= _LAGS * level:
        arrival = f"; at its speed it takes {missing / speed:.0f} more steps" if speed > 0 else ""
        return (
            f"{head}: β = {state.beta:.4g} lets the optimum go to about {reach:.2g} nats (the "
            f"scores' standard deviation is {score_sd:.3g}), so the policy learns too slowly to "
            f"come there{arrival}; raise optimizer.lr, or train for longer"
        )
    return (
        f"{head}: the scores differ by a standard deviation of only {score_sd:.3g}, for which the "
        f"optimum of β = {state.beta:.4g} spends about {reach:.2g} nats: the score has little more "
        "to give; β goes on falling, or lower the budget"
    )
