"""Checks `objective.*`: what is optimised, with which gradient, and how hard β pulls."""

import math

from kleash.kl.control.controllers import initial_beta
from kleash.kl.control.groups import States
from kleash.kl.placements import gradient_of
from kleash.kl.planning.initial_beta import Start
from kleash.preflight.findings import Check, Finding, some
from kleash.preflight.probe_batch import Trial
from kleash.training.assembly import make_leash, target_per_response
from kleash.training.metadata import objective_line
from kleash.training.metrics import score_variance

_SLACK, _NO_LEASH = 20.0, 100.0
"""Standard deviations of the score in one β: beyond, the leash is hardly felt, or not at all."""
_TIGHT, _NO_REWARD = 0.05, 0.01
"""Below, the score is hardly felt, or not at all."""
_FEW, _FEW_PER_TOKEN = 0.1, 0.005
"""Nats per response and per token: a target below both is what others write per token."""
_PER_TOKEN = 2.0
"""Nats per token above which a target is no leash: a uniform draw of 1 word in 7."""


def objective(trial: Trial) -> Finding:
    """The objective actually optimised, in one line with its numbers."""
    leash, states = trial.config.leash, starting_states(trial)
    # A plan has its own responses, many more than a check: no number but the plan's is said.
    planned = leash.beta is None and leash.schedule is None and leash.initial_beta == "auto"
    betas = {name: None if planned else state.beta for name, state in states.items()}
    line = objective_line(trial.config, betas)
    return Finding("objective.objective", "ok", line, "what you meant to optimise")


def gradient(trial: Trial) -> Finding:
    """Which gradient the configured placement really has."""
    check = Check("objective.gradient", "the gradient of the KL of whole responses")
    placement, beta = trial.components.settings.placement, starting_beta(trial)
    found = gradient_of(placement)
    measured = f"{placement}: {found.kind}"
    if found.sound or beta == 0:
        return check.ok(measured)
    answer = check.fail if found.kind == "zero" else check.warn
    return answer(
        measured,
        f"The placement {placement} has a {found.kind} gradient: {found.why}.",
        "Set leash.placement: reward_k1 (or exact), and leave leash.allow_biased out.",
    )


def score_spread(trial: Trial) -> Finding:
    """A score that is the same for every response gives no gradient."""
    check = Check("objective.score_spread", "scores differ between responses")
    deviation = score_deviation(trial)
    if deviation is None:
        return check.skip("One response has no spread.")
    mean = float(trial.written.raw_scores.mean())
    measured = f"{mean:.3g} ± {deviation:.3g} (standard deviation)"
    if deviation > 1e-6 * max(1.0, abs(mean)):
        return check.ok(measured)
    return check.fail(
        measured,
        "The reward gives every response the same score: there is nothing to climb.",
        "Check the reward on a few responses; a callable must read its second argument, a "
        "classifier its template's {response}, with a tokenizer that knows the words; a weight of "
        "0 silences a reward.",
    )


def strength(trial: Trial) -> Finding:
    """β against the spread of the score: what one nat costs, in standard deviations."""
    check = Check(
        "objective.strength",
        f"one standard deviation of the score worth {_TIGHT:g} to {_SLACK:g} nats",
    )
    deviation, beta = score_deviation(trial), starting_beta(trial)
    if beta == 0:
        return check.skip("β is 0: the KL is measured, not charged.")
    leash = trial.config.leash
    if leash.beta is None and leash.initial_beta == "auto":
        return check.skip("β follows from leash.target_kl and the plan: see `kleash plan`.")
    if deviation is None or deviation == 0:
        return check.skip("The score has no spread: see leash.score_spread.")
    unit = _unit(trial, deviation)
    nats = unit / beta
    measured = f"β = {beta:.4g}: one standard deviation ({unit:.3g}) is worth {nats:.3g} nats"
    if _TIGHT <= nats <= _SLACK:
        return check.ok(measured)
    slack = nats > _SLACK
    cause = (
        "β is far too small for this score: the optimum spends hundreds of nats, so the leash is "
        "not felt."
        if slack
        else "β is far too large for this score: every nat costs more than the score can repay, so "
        "nothing will be learnt."
    )
    worth = unit / math.sqrt(2 * 6.0)
    key = "leash.beta" if leash.beta is not None else "leash.initial_beta"
    answer = check.fail if nats > _NO_LEASH or nats < _NO_REWARD else check.warn
    return answer(
        measured,
        cause,
        f"Set {key}: {worth:.2g} (the optimum then spends about 6 nats per response), or give "
        "leash.target_kl and no β.",
    )


