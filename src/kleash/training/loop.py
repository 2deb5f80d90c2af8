"""The training loop: write, score, reward, climb, and move β, in that order, once a step.

    1. the policy writes responses to the prompts
    2. the same tokens go through the frozen reference, which never writes
    3. per token: log π, log π_ref, exact KL, entropy
    4. rewards: the score on the last token, −β·kl on each
    5. advantages, clipped updates
    6. β moves, so that the KL spent meets its target

Where a launcher started several processes, each runs this loop. Writing, scoring and gradients are
divided by rows (`data_parallel`); all else is the same function of the same numbers everywhere,
which is asserted after every step. The first process writes the files.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from signal import Signals

from rich.console import Console
from torch import Tensor

from kleash.algorithms import dispatch
from kleash.algorithms.common import trained_rows
from kleash.algorithms.rewards import ScoreStatistics
from kleash.config.schema import Config
from kleash.errors import EngineError, ModelError, RefusedError
from kleash.kl.control.groups import States, betas_of, is_grouped
from kleash.kl.statistics import clustered_mean, response_kl
from kleash.masked import masked_mean
from kleash.mesh import is_first_process, joined
from kleash.storage.events import new_event
from kleash.storage.samples import Sample
from kleash.training.ahead import writing_ahead
from kleash.training.assembly import Reward
from kleash.training.calibration import start_lines
from kleash.training.callbacks import Callbacks, RolloutEvent, StartEvent, StepEvent
from kleash.training.evaluation import HeldoutEvaluator, SampleReader
from kleash.training.evidence import PendingStep
from kleash.training.interruption import RunInterrupted, StopRequest, catch_signals
from kleash.training.kept_reading import SharedReading
from kleash.training.kl_control import (
    controller_measures,
    leash_measures,
    measurements,
    read_groups,
    shortfall_lines,
)
from kleash.training.metadata import betas_by_group, objective_line
from kleash.training.metrics import (
    Clock,
    Number,
    account,
    charge_measures,
    distill_measures,
    next_mixing,
    objective_measures,
    reward_measures,
    rollout_measures,
    sampler_measures,
    with_error,
)
from kleash.training.optimization import PolicyUpdater, epoch_order
from kleash.training.progress import TrainingDisplay
from kleash.training.quantization_floor import has_floor, quantization_meta
from kleash.training.recovery import (
    begin_step,
    check_after_last_update,
    check_bounds,
    keep_for_later,
    recover,
    several_updates,
)
from kleash.training.replicas import require_same_step
from kleash.training.responses import JudgedResponses
from kleash.training.session import Session
from kleash.training.startup import Preflight, open_session
from kleash.training.state import TrainingState
from kleash.training.trackers import Trackers
from kleash.training.vocabulary import vocabulary_measures
from kleash.types import Experience, Fresh, Rollout, ScoredRollout

_SAME_MODEL = 1e-4
"""Nats per token below which two models count as one."""
_HELDOUT_SAMPLES = 8


class Trainer:
    """Trains a policy on the leash and leaves a run directory.

    If the output already holds this very run, unfinished, it is continued from its newest
    checkpoint: numbers and weights are those of a run that was never interrupted.

    Example:
        Trainer(config, callbacks=[mine]).fit()
    """

    session: Session

    def __init__(
        self,
        config: Config,
        *,
        callbacks: Sequence[object] = (),
        preflight: Preflight | None = None,
        argv: Sequence[str] = (),
        rewards: Mapping[str, Reward] | None = None,
        rows: Mapping[str, Sequence[object]] | None = None,
    ) -> None:
        """Nothing is loaded or written before `fit`.

        Args:
            config: the run, written down; `{world}` already replaced.
            callbacks: objects with methods named in `callbacks`; each of several processes calls
                its own, with the same events.
            preflight: looks at the components before anything begins; raises what must stop the
                run, and returns its warnings, for the record.
            argv: the command line, for the record.
            rewards: reward functions or objects by the names they have in `reward_models`, which
                take the place of what is named there.
            rows: prompts given in memory, `train` and `heldout`, in the place of the files.

        Raises:
            ConfigError: a callback has none of the methods, or a tracker is not installed.
        """
        self.config = config
        self._preflight = preflight
        self._argv = argv
        self._rewards = rewards or {}
        self._rows = rows or {}
        first = is_first_process()
        self._trackers = Trackers(config.logging.trackers if first else (), Path(config.output))
        self._display = TrainingDisplay(
            config.steps,
            title=Path(config.output).resolve().name,
            console=None if first else Console(quiet=True),
        )
        self.callbacks = Callbacks([self._trackers, self._display, *callbacks])

    def fit(self) -> Path:
        """Make every step that is still to be made.

        Returns:
            The run directory.

        Raises:
            KleashError: something the user can fix; nothing was begun if it shows at the start, and
                the run directory says "failed" and why if it shows later.
            RunInterrupted: SIGINT or SIGTERM came; the step was finished and saved.
        """
        with joined(self.config.distributed.timeout_s) as mesh:
            self.session = session = open_session(
                self.config,
                argv=self._argv,
                preflight=self._preflight,
                mesh=mesh,
                rewards=self._rewards,
                rows=self._rows,
                callbacks=self.callbacks,
            )
            signals = catch_signals(notice=mesh.is_first, launched=mesh.size > 1)
            engine = closing(session.components)
            with engine, session.run, self._trackers, self._display, signals as stop:
                self._start()
                pending = None
                while session.state.step < self.config.steps:
                    self._stop_if_asked(stop)
                    pending = begin_step(session, pending)
                    try:
                        mesh.agree(session.guard.require_checksums)
                        metrics = self._step(pending)
                    except RefusedError as error:
                        recover(error, pending, session)
                        continue
                    except EngineError as error:
                        keep_for_later(error, pending, session)
                        raise
                    session.next_rollout = pending.following
                    require_same_step(metrics, session)
                    self.callbacks.on_step(StepEvent(session.state.step, metrics))
                    session.reanchor_if_due()
                    session.save_if_due(metrics)
                for line in session.note_warning_signs():
                    self._display.say(f"warning: {line}")
        return session.run.path

    def _stop_if_asked(self, stop: StopRequest) -> None:
        """Save and end, between two steps, where a signal asked for it.

        Raises:
            RunInterrupted: it did; the message says where the run stands and how to go on.
        """
        session, step = self.session, self.session.state.step
        asked = [number for number in session.components.mesh.gather(stop.signal) if number]
        if not asked:
            return
        signal = Signals(asked[0])
        checkpoint = session.ensure_saved()
        raise RunInterrupted(
            f"stopped by {signal.name} after step {step} of {self.config.steps}; kept in "
            f"{checkpoint}; go on with: kleash train --resume {session.run.path}",
            exit_code=128 + signal,
        )

    def _step(self, pending: PendingStep) -> dict[str, Number]:
        """One rollout and its updates; every number of it goes into the run directory."""
        session, config, clock = self.session, self.config, Clock()
        components, state = session.components, session.state

        # 1. The policy writes; the reward models read.
        numbers, cursor = state.cursor.take(config.rollout.prompts_per_step)
        with clock.measure("time/generate"):
            judged = self._write(numbers, pending)
        scores, seen = self._normalise(judged.raw_scores)
        pending.scores = scores
        betas = betas_of(state.betas, components.groups_of(judged.rollout))

        # 2–3. Policy, reference and critic score the same tokens.
        with clock.measure("time/score"):
            rollout, kept = judged.rollout, None
            order = epoch_order(trained_rows(rollout, components.settings.truncated))
            spot = _is_due(config.logging.spot_check_every, pending.step)
            once, rows = self._read_once(rollout, order, spot_check=spot)
            if rows is None:
                scored = components.score(rollout, scores, microbatch=once.scoring, spot_check=spot)
            else:
                scored, kept = once.score(rollout, scores, rows)
            pending.scored = scored
            original_kl = self._original_kl(scored)
        self._require_sound(judged, scored, original_kl, pending)
        samples, closely = self._read_closely(judged, scored, pending.step)

        # 4–5. Rewards, advantages, clipped updates.
        with clock.measure("time/update"):
            settings = replace(components.settings, mixing=state.mixing)
            experience = dispatch.algorithm_of(settings).prepare(scored, betas, settings)
            updates = closely | self._climb(experience, pending, order, kept)
        if pending.step == config.steps:
            updates |= check_after_last_update(session, pending)

        # 6. β moves.
        moved, control = self._move(experience.scored)
        after = replace(
            state,
            step=pending.step,
            episodes=state.episodes + len(judged.texts),
            betas=moved,
            scores=seen,
            cursor=cursor,
            mixing=next_mixing(settings, experience, betas),
            seconds=state.seconds + (elapsed := clock.total),
        )
        metrics = {
            **objective_measures(experience.scored, beta=dispatch.price(betas, settings)),
            **self._rollout_numbers(judged, scored, original_kl),
            **updates,
            **charge_measures(settings, experience, betas),
            "objective/accounting_residual": account(settings, experience, betas),
            **control,
            **clock.seconds,
            **_progress(elapsed, scored, after),
        }
        metrics = self._write_down(after, metrics, samples)
        session.state = replace(after, sampler_floor=metrics.get("rollout/kl_sampler_floor"))
        return metrics

    def _start(self) -> None:
        """Say what begins; a fresh run evaluates the reference first."""
        session = self.session
        state = session.state
        self._display.target_kl = None if is_grouped(state.betas) else self.config.leash.target_kl
        lines = [
            objective_line(self.config, betas_by_group(state.betas), step=state.step),
            *(f"warning: {warning}" for warning in session.warnings),
        ]
        if state.step == 0:
            lines += start_lines(self.config.leash, state.starts)
        self.callbacks.on_start(StartEvent(session.run.path, state.step, self.config.steps, lines))
        if session.fresh and session.components.heldout:
            session.run.append_metrics({"step": 0, **self._evaluate(state)})

    def _write(self, numbers: Sequence[int], pending: PendingStep) -> JudgedResponses:
        """Responses to the prompts with these numbers, and the reward models' scores."""
        components = self.session.components
        pending.responses = components.write(
            [components.prompts[number] for number in numbers],
            responses_per_prompt=self.config.rollout.responses_per_prompt,
            microbatch=self.config.responses_per_step,
            written=self.session.next_rollout,
        )
        return components.judge(pending.responses)

    def _normalise(self, raw: Tensor) -> tuple[Tensor, ScoreStatistics]:
        """Scores in the units of training, and the statistics of all scores so far."""
        seen = self.session.state.scores
        match self.config.score_normalisation:
            case "none":
                return raw, seen
            case "initial":
                return seen.normalise(raw), seen
            case "running":
                seen = seen.update(raw)
                return seen.normalise(raw), seen

    def _read_once(
        self, rollout: Rollout, order: Tensor, *, spot_check: bool
    ) -> tuple[SharedReading, Tensor | None]:
        """The rows whose graph of scoring serves the first update, which reads them no more.

        None in the first step, as where a spot check is due: there the update reads the policy
        again, and the ratios of two readings show whether the model is deterministic. With several
        minibatches they show it in each step: sharing a part would save too little.
        """
        passes, limit = self.config.algorithm, self.config.rollout.microbatch
        shared = SharedReading(self.session.components, limit, passes.microbatch)
        apart = spot_check or self.session.state.step == 0 or passes.minibatches > 1
        return shared, None if apart else shared.rows(rollout, order)

    def _original_kl(self, scored: ScoredRollout) -> Tensor:
        """[batch, token] exact KL to the run's first reference, wherever the anchor is now."""
        components = self.session.components
        if components.reference is components.original:
            return scored.kl
        return components.score(
            scored.rollout,
            scored.scores,
            reference=components.original,
            critic=False,
            microbatch=self.config.rollout.microbatch,
        ).kl

    def _require_sound(
        self,
        judged: JudgedResponses,
        scored: ScoredRollout,
        original_kl: Tensor,
        pending: PendingStep,
    ) -> None:
        """Before anything is learnt from a rollout: the start and the bounds are right.

        Raises:
            ModelError: the run does not start at its reference.
            TripwireError: a bound was passed.
        """
        session, step = self.session, pending.step
        if step == 1 and not self.config.reference.reference_differs:
            _require_reference_is_start(scored)
        sections = self.config.policy, self.config.reference
        if step == 1 and has_floor(*sections):
            session.run.update_meta(**quantization_meta(*sections, scored))
        event = RolloutEvent(
            step=step,
            config=self.config,
            components=session.components,
            judged=judged,
            scored=scored,
            folder=session.run.path,
            append_event=session.run.append_event,
            sampler_floor=session.state.sampler_floor,
            written_ahead=session.next_rollout is not None,
        )
        self.callbacks.on_rollout(event)
        check_bounds(self.config.tripwires, scored, original_kl)
        pending.within_bounds = True

    def _read_closely(
        self, judged: JudgedResponses, scored: ScoredRollout, step: int
    ) -> tuple[list[Sample], dict[str, Number]]:
        """Responses to keep and, where it is due, both laws over the whole vocabulary.

        While the policy is still the one that wrote them.
        """
        components, numbers = self.session.components, dict[str, Number]()
        # Of a rollout that a copy of the policy wrote ahead, the law is not there any more.
        there = components.engine is not None or self.session.next_rollout is None
        if there and _is_due(self.config.logging.spot_check_every, step):
            numbers = vocabulary_measures(
                scored.rollout,
                components.policy,
                temperature=components.sampling.temperature,
                engine=components.engine,
            )
        reader = SampleReader(
            components.policy, components.reference, components.sampling.temperature
        )
        count = self.config.logging.samples_per_step
        return reader.training_samples(scored, judged, step=step, count=count), numbers

    def _climb(
        self, experience: Experience, pending: PendingStep, order: Tensor, kept: Fresh | None
    ) -> dict[str, Number]:
        """The clipped updates; `pending` knows from when on weights may have moved."""
        pending.updating = several_updates(self.config.algorithm)
        updater = PolicyUpdater(self.session.components, self.config)
        with writing_ahead(self.session) as following:
            updates = updater.update(experience, done=pending.step - 1, order=order, reading=kept)
        pending.updating = True
        pending.following = following.rollout(pending)
        return updates

    def _move(self, scored: ScoredRollout) -> tuple[States, dict[str, Number]]:
        """Where every β goes after this rollout, and the numbers of what was read and decided."""
        session, leash = self.session, self.config.leash
        components, state = session.components, session.state
        trained = dispatch.trained_scores(scored, components.settings)
        readings = read_groups(scored, components.groups_of(scored.rollout), trained=trained)
        given = measurements(readings, state.starts, follow_scores=leash.initial_beta == "auto")
        moved = session.leash.update(state.betas, given)
        for line in shortfall_lines(session.leash, moved, readings):
            event = new_event(state.step + 1, "alarm", line, sign="budget_under_spent")
            session.run.append_event(event)
            self._display.say(f"step {event.step}: {line}")
        return moved, {
            **leash_measures(leash, state.betas, readings, components.frontier),
            **controller_measures(session.leash, state.betas, given, moved),
        }

    def _rollout_numbers(
        self, judged: JudgedResponses, scored: ScoredRollout, original_kl: Tensor
    ) -> dict[str, Number]:
        """What was written, the gap of its sampler and its scores; the KL to a first reference."""
        measures = rollout_measures(scored, judged.texts) | distill_measures(scored)
        settings, floor = self.session.components.settings, self.session.state.sampler_floor
        measures |= sampler_measures(scored, settings, floor=floor)
        if judged.parts:
            measures |= reward_measures(judged.parts, judged.raw_scores)
        if self.config.leash.reanchor_every is not None:
            mask, clusters = scored.rollout.response_mask, scored.rollout.prompt_index
            estimate = clustered_mean(response_kl(original_kl, mask), clusters)
            measures |= with_error("objective/kl_original", estimate)
        return measures

    def _write_down(
        self, after: TrainingState, metrics: dict[str, Number], samples: Sequence[Sample]
    ) -> dict[str, Number]:
        """A held-out evaluation where one is due, the step's numbers, and a few responses."""
        session, step = self.session, after.step
        due = step == self.config.steps or _is_due(self.config.heldout.every, step)
        if session.components.heldout and due:
            metrics = {**metrics, **self._evaluate(after)}
        session.run.append_metrics(metrics)
        session.run.append_samples(samples)
        return metrics

    def _evaluate(self, state: TrainingState) -> dict[str, Number]:
        config = self.config
        differs = config.reference.reference_differs
        evaluator = HeldoutEvaluator(
            self.session.components,
            responses_per_prompt=config.heldout.responses_per_prompt,
            written_at_once=max(256, config.rollout.microbatch_size),
            microbatch=config.rollout.microbatch,
            samples=_HELDOUT_SAMPLES,
        )
        metrics, samples = evaluator.evaluate(
            step=state.step,
            betas=state.betas,
            who="reference" if state.step == 0 and not differs else "policy",
        )
        self.session.run.append_samples(samples)
        return metrics


