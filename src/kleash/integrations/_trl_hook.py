"""The one place that reaches into TRL's trainers, and what it relies on.

A `TrainerCallback` sees neither the completions of a step nor the trainer's β. Both trainers that
are supported make each batch of completions in `_generate_and_score_completions`, whose dictionary
holds ids, masks and advantages, and its scores in `_calculate_rewards`; β is the attribute `beta`,
read anew for each batch and loss. These two methods are wrapped on the trainer object, and nothing
else is; a trainer without them is refused by its name and version.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kleash.errors import ConfigError, RefusedError
from kleash.integrations._models import ReferenceSource, policy_of, reference_of
from kleash.integrations._reading import (
    BatchReading,
    evaluating,
    read_completions,
    reverse_kl,
    summarise,
)
from kleash.models.policy import Policy, Reference

SUPPORTED = ("GRPOTrainer", "RLOOTrainer")
_METHODS = ("_generate_and_score_completions", "_calculate_rewards")
_SETTINGS = ("beta", "temperature", "_metrics")
_LOGGED = ("kl_ref", "kl_ref_se", "kl_ref_k1", "entropy_per_token", "reverse_kl_ref")
"""Of the measures, those that go into the trainer's log."""
_STATE = "kleash"
"""Key of this module's entries in the trainer's state, which TRL saves with each checkpoint."""


@runtime_checkable
class Subscriber(Protocol):
    """What is called with each batch of completions."""

    def wants(self, step: int) -> bool:
        """Whether to measure the batch made for this step."""
        ...

    def take(self, reading: BatchReading) -> None:
        """Take in a batch that was measured, before it is trained on."""
        ...


@runtime_checkable
class Guard(Subscriber, Protocol):
    """A subscriber that answers for batches that cannot be measured."""

    def refuse(self, step: int, error: RefusedError) -> None:
        """Raise the error, or see to it that the batch is not trained on."""
        ...


def trl_version(trainer: Any) -> str:
    """Version of the library that a trainer comes from, for messages and records."""
    package = next(
        (
            cls.__module__.split(".")[0]
            for cls in type(trainer).__mro__
            if cls.__name__ in SUPPORTED
        ),
        "trl",
    )
    return str(getattr(sys.modules.get(package), "__version__", "unknown"))


def require_supported(trainer: Any) -> None:
    """Refuse a trainer that the integration cannot see into.

    Raises:
        ConfigError: naming the class, TRL's version and what is missing.
    """
    kind = type(trainer).__name__
    known = any(cls.__name__ in SUPPORTED for cls in type(trainer).__mro__)
    missing = [name for name in (*_METHODS, *_SETTINGS) if not hasattr(trainer, name)]
    if not known or missing:
        lacks = f", without {', '.join(missing)}" if missing else ""
        raise ConfigError(
            f"expected a TRL trainer that writes completions ({' or '.join(SUPPORTED)}), got "
            f"{kind} of TRL {trl_version(trainer)}{lacks}: for other trainers use "
            "kleash.integrations.transformers"
        )
    _require_settings(trainer)


def _require_settings(trainer: Any) -> None:
    if getattr(trainer, "mask_truncated_completions", False):
        raise ConfigError(
            "expected mask_truncated_completions=False, got True: TRL then hides the responses "
            "that hit the length limit, and a KL without them would be that of the others alone"
        )
    kind = str(getattr(trainer.accelerator.distributed_type, "value", ""))
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ConfigError(
            f"expected whole models on each process (one process, or DDP), got {kind}: audit its "
            "checkpoints with `kleash audit` instead"
        )


