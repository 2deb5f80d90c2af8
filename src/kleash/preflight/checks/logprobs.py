"""Checks `logprobs.*`: do policy and reference give each token its own log-probability?

Every check compares the path of training with the model's own reading of a text by itself, and
moves one thing at a time, so that what fails names what is wrong.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kleash.masked import masked_mean
from kleash.models.policy import Policy, Reference
from kleash.models.reference_offload import underlying
from kleash.preflight.comparison import at, gap, greedy, state_gap, twice
from kleash.preflight.findings import Check, Finding, skipped, some
from kleash.preflight.probe_batch import (
    Tilted,
    Trial,
    logprobs_at,
    reference_logits,
    rollout_of,
    states_of,
)
from kleash.scoring import token_scores
from kleash.scoring.dense import token_scores as dense_scores

_SAME_MODEL = 1e-4
"""Nats per token below which two models count as one."""
_PADDING = 5


def architecture(trial: Trial) -> Finding:
    """The policy was saved as a language model: tied weights let a classifier pass for one."""
    check = Check("logprobs.architecture", "a checkpoint saved as a causal language model")
    policy = trial.components.policy
    saved = (policy.model.config.architectures or [""])[0]
    if "Classification" not in saved and "Encoder" not in saved:
        return check.ok(saved or type(policy.model).__name__)
    return check.fail(
        saved,
        f"The policy in {policy.path!r} was saved as {saved}: it was trained to judge, and its "
        "words come from a head that only shares its embedding.",
        "Give policy.path the directory of the fine-tuned language model, and this one to "
        "reward_models or algorithm.value.path.",
    )


def dropout(trial: Trial) -> Finding:
    """The same tokens twice, the same numbers twice; no layer that drops anything."""
    check = Check("logprobs.dropout", "two readings of the same tokens agree; no dropout is on")
    named = {"policy": trial.components.policy, "reference": underlying(trial.components.reference)}
    live = {who: live_dropouts(model.model) for who, model in named.items()}
    worst = {who: twice(model, trial.texts) for who, model in named.items()}
    measured = ", ".join(f"{who} {moved:.2g} nats apart" for who, moved in worst.items())
    for who, model in named.items():
        if live[who]:
            return check.fail(
                f"{measured}; {some(live[who])}",
                f"Dropout is on in the {who}: its log-probabilities are random, and the policy is "
                "at a distance from itself.",
                f"Set the dropout rates in the {who}'s config.json to 0 and leave the model in "
                "evaluation mode (model.eval()), in training too.",
            )
        if worst[who] > 0:
            answer = check.fail if worst[who] > trial.tolerance else check.warn
            return answer(
                measured,
                f"The {who} is not deterministic though no dropout is on: "
                f"{type(model.model).__name__} draws random numbers or runs a kernel that adds in "
                "no fixed order.",
                "Set policy.attention: eager, or policy.precision: float32.",
            )
    return check.ok(measured)


def live_dropouts(model: nn.Module) -> list[str]:
    """Modules that would drop something in their present mode."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not module.training:
            continue
        rates = [v for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]
        if isinstance(module, nn.Dropout):
            rates.append(module.p)
        if any(rate > 0 for rate in rates):
            found.append(f"{path or type(module).__name__} (p = {max(rates):g})")
    return found


def self_kl(trial: Trial) -> Finding:
    """The policy scored against itself."""
    check = Check("logprobs.self_kl", "KL of the policy to itself 0, log π = log π_ref")
    scored = trial.score(trial.rollout, trial.components.policy)
    kl = float(scored.kl.abs().max())
    apart = float((scored.rollout_logprobs - scored.ref_logprobs).abs().max())
    measured = f"KL {kl:.2g}, log-ratio {apart:.2g} nats at the worst token"
    if max(kl, apart) <= 1e-5:
        return check.ok(measured)
    live = live_dropouts(trial.components.policy.model)
    cause = (
        f"dropout is on ({some(live)})"
        if live
        else "the two sides of the comparison are not computed alike (temperature, head or kernel)"
    )
    return check.fail(
        measured,
        f"The policy is at a distance from itself: {cause}.",
        "Fix the first failing logprobs check; if there is none, give both models to one "
        "call, with one temperature, head and kernel.",
    )


