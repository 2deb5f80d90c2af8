"""Room *sampling*: was it written by the law that is scored?

Of each position the whole law is known, so a batch can be asked which explanation of its words is
likelier than π itself: a cut tail, a word that is never given, a temperature, a taste for or
against repeating. Each explanation's gain in log-likelihood is in nats; if the words do come from
π a gain above g has probability of about e^(−g), whatever the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.generation import overridden_settings
from kleash.heads import apply_head
from kleash.kl.statistics import clustered_mean, response_kl
from kleash.preflight.finding import Finding, skipped, some
from kleash.preflight.trial import Trial

_SURE = 14.0
"""Nats of log-likelihood: a false alarm in a million batches."""
_EXPONENTS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
"""1/T of the temperatures tried."""
_MASSES = tuple(number / 50 for number in range(51))
"""Cuts of top-p: a word is kept if the likelier ones have less than that."""
_RATIOS = tuple(10 ** (-number / 10) for number in range(41))
"""Probabilities relative to the likeliest word's, from 1 to 10⁻⁴: cuts of min-p."""
_ENTRIES = 10**8
"""Tokens × vocabulary that are read at most: a thousand tokens of a large vocabulary."""
_SMALL_KL = 1.0
"""Nats up to which E[exp(−Σ k1)] can be told from samples: beyond, rare responses carry it."""


@dataclass
class Evidence:
    """Log-likelihood gained over π by each explanation, summed over tokens."""

    tokens: int
    never: Float[Tensor, " vocab"]
    """Σ −log(1 − p_v): what it says against π that word v was not drawn."""
    drawn: Float[Tensor, " vocab"]
    """How often each word was."""
    above: float
    """Largest mass of words likelier than a drawn one."""
    beyond_mass: Float[Tensor, " mass"]
    """Σ −log(mass of the words with at most so much above them), for each of `_MASSES`."""
    rank: int
    """Largest number of words likelier than a drawn one."""
    beyond_rank: Float[Tensor, " vocab"]
    """Σ −log(mass of the k + 1 likeliest words): what it says against π that none lies beyond."""
    ratio: float
    """Smallest probability of a drawn word, relative to the likeliest's."""
    below_ratio: Float[Tensor, " ratio"]
    """Σ −log(mass of the words at least that likely), for each of `_RATIOS`."""
    heated: Float[Tensor, " exponent"]
    repeats: float
    """Repeated words drawn, less those expected."""
    repeats_variance: float
    early_stop: Float[Tensor, " position"]
    """Σ −log(1 − p_stop) at each position of the responses."""


def replay(trial: Trial) -> Finding:
    """The engine's log-probabilities against the trainer's: mean importance ratio 1."""
    name, expected = "sampling.ratio", "mean π_trainer/π_sampler = 1 ± 0.01 per token"
    rollout = trial.rollout
    if rollout.sampler_logprobs is None:
        return skipped(name, "The sampler gave no log-probabilities.")
    mask = rollout.response_mask
    apart = (trial.scored.rollout_logprobs - rollout.sampler_logprobs)[mask].double()
    ratio, worst = float(apart.exp().mean()), float(apart.abs().max())
    measured = f"mean ratio {ratio:.4f}, {worst:.2g} nats apart at the worst token"
    if abs(ratio - 1) <= 0.01 and worst <= 10 * trial.tolerance:
        return Finding(name, "ok", measured, expected)
    heat = _sampler_heat(trial)
    cause = (
        f"The sampler wrote at temperature {heat:g} and the trainer scores at "
        f"{trial.crew.sampling.temperature:g}."
        if heat is not None
        else "The sampler's log-probabilities are not the trainer's: another model, a cut "
        "distribution or a penalty wrote these responses."
    )
    return Finding(
        name,
        "fail",
        measured,
        expected,
        cause,
        "Sample with kleash.generation and SamplingSpec alone, and score at the same "
        "rollout.temperature.",
    )