def train(
    config: Config,
    *,
    argv: Sequence[str] = (),
    preflight: Preflight | None = None,
    callbacks: Sequence[object] = (),
) -> Path:
    """`Trainer(config, …).fit()`: train and return the run directory."""
    return Trainer(config, callbacks=callbacks, preflight=preflight, argv=argv).fit()


def _is_due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps happens now; never where `every` is 0."""
    return bool(every) and step % every == 0


def _require_reference_is_start(scored: ScoredRollout) -> None:
    """Before the first update the policy is the reference, or two models were mixed up."""
    per_token = float(masked_mean(scored.kl, scored.rollout.response_mask))
    if per_token > _SAME_MODEL:
        raise ModelError(
            f"the reference is not the policy this run starts from: KL {per_token:.3g} nats per "
            f"token before any update, expected at most {_SAME_MODEL:g}; fix reference.path, or "
            "say reference.reference_differs: true if it is meant"
        )


def _progress(elapsed: float, scored: ScoredRollout, after: TrainingState) -> dict[str, Number]:
    """Where the run is, and how fast."""
    tokens = int(scored.rollout.response_mask.sum())
    return {
        "tokens_per_second": tokens / elapsed,
        "step": after.step,
        "episodes": after.episodes,
        "seconds": after.seconds,
    }