def start(trial: Trial) -> Finding:
    """Before the first update the policy is the reference, unless it is said that it is not."""
    differs = trial.config.reference.reference_differs
    check = Check(
        "logprobs.start",
        "a KL above 0, as reference_differs says"
        if differs
        else f"KL(π‖π_ref) at most {_SAME_MODEL:g} nats per token before any update",
    )
    if not trial.at_start:
        return check.skip("The policy has been updated: it no longer is its reference.")
    per_token = float(masked_mean(trial.scored.kl, trial.rollout.response_mask))
    measured = f"{per_token:.3g} nats per token"
    if per_token <= _SAME_MODEL or differs:
        return check.ok(measured)
    cause, remedy = why_apart(trial)
    return check.fail(measured, cause, remedy)


def why_apart(trial: Trial) -> tuple[str, str]:
    """What makes the reference another model than the policy; cause and remedy."""
    policy, reference = trial.components.policy, underlying(trial.components.reference)
    mine, theirs = policy.identity(), reference.identity()
    if live := live_dropouts(reference.model):
        return (
            f"Dropout is on in the reference ({some(live)}).",
            "Leave the reference in evaluation mode (model.eval()).",
        )
    if reference.adapter is not None:
        return (
            "The reference is the policy with its adapter off, but the adapter is not fresh: the "
            "reference is the bare base and not the model the run starts from.",
            "Merge the adapter into the weights first (merge_and_unload) and give the merged model "
            "as policy.path, or name its directory in policy.adapter, which merges it.",
        )
    if mine.dtype != theirs.dtype:
        return (
            f"The policy is in {mine.dtype} and the reference in {theirs.dtype}: the difference is "
            "rounding, not drift.",
            "Load both in one dtype: policy.precision is used for both.",
        )
    if mine.sha256 != theirs.sha256:
        return (
            f"The reference {theirs.path!r} has other weights than the policy {mine.path!r}.",
            "Leave reference.path out (the reference is then the policy as it starts), or set "
            "reference.reference_differs: true if it is meant.",
        )
    ours, other = policy.model.config.to_dict(), reference.model.config.to_dict()
    keys = sorted(key for key in ours | other if ours.get(key) != other.get(key))
    if keys:
        return (
            "The same weights are read with different settings in config.json: "
            + some([f"{k} {ours.get(k)!r} and {other.get(k)!r}" for k in keys])
            + ".",
            f"Give both models the same {some(keys)}.",
        )
    return (
        "Policy and reference have the same weights and settings, but are not computed alike.",
        "Fix the other failing logprobs checks first.",
    )


def head(trial: Trial) -> Finding:
    """The head as data gives the logits that the model itself gives."""
    check = Check("logprobs.head", "head(hidden states) are the model's own log-probabilities")
    policy = trial.components.policy
    apart = max(
        gap(
            logprobs_at(policy.head, text.of_response(), text.response),
            at(text.logprobs(1.0, policy.words), text.response),
        )
        for text in trial.texts
    )
    measured = f"{apart:.2g} nats at the worst token"
    if apart <= trial.tolerance:
        return check.ok(measured)
    return check.fail(
        measured,
        f"The head of {type(policy.model).__name__} is read wrong: a scale, soft-cap or bias of "
        "its logits is missing or doubled.",
        "Read in kleash.models.lm_head.read_head what the model's own forward does to its logits "
        "(logit_scale, logits_scaling and final_logit_softcapping of config.json, a bias), or take "
        "another architecture.",
    )


def alignment(trial: Trial) -> Finding:
    """Each token is scored from the state before it, not from a neighbour's."""
    check = Check("logprobs.alignment", "token t is scored from the state after token t − 1")
    gaps = {shift: state_gap(trial, shift) for shift in (0, -1, 1)}
    best = min(gaps, key=lambda shift: gaps[shift])
    measured = f"{gaps[0]:.2g} nats at the worst token"
    if gaps[0] <= trial.tolerance or gaps[best] > trial.tolerance:
        return check.ok(measured)
    return check.fail(
        f"{measured}, {gaps[best]:.2g} if shifted by {best:+d}",
        f"Hidden states are off by one: the state at position t{best:+d} is used for token t.",
        "Take state t − 1 for token t; kleash.models.policy.trunk_states does.",
    )


def positions(trial: Trial) -> Finding:
    """Without any padding, the states are the model's own."""
    check = Check("logprobs.positions", "positions count a text's tokens from 0")
    apart = state_gap(trial, 0)
    measured = f"{apart:.2g} nats at the worst token of unpadded texts"
    if apart <= trial.tolerance:
        return check.ok(measured)
    if min(state_gap(trial, shift) for shift in (-1, 1)) <= trial.tolerance:
        return check.skip("The states are off by one: see scoring.alignment.")
    return check.fail(
        measured,
        "Position ids are wrong: without padding the states differ from those the model computes "
        "with its own positions.",
        "Number the real tokens of a row from 0: position_ids = mask.cumsum(-1) − 1.",
    )


