"""What watches TRL's trainers: the audit, and the controller of β; see `trl`."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import kleash
from kleash.errors import ConfigError
from kleash.integrations._models import ReferenceSource
from kleash.integrations._reading import BatchReading, evaluating
from kleash.integrations._record import DIRECTORY, TrainerRecord
from kleash.integrations._trl_hook import Watcher, trl_version, watch
from kleash.kl.control.controllers import (
    BetaState,
    BudgetBeta,
    Measurement,
    initial_beta,
    raise_beta,
)
from kleash.storage.samples import Sample
from kleash.training.evaluation import SampleReader
from kleash.training.responses import JudgedResponses, Responses


class KLAudit(TrainerCallback):
    """Measure exact KL(π‖π_ref) on a step's completions, every so many steps.

    Args:
        every: steps from one measurement to the next; the first step is measured.
        reference: a checkpoint's path or hub name, or a model. By default the trainer's own
            reference; else the adapter turned off; else, where β is 0, the checkpoint that the
            model was loaded from.
        both: also the mean of Σ_t KL(π_ref‖π) along the same completions.
        output: the run directory; by default `kleash` in the trainer's `output_dir`.
        samples: completions kept at each measurement with both models' numbers at every token:
            half of them those of largest KL, half at random.

    Raises:
        ConfigError: if a setting cannot be.
    """

    def __init__(
        self,
        every: int = 10,
        *,
        reference: ReferenceSource | None = None,
        both: bool = False,
        output: str | Path | None = None,
        samples: int = 2,
    ) -> None:
        if every < 1 or samples < 0:
            raise ConfigError(
                f"expected every of at least 1 and samples of at least 0, got {every} and {samples}"
            )
        self.every, self.samples = every, samples
        self.both, self.reference = both, reference
        self.output = None if output is None else Path(output)
        self.history: list[Mapping[str, Any]] = []
        """What was measured since training began, by key of metrics.jsonl."""
        self._watcher: Watcher | None = None
        self.record = TrainerRecord(None)
        self._last: int | None = None

    def attach(self, trainer: Any) -> "KLAudit":
        """Begin to watch a trainer, before `train`.

        Raises:
            ConfigError: if the trainer is not supported.
        """
        self._watcher = watch(trainer, self, self.reference)
        self._watcher.both = self._watcher.both or self.both
        trainer.add_callback(self)
        return self

    def wants(self, step: int) -> bool:
        """Whether `every` steps have passed since the last measurement."""
        return self._last is None or step - self._last >= self.every

    def take(self, reading: BatchReading) -> None:
        """Log a measurement and write it into the run directory."""
        watcher = attached(self, self._watcher)
        self._last = reading.step
        watcher.keep("KLAudit", {"last": reading.step})
        self.history.append({"step": reading.step, **reading.measures})
        budget = next((one for one in watcher.subscribers if isinstance(one, KLBudget)), None)
        metrics: dict[str, Any] = {
            **self.history[-1],
            "objective/beta": float(watcher.trainer.beta),
            "objective/target_kl": None if budget is None else budget.target_kl,
        }
        self.record.step(metrics, self._samples(reading, watcher))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the run directory."""
        watcher = attached(self, self._watcher)
        self._last = watcher.saved("KLAudit").get("last")
        self.record = TrainerRecord.begin(
            self.output or Path(args.output_dir) / DIRECTORY,
            settings=self._settings(watcher),
            meta=_meta(watcher),
            after_step=state.global_step,
            writes=state.is_world_process_zero,
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the run finished."""
        self.record.close("finished")

    def _settings(self, watcher: Watcher) -> dict[str, Any]:
        args = watcher.trainer.args
        sampler = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {
            "algorithm": {"name": "rloo" if watcher.is_rloo else "grpo"},
            "kl_audit": {"every": self.every, "both": self.both},
            "sampling": {name: getattr(args, name, None) for name in sampler},
        }

    def _samples(self, reading: BatchReading, watcher: Watcher) -> list[Sample]:
        """Kept responses of this process's rows."""
        if not self.samples:
            return []
        policy, reference = watcher.pair()
        scored = reading.scored
        rollout, tokenizer = scored.rollout, policy.tokenizer
        prompts = [
            str(tokenizer.decode(ids[kept]))
            for ids, kept in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
        ]
        texts = [
            str(tokenizer.decode(ids[kept]))
            for ids, kept in zip(rollout.response_ids, rollout.response_mask, strict=True)
        ]
        written = JudgedResponses(Responses(rollout, prompts, texts), scored.scores, {})
        reader = SampleReader(policy, reference, watcher.temperature)
        with evaluating(policy.model, reference.model):
            return reader.training_samples(scored, written, step=reading.step, count=self.samples)


class KLBudget(TrainerCallback):
    """Move the trainer's β so that the exact KL per response comes to a budget and stays there.

    Each batch of completions is measured before it is trained on; β moves after the step. Feed
    forward comes from the spread of the scores in the units that β is a price in: of the advantages
    in GRPO, whose `scale_rewards` divides them, and of the rewards in RLOO. From their first spread
    comes the β to start from as well, sd/√(2·target_kl), in force from the second step on: in the
    first, policy and reference are the same. See `kleash.kl.control.budget.BudgetBeta`. The state
    lies in the trainer's own checkpoints, and a resumed run goes on with the same β.

    Args:
        target_kl: the budget, in nats per response, at the sampling temperature.
        reference: as for `KLAudit`; one for all callbacks of a trainer.
        controller: settings other than the usual ones, `initial` among them, which is then taken
            at its word; for this `target_kl`.

    Raises:
        ConfigError: if the target is not a positive number.
    """

    def __init__(
        self,
        target_kl: float,
        *,
        reference: ReferenceSource | None = None,
        controller: BudgetBeta | None = None,
    ) -> None:
        if not 0 < target_kl < math.inf:
            raise ConfigError(f"expected a target_kl above 0 nats per response, got {target_kl}")
        if controller is not None and controller.target_kl != target_kl:
            raise ConfigError(
                f"expected a controller for the target_kl {target_kl}, got one for "
                f"{controller.target_kl}"
            )
        self.target_kl, self.reference = target_kl, reference
        self.controller = controller
        self.state: BetaState | None = None
        self._watcher: Watcher | None = None
        self._last = 0

    def attach(self, trainer: Any) -> "KLBudget":
        """Begin to watch a trainer, before `train`.

        Raises:
            ConfigError: if the trainer is not supported, or its β is 0 or cannot be moved.
        """
        watcher = watch(trainer, self, self.reference)
        if not trainer.beta > 0:
            raise ConfigError(
                f"expected beta above 0 in the trainer's configuration, got {trainer.beta}: at 0 "
                f"TRL {trl_version(trainer)} has no reference and no KL term; any other is where "
                "the controller starts"
            )
        if hasattr(trainer, "liger_loss"):
            raise ConfigError(
                f"expected use_liger_kernel=False, got True: the fused loss of TRL "
                f"{trl_version(trainer)} keeps the beta that it was made with"
            )
        self._watcher = watcher
        trainer.add_callback(self)
        return self

    def wants(self, step: int) -> bool:
        """Every step, once."""
        return step > self._last

    def take(self, reading: BatchReading) -> None:
        """Update the controller; β itself moves after the step."""
        watcher = attached(self, self._watcher)
        error = reading.kl.standard_error
        watcher.log({"beta": float(watcher.trainer.beta), "target_kl": self.target_kl})
        self._last = reading.step
        if self.controller is None:
            if not reading.score_variance:
                return  # scores that do not vary imply no β
            beta = initial_beta(self.target_kl, math.sqrt(reading.score_variance))
            self.controller = BudgetBeta(self.target_kl, initial=beta)
        if self.state is None:
            self.state = self.controller.init()
        measurement = Measurement(
            response_kl=reading.kl.mean,
            standard_error=math.nan if error is None else error,
            responses=reading.kl.n,
            score_variance=reading.score_variance,
        )
        self.state = self.controller.update(self.state, measurement)

    def raise_beta(self, factor: float) -> None:
        """Multiply β from the next step on, as after a rollback."""
        watcher = attached(self, self._watcher)
        if self.state is None:
            watcher.trainer.beta *= factor
        else:
            self.state = raise_beta(self.state, factor)
        self._set(watcher)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, or go on from the checkpoint that is resumed."""
        watcher = attached(self, self._watcher)
        saved = watcher.saved("KLBudget")
        if saved:
            if self.controller is None:
                self.controller = BudgetBeta(self.target_kl, initial=saved["initial"])
            self.state = BetaState(**saved["state"])
        elif self.controller is not None:
            self.state = self.controller.init()
        self._last = state.global_step
        self._set(watcher)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the new β in force, and into what the trainer saves."""
        self._set(attached(self, self._watcher))

    def _set(self, watcher: Watcher) -> None:
        if self.state is None or self.controller is None:
            return
        watcher.trainer.beta = self.state.beta
        kept = {"initial": self.controller.initial, "state": asdict(self.state)}
        watcher.keep("KLBudget", kept)


def attached(callback: TrainerCallback, watcher: Watcher | None) -> Watcher:
    """The watcher of a callback that was attached.

    Raises:
        ConfigError: if it was only passed in `callbacks`, where it sees no trainer.
    """
    if watcher is None:
        name = type(callback).__name__
        raise ConfigError(
            f"expected {name}(…).attach(trainer), got {name} in the trainer's callbacks alone, "
            "where it sees neither completions nor β"
        )
    return watcher


def _meta(watcher: Watcher) -> dict[str, Any]:
    _, reference = watcher.pair()
    return {
        "trainer": type(watcher.trainer).__name__,
        "trl": trl_version(watcher.trainer),
        "kleash": kleash.__version__,
        "reference": {"path": reference.path, "how": reference.how},
    }