def target(trial: Trial) -> Finding:
    """The target is in nats per response; what is it per token?"""
    check = Check(
        "objective.target",
        f"a target per response: above {_FEW:g} nats or {_FEW_PER_TOKEN:g} per token, under "
        f"{_PER_TOKEN:g} per token",
    )
    goal = trial.config.leash.target_kl
    if trial.config.leash.groups is not None:
        return check.skip("Each group of prompts has a target of its own.")
    if goal is None:
        return check.skip("β does not move: there is no target per response.")
    length = float(trial.rollout.response_mask.sum(-1).double().mean())
    per_token = goal / length
    measured = f"{goal:g} nats per response, {per_token:.3g} per token at {length:.1f} tokens"
    tiny = goal <= _FEW and per_token < _FEW_PER_TOKEN
    if not tiny and per_token <= _PER_TOKEN:
        return check.ok(measured)
    if tiny:
        return check.warn(
            measured,
            f"leash.target_kl = {goal:g} looks like a target per token; here it is the whole "
            "response's.",
            f"Set leash.target_kl: {goal * length:.3g}, or leash.target_kl_per_token: {goal:g} in "
            "its place.",
        )
    answer = check.fail if per_token > 10 else check.warn
    return answer(
        measured,
        f"leash.target_kl = {goal:g} is more than responses of {length:.1f} tokens can sensibly "
        "spend: β will fall until the leash is gone.",
        f"Set leash.target_kl: {min(6.0, length / 4):.3g}, a quarter of a nat per token at most.",
    )


def inert(trial: Trial) -> Finding:
    """Options that were written down and do nothing."""
    check = Check("objective.inert", "every option that is set does something")
    useless = inert_options(trial)
    if not useless:
        return check.ok("none found")
    return check.warn(
        f"{len(useless)} found",
        "Options do nothing here: " + some(useless) + ".",
        "Remove "
        + some([option.split(" ")[0].rstrip(":") for option in useless])
        + ", or set what would make it count.",
    )


def inert_options(trial: Trial) -> list[str]:
    """`key: why` of every option that is set and has no effect."""
    config = trial.config
    leash, found = config.leash, list[str]()
    if leash.allow_biased and gradient_of(leash.placement).sound:
        found.append(f"leash.allow_biased ({leash.placement} is not biased)")
    if leash.beta == 0 and leash.placement not in ("reward_k1", "measure"):
        found.append("leash.placement (β is 0)")
    for key, reward in config.reward_models.items():
        if reward.weight == 0:
            found.append(f"reward_models.{key}.weight (0 silences the reward)")
    alike = config.policy.quantization == config.reference.quantization
    if config.reference.reference_differs and config.reference.path is None and alike:
        found.append("reference.reference_differs (the reference is the policy itself)")
    if config.optimizer.warmup_steps >= config.steps:
        found.append("optimizer.warmup_steps (the run ends before the peak rate)")
    if config.heldout.every > config.steps:
        found.append("heldout.every (longer than the run)")
    if config.logging.checkpoint_every > config.steps:
        found.append("logging.checkpoint_every (longer than the run)")
    return found


def score_deviation(trial: Trial) -> float | None:
    """Standard deviation of the score, within prompts; None with a single response."""
    variance = score_variance(trial.scored)
    return None if variance is None else math.sqrt(variance)


def _unit(trial: Trial, deviation: float) -> float:
    """Standard deviation of the score in the units that β is a price in."""
    config = trial.config
    normalised = config.score_normalisation != "none" or config.algorithm.name == "grpo"
    return 1.0 if normalised else deviation


def starting_beta(trial: Trial) -> float:
    """β of the first step; where there are groups, of the first of them."""
    return next(iter(starting_states(trial).values())).beta


def starting_states(trial: Trial) -> States:
    """The first step's β, from this trial's few responses where a plan would check for more."""
    leash, starts = trial.config.leash, dict[str, Start]()
    length = float(trial.scored.rollout.response_mask.sum(-1).float().mean())
    deviation = score_deviation(trial) or 1.0
    unit = _unit(trial, deviation)
    for name, own in leash.each().items():
        target = target_per_response(own, length)
        if target is not None:
            given = leash.initial_beta
            beta = initial_beta(target, unit) if given == "auto" else given
            starts[name] = Start(beta, "spread", response_length=length)
    responses = trial.config.responses_per_step
    return make_leash(leash, starts=starts, responses_per_step=responses).init()
