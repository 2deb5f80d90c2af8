"""What a run is at the moment: its models, its state, its directory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import inf, log
from pathlib import Path
from time import monotonic

from kleash import __version__
from kleash.config.schema import Config
from kleash.kl.control.groups import Leash
from kleash.models.precision import weights_dtype
from kleash.models.reference_offload import anchor_at
from kleash.rollout.policy_copy import PolicyCopy
from kleash.storage.atomic_directories import list_checkpoints, step_of
from kleash.storage.events import new_event
from kleash.storage.model_card import ModelCardFacts, model_card
from kleash.storage.run_directory import RunWriter, read_run
from kleash.training.callbacks import Callbacks, CheckpointEvent
from kleash.training.components import Components
from kleash.training.metrics import Number
from kleash.training.record import SilentRun
from kleash.training.reference_guard import ReferenceGuard
from kleash.training.state import (
    TrainingState,
    latest_checkpoint,
    restore_anchor,
    restore_next_rollout,
    restore_run_state,
    save_run_state,
)
from kleash.training.warning_signs import warning_signs, worst_samples
from kleash.types import Rollout

_Z95 = 1.96
"""Standard errors on either side of a 95 % interval."""


@dataclass(eq=False)
class Session:
    """A run that is ready for its next step. Steps, re-anchoring and rollbacks change it."""

    config: Config
    components: Components
    leash: Leash
    """The controller of each group's β."""
    state: TrainingState
    run: RunWriter | SilentRun
    """Written by the first process alone."""
    guard: ReferenceGuard
    callbacks: Callbacks
    warnings: list[str]
    """What the preflight said; of a run that is continued, why it begins again if it does."""
    fresh: bool
    """No step of it has been kept: it begins with what the reference does."""
    next_rollout: Rollout | None = None
    """The rollout of the next step, where it was written ahead; None: it is still to be written."""
    policy_copy: PolicyCopy | None = None
    """What writes ahead where no engine has weights of its own; made when first needed."""
    saved_at: float = field(default_factory=lambda: monotonic())
    """When this process began or last wrote a checkpoint, on its own clock in seconds."""

    def reanchor_if_due(self) -> None:
        """Tie the leash to the policy as it now is, where the configuration says so."""
        every, step = self.config.leash.reanchor_every, self.state.step
        if every is None or step % every or step == self.config.steps:
            return
        anchor = anchor_at(self.components.policy, step, like=self.components.original)
        self.components = replace(self.components, reference=anchor)
        self.state = replace(self.state, anchored=step)
        self.guard = ReferenceGuard.of(self.components.original, anchor)
        sentence = f"the leash is tied to the policy of step {step}"
        self.run.append_event(new_event(step, "reanchored", sentence))

    def save_if_due(self, metrics: Mapping[str, Number]) -> None:
        """A checkpoint where one is due; the best held-out objective so far is remembered.

        Raises:
            RunError: a reference changed, or the checkpoint cannot be written.
        """
        if not self._is_save_due():
            return
        self.components.mesh.agree(self.guard.require_hashes)
        objective, best = metrics.get("heldout/rlhf_reward"), self.state.best_objective
        if objective is not None and objective > (-inf if best is None else best):
            self.state = replace(self.state, best_step=self.state.step, best_objective=objective)
        self.save(keep=self.config.logging.keep, metrics=metrics)

    def _is_save_due(self) -> bool:
        """After the last step, every so many steps, or once so many minutes are at risk.

        A run that rolls back keeps checkpoints by steps alone: to which it goes back must not
        depend on how fast the machine is.
        """
        logging, step = self.config.logging, self.state.step
        if step == self.config.steps:
            return True
        if logging.checkpoint_every and step % logging.checkpoint_every == 0:
            return True
        if not logging.checkpoint_minutes or self.config.tripwires.then == "rollback":
            return False
        waited = 60 * logging.checkpoint_minutes
        # The clock of the first process is that of all.
        return self.components.mesh.broadcast(lambda: monotonic() - self.saved_at >= waited)

    def note_warning_signs(self) -> list[str]:
        """At the end of a run: what looks wrong in its numbers, also in run.json and as events.

        Returns:
            A sentence for each sign.
        """
        frontier = self.components.frontier
        known = None if frontier is None else log(self.config.plan.responses)
        if not self.components.mesh.is_first:
            return []
        run = read_run(self.run.path)
        signs = warning_signs(run.metrics, known_kl=known)
        self.run.update_meta(warning_signs=[asdict(sign) for sign in signs])
        lines = [f"{sign.sentence} (since step {sign.since})" for sign in signs]
        for sign, line in zip(signs, lines, strict=True):
            worst = worst_samples(run.samples, since=sign.since)
            event = new_event(self.state.step, "alarm", line, sign=sign.name, worst=worst)
            self.run.append_event(event)
        return lines

    def newest_checkpoint(self) -> Path | None:
        """The newest finished checkpoint, as the first process sees it; None: there is none."""
        found = self.components.mesh.broadcast(
            lambda: None if (at := latest_checkpoint(self.run.checkpoints)) is None else str(at)
        )
        return None if found is None else Path(found)

    def ensure_saved(self) -> Path:
        """The checkpoint of the run as it stands, written now if it is not there yet.

        Raises:
            RunError: a reference changed, or the checkpoint cannot be written.
        """
        newest = self.newest_checkpoint()
        if newest is not None and step_of(newest) == self.state.step:
            return newest
        self.components.mesh.agree(self.guard.require_hashes)
        return self.save(keep=self.config.logging.keep)

    def save(self, *, keep: int, metrics: Mapping[str, Number] | None = None) -> Path:
        """Write a checkpoint of the run as it stands; older ones beyond `keep` go.

        Args:
            keep: how many remain.
            metrics: of the run's last step; None: they are read from the run directory.
        """
        known = self.components.mesh.broadcast(self._last_metrics) if metrics is None else metrics
        path = save_run_state(
            self.run.checkpoints,
            self.components,
            self.state,
            self.guard.original,
            keep=keep,
            card=self._card(known),
            next_rollout=self.next_rollout,
        )
        self.saved_at = monotonic()
        self.run.update_meta(
            saved_step=self.state.step,
            best_checkpoint=self.state.best_step,
            best_objective=self.state.best_objective,
        )
        self.callbacks.on_checkpoint(CheckpointEvent(self.state.step, path))
        return path

    def _last_metrics(self) -> Mapping[str, Number]:
        """What the run directory has of the last step."""
        lines = read_run(self.run.path).metrics
        return next((one for one in lines if one["step"] == self.state.step), {})

    def _card(self, metrics: Mapping[str, Number]) -> str | None:
        """The model card of this policy; None before the first step, where nothing was measured.

        The rollout of a step was written before the step's updates, so its KL is that of the policy
        one step earlier: it stands in, and the card says so, where there was no evaluation after.
        """
        config, policy = self.config, self.components.policy
        of_group = config.algorithm.name == "grpo"
        if metrics.get("heldout/kl_ref") is not None:
            section, of = "heldout", "to held-out prompts"
            count = metrics.get("heldout/responses")
        else:
            section = "objective"
            of = f"to training prompts, by the policy before the updates of step {self.state.step}"
            count = config.responses_per_step
        kl, error = metrics.get(f"{section}/kl_ref"), metrics.get(f"{section}/kl_ref_se")
        if kl is None or self.state.step == 0:
            return None
        return model_card(
            ModelCardFacts(
                reference=self.guard.original.path,
                base_model=config.policy.path,
                # An adapter on an adapter is saved as the whole model.
                kind="lora" if policy.adapter and not config.policy.adapter else "full",
                algorithm=config.algorithm.name,
                step=self.state.step,
                version=__version__,
                beta=float(metrics["objective/beta"] or 0),
                beta_unit="group standard deviations per nat" if of_group else "score per nat",
                placement=config.leash.placement,
                kl=kl,
                kl_interval=None if error is None else (kl - _Z95 * error, kl + _Z95 * error),
                kl_responses=None if count is None else int(count),
                kl_of=of,
                target_kl=config.leash.target_kl,
                score=metrics.get(f"{section}/scores"),
                score_error=metrics.get(f"{section}/scores_se"),
                reward_models={
                    name: str(reward.callable or reward.path)
                    for name, reward in config.reward_models.items()
                },
                prompts=config.prompts.train,
                seed=config.seed,
                dtype=weights_dtype(config.policy.precision, frozen=config.policy.base_is_frozen),
                quantized_base=config.policy.quantization != "none",
            )
        )

    def restore(self, step: int) -> None:
        """Everything as it was when the checkpoint of that step was written."""
        found = list_checkpoints(self.run.checkpoints)
        (checkpoint,) = [c for c in found if step_of(c) == step]
        components = self.components
        self.state = restore_run_state(checkpoint, components, self.guard.original)
        anchor = restore_anchor(checkpoint, components.policy, components.original, self.state)
        self.components = replace(components, reference=anchor)
        self.next_rollout = restore_next_rollout(checkpoint, components.policy.device)
        self.guard = ReferenceGuard.of(components.original, anchor)
