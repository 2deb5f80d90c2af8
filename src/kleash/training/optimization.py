"""From an experience to a better policy: passes, minibatches, gradients, optimiser steps.

A gradient that is not finite never reaches the weights; whose it was is found out by asking each
response alone, and then each of its tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kleash.algorithms.common import kept_rows, select
from kleash.algorithms.losses import average, combine, explained_variance
from kleash.config.schema import Config
from kleash.errors import NonFiniteError, RefusedError, RunError
from kleash.kl.placements import effective_sample_size
from kleash.mesh import Mesh
from kleash.models.policy import Policy
from kleash.models.sharding import own, whole
from kleash.training.assembly import learning_rate_factor
from kleash.training.components import Components
from kleash.training.metrics import Number
from kleash.training.optimizers import set_learning_rates
from kleash.training.pretraining_mix import PretrainingMix, pretraining_loss
from kleash.types import Experience, Fresh

_FIRST_RATIO_TOLERANCE = {
    torch.float64: 1e-3,
    torch.float32: 1e-3,
    torch.bfloat16: 1.0,
    torch.float16: 0.1,
}
"""How far the first ratio of a step may be from 1 by rounding alone, by the type that a trunk's
products are in: responses are read in other batches, and so added up in another order."""


@dataclass(frozen=True, eq=False)
class PolicyUpdater:
    """Makes the optimiser steps of one rollout."""

    components: Components
    config: Config

    def update(
        self,
        experience: Experience,
        *,
        done: int,
        order: Int[Tensor, " kept"],
        reading: Fresh | None = None,
    ) -> dict[str, Number]:
        """Passes over the rollout in minibatches; each is one optimiser step.

        Args:
            experience: the rollout.
            done: steps finished before this one.
            order: `epoch_order` of its rows, for the first epoch.
            reading: what `SharedReading.score` said of the first microbatch in that order.

        Raises:
            RefusedError: a number is not finite; it names the response and token of the rollout.
            RunError: the policy does not repeat what it said when the rollout was scored.
        """
        components, config = self.components, self.config
        factor = learning_rate_factor(config.optimizer, step=done, steps=config.steps)
        set_learning_rates(components.optimizer, factor)
        made: list[dict[str, float]] = []
        first_error: float | None = None
        effective = 1.0
        for chosen in self._minibatches(experience, order):
            try:
                minibatch = select(experience, chosen)
                components.optimizer.zero_grad(set_to_none=True)
                passed = components.backward_of_minibatch(
                    minibatch,
                    microbatch=config.algorithm.microbatch,
                    kept=reading,
                )
                # Of what scoring kept there is one reading, and nothing to compare it with.
                if not made and (reading is None or len(reading.logprobs) < len(chosen)):
                    first_error = passed.ratio_error
                    _require_first_ratio(first_error, components.policy.compute_dtype)
                # Of the policy as it was before its first update.
                reading = None
                kept = effective_sample_size(passed.weights, minibatch.mask)
                effective = min(effective, float(kept) / int(minibatch.mask.sum()))
                if made and effective < cast(float, config.algorithm.min_effective_samples):
                    break
                numbers = combine(passed.metrics)
                numbers |= _pretrain(components.policy, components.pretraining, components.mesh)
                components.add_gradients()
                numbers["optim/grad_norm"] = self._optimise(minibatch)
            except RefusedError as error:
                error.among(chosen.tolist())
                raise
            made.append(numbers)
        foreseen = experience.scored.values
        return {
            **average(made),
            "policy/ratio_first_error": first_error,
            "policy/effective_samples": effective,
            "policy/updates": len(made),
            "optim/lr": config.optimizer.lr * factor,
            "value/explained_variance": None
            if foreseen is None
            else explained_variance(foreseen, experience.returns, experience.mask),
        }

    def _minibatches(self, experience: Experience, first: Tensor) -> Iterator[Tensor]:
        """Rows of each optimiser step: every kept response once in an epoch, in a new order."""
        rows = kept_rows(experience)
        if not torch.equal(first.sort().values, rows):
            raise ValueError(
                f"expected an order of the rows {rows.tolist()}, got {first.tolist()}: give the "
                "`epoch_order` of `trained_rows`"
            )
        for epoch in range(self.config.algorithm.epochs):
            order = epoch_order(rows) if epoch else first
            yield from order.chunk(self.config.algorithm.minibatches)

    def _optimise(self, minibatch: Experience) -> float:
        """One optimiser step; refused if a gradient is not finite: the weights stay good."""
        # Weights that are still gathered would be read again as they were before the step.
        self.components.release()
        parameters = self.components.parameters()
        most = self.config.optimizer.max_grad_norm
        norm = float(clip_gradients(parameters, most))
        if not norm < float("inf"):
            response, token = self._culprit(minibatch)
            raise NonFiniteError(
                f"the gradient's norm is {norm}, by {{place}}: the update was refused; lower "
                "optimizer.lr or look at the scores of this step",
                response=response,
                token=token,
            )
        self.components.optimizer.step()
        # Writing and scoring have the memory meanwhile.
        self.components.optimizer.zero_grad(set_to_none=True)
        return norm

    def _culprit(self, minibatch: Experience) -> tuple[int | None, int | None]:
        """The first response whose gradient alone is not finite, and its first such token."""
        tokens = int(minibatch.mask.sum())
        for row in range(len(minibatch.mask)):
            alone = select(minibatch, torch.tensor([row], device=minibatch.mask.device))
            if self._is_finite(alone, tokens=tokens):
                continue
            for token in alone.mask[0].nonzero().flatten().tolist():
                only = torch.zeros_like(alone.mask)
                only[0, token] = True
                if not self._is_finite(replace(alone, mask=only), tokens=tokens):
                    return row, token
            return row, None
        return None, None

    def _is_finite(self, part: Experience, *, tokens: int) -> bool:
        components = self.components
        components.optimizer.zero_grad(set_to_none=True)
        try:
            components.loss(part, tokens=tokens)[0].total.backward()
        except NonFiniteError:
            return False
        # The norm, for it can overflow where no single number does.
        return bool(gradient_norm(components.parameters()).isfinite())


def epoch_order(rows: Int[Tensor, " kept"]) -> Int[Tensor, " kept"]:
    """The order in which an epoch takes some rows, drawn from torch's generator of the CPU."""
    return rows[torch.randperm(len(rows)).to(rows.device)]


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale all gradients together so that their norm is at most `most`.

    Returns:
        The norm before: √ Σ g², over the parts that all processes hold of divided ones.
    """
    norm = gradient_norm(parameters)
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    if bool(scale == 1):
        return norm
    for parameter in parameters:
        if parameter.grad is not None:
            own(parameter.grad).mul_(scale.to(own(parameter.grad).device))
    return norm


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, divided ones and whole ones alike."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    divided = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    undivided = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [whole(nn.utils.get_total_norm(some)) for some in (undivided, divided) if some]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def _pretrain(policy: Policy, mix: PretrainingMix | None, mesh: Mesh) -> dict[str, float]:
    """Gradients of the pretraining mix, where there is one, and its likelihood.

    Every process draws the same texts, and reads its own of them.
    """
    if mix is None:
        return {}
    texts = mix.draw()
    tokens = sum(len(text) - 1 for text in texts)
    own, likelihood = texts[mesh.rank :: mesh.size], 0.0
    if own:
        loss = pretraining_loss(
            policy, own, tokens=tokens, pad_id=policy.pad_id, device=policy.device
        )
        (mix.coefficient * loss).backward()
        likelihood = float(loss.detach())
    return {"loss/pretraining": sum(mesh.gather(likelihood))}


def _require_first_ratio(error: float, dtype: torch.dtype) -> None:
    if error > _FIRST_RATIO_TOLERANCE[dtype]:
        raise RunError(
            f"before the first update the policy must give its own tokens the probability it gave "
            f"them when they were scored, got a ratio off by {error:.3g}: the model is not "
            "deterministic (dropout, a low-precision kernel); use policy.precision: float32 or "
            "policy.attention: eager"
        )
