"""All checks in order over one shared batch, and what a run does with their findings."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from kleash.config.schema import Config
from kleash.errors import KleashError, PreflightError
from kleash.preflight.checks import (
    learning_rate,
    logprobs,
    masks,
    objective,
    precision,
    prompts,
    reference,
    resources,
    reward_model,
    sampling,
)
from kleash.preflight.checks.reward_model import Pair
from kleash.preflight.findings import Finding, Report
from kleash.preflight.probe_batch import QUICK, WHOLE, Trial, draw
from kleash.training.assembly import assemble
from kleash.training.components import Components

TrialCheck = Callable[[Trial], Finding]
Say = Callable[[str], None]
Status = Callable[[], AbstractContextManager[Say | None]]
"""Opens a status line, which is given what is being done; or nothing."""
_BATCH = "batch"
"""Where nothing can be written, judged or scored; training would stop at it too."""

SCORING: tuple[TrialCheck, ...] = (
    logprobs.architecture,
    logprobs.dropout,
    logprobs.self_kl,
    logprobs.start,
    logprobs.head,
    logprobs.alignment,
    logprobs.positions,
    logprobs.left_padding,
    logprobs.right_padding,
    logprobs.batching,
    logprobs.packing,
    logprobs.canary,
    logprobs.streaming,
    logprobs.temperature,
    logprobs.floor,
)
SAMPLING: tuple[TrialCheck, ...] = (
    sampling.ratio,
    sampling.mean_weight,
    sampling.law,
    sampling.leftovers,
    sampling.ending,
)
MASKS: tuple[TrialCheck, ...] = (
    masks.shape,
    masks.end_token,
    masks.padding_ids,
    masks.numbers,
    masks.prompt_tokens,
)
REFERENCE: tuple[TrialCheck, ...] = (
    reference.frozen,
    reference.storage,
    reference.adapter,
    reference.quantization,
)
REWARD: tuple[TrialCheck, ...] = (
    reward_model.head,
    reward_model.alone,
    reward_model.last_token,
    reward_model.bos,
    reward_model.template,
    reward_model.dropped_tokens,
)
LEASH: tuple[TrialCheck, ...] = (
    objective.objective,
    objective.gradient,
    objective.score_spread,
    objective.strength,
    objective.target,
    objective.inert,
)
READING: tuple[TrialCheck, ...] = (
    prompts.duplicates,
    prompts.leak,
    prompts.chat_template,
    prompts.tools,
)

QUICK_CHECKS = (
    *SCORING,
    *SAMPLING,
    *MASKS,
    *REFERENCE,
    *REWARD,
    *LEASH,
    *READING,
    precision.survival,
    learning_rate.one_update,
    resources.undo,
)
OF_SCORES = (*REWARD, objective.score_spread, objective.strength, objective.target)
"""Those that have nothing to look at where nothing is scored."""
OF_A_BATCH = (*SCORING, *SAMPLING, *MASKS, *REFERENCE)
"""Those that need no configuration."""


def silent(doing: str) -> None:
    """Say nothing of what is being done."""
    del doing


def check(
    config: Config, *, quick: bool = False, pairs: Sequence[Pair] = (), say: Say = silent
) -> Report:
    """Assemble a run and examine it; nothing is trained and nothing written.

    Args:
        config: the run, written down; `{world}` already replaced.
        quick: only what `kleash train` runs by itself.
        pairs: replies of which people preferred one, to try the reward on.
        say: gets what is being done, each time before it begins.
    """
    began = time.perf_counter()
    say("loading models and prompts")
    try:
        components = assemble(config)
    except KleashError as error:
        return Report((refused("assembly", error),), time.perf_counter() - began)
    report = examine_components(config, components, quick=quick, pairs=pairs, say=say)
    return Report(report.findings, time.perf_counter() - began)


def examine_components(
    config: Config,
    components: Components,
    *,
    quick: bool,
    pairs: Sequence[Pair] = (),
    say: Say = silent,
) -> Report:
    """Run the checks on objects that are there; weights and random numbers stay as they were."""
    began = time.perf_counter()
    devices = [components.policy.device] if components.policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        findings = [reference.vocabulary(components.policy, components.reference)]
        size = QUICK if quick else WHOLE
        say(f"writing {size.responses_per_prompt} responses to each of {size.prompts} prompts")
        try:
            trial = draw(config, components, size)
        except (KleashError, ValueError) as error:
            findings.append(refused(_BATCH, error))
            return Report(tuple(findings), time.perf_counter() - began)
        scored = bool(components.reward.rewards)
        chosen = [one for one in QUICK_CHECKS if scored or one not in OF_SCORES]
        findings += run_checks(chosen, trial, say=say)
        if not quick:
            judged = (reward_model.probes, _preferences(pairs)) if scored else ()
            slow = (reference.identity, *judged)
            findings += run_checks(slow, trial, say=say)
            say("two iterations of training, for memory and time")
            findings += resources.examine(trial)
    return Report(tuple(findings), time.perf_counter() - began)


def run_checks(checks: Sequence[TrialCheck], trial: Trial, *, say: Say = silent) -> list[Finding]:
    """Each check's finding; one that could not be carried out has found something too."""
    findings: list[Finding] = []
    for one in checks:
        say(name_of(one))
        try:
            findings.append(one(trial))
        except (KleashError, ValueError) as error:
            findings.append(refused(name_of(one), error))
    return findings


def _preferences(pairs: Sequence[Pair]) -> TrialCheck:
    """The check of that name, on these pairs."""

    @functools.wraps(reward_model.preferences)
    def preferences(trial: Trial) -> Finding:
        return reward_model.preferences(trial, pairs)

    return preferences


def name_of(check: TrialCheck) -> str:
    """`module.check`, as in its finding."""
    return f"{check.__module__.rsplit('.', 1)[-1]}.{check.__name__}"


def refused(name: str, error: Exception) -> Finding:
    """An error that training would meet too, as a finding."""
    return Finding(
        name,
        "fail",
        measured=type(error).__name__,
        expected="no error",
        cause=str(error),
        remedy="The sentence says what was expected: fix that first, then check again.",
    )


def require_sound(
    config: Config, components: Components, *, status: Status = contextlib.nullcontext
) -> list[str]:
    """The quick part, before a run: its warnings, for the record.

    Args:
        config: the run.
        components: what was assembled for it.
        status: opens a status line, which is given what is being done.

    Raises:
        PreflightError: a check failed.
    """
    with status() as say:
        report = examine_components(config, components, quick=True, say=say or silent)
    if report.fails:
        first, more = report.fails[0], len(report.fails) - 1
        if first.name == _BATCH:
            raise PreflightError(f"no batch can be made: {first.cause}")
        others = f" ({more} more: see kleash check)" if more else ""
        raise PreflightError(
            f"{first.name}: {first.cause} {first.remedy}{others} Or pass --no-check to train all "
            "the same."
        )
    return [f"{w.name}: {w.cause} {w.remedy}" for w in report.warnings]