def mean_weight(trial: Trial) -> Finding:
    """E[exp(−Σ k1)] = 1 over responses of the policy: an identity of any two laws."""
    name, expected = "sampling.mean_weight", "E[exp(−Σ k1)] = 1 within its error"
    mask, clusters = trial.rollout.response_mask, trial.rollout.prompt_index
    k1 = response_kl(trial.scored.rollout_logprobs - trial.scored.ref_logprobs, mask)
    exact = float(response_kl(trial.scored.kl, mask).mean())
    if exact > _SMALL_KL:
        return skipped(name, f"At {exact:.2g} nats rare responses carry this mean: no error known.")
    found = clustered_mean((-k1).double().exp(), clusters)
    error = found.standard_error or 0.0
    measured = f"{found.mean:.4f} ± {error:.4f}"
    if abs(found.mean - 1) <= 6 * error + 1e-3:
        return Finding(name, "ok", measured, expected)
    return Finding(
        name,
        "fail",
        measured,
        expected,
        "Responses are not samples of the policy that is scored: their weights against the "
        "reference do not average to 1.",
        "Mend sampling.law, sampling.ratio or the scoring room, whichever fails.",
    )


def law(trial: Trial) -> Finding:
    """Which law explains the words that were drawn?"""
    name, expected = "sampling.law", "words drawn from the law that is scored, uncut and unshaped"
    evidence = weigh(trial)
    explanations = explain(trial, evidence)
    best = max(explanations, key=lambda which: explanations[which][0])
    gain, cause, remedy = explanations[best]
    measured = f"{evidence.tokens} tokens; best other explanation ({best}) gains {gain:.1f} nats"
    if gain <= _SURE:
        return Finding(name, "ok", measured, expected)
    return Finding(name, "fail", measured, expected, cause, remedy)


def explain(trial: Trial, evidence: Evidence) -> dict[str, tuple[float, str, str]]:
    """Gain, cause and remedy of each explanation."""
    tokenizer, n = trial.crew.policy.tokenizer, evidence.tokens
    leftovers = overridden_settings(trial.crew.policy)
    from_file = f" (generation_config.json has {leftovers})" if leftovers else ""
    plain = (
        "Sample with do_sample and nothing else; remove the setting from generation_config.json, "
        "and sharpen with rollout.temperature."
    )
    exponent = int(evidence.heated.argmax())
    heat = trial.crew.sampling.temperature / _EXPONENTS[exponent]
    never = torch.where(evidence.drawn == 0, evidence.never, -torch.inf)
    word = int(never.argmax())
    spelled = str(tokenizer.convert_ids_to_tokens([word])[0])
    repeats = evidence.repeats / math.sqrt(max(evidence.repeats_variance, 1e-12))
    ends = [int(length) for length in trial.rollout.response_mask.sum(-1)[trial.rollout.ended]]
    earliest = min(ends, default=0)
    stops = "the end token" if word in trial.crew.policy.stop_ids else f"the word {spelled!r}"
    cut = next(i for i, mass in enumerate(_MASSES) if mass >= evidence.above or mass == 1)
    least = next((i for i, ratio in enumerate(_RATIOS) if ratio <= evidence.ratio), None)
    return {
        "top-p": (
            float(evidence.beyond_mass[cut]),
            f"The tail of the distribution is cut as top-p does: none of {n} words has more than "
            f"{evidence.above:.1%} of the mass above it{from_file}.",
            plain,
        ),
        "top-k": (
            float(evidence.beyond_rank[evidence.rank]),
            f"The tail of the distribution is cut as top-k does: none of {n} words is beyond the "
            f"likeliest {evidence.rank + 1}{from_file}.",
            plain,
        ),
        "min-p": (
            0.0 if least is None else float(evidence.below_ratio[least]),
            f"The tail of the distribution is cut as min-p does: none of {n} words is below "
            f"{evidence.ratio:.3g} of the likeliest's probability{from_file}.",
            plain,
        ),
        "another temperature": (
            float(evidence.heated[exponent]),
            f"Words are drawn at a temperature of about {heat:.2g} and scored at "
            f"{trial.crew.sampling.temperature:g}{from_file}.",
            f"Sample at the temperature that is scored: rollout.temperature: "
            f"{trial.crew.sampling.temperature:g}, in the sampler too.",
        ),
        "a word left out": (
            float(never[word]) - math.log(len(never)),
            f"{stops[0].upper()}{stops[1:]} is suppressed: the policy gives it probability but it "
            f"is never drawn{from_file}.",
            "Remove suppress_tokens, bad_words_ids, min_length and the like from the sampler's "
            "settings.",
        ),
        "a least length": (
            float(evidence.early_stop[: max(earliest - 1, 0)].sum()),
            f"The end token is suppressed at first (min_length, min_new_tokens): no response ends "
            f"before token {earliest} though the policy would{from_file}.",
            "Remove min_length and min_new_tokens from the sampler's settings.",
        ),
        "a repetition penalty": (
            repeats**2 / 2 if repeats < 0 else 0.0,
            f"Words that were there before are drawn too seldom ({evidence.repeats:+.1f} against "
            f"expectation): a repetition penalty or no_repeat_ngram_size is on{from_file}.",
            "Set repetition_penalty: 1.0 and no_repeat_ngram_size: 0 in generation_config.json.",
        ),
        "a taste for repeating": (
            repeats**2 / 2 if repeats > 0 else 0.0,
            f"Words that were there before are drawn too often ({evidence.repeats:+.1f} against "
            f"expectation): a penalty below 1 or a bias is on{from_file}.",
            "Set repetition_penalty: 1.0 and remove sequence_bias from generation_config.json.",
        ),
    }


