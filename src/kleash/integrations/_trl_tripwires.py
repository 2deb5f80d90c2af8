"""Bounds inside TRL's trainers: a batch beyond them is never learnt from."""

from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from transformers import TrainerCallback

from kleash.errors import ConfigError, NonFiniteError, RefusedError, TripwireError
from kleash.integrations._models import ReferenceSource
from kleash.integrations._reading import BatchReading
from kleash.integrations._trl_callbacks import KLAudit, KLBudget, attached
from kleash.integrations._trl_hook import Watcher, watch
from kleash.storage.events import EventKind
from kleash.training.tripwires import check_entropy, check_kl

Action = Literal["raise", "stop", "roll_back"]


class Tripwires(TrainerCallback):
    """Refuse a batch whose KL, entropy or gradient is out of bounds; it is never learnt from.

    Every batch of completions is measured before it is trained on. Where the exact KL is above
    `stop_kl`, the entropy below `min_entropy`, or a log-probability or a gradient not finite:

        raise       `train` raises the error, which names the worst response and its worst token
        stop        `train` ends after this step, without its update
        roll_back   weights and optimiser come back from the newest checkpoint whose policy was
                    within bounds, β is multiplied by `beta_factor`, and training goes on; after
                    `rollbacks` of them, or without such a checkpoint, it stops

    Args:
        stop_kl: nats per response, over the rows of all processes.
        min_entropy: nats per token.
        action: what to do.
        rollbacks: how many, at most.
        beta_factor: above 1.
        reference: as for `KLAudit`; one for all callbacks of a trainer.

    Raises:
        ConfigError: if a setting cannot be.
    """

    def __init__(
        self,
        *,
        stop_kl: float | None = None,
        min_entropy: float | None = None,
        action: Action = "raise",
        rollbacks: int = 3,
        beta_factor: float = 1.5,
        reference: ReferenceSource | None = None,
    ) -> None:
        if action not in get_args(Action):
            raise ConfigError(
                f"expected an action out of {', '.join(get_args(Action))}, got {action!r}"
            )
        bounds = {"stop_kl": stop_kl, "min_entropy": min_entropy, "beta_factor": beta_factor}
        for name, bound in bounds.items():
            if bound is not None and not 0 < bound < float("inf"):
                raise ConfigError(f"expected {name} above 0, got {bound}")
        if beta_factor <= 1 or rollbacks < 0:
            raise ConfigError(
                "expected beta_factor above 1 and rollbacks of at least 0, got "
                f"{beta_factor} and {rollbacks}"
            )
        self.stop_kl, self.min_entropy = stop_kl, min_entropy
        self.action, self.rollbacks = action, rollbacks
        self.beta_factor, self.reference = beta_factor, reference
        self.done = 0
        """Rollbacks so far."""
        self._tripped: RefusedError | None = None
        self._watcher: Watcher | None = None

    def attach(self, trainer: Any) -> "Tripwires":
        """Begin to watch a trainer, before `train`.

        Raises:
            ConfigError: if the trainer is not supported.
        """
        self._watcher = watch(trainer, self, self.reference)
        trainer.add_callback(self)
        return self

    def wants(self, step: int) -> bool:
        """Every batch."""
        return True

    def take(self, reading: BatchReading) -> None:
        """Compare with the bounds.

        Raises:
            TripwireError: with the action "raise".
        """
        # Means over all processes decide, so that all of them decide alike.
        kl, entropy = (
            cast(float, reading.measures[f"objective/{key}"])
            for key in ("kl_ref", "entropy_per_token")
        )
        if self.stop_kl is not None and not kl <= self.stop_kl:
            self.refuse(reading.step, self._kl_error(reading, kl))
        elif self.min_entropy is not None and not entropy >= self.min_entropy:
            self.refuse(reading.step, self._entropy_error(reading, entropy))

    def refuse(self, step: int, error: RefusedError) -> None:
        """Raise the error, or withhold the update and act when the step ends.

        Raises:
            RefusedError: with the action "raise".
        """
        if self.action == "raise":
            self._event(step, "refused", str(error))
            audit = self._audit()
            if audit is not None:
                audit.record.close("failed", str(error))
            raise error
        self._tripped = error

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Withhold an update that was refused, or whose gradient is not finite."""
        model = kwargs["model"]
        parameters = [p for p in model.parameters() if p.grad is not None]
        if self._tripped is None:
            norms = [torch.linalg.vector_norm(p.grad.detach().float()) for p in parameters]
            if norms and not bool(torch.stack(norms).isfinite().all()):
                error = NonFiniteError("expected finite gradients, got NaN or infinite ones")
                self.refuse(state.global_step + 1, error)
        if self._tripped is not None:
            for parameter in parameters:
                parameter.grad = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, or go back."""
        error, self._tripped = self._tripped, None
        if error is None:
            return
        if self.action == "roll_back" and self.done < self.rollbacks:
            # A checkpoint of step n holds the policy that is measured at step n + 1.
            tripped = state.global_step
            within = tripped - 1 if isinstance(error, NonFiniteError) else tripped - 2
            found = newest_checkpoint(Path(args.output_dir), through=within)
            if found is not None:
                self._roll_back(tripped, found, error)
                return
        self._event(state.global_step, "stopped", str(error))
        control.should_training_stop = True

    def _roll_back(self, step: int, checkpoint: Path, error: RefusedError) -> None:
        watcher = attached(self, self._watcher)
        trainer = watcher.trainer
        trainer._load_from_checkpoint(str(checkpoint))
        trainer._load_optimizer_and_scheduler(str(checkpoint))
        # What the refused policy wrote is not to be learnt from.
        trainer._buffered_inputs = None
        self.done += 1
        budget = next((one for one in watcher.subscribers if isinstance(one, KLBudget)), None)
        if budget is None:
            trainer.beta *= self.beta_factor
        else:
            budget.raise_beta(self.beta_factor)
        self._event(
            step,
            "rolled_back",
            f"{error}; back to {checkpoint.name}, beta × {self.beta_factor:g}",
            checkpoint=checkpoint.name,
            rollback=self.done,
        )

    def _kl_error(self, reading: BatchReading, mean: float) -> RefusedError:
        assert self.stop_kl is not None
        scored = reading.scored
        try:
            check_kl(scored.kl, scored.rollout.response_mask, stop_kl=self.stop_kl)
        except TripwireError as error:
            return error
        return RefusedError(
            f"the KL to the reference is {mean:.3g} nats per response over all processes, beyond "
            f"the bound stop_kl of {self.stop_kl:g}"
        )

    def _entropy_error(self, reading: BatchReading, mean: float) -> RefusedError:
        assert self.min_entropy is not None
        scored = reading.scored
        mask = scored.rollout.response_mask
        try:
            check_entropy(scored.entropy, mask, min_entropy=self.min_entropy)
        except TripwireError as error:
            return error
        return RefusedError(
            f"the entropy is {mean:.3g} nats per token over all processes, below the bound "
            f"min_entropy of {self.min_entropy:g}"
        )

    def _audit(self) -> KLAudit | None:
        subscribers = attached(self, self._watcher).subscribers
        return next((one for one in subscribers if isinstance(one, KLAudit)), None)

    def _event(self, step: int, kind: EventKind, sentence: str, **details: Any) -> None:
        audit = self._audit()
        if audit is not None:
            audit.record.event(step, kind, sentence, **details)


def newest_checkpoint(folder: Path, *, through: int) -> Path | None:
    """The trainer's newest checkpoint that is not after this step; None if there is none."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and int(number) <= through and (path / "trainer_state.json").is_file():
            found[int(number)] = path
    return found[max(found)] if found else None