class Watcher:
    """Measures a trainer's batches once for all that want them."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.subscribers: list[Subscriber] = []
        self.given: ReferenceSource | None = None
        self._pair: tuple[Policy, Reference] | None = None
        self._scores: Tensor | None = None
        self.both = False
        self._install()

    @property
    def next_step(self) -> int:
        """The training step that is being made, counted from 1."""
        return cast(int, self.trainer.state.global_step) + 1

    @property
    def temperature(self) -> float:
        """Of sampling, and of TRL's own log-probabilities."""
        return float(self.trainer.temperature)

    @property
    def microbatch(self) -> int:
        """Responses read at once: as many as the trainer's loss reads."""
        return max(1, int(self.trainer.args.per_device_train_batch_size))

    def use_reference(self, given: ReferenceSource | None) -> None:
        """Measure against this reference; all that watch one trainer share it.

        Raises:
            ConfigError: if another one was named before.
        """
        if given is None or given is self.given or given == self.given:
            return
        if self.given is not None:
            raise ConfigError(
                f"expected one reference for all callbacks of a trainer, got {self.given!r} and "
                f"{given!r}"
            )
        self.given = given

    def pair(self) -> tuple[Policy, Reference]:
        """Both models; the reference is found, or loaded, when it is first asked for.

        Raises:
            ConfigError: if no reference can be found.
            ModelError: if a model cannot be used.
        """
        if self._pair is None:
            trainer = self.trainer
            model = cast(nn.Module, trainer.accelerator.unwrap_model(trainer.model))
            own = getattr(trainer, "ref_model", None)
            if own is not None:
                own = cast(nn.Module, trainer.accelerator.unwrap_model(own))
            with evaluating(model):
                policy = policy_of(model, _tokenizer(trainer))
            self._pair = reference_of(policy, own, self.given)
        return self._pair

    def log(self, numbers: Mapping[str, float | int | None]) -> None:
        """Put numbers into the trainer's next log line, under `kleash/`."""
        for name, value in numbers.items():
            if value is not None:
                self.trainer._metrics["train"][f"kleash/{name}"].append(float(value))

    def saved(self, name: str) -> dict[str, Any]:
        """What `keep` put into the checkpoint that is resumed from; nothing in a new run."""
        states = cast("dict[str, Any]", self.trainer.state.stateful_callbacks or {})
        return cast("dict[str, Any]", states.get(_STATE, {})).get(name, {})

    def keep(self, name: str, values: Mapping[str, Any]) -> None:
        """Have plain values saved with the trainer's state."""
        states = cast("dict[str, Any]", self.trainer.state.stateful_callbacks)
        states.setdefault(_STATE, {})[name] = dict(values)

    def _install(self) -> None:
        trainer = self.trainer
        generate = cast(Callable[..., Any], trainer._generate_and_score_completions)
        judge = cast(Callable[..., Any], trainer._calculate_rewards)

        def judged(*args: Any, **kwargs: Any) -> Any:
            found = judge(*args, **kwargs)
            self._scores = cast(Tensor, found).detach()
            return found

        def measured(*args: Any, **kwargs: Any) -> Any:
            batch = generate(*args, **kwargs)
            if trainer.model.training:
                self._measure(cast("dict[str, Any]", batch))
            return batch

        trainer._calculate_rewards = judged
        trainer._generate_and_score_completions = measured

    def _measure(self, batch: Mapping[str, Any]) -> None:
        trainer, step = self.trainer, self.next_step
        wanted = [one for one in self.subscribers if one.wants(step)]
        if not wanted:
            return
        if batch.get("pixel_values") is not None:
            raise ConfigError("expected completions of text alone, got a batch with images")
        policy, reference = self.pair()
        sizes = {"temperature": self.temperature, "microbatch": self.microbatch}
        gather = cast(Callable[[Tensor], Tensor], trainer.accelerator.gather)
        scored, error = None, None
        try:
            scored = read_completions(batch, policy, reference, **cast(Any, sizes))
        except RefusedError as found:
            error = found
        # All processes go on or none: the means below are over the rows of all.
        refused = gather(
            torch.tensor([int(error is not None)], device=batch["completion_ids"].device)
        )
        if scored is None or bool(refused.any()):
            if error is None:
                where = refused.nonzero().flatten().tolist()
                error = RefusedError(
                    f"the completions of process {where[0]} cannot be measured; its own error says "
                    "why"
                )
            guard = next((one for one in wanted if isinstance(one, Guard)), None)
            if guard is None:
                raise error
            guard.refuse(step, error)
            return
        back = None
        if self.both:
            back = reverse_kl(scored, policy, reference, **cast(Any, sizes))
        scores = self._scores_of_all()
        if scores is not None:
            first = trainer.accelerator.process_index * len(scored.scores)
            scored = replace(scored, scores=scores[first : first + len(scored.scores)].float())
        reading = summarise(
            step,
            scored,
            gather,
            scores=scores,
            priced=scores if self.is_rloo else gather(batch["advantages"].double()),
            reverse=back,
        )
        short = {key.split("/")[1]: value for key, value in reading.measures.items()}
        self.log({name: short.get(name) for name in _LOGGED})
        for one in wanted:
            one.take(reading)

    @property
    def is_rloo(self) -> bool:
        """Whether β is a price in score; GRPO's is one in (divided) advantages."""
        return any(cls.__name__ == "RLOOTrainer" for cls in type(self.trainer).__mro__)

    def _scores_of_all(self) -> Float[Tensor, " all"] | None:
        """The weighted sum that TRL trains on, of all processes; NaN where nothing was scored."""
        if self._scores is None:
            return None
        weights = self.trainer.reward_weights.to(self._scores.device)
        found = self._scores.double()
        total = (found * weights).nansum(1)
        bounds = getattr(self.trainer, "reward_clip_range", None)
        if bounds:
            total = total.clamp(bounds[0], bounds[1])
        return torch.where(found.isnan().all(1), torch.nan, total)


def watcher_of(trainer: Any) -> Watcher:
    """The one watcher of a trainer, made when it is first asked for.

    Raises:
        ConfigError: if the trainer is not supported.
    """
    require_supported(trainer)
    watcher = cast("Watcher | None", getattr(trainer, "_kleash_watcher", None))
    if watcher is None:
        watcher = Watcher(trainer)
        trainer._kleash_watcher = watcher
    return watcher


def watch(trainer: Any, subscriber: Subscriber, reference: ReferenceSource | None) -> Watcher:
    """Have a subscriber called with a trainer's batches.

    Raises:
        ConfigError: if the trainer is not supported, or another reference was named before.
    """
    watcher = watcher_of(trainer)
    watcher.use_reference(reference)
    watcher.subscribers.append(subscriber)
    return watcher


def _tokenizer(trainer: Any) -> Any:
    """The tokenizer, also where the trainer holds a processor around it."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
