"""Checks `resources.*`: will it fit, and how long will it take? From two measured iterations.

An iteration is a step without its last act: write, score, differentiate; no weight moves. What a
step allocates later, Adam's two moments, is added by counting. Left out: held-out evaluations.
"""

import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kleash.algorithms import dispatch
from kleash.algorithms.common import kept_rows, select
from kleash.config.algorithm import PassesConfig
from kleash.config.rollout import RolloutConfig
from kleash.models.batching import most_rows
from kleash.preflight.findings import Check, Finding, skipped
from kleash.preflight.probe_batch import MICROBATCH, Trial
from kleash.rollout.scoring_pass import microbatches, row_lengths
from kleash.training.recovery import copy_bytes, several_updates, undone_in_memory

_ITERATIONS = 2
_GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """What one measured iteration cost."""

    responses: int
    tokens: int
    writing: float
    """Seconds."""
    reading: float
    learning: float
    before: int
    """Bytes in use before the first iteration."""
    peak: int
    """Bytes at the highest point so far."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.writing + self.reading + self.learning


def examine(trial: Trial) -> list[Finding]:
    """Memory and time of the run."""
    if trial.config.rollout.truncated == "drop" and not bool(trial.rollout.ended.any()):
        why = "No response is left to learn from, so no iteration can be tried."
        return [skipped("resources.memory", why), skipped("resources.time", why)]
    costs = [_iterate(trial) for _ in range(_ITERATIONS)]
    return [_memory(trial, costs[0], costs[-1]), _time(trial, costs[-1])]


def undo(trial: Trial) -> Finding:
    """What becomes of a step that is refused between its updates."""
    check = Check("resources.undo", "a refused step that costs no more than itself")
    config, components = trial.config, trial.components
    if not several_updates(config.algorithm):
        return check.ok("one update a step: it is refused before it is made")
    size = f"{copy_bytes(components.optimizer) / _GIB:.2g} GiB"
    if undone_in_memory(config.tripwires, components.optimizer):
        return check.ok(f"a copy of {size} in main memory")
    every = config.logging.checkpoint_every
    if every:
        return check.ok(f"back to the last checkpoint, at most {every} steps")
    minutes = config.logging.checkpoint_minutes
    if minutes:
        return check.ok(f"back to the last checkpoint, about {minutes:g} minutes at most")
    return check.warn(
        "back to the beginning of the run",
        f"No copy is kept of what learns (it would take {size}), and no checkpoint is written "
        "before the last step: a number that is not finite would cost the whole run.",
        "Set logging.checkpoint_every: 10 (or as often as you can lose that many steps), or "
        "tripwires.undo: memory.",
    )


def adam_bytes(parameters: Sequence[nn.Parameter]) -> int:
    """Adam's two moments, which exist from the first update on."""
    return sum(2 * p.numel() * p.element_size() for p in parameters)


def machine_bytes(device: torch.device) -> int:
    """Memory of the device that trains."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory(trial: Trial, first: Cost, last: Cost) -> Finding:
    components, config = trial.components, trial.config
    has = machine_bytes(components.policy.device)
    # A budget of tokens is full too where every row is as long as the longest.
    longest = max(row_lengths(trial.rollout))
    rows = min(most_rows(config.algorithm.microbatch, longest), config.responses_per_step)
    grown = max(0, last.peak - first.before)
    needs = (
        first.before
        + int(grown * max(1.0, rows / first.responses))
        + adam_bytes(components.parameters())
    )
    measured = f"about {needs / _GIB:.2f} GiB of {has / _GIB:.1f} GiB"
    check = Check("resources.memory", "at most nine tenths of the machine's memory")
    if needs <= 0.9 * has:
        return check.ok(measured)
    answer = check.fail if needs > has else check.warn
    return answer(
        measured,
        f"The run needs about {needs / _GIB:.1f} GiB and the machine has {has / _GIB:.1f} GiB: it "
        "will stop in the first update, or swap.",
        f"Lower {_size('algorithm', config.algorithm)} and {_size('rollout', config.rollout)}, or "
        "train an adapter (policy.lora).",
    )


def _size(section: str, sizes: PassesConfig | RolloutConfig) -> str:
    key = "microbatch_size" if sizes.microbatch_tokens is None else "microbatch_tokens"
    return f"{section}.{key} (now {getattr(sizes, key)})"


def _time(trial: Trial, cost: Cost) -> Finding:
    config = trial.config
    share = config.responses_per_step / cost.responses
    step = share * (cost.writing + cost.reading + config.algorithm.epochs * cost.learning)
    total = step * config.steps
    speed = cost.tokens * share / step
    return Finding(
        "resources.time",
        "ok",
        f"{_spelled(total)} for {config.steps} steps ({step:.2g} s each), {speed:.0f} tokens/s",
        "a time you have",
    )


def _iterate(trial: Trial) -> Cost:
    components, config = trial.components, trial.config
    device = components.policy.device
    before, clock = _peak(device), time.perf_counter()
    group = config.rollout.responses_per_prompt
    prompts = components.prompts[: min(config.rollout.prompts_per_step, max(1, 64 // group))]
    microbatch = config.rollout.microbatch_size
    written = components.judge(
        components.write(prompts, responses_per_prompt=group, microbatch=microbatch)
    )
    responses = len(written.texts)
    wrote = time.perf_counter()
    scored = components.score(written.rollout, written.raw_scores, microbatch=MICROBATCH)
    was_read = time.perf_counter()
    experience = dispatch.algorithm_of(components.settings).prepare(
        scored, 0.1, components.settings
    )
    # The first is the largest, which memory is measured on.
    kept = select(experience, kept_rows(experience))
    rows = microbatches(kept.scored.rollout, config.algorithm.microbatch)[0]
    part = select(kept, rows)
    loss, _ = components.loss(part, tokens=int(part.mask.sum()))
    loss.total.backward()
    peak = _peak(device)
    components.optimizer.zero_grad(set_to_none=True)
    lengths = row_lengths(kept.scored.rollout)
    share = sum(lengths[i] for i in rows.tolist()) / sum(lengths)
    learning = (time.perf_counter() - was_read) / share
    return Cost(
        responses=responses,
        tokens=int(written.rollout.response_mask.sum()),
        writing=wrote - clock,
        reading=was_read - wrote,
        learning=learning,
        before=before,
        peak=peak,
    )


def _peak(device: torch.device) -> int:
    """Highest memory use so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _spelled(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
