"""Checks `masks.*`: only what the policy wrote counts, all of it, and nothing beside it.

Values outside a mask are replaced by what would ruin any sum, and nothing may change.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor

from kleash.algorithms import dispatch
from kleash.kl.statistics import response_kl
from kleash.models.lm_head import apply_head
from kleash.preflight.findings import Check, Finding, some
from kleash.preflight.probe_batch import Text, Tilted, Trial
from kleash.training.metrics import objective_measures
from kleash.types import Fresh, Rollout, ScoredRollout

_BETA = 0.1
"""Any β would do: the numbers are checked, not learnt from."""
_COLUMNS = 3


def shape(trial: Trial) -> Finding:
    """Prompts end at the last column, responses begin at the first, and neither has holes."""
    check = Check(
        "masks.shape",
        "prompt masks without holes up to the last column, response masks from the first",
    )
    rollout = trial.rollout
    prompts = (rollout.prompt_mask.long().diff(dim=-1) >= 0).all(-1) & rollout.prompt_mask[:, -1]
    responses = (rollout.response_mask.long().diff(dim=-1) <= 0).all(-1)
    responses &= rollout.response_mask[:, 0]
    for which, sound in (("prompt", prompts), ("response", responses)):
        if not bool(sound.all()):
            rows = (~sound).nonzero().flatten().tolist()
            return check.fail(
                f"{len(rows)} of {len(sound)} {which} masks broken, the first in row {rows[0]}",
                f"A {which} mask has holes: it was made by comparing ids with the padding id, "
                "which real tokens can have too, and not from lengths.",
                f"Make the {which} mask from lengths: arange(width) < length.",
            )
    return check.ok(f"{len(prompts)} rows whole")


def end_token(trial: Trial) -> Finding:
    """The end-of-sequence token of a response belongs to it, and is its only one."""
    check = Check(
        "masks.end_token", "a response that ended has its end token inside the mask, once and last"
    )
    policy, rollout = trial.components.policy, trial.rollout
    stops = torch.tensor(policy.stop_ids, device=rollout.response_ids.device)
    stop = torch.isin(rollout.response_ids, stops) & rollout.response_mask
    length = rollout.response_mask.sum(-1)
    last = rollout.response_ids.gather(1, (length - 1).clamp(min=0)[:, None]).squeeze(1)
    lost = rollout.ended & ~torch.isin(last, stops)
    beyond = stop.sum(-1) > 1
    measured = f"{int(rollout.ended.sum())} of {len(length)} responses ended"
    if bool(lost.any()):
        return check.fail(
            f"{int(lost.sum())} responses lack it, the first in row {int(lost.long().argmax())}",
            "The end token is left out of the response mask: the policy is never taught when to "
            "stop, and the KL of stopping is not counted.",
            "Count the first stop token as part of the response (its length is its place + 1).",
        )
    if bool(beyond.any()):
        return check.fail(
            f"{int(beyond.sum())} responses go on after it",
            "Tokens after the end token are counted: padding that has the end token's id (pad = "
            "eos), or text that is cut before anyone reads it.",
            "End the response mask at the first stop token of the response.",
        )
    return check.ok(measured)


def padding_ids(trial: Trial) -> Finding:
    """Whatever ids fill the padding, the numbers stay: pad = eos does no harm."""
    check = Check("masks.padding_ids", "any ids in the padding give the same numbers")
    rollout, policy = trial.rollout, trial.components.policy
    word = max(i for i in range(policy.words) if i not in (policy.pad_id, *policy.stop_ids))
    changed = replace(
        rollout,
        prompt_ids=torch.where(rollout.prompt_mask, rollout.prompt_ids, word),
        response_ids=torch.where(rollout.response_mask, rollout.response_ids, word),
    )
    again = trial.score(changed, Tilted(policy))
    names = ("rollout_logprobs", "ref_logprobs", "kl", "entropy", "values")
    moved = {key: _apart(getattr(again, key), getattr(trial.tilted, key)) for key in names}
    measured = f"{max(moved.values()):.2g} at the worst number"
    guilty = [key for key, gap in moved.items() if gap > trial.tolerance]
    if not guilty:
        pad_is_eos = policy.pad_id in policy.stop_ids
        return check.ok(measured + (", pad = eos" if pad_is_eos else ""))
    return check.fail(
        measured,
        f"Ids in the padding change {some(guilty)}: padding is attended to or counted.",
        "Pass the attention mask of every padded row, and compute masks from lengths, never from "
        "ids.",
    )


def numbers(trial: Trial) -> Finding:
    """NaN at every masked place changes no reward, return, advantage, loss or metric."""
    check = Check(
        "masks.numbers", "no number outside the masks, NaN included, changes reward, loss or metric"
    )
    clean, moved = _consequences(trial, trial.tilted), dict[str, float]()
    # Large numbers first: what they move has a name, where NaN may end in an error.
    for poison in (1e6, torch.nan):
        poisoned = _consequences(trial, _poison(trial.tilted, poison))
        moved = {key: _relative(clean[key], poisoned[key]) for key in clean}
        if any(gap > 1e-5 for gap in moved.values()):
            break
    guilty = [key for key, gap in moved.items() if gap > 1e-5]
    if not guilty:
        return check.ok(f"{len(moved)} numbers, none moved")
    return check.fail(
        f"{len(guilty)} of {len(moved)} numbers moved",
        f"Values outside the response mask reach {some(guilty)}.",
        "Select with torch.where(mask, x, 0) before every sum, mean and whitening.",
    )


def prompt_tokens(trial: Trial) -> Finding:
    """The KL of a response is that of its own tokens: no prompt in it, nothing left out."""
    check = Check("masks.prompt_tokens", "the KL of a response sums over its own tokens")
    kls = response_kl(trial.tilted.kl, trial.rollout.response_mask)
    excess = [float(kls[t.row]) - float(_dense_kl(trial, t).sum()) for t in trial.texts]
    prompts = [float(_prompt_kl(trial, t).sum()) for t in trial.texts]
    worst = max(excess, key=abs)
    measured = f"{worst:+.2g} nats beside those of its own tokens"
    limit = trial.tolerance * max(len(t.response) for t in trial.texts)
    if abs(worst) <= limit:
        return check.ok(measured)
    like_prompts = all(
        abs(e - p) <= limit + 0.05 * abs(p) for e, p in zip(excess, prompts, strict=True)
    )
    cause = (
        "The KL of the prompt's tokens is counted with the response's."
        if like_prompts
        else "The KL of a response is not the sum over its own tokens: some are left out, counted "
        "twice or scored in another state."
    )
    return check.fail(
        measured,
        cause,
        "Sum the KL under the response mask alone (kleash.kl.statistics.response_kl).",
    )


def _consequences(trial: Trial, scored: ScoredRollout) -> dict[str, Tensor]:
    """Everything that a step computes from a scored batch."""
    # What becomes of truncated responses is another question: here every one of them counts.
    settings = replace(trial.components.settings, truncated="score", missing_eos_penalty=None)
    mask = trial.rollout.response_mask
    width = mask.shape[1]
    experience = dispatch.algorithm_of(settings).prepare(scored, _BETA, settings)
    kl = scored.kl if experience.pathwise is not None else None
    now = Fresh(scored.rollout_logprobs, scored.values, kl, divergence=scored.kl)
    loss = dispatch.algorithm_of(settings).loss(
        experience, now, settings, tokens=int(experience.mask.sum())
    )
    measures = objective_measures(scored, beta=_BETA)
    return {
        "rewards": torch.where(mask, experience.rewards[:, :width], 0.0),
        "advantages": torch.where(mask, experience.advantages[:, :width], 0.0),
        "returns": torch.where(mask, experience.returns[:, :width], 0.0),
        "the loss": loss.total,
        **{key: torch.tensor(value) for key, value in loss.metrics.items()},
        **{k: torch.tensor(v) for k, v in measures.items() if v is not None},
    }


def _poison(scored: ScoredRollout, poison: float) -> ScoredRollout:
    """A number outside every mask, and more such columns on the right."""
    mask = scored.rollout.response_mask

    def widened(x: Tensor) -> Tensor:
        value = poison if x.is_floating_point() else 0
        kept = torch.where(mask, x, value) if x.is_floating_point() else x
        return torch.nn.functional.pad(kept, (0, _COLUMNS), value=value)

    def of(part: ScoredRollout | Rollout) -> dict[str, Tensor]:
        named = {field.name: getattr(part, field.name) for field in fields(part)}
        return {
            key: widened(x)
            for key, x in named.items()
            if isinstance(x, Tensor) and x.shape == mask.shape and not key.startswith("prompt")
        }

    return replace(scored, **of(scored), rollout=replace(scored.rollout, **of(scored.rollout)))


def _dense_kl(trial: Trial, text: Text) -> Tensor:
    """KL to the tilted head at each token of a response, from the model's own states."""
    return _kl_at(trial, text.of_response())


def _prompt_kl(trial: Trial, text: Text) -> Tensor:
    """The same at each token of its prompt but the first, which nothing predicts."""
    return _kl_at(trial, text.states[: len(text.prompt) - 1])


def _kl_at(trial: Trial, states: Tensor) -> Tensor:
    policy, heat = trial.components.policy, trial.components.sampling.temperature
    with torch.no_grad():
        mine, theirs = (
            (apply_head(model.head, states)[:, : policy.words].double() / heat).log_softmax(-1)
            for model in (policy, Tilted(policy))
        )
    return (mine.exp() * (mine - theirs)).sum(-1)


def _relative(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest number: a sum rounds with its terms."""
    return _apart(one, other) / max(1.0, float(one.abs().max()))


def _apart(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else torch.inf
    gap = (one.double() - other.double()).abs()
    same = (one == other) | (one.isnan() & other.isnan())
    return float(torch.where(same, 0.0, torch.nan_to_num(gap, nan=torch.inf)).max())