def no_evidence(vocabulary: int, width: int) -> Evidence:
    """Before any word is read, of responses of at most `width` tokens."""

    def zeros(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64)

    return Evidence(
        tokens=0,
        never=zeros(vocabulary),
        drawn=zeros(vocabulary),
        above=0.0,
        beyond_mass=zeros(len(_MASSES)),
        rank=0,
        beyond_rank=zeros(vocabulary),
        ratio=1.0,
        below_ratio=zeros(len(_RATIOS)),
        heated=zeros(len(_EXPONENTS)),
        repeats=0.0,
        repeats_variance=0.0,
        early_stop=zeros(width),
    )


@torch.no_grad()
def weigh(trial: Trial) -> Evidence:
    """Read the law at every token of the batch, a response at a time."""
    policy, rollout = trial.crew.policy, trial.rollout
    vocabulary = policy.words
    evidence = no_evidence(vocabulary, rollout.response_ids.shape[1])
    for row in range(len(rollout.response_ids)):
        if evidence.tokens * vocabulary > _ENTRIES:
            break
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row][rollout.response_mask[row]]
        ones = torch.ones_like
        states = policy.hidden_states(
            prompt[None], ones(prompt[None]).bool(), response[None], ones(response[None]).bool()
        )
        logits = apply_head(policy.head, states[0, : len(response)])[:, :vocabulary].double()
        logprobs = (logits / trial.crew.sampling.temperature).log_softmax(-1).cpu()
        add_evidence(evidence, logprobs, prompt.cpu(), response.cpu(), policy.stop_ids)
    return evidence


def add_evidence(
    evidence: Evidence,
    logprobs: Float[Tensor, "token vocab"],
    prompt: Int[Tensor, " prompt"],
    response: Int[Tensor, " token"],
    stops: tuple[int, ...],
) -> None:
    """What the words of one response say."""
    p = logprobs.exp()
    drawn = logprobs.gather(1, response[:, None])
    mine = drawn.squeeze(1)
    evidence.tokens += len(response)
    evidence.drawn += torch.bincount(response, minlength=p.shape[1]).double()
    evidence.never += -torch.log1p(-p.clamp(max=1 - 1e-12)).sum(0)
    ordered = p.sort(-1, descending=True).values
    summed = ordered.cumsum(-1).clamp(max=1)
    above = torch.where(logprobs > drawn, p, 0.0).sum(-1)
    evidence.above = max(evidence.above, float(above.max()))
    evidence.beyond_mass -= _log_kept(summed, summed - ordered, torch.tensor(_MASSES))
    evidence.rank = max(evidence.rank, int((logprobs > drawn).sum(-1).max()))
    evidence.beyond_rank -= summed.log().sum(0)
    relative = ordered / ordered[:, :1]
    evidence.ratio = min(evidence.ratio, float((mine.exp() / ordered[:, 0]).min()))
    evidence.below_ratio -= _log_kept(summed, -relative, -torch.tensor(_RATIOS))
    for number, exponent in enumerate(_EXPONENTS):
        sharpened = (exponent * logprobs).logsumexp(-1)
        evidence.heated[number] += ((exponent - 1) * mine - sharpened).sum()
    seen = torch.zeros_like(p, dtype=torch.bool)
    for place in range(len(response)):
        seen[place, prompt] = True
        seen[place, response[:place]] = True
    expected = torch.where(seen, p, 0.0).sum(-1)
    again = seen.gather(1, response[:, None]).squeeze(1).double()
    evidence.repeats += float((again - expected).sum())
    evidence.repeats_variance += float((expected * (1 - expected)).sum())
    stop = p[:, list(stops)].sum(-1).clamp(max=1 - 1e-12)
    evidence.early_stop[: len(response)] += -torch.log1p(-stop)