def left_padding(trial: Trial) -> Finding:
    """A prompt padded on the left is read as the same prompt."""
    return _padding(
        trial,
        "logprobs.left_padding",
        "left",
        "on the left (before the prompt)",
        "Number positions from a row's first real token, and pass the attention mask wherever a "
        "row is padded.",
    )


def right_padding(trial: Trial) -> Finding:
    """A response padded on the right is read as the same response."""
    return _padding(
        trial,
        "logprobs.right_padding",
        "right",
        "on the right (after the response)",
        "Take a causal model: a later token must not change an earlier state.",
    )


def batching(trial: Trial) -> Finding:
    """A text in a batch gets the numbers it gets by itself."""
    check = Check("logprobs.batching", "log π of a text does not depend on the rest of its batch")
    components, apart = trial.components, 0.0
    for text in trial.texts:
        alone = trial.score(rollout_of(text.prompt, text.response), components.reference)
        row = trial.scored.rollout_logprobs[text.row][trial.rollout.response_mask[text.row]]
        apart = max(apart, gap(alone.rollout_logprobs[0], row))
    measured = f"{apart:.2g} nats at the worst token"
    if apart <= trial.tolerance:
        return check.ok(measured)
    return check.fail(
        measured,
        "A response's log-probabilities depend on what shares its batch: rows see each other, or "
        "padding is seen.",
        "Fix scoring.left_padding or scoring.right_padding if they fail; else read each row by "
        "itself: no layer may take a mean, a norm or a maximum over rows (policy.attention: eager "
        "rules the kernel out).",
    )


def packing(trial: Trial) -> Finding:
    """Rows are never packed, so nothing can leak between them."""
    del trial
    return skipped("logprobs.packing", "kleash puts one text into a row and packs none.")


def canary(trial: Trial) -> Finding:
    """Greedy text, scored end to end: no other word may be likelier than the one written."""
    check = Check("logprobs.canary", "greedy text gets the highest log-probability at each token")
    components = trial.components
    scored, best = list[Tensor](), list[Tensor]()
    for text in trial.texts[:2]:
        words, top = greedy(trial, text.prompt)
        written = rollout_of(text.prompt, words)
        seen = trial.score(written, components.policy)
        scored.append(seen.rollout_logprobs[0].double())
        best.append(top)
    mine, top = torch.cat(scored), torch.cat(best)
    measured = f"{float(mine.mean()):.3f} nats a token, {float(top.mean()):.3f} possible"
    if gap(mine, top) <= 2 * trial.tolerance:
        return check.ok(measured)
    return check.fail(
        measured,
        "Greedy text is not the likeliest text: tokens are scored off by one, at another "
        "temperature, or with another head than the model's.",
        "Fix scoring.alignment, scoring.temperature or scoring.head, whichever fails; if none "
        "does, keep what was read in its place: log-probability t is that of response token t.",
    )


def streaming(trial: Trial) -> Finding:
    """The streaming kernel against all logits at once."""
    check = Check("logprobs.streaming", "log π, KL and entropy as from the whole table of logits")
    policy, tilted, apart = trial.components.policy, Tilted(trial.components.policy), 0.0
    want = ("logprobs", "ref_logprobs", "kl", "entropy")
    for text in trial.texts:
        with torch.no_grad():
            states = text.of_response()
            one, other = (
                scorer(
                    states,
                    policy.head,
                    text.response,
                    reference=(states, tilted.head),
                    temperature=trial.components.sampling.temperature,
                    want=want,
                )
                for scorer in (token_scores, dense_scores)
            )
        apart = max(apart, *(gap(getattr(one, key), getattr(other, key)) for key in want))
    measured = f"{apart:.2g} nats at the worst number"
    if apart <= max(trial.tolerance / 10, 1e-5):
        return check.ok(measured)
    return check.fail(
        measured,
        "The streaming kernel computes something else than a log-softmax over the whole "
        "vocabulary on this machine.",
        "Take another version of torch"
        + ("" if policy.device.type == "cpu" else ", or set device: cpu")
        + ", and report this with the versions of torch and kleash.",
    )


