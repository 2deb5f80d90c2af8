"""Drift from the base during any `transformers` run, and a check of it for tests.

    from kleash.integrations.transformers import DriftAudit, assert_close

    DriftAudit(every=50, texts="heldout.txt", fail_above=0.2).attach(trainer)
    assert_close("models/tuned", "models/base", nats=0.05, prompts="heldout.jsonl")

Works with `Trainer` and its descendants (`SFTTrainer`, `DPOTrainer`, …) that train a causal
language model with all its weights on each process.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

from transformers import TrainerCallback

import kleash
from kleash.auditing import Audit, audit
from kleash.auditing.api import Texts
from kleash.auditing.model_sources import ModelSource
from kleash.auditing.options import AuditKeywords
from kleash.errors import ConfigError
from kleash.integrations._held_out import HeldOut, measures_of
from kleash.integrations._models import ReferenceSource
from kleash.integrations._record import DIRECTORY, TrainerRecord

__all__ = ["DriftAudit", "assert_close"]


class DriftAudit(TrainerCallback):
    """Measure how far the model has drifted from its base, every so many steps and at the end.

    On prompts the model answers, and KL(π‖π_ref) of its answers is measured; on texts both models
    read what others wrote. The numbers go into the trainer's log as `kleash/…`, and into a run
    directory that `kleash report` opens.

    Args:
        every: steps from one measurement to the next; the first is before any training.
        prompts: a prompt file or a list of prompts, held out.
        texts: a text file or a list of texts, held out.
        reference: a checkpoint's path or hub name, or a model; by default the checkpoint that the
            model (or the base of its adapter) was loaded from.
        fail_above: training stops where the 95 % interval of the drift lies above this many nats.
        per: what `fail_above` is per.
        output: the run directory; by default `kleash` in the trainer's `output_dir`.
        options: of `kleash.audit`, such as max_new_tokens and responses_per_prompt.

    Raises:
        ConfigError: if a setting cannot be.
    """

    def __init__(
        self,
        every: int = 50,
        *,
        prompts: Texts | None = None,
        texts: Texts | None = None,
        reference: ReferenceSource | None = None,
        fail_above: float | None = None,
        per: Literal["token", "response"] = "token",
        output: str | Path | None = None,
        **options: Any,
    ) -> None:
        if every < 1:
            raise ConfigError(f"expected every of at least 1, got {every}")
        gate = {} if fail_above is None else {"fail_above": fail_above, "per": per}
        self.every = every
        self.held_out = HeldOut(prompts, texts, reference, {**options, **gate})
        self.output = None if output is None else Path(output)
        self.audits: list[tuple[int, Mapping[str, Audit]]] = []
        """What was measured, by step."""
        self.failed: str | None = None
        """Why training was stopped; None if it was not."""
        self._trainer: Any = None
        self._record = TrainerRecord(None)

    def attach(self, trainer: Any) -> "DriftAudit":
        """Begin to watch a trainer, before `train`.

        Raises:
            ConfigError: if the model is split over processes.
        """
        kind = str(getattr(trainer.accelerator.distributed_type, "value", ""))
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise ConfigError(
                f"expected whole models on each process (one process, or DDP), got {kind}: audit "
                "its checkpoints with `kleash audit` instead"
            )
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the run directory and measure where training begins."""
        if self._trainer is None:
            raise ConfigError(
                "expected DriftAudit(…).attach(trainer), got DriftAudit in the trainer's callbacks "
                "alone, where it cannot write into the trainer's log"
            )
        self._record = TrainerRecord.begin(
            self.output or Path(args.output_dir) / DIRECTORY,
            settings={"drift_audit": {"every": self.every, "read": self.held_out.names}},
            meta={"trainer": type(self._trainer).__name__, "kleash": kleash.__version__},
            after_step=state.global_step,
            writes=state.is_world_process_zero,
        )
        if state.global_step == 0:
            self._measure(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is due."""
        if state.global_step % self.every == 0:
            self._measure(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what came out, unless that was just done, and close the run directory."""
        if not self.audits or self.audits[-1][0] != state.global_step:
            self._measure(state, control)
        self._record.close("finished", self.failed)

    def _measure(self, state: Any, control: Any) -> None:
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        tokenizer = trainer.processing_class
        found = self.held_out.measure(model, getattr(tokenizer, "tokenizer", tokenizer))
        self.audits.append((state.global_step, found))
        measures = measures_of(found)
        due = control.should_log
        trainer.log({f"kleash/{k}": v for k, v in measures.items() if v is not None})
        # Logging clears the flag, and with it the trainer's own line of this step.
        control.should_log = due
        # The report's own curve is that of the prompts, or of the texts where there are no prompts.
        first = "heldout" if "prompts" in found else "texts"
        headline = {f"objective/{k}": measures[f"{first}/{k}"] for k in ("kl_ref", "kl_ref_se")}
        self._record.step({"step": state.global_step, **headline, **measures})
        beyond = [
            f"on {name}, {_sentence(one)}"
            for name, one in found.items()
            if one.gate is not None and one.gate.decision == "above"
        ]
        if beyond:
            self.failed = "; ".join(beyond)
            self._record.event(state.global_step, "stopped", self.failed)
            control.should_training_stop = True


def assert_close(
    model: ModelSource,
    reference: ModelSource,
    *,
    nats: float,
    prompts: Texts | None = None,
    texts: Texts | None = None,
    **options: Unpack[AuditKeywords],
) -> Audit:
    """Assert that a model is within so many nats of a reference, for pytest and CI.

    Passes where the 95 % interval of the exact KL lies below `nats`, and fails where it lies above
    or where that cannot be told from so few prompts.

    Args:
        model: a path, a hub name, or (model, tokenizer).
        reference: the same.
        nats: the bound; per token, or per response with per="response".
        prompts: the model answers them: KL(π‖π_ref) on its own responses.
        texts: both models read them.
        options: of `kleash.audit`.

    Returns:
        The audit.

    Raises:
        AssertionError: if the model is further away, or may be.
        ConfigError: if there is not exactly one source, or an option cannot be.
    """
    if "fail_above" in options:
        raise ConfigError("expected nats alone, got fail_above as well: they are the same bound")
    found = audit(model, reference, prompts, texts=texts, **{**options, "fail_above": nats})
    assert found.gate is not None
    if found.gate.decision != "below":
        raise AssertionError(_sentence(found))
    return found


def _sentence(found: Audit) -> str:
    gate = found.gate
    assert gate is not None
    value = found.kl.per_token if gate.per == "token" else found.kl.per_response
    low, high = (value.mean if end is None else end for end in (value.low, value.high))
    said = (
        f"expected {found.policy.path} within {gate.threshold:g} nats per {gate.per} of "
        f"{found.reference.path}, got {value.mean:.4g} (95 %: {low:.4g} … {high:.4g}, "
        f"{value.n} responses)"
    )
    if gate.decision == "undecided":
        return f"{said}: too few to tell; give more prompts or texts"
    return said