def _log_kept(
    summed: Float[Tensor, "token vocab"],
    rising: Float[Tensor, "token vocab"],
    cuts: Float[Tensor, " cut"],
) -> Float[Tensor, " cut"]:
    """Σ_t log of the mass left by each cut, which keeps the words that rise no higher."""
    asked = cuts.to(rising.dtype).expand(len(rising), -1).contiguous()
    kept = torch.searchsorted(rising.contiguous(), asked, right=True).clamp(min=1)
    return summed.gather(1, kept - 1).log().sum(0)


def leftovers(trial: Trial) -> Finding:
    """Settings in the model's own generation_config.json: they do not apply here."""
    name, expected = "sampling.leftovers", "no sampling settings in generation_config.json"
    found = overridden_settings(trial.crew.policy)
    if not found:
        return Finding(name, "ok", "none", expected)
    listed = some([f"{key} = {value}" for key, value in found.items()])
    return Finding(
        name,
        "warn",
        listed,
        expected,
        f"The model's generation_config.json sets {listed}; training puts it aside, but whoever "
        "samples from the trained model with the library's defaults will not.",
        f"Remove {some(list(found))} from {trial.crew.policy.path}/generation_config.json.",
    )


def ending(trial: Trial) -> Finding:
    """The policy can end a response, and does."""
    name, expected = "sampling.ending", "responses end by themselves"
    policy, ended = trial.crew.policy, trial.rollout.ended
    stops = [i for i in policy.stop_ids if i < policy.words]
    mass = max(
        float(
            t.logprobs(trial.crew.sampling.temperature, policy.words).exp()[:, stops].sum(-1).max()
        )
        for t in trial.texts
    )
    share, limit = 1 - float(ended.double().mean()), trial.crew.sampling.max_new_tokens
    measured = f"{share:.0%} cut at {limit} tokens; p(end) up to {mass:.2g}"
    names = some([str(w) for w in policy.tokenizer.convert_ids_to_tokens(list(policy.stop_ids))])
    if not bool(ended.any()) and mass < 1e-3:
        return Finding(
            name,
            "fail",
            measured,
            expected,
            f"The end token is never produced: the policy gives {names} no probability, so every "
            "response runs into the limit.",
            "Name the token this model was taught to end with as eos_token in "
            "tokenizer_config.json and generation_config.json, or fine-tune it to end.",
        )
    if not bool(ended.any()) and trial.config.rollout.truncated == "drop":
        return Finding(
            name,
            "fail",
            measured,
            expected,
            "Every response is cut by the length limit and rollout.truncated: drop leaves them "
            "all out: there is nothing to learn from.",
            f"Raise rollout.max_new_tokens (now {limit}), or set rollout.truncated: score.",
        )
    if share > 0.5:
        return Finding(
            name,
            "warn",
            measured,
            expected,
            "Most responses are cut by the length limit: the reward judges fragments.",
            "Raise rollout.max_new_tokens, or set rollout.truncated: penalise with a "
            "missing_eos_penalty.",
        )
    return Finding(name, "ok", measured, expected)


def _sampler_heat(trial: Trial) -> float | None:
    """The temperature at which the texts' own log-probabilities are the sampler's."""
    sampler, mask = trial.rollout.sampler_logprobs, trial.rollout.response_mask
    if sampler is None:
        return None
    asked = trial.crew.sampling.temperature
    for heat in (1.0, *(asked / exponent for exponent in _EXPONENTS)):
        gaps = [
            t.logprobs(heat, trial.crew.policy.words).gather(1, t.response[:, None]).squeeze(1)
            - sampler[t.row][mask[t.row]]
            for t in trial.texts
        ]
        if float(torch.cat(gaps).abs().max()) <= 10 * trial.tolerance:
            return heat
    return None
