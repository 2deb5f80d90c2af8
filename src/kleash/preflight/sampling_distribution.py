"""Which law were the words of a batch drawn from? Each explanation, and what it gains over π.

Of each position the whole law is known, so it can be asked which explanation of the drawn words is
likelier than π itself: a cut tail, a word that is never given, a temperature, a taste for or
against repeating. A gain is in nats of log-likelihood, and is minus the logarithm of a p-value: if
the words do come from π, a gain above g has probability of about e^(−g), whatever the vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.models.lm_head import apply_head
from kleash.preflight.probe_batch import Trial
from kleash.rollout.sampling import overridden_settings

EXPONENTS = (
    *(0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
    *(1.02, 1.05, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0),
)
"""1/T of the temperatures tried."""
_MASSES = (*(number / 100 for number in range(100)), 0.995, 1.0)
"""Cuts of top-p: a word is kept if the likelier ones have less than that."""
_RATIOS = tuple(10 ** (-number / 10) for number in range(41))
"""Probabilities relative to the likeliest word's, from 1 to 10⁻⁴: cuts of min-p."""
_ENTRIES = 10**8
"""Tokens × vocabulary that are read at most: a thousand tokens of a large vocabulary."""
_PLAIN = (
    "Draw from the whole distribution (do_sample, without top_p, top_k or min_p), and sharpen with "
    "rollout.temperature."
)


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


@dataclass(frozen=True)
class Explanation:
    """A law that is not π, and how much likelier it makes the words."""

    name: str
    gain: float
    cause: str
    remedy: str


def explain(trial: Trial, evidence: Evidence) -> Explanation:
    """The explanation that gains most."""
    found = overridden_settings(trial.components.policy)
    hint = f" (generation_config.json has {found})" if found else ""
    everything = [
        *_cuts(evidence, hint),
        _heat(evidence, trial.components.sampling.temperature, hint),
        *_missing(trial, evidence, hint),
        _repeats(evidence, hint),
    ]
    return max(everything, key=lambda explanation: explanation.gain)


def _cuts(evidence: Evidence, hint: str) -> list[Explanation]:
    n = evidence.tokens
    cut = next(i for i, mass in enumerate(_MASSES) if mass >= evidence.above or mass == 1)
    least = next((i for i, ratio in enumerate(_RATIOS) if ratio <= evidence.ratio), None)
    tail = "The tail of the distribution is cut as"
    return [
        Explanation(
            "top-p",
            float(evidence.beyond_mass[cut]),
            f"{tail} top-p does: none of {n} words has more than {evidence.above:.1%} of the mass "
            f"above it{hint}.",
            _PLAIN,
        ),
        Explanation(
            "top-k",
            float(evidence.beyond_rank[evidence.rank]),
            f"{tail} top-k does: none of {n} words is beyond the likeliest {evidence.rank + 1}"
            f"{hint}.",
            _PLAIN,
        ),
        Explanation(
            "min-p",
            0.0 if least is None else float(evidence.below_ratio[least]),
            f"{tail} min-p does: none of {n} words is below {evidence.ratio:.3g} of the "
            f"likeliest's probability{hint}.",
            _PLAIN,
        ),
    ]


def _heat(evidence: Evidence, scored: float, hint: str) -> Explanation:
    best = int(evidence.heated.argmax())
    return Explanation(
        "another temperature",
        float(evidence.heated[best]),
        f"Words are drawn at a temperature of about {scored / EXPONENTS[best]:.3g} and scored at "
        f"{scored:g}{hint}.",
        "Sample at the temperature that is scored: "
        f"rollout.temperature: {scored:g}, in the sampler too.",
    )


def _missing(trial: Trial, evidence: Evidence, hint: str) -> list[Explanation]:
    policy = trial.components.policy
    never = torch.where(evidence.drawn == 0, evidence.never, -torch.inf)
    word = int(never.argmax())
    spelled = str(policy.tokenizer.convert_ids_to_tokens([word])[0])
    who = "The end token" if word in policy.stop_ids else f"The word {spelled!r}"
    ends = trial.rollout.response_mask.sum(-1)[trial.rollout.ended].tolist()
    earliest = min(ends, default=0)
    return [
        Explanation(
            "a word left out",
            # One of many words is the least drawn by chance.
            float(never[word]) - math.log(len(never)),
            f"{who} is suppressed: the policy gives it probability but it is never drawn{hint}.",
            "Remove suppress_tokens, bad_words_ids, min_length and the like from the sampler's "
            "settings.",
        ),
        Explanation(
            "a least length",
            float(evidence.early_stop[: max(earliest - 1, 0)].sum()),
            "The end token is suppressed at first (min_length, min_new_tokens): no response ends "
            f"before token {earliest} though the policy would{hint}.",
            "Remove min_length and min_new_tokens from the sampler's settings.",
        ),
    ]


def _repeats(evidence: Evidence, hint: str) -> Explanation:
    surplus = evidence.repeats
    gain = surplus**2 / 2 / max(evidence.repeats_variance, 1e-12)
    before = f"({surplus:+.1f} against expectation)"
    if surplus < 0:
        return Explanation(
            "a repetition penalty",
            gain,
            f"Words that were there before are drawn too seldom {before}: a repetition penalty or "
            f"no_repeat_ngram_size is on{hint}.",
            "Set repetition_penalty: 1.0 and no_repeat_ngram_size: 0 in the sampler's settings.",
        )
    return Explanation(
        "a taste for repeating",
        gain,
        f"Words that were there before are drawn too often {before}: a penalty below 1 or a bias "
        f"is on{hint}.",
        "Set repetition_penalty: 1.0 and remove sequence_bias from the sampler's settings.",
    )


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
        heated=zeros(len(EXPONENTS)),
        repeats=0.0,
        repeats_variance=0.0,
        early_stop=zeros(width),
    )


@torch.no_grad()
def weigh(trial: Trial) -> Evidence:
    """Read the law at every token of the batch, a response at a time."""
    policy, rollout = trial.components.policy, trial.rollout
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
        logprobs = (logits / trial.components.sampling.temperature).log_softmax(-1).cpu()
        # An id beyond the head's rows is never written: it ends nothing.
        stops = [stop for stop in policy.stop_ids if stop < policy.words]
        add_evidence(evidence, logprobs, prompt.cpu(), response.cpu(), stops)
    return evidence


def add_evidence(
    evidence: Evidence,
    logprobs: Float[Tensor, "token vocab"],
    prompt: Int[Tensor, " prompt"],
    response: Int[Tensor, " token"],
    stops: Sequence[int],
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
    for number, exponent in enumerate(EXPONENTS):
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