def temperature(trial: Trial) -> Finding:
    """Policy and reference are scored at the temperature of sampling."""
    asked = trial.components.sampling.temperature
    check = Check(
        "logprobs.temperature", f"both models scored at the temperature of sampling, {asked:g}"
    )
    fits: dict[str, float | None] = {}
    for who in ("policy", "reference"):
        fits[who] = _fitting(trial, lambda heat, who=who: _heat_gap(trial, who, heat))
    measured = ", ".join(
        f"{who} at {'another law' if fit is None else f'{fit:g}'}" for who, fit in fits.items()
    )
    for who, fit in fits.items():
        if fit is not None and fit != asked:
            return check.fail(
                measured,
                f"The {who} is scored at temperature {fit:g} but responses are sampled at "
                f"{asked:g}: every log-ratio holds the difference.",
                f"Divide the {who}'s logits by rollout.temperature too, or set "
                "rollout.temperature: 1.0.",
            )
    if None in fits.values():
        return check.skip("No temperature explains the numbers: see the other checks here.")
    return check.ok(measured)


def floor(trial: Trial) -> Finding:
    """The KL that rounding alone gives: nothing smaller can be read."""
    check = Check(
        "logprobs.floor",
        "both models in one dtype and attention kernel; a floor far below the target",
    )
    per_response = kl_floor(trial)
    reference = underlying(trial.components.reference)
    mine, theirs = ways(trial.components.policy), ways(reference)
    measured = f"{per_response:.2g} nats per response; policy {mine}, reference {theirs}"
    target = trial.config.leash.target_kl
    if mine != theirs:
        return check.warn(
            measured,
            f"Policy and reference are computed differently ({mine} and {theirs}): the KL holds "
            "rounding beside drift.",
            "Load both with one policy.precision and one policy.attention.",
        )
    if target is not None and target < 3 * per_response:
        return check.fail(
            measured,
            f"leash.target_kl = {target:g} is under three times what rounding alone gives: it "
            "cannot be resolved.",
            f"Set leash.target_kl: {10 * per_response:.1g} or more"
            + ("." if mine.startswith("float32") else ", or policy.precision: float32."),
        )
    return check.ok(measured)


def kl_floor(trial: Trial) -> float:
    """Nats per response between two ways to compute the same law: sampler's and trainer's."""
    sampler = trial.rollout.sampler_logprobs
    if sampler is None:
        return 0.0
    mask = trial.rollout.response_mask
    gap = torch.where(mask, sampler - trial.scored.rollout_logprobs, 0.0)
    return float(gap.sum(-1).abs().mean())


def ways(owner: Policy | Reference) -> str:
    """Weights, arithmetic and attention kernel of a model."""
    kernel = getattr(owner.model.config, "_attn_implementation", None)
    dtype = str(next(owner.model.parameters()).dtype).removeprefix("torch.")
    computed = "/computed in bf16" if owner.precision == "bf16" else ""
    return f"{dtype}{computed}/{kernel or 'default'}"


def _padding(trial: Trial, name: str, side: str, where: str, remedy: str) -> Finding:
    check = Check(name, f"log π of a text does not change when it is padded {where}")
    policy, apart = trial.components.policy, 0.0
    for text in trial.texts:
        plain = logprobs_at(policy.head, states_of(policy, text), text.response)
        for fill in (policy.pad_id, int(text.response[0])):
            amount = {side: _PADDING, "fill": fill}
            padded = states_of(policy, text, **amount)
            apart = max(apart, gap(plain, logprobs_at(policy.head, padded, text.response)))
    measured = f"{apart:.2g} nats at the worst token, {_PADDING} pads"
    if apart <= trial.tolerance:
        return check.ok(measured)
    cause = f"Padding {where} changes a response's log-probabilities: position ids or the attention"
    return check.fail(measured, f"{cause} mask do not leave it out.", remedy)


def _fitting(trial: Trial, apart: Callable[[float], float]) -> float | None:
    """The temperature at which the scored numbers are the model's own; None if there is none."""
    asked = trial.components.sampling.temperature
    others = (1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.5, 2.0, asked * asked)
    return next((heat for heat in (asked, *others) if apart(heat) <= trial.tolerance), None)


def _heat_gap(trial: Trial, who: str, heat: float) -> float:
    mask, words = trial.rollout.response_mask, trial.components.policy.words
    apart = 0.0
    for text in trial.texts:
        if who == "policy":
            logits, scored = text.logits, trial.scored.rollout_logprobs
        else:
            logits, scored = (
                reference_logits(trial.components.reference, text),
                trial.scored.ref_logprobs,
            )
        table = (logits[:, :words].double() / heat).log_softmax(-1)
        apart = max(apart, gap(at(table, text.response), scored[text.row][mask[text.row]]))
    return apart
