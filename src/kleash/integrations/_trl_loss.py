"""GRPO's KL term made exact: the whole distribution instead of one sampled ratio a token.

TRL's GRPO adds β·k3 of the sampled tokens to its loss. Differentiated, k3 follows KL(π_ref‖π) at
each token alone (`kleash.kl.placements`), not the KL(π‖π_ref) of responses that its value
estimates.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kleash.errors import ConfigError
from kleash.integrations._models import ReferenceSource
from kleash.integrations._reading import rollout_of
from kleash.integrations._trl_hook import Watcher, trl_version, watcher_of
from kleash.kl.placements import Placement, loss_terms
from kleash.models.policy import Policy, Reference
from kleash.scoring import token_scores

Gradient = Literal["sequence", "token"]
_PLACEMENTS: dict[Gradient, Placement] = {"sequence": "exact_weighted", "token": "loss_exact"}
_LOSSES = ("bnpo", "cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo")


def exact_kl_loss(
    trainer: Any, *, gradient: Gradient = "sequence", reference: ReferenceSource | None = None
) -> None:
    r"""Replace the k3 term of a GRPOTrainer by the exact KL, before `train`.

        loss = L_policy + β · aggregate_t( w_{<t} · KL(π(·|c_t)‖π_ref(·|c_t)) )     "sequence"
        loss = L_policy + β · aggregate_t( KL(π(·|c_t)‖π_ref(·|c_t)) )              "token"

    with w_{<t} = Π_{s<t} π(a_s)/π_rollout(a_s) differentiable, and aggregate what the trainer's
    `loss_type` does with its per-token losses. "sequence" has the gradient of the KL of whole
    responses, in expectation, where aggregate divides by a constant (`dr_grpo`, `luspo`; `dapo`,
    `cispo` and `vespo` up to the number of tokens in a batch). "token" leaves out that tokens
    change which states follow. Where responses are divided by their lengths (`grpo`, `sapo`,
    `bnpo`), both follow that weighted sum instead.

    β is then the price of one nat of KL per response, in the units of the advantages: with
    `scale_rewards="group"`, standard deviations of a group's rewards.

    It takes another forward and backward pass of the trunk, and a forward pass of the reference.

    Args:
        trainer: a GRPOTrainer on one process.
        gradient: which of the two.
        reference: as for `KLAudit`.

    Raises:
        ConfigError: if the trainer is another one, has a fused loss, or several processes.
    """
    if gradient not in get_args(Gradient):
        raise ConfigError(f"expected gradient 'sequence' or 'token', got {gradient!r}")
    watcher = watcher_of(trainer)
    _require_grpo(trainer, watcher)
    watcher.use_reference(reference)
    original = cast(Callable[[Any, Any], Tensor], trainer._compute_loss)

    def with_exact_kl(model: Any, inputs: Mapping[str, Any]) -> Tensor:
        beta = float(trainer.beta)
        trainer.beta = 0.0  # leaves the k3 term out
        try:
            loss = original(model, inputs)
        finally:
            trainer.beta = beta
        if beta == 0:
            return loss
        term, kl, mask = exact_terms(
            inputs, *watcher.pair(), temperature=watcher.temperature, gradient=gradient
        )
        mode = "train" if trainer.model.training else "eval"
        per_token = float(torch.where(mask, kl, 0.0).detach().sum() / mask.sum())
        trainer._metrics[mode]["kleash/kl_ref_per_token"].append(per_token)
        return loss + beta * aggregate(term, mask, trainer, inputs, training=mode == "train")

    trainer._compute_loss = with_exact_kl


def exact_terms(
    batch: Mapping[str, Any],
    policy: Policy,
    reference: Reference,
    *,
    temperature: float,
    gradient: Gradient,
) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
    """Each token's term of the loss, its exact KL, and which tokens the policy wrote.

    Args:
        batch: a trainer's batch; `old_per_token_logps` where the policy has moved since.
        policy: the policy; gradients flow.
        reference: the frozen reference.
        temperature: that of sampling.
        gradient: see `exact_kl_loss`.
    """
    rollout, own = rollout_of(batch, policy.stop_ids)
    part = (
        rollout.prompt_ids,
        rollout.prompt_mask,
        rollout.response_ids,
        rollout.response_mask,
    )
    hidden = policy.hidden_states(*part)
    got = token_scores(
        hidden[:, :-1][own],
        policy.head,
        rollout.response_ids[own],
        reference=(reference.hidden_states(*part)[:, :-1][own], reference.head),
        temperature=temperature,
        want=("logprobs", "kl"),
    )
    assert got.logprobs is not None and got.kl is not None
    logprobs, kl = (x.new_zeros(own.shape).masked_scatter(own, x) for x in (got.logprobs, got.kl))
    before = batch.get("old_per_token_logps")
    term = loss_terms(
        _PLACEMENTS[gradient],
        logprobs=logprobs,
        rollout_logprobs=logprobs.detach() if before is None else before.to(logprobs),
        ref_logprobs=torch.zeros_like(logprobs),
        kl=kl,
        mask=own,
    )
    assert term is not None
    return term, kl, own


def aggregate(
    term: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    trainer: Any,
    inputs: Mapping[str, Any],
    *,
    training: bool,
) -> Float[Tensor, ""]:
    """What the trainer's `loss_type` makes of per-token losses.

    Args:
        term: one number per token, 0 outside the mask.
        mask: True on the policy's tokens.
        trainer: read for `loss_type` and what it divides by.
        inputs: read for `num_items_in_batch`.
        training: whether gradients are accumulated over several batches.
    """
    total, lengths = term.sum(), mask.sum(-1).clamp(min=1)
    accumulated = trainer.current_gradient_accumulation_steps if training else 1
    match trainer.loss_type:
        case "grpo" | "sapo":
            mean = (term.sum(-1) / lengths).mean()
        case "bnpo":
            mean = total / mask.sum().clamp(min=1)
        case "dr_grpo":
            mean = total / (len(term) * trainer.max_completion_length)
        case "luspo":
            mean = term.sum(-1).mean()
        case _:
            share = accumulated / trainer.args.steps_per_generation if training else 1.0
            return total / (inputs["num_items_in_batch"].clamp(min=1) * share)
    return mean / accumulated


def _require_grpo(trainer: Any, watcher: Watcher) -> None:
    kind, version = type(trainer).__name__, trl_version(trainer)
    if watcher.is_rloo:
        raise ConfigError(
            f"expected a GRPOTrainer, got {kind}: RLOO takes β·k1 off the reward, which has the "
            "gradient of the KL of whole responses already"
        )
    if not hasattr(trainer, "_compute_loss") or trainer.loss_type not in _LOSSES:
        raise ConfigError(
            f"expected a loss_type out of {', '.join(_LOSSES)}, got "
            f"{getattr(trainer, 'loss_type', None)!r} in {kind} of TRL {version}"
        )
    if hasattr(trainer, "liger_loss"):
        raise ConfigError(
            f"expected use_liger_kernel=False, got True: the fused loss of TRL {version} takes no "
            "other KL term"
        )
    if trainer.accelerator.num_processes > 1:
        raise ConfigError(
            "expected one process for the exact KL loss, got "
            f"{trainer.accelerator.num_processes}: its forward pass goes past DDP's"
        )
