"""Checks `sampling.*`: is the sampled distribution the one that is scored, and do responses end?

What the words themselves say about the law they were drawn from is in `law`.
"""

from kleash.kl.statistics import clustered_mean, response_kl
from kleash.preflight.findings import Check, Finding, some
from kleash.preflight.probe_batch import Trial
from kleash.preflight.sampler_causes import explain_gap
from kleash.preflight.sampling_distribution import explain, weigh
from kleash.rollout.sampling import overridden_settings

_SURE = 14.0
"""Nats of log-likelihood: a false alarm in a million batches."""
_SMALL_KL = 0.3
"""Nats up to which E[exp(−Σ k1)] can be estimated from samples: beyond, rare responses carry it."""


def ratio(trial: Trial) -> Finding:
    """The engine's log-probabilities against the trainer's: mean importance ratio 1."""
    check = Check("sampling.ratio", "mean π_trainer/π_sampler = 1 ± 0.01 per token")
    rollout = trial.rollout
    if rollout.sampler_logprobs is None:
        return check.skip("The sampler gave no log-probabilities.")
    mask = rollout.response_mask
    apart = (trial.scored.rollout_logprobs - rollout.sampler_logprobs)[mask].double()
    mean, worst = float(apart.exp().mean()), float(apart.abs().max())
    measured = f"mean ratio {mean:.4f}, {worst:.2g} nats apart at the worst token"
    if abs(mean - 1) <= 0.01 and worst <= 10 * trial.tolerance:
        return check.ok(measured)
    found = explain_gap(trial)
    if found.is_rounding and trial.config.rollout.correction != "none":
        return check.warn(measured, found.cause, "Nothing, as rollout.correction allows for it.")
    return check.fail(measured, found.cause, found.remedy)


def mean_weight(trial: Trial) -> Finding:
    """E[exp(−Σ k1)] = 1 over responses of the policy: an identity of any two laws."""
    check = Check("sampling.mean_weight", "E[exp(−Σ k1)] = 1 within its error")
    mask, clusters = trial.rollout.response_mask, trial.rollout.prompt_index
    k1 = response_kl(trial.scored.rollout_logprobs - trial.scored.ref_logprobs, mask)
    exact = float(response_kl(trial.scored.kl, mask).mean())
    if exact > _SMALL_KL:
        return check.skip(f"At {exact:.2g} nats rare responses carry this mean: no error known.")
    found = clustered_mean((-k1).double().exp(), clusters)
    error = found.standard_error or 0.0
    measured = f"{found.mean:.4f} ± {error:.4f}"
    if abs(found.mean - 1) <= 6 * error + 1e-3:
        return check.ok(measured)
    return check.fail(
        measured,
        "Responses are not samples of the policy that is scored: their weights against the "
        "reference do not average to 1.",
        "Fix sampling.law, sampling.ratio or the logprobs checks, whichever fails.",
    )


def law(trial: Trial) -> Finding:
    """Which law explains the words that were drawn?"""
    check = Check("sampling.law", "words drawn from the law that is scored, uncut and unshaped")
    evidence = weigh(trial)
    best = explain(trial, evidence)
    measured = (
        f"{evidence.tokens} tokens; the best other explanation ({best.name}) gains "
        f"{best.gain:.1f} nats"
    )
    if best.gain <= _SURE:
        return check.ok(measured)
    return check.fail(measured, best.cause, best.remedy)


def leftovers(trial: Trial) -> Finding:
    """Settings in the model's own generation_config.json: they do not apply here."""
    check = Check("sampling.leftovers", "no sampling settings in generation_config.json")
    found = overridden_settings(trial.components.policy)
    if not found:
        return check.ok("none")
    listed = some([f"{key} = {value}" for key, value in found.items()])
    return check.warn(
        listed,
        f"The model's generation_config.json sets {listed}; training puts it aside, but whoever "
        "samples from the trained model with the library's defaults will not.",
        f"Remove {some(list(found))} from {trial.components.policy.path}/generation_config.json.",
    )


def ending(trial: Trial) -> Finding:
    """The policy can end a response, and does."""
    check = Check("sampling.ending", "responses end by themselves")
    policy, ended = trial.components.policy, trial.rollout.ended
    stops = [i for i in policy.stop_ids if i < policy.words]
    mass = max(
        float(
            t.logprobs(trial.components.sampling.temperature, policy.words)
            .exp()[:, stops]
            .sum(-1)
            .max()
        )
        for t in trial.texts
    )
    share, limit = 1 - float(ended.double().mean()), trial.components.sampling.max_new_tokens
    measured = f"{share:.0%} cut at {limit} tokens; p(end) up to {mass:.2g}"
    names = some([str(w) for w in policy.tokenizer.convert_ids_to_tokens(list(policy.stop_ids))])
    rollout = trial.config.rollout
    if rollout.truncated == "score" and "truncated" in rollout.model_fields_set:
        return check.ok(f"{measured}; fragments, which are scored as they are")
    if not bool(ended.any()) and mass < 1e-3:
        return check.fail(
            measured,
            f"The end token is never produced: the policy gives {names} no probability, so every "
            "response runs into the limit.",
            "Name the token this model was taught to end with as eos_token in "
            "tokenizer_config.json and generation_config.json, or fine-tune it to end; where "
            "fragments are meant, write rollout.truncated: score.",
        )
    if not bool(ended.any()) and rollout.truncated == "drop":
        return check.fail(
            measured,
            "Every response is cut by the length limit and rollout.truncated: drop leaves them "
            "all out: there is nothing to learn from.",
            f"Raise rollout.max_new_tokens (now {limit}), or set rollout.truncated: score.",
        )
    if share > 0.5 and rollout.truncated in ("score", "drop"):
        return check.warn(
            measured,
            "Most responses are cut by the length limit: the reward judges fragments.",
            f"Raise rollout.max_new_tokens (now {limit}), or set rollout.truncated: penalise with "
            "rollout.missing_eos_penalty; where fragments are meant, write rollout.truncated: "
            "score.",
        )
    return check.ok(measured)
