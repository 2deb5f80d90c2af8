"""Check `learning_rate.one_update`: how far a single update at the peak rate moves the policy.

Made on the batch that is there, by the very loss and optimiser of the run, and undone: weights,
moments and random numbers are afterwards what they were.
"""

import math

from kleash.algorithms import dispatch
from kleash.algorithms.common import kept_rows, select
from kleash.kl.control.groups import betas_of
from kleash.kl.statistics import response_kl
from kleash.preflight.checks.objective import starting_states
from kleash.preflight.findings import Check, Finding
from kleash.preflight.probe_batch import MICROBATCH, Trial
from kleash.training.assembly import target_per_response
from kleash.training.optimization import clip_gradients
from kleash.training.snapshot import put_back, remember

_ABSURD = 10
"""How often one update may pass the bound where nothing is held: β 0 was asked to go far."""
_DECADES = 8
"""Powers of ten by which a rate may be too large for a better one to be found."""


def one_update(trial: Trial) -> Finding:
    """A first update that spends the whole budget leaves nothing to steer by.

    The budget is `leash.target_kl`, the smallest where groups have their own; without one, what a
    plan of the run could know at most: the log of `plan.responses`. With β = 0 nothing is held, and
    passing it is a warning, up to ten times as much.
    """
    check = Check("learning_rate.one_update", "one update spends less KL than the budget")
    components, config = trial.components, trial.config
    if not trial.at_start or components.mesh.size > 1:
        return check.skip("A trial update is made before a run begins, and in a single process.")
    bound, name = _bound(trial)
    rate, kl = config.optimizer.lr, kl_of_one_update(trial)
    updates = config.algorithm.epochs * config.algorithm.minibatches
    measured = f"{kl:.3g} nats per response at optimizer.lr {rate:g}, beside {bound:.3g}: {name}"
    if kl * updates <= bound:
        return check.ok(measured)
    remedy = _remedy(trial, most=bound / updates)
    if kl > bound and (trial.config.leash.beta != 0 or kl > _ABSURD * bound):
        return check.fail(
            measured,
            f"One update at optimizer.lr: {rate:g} moves the policy {kl:.3g} nats per response "
            f"from where it was, beyond {bound:.3g}, {name}: no β could hold it.",
            remedy,
        )
    if kl > bound:
        return check.warn(
            measured,
            f"One update at optimizer.lr: {rate:g} moves the policy {kl:.3g} nats per response, "
            f"beyond {bound:.3g}, {name}; nothing holds it with leash.beta: 0.",
            remedy,
        )
    return check.warn(
        measured,
        f"The {updates} updates of a step spend {updates * kl:.2g} nats per response or more at "
        f"optimizer.lr: {rate:g}, beyond {bound:.3g}, {name}.",
        remedy,
    )


def _remedy(trial: Trial, *, most: float) -> str:
    """The largest tenth, hundredth, … of the rate at which an update spends at most so much."""
    for power in range(1, _DECADES + 1):
        kl = kl_of_one_update(trial, share=10.0**-power)
        if kl <= most:
            rate = trial.config.optimizer.lr * 10.0**-power
            return f"Lower optimizer.lr to {rate:g}, at which an update spends {kl:.2g} nats."
    return "Lower optimizer.lr by many orders of magnitude, or look at the scores."


def kl_of_one_update(trial: Trial, *, share: float = 1.0) -> float:
    """KL of the trial's responses after one update, less that before; in nats.

    Args:
        trial: the batch that the update is made on.
        share: of the peak learning rate.

    Raises:
        NonFiniteError: the updated policy gives no finite numbers.
    """
    components, optimizer = trial.components, trial.components.optimizer
    betas = betas_of(starting_states(trial), components.groups_of(trial.rollout))
    experience = dispatch.algorithm_of(components.settings).prepare(
        trial.scored, betas, components.settings
    )
    batch = select(experience, kept_rows(experience))
    undo = remember(optimizer, weights=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
        optimizer.zero_grad(set_to_none=True)
        components.backward_of_minibatch(batch, microbatch=trial.config.algorithm.microbatch)
        components.add_gradients()
        components.release()
        clip_gradients(components.parameters(), trial.config.optimizer.max_grad_norm)
        optimizer.step()
        after = components.score(trial.rollout, trial.written.raw_scores, microbatch=MICROBATCH)
    finally:
        components.release()
        put_back(optimizer, undo)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    mask = trial.rollout.response_mask
    moved = response_kl(after.kl, mask) - response_kl(trial.scored.kl, mask)
    return float(moved.mean())


def _bound(trial: Trial) -> tuple[float, str]:
    """Nats per response that one update must not spend, and what they are."""
    length = float(trial.rollout.response_mask.sum(-1).float().mean())
    targets = [target_per_response(own, length) for own in trial.config.leash.each().values()]
    known = [target for target in targets if target is not None]
    if known:
        return min(known), "the budget"
    return math.log(trial.config.plan.responses), "all that a plan could know (plan.responses)"
