"""From the running account to what is said: means with intervals, shares, texts."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kleash.auditing.accumulator import LOWEST, PER_DECADE, AuditAccumulator
from kleash.auditing.confidence_intervals import ConfidenceInterval, Kind, tail_index
from kleash.auditing.model_pair import ModelPair
from kleash.auditing.padding import FLOOR_RESPONSES, noise_floor
from kleash.auditing.result import AuditedResponse, Measure, Part, Share, Tail, Verdict, WorstToken
from kleash.auditing.token_classes import TOKEN_CLASSES
from kleash.auditing.token_records import Record
from kleash.auditing.worst_responses import ResponseDetails, item_of, response_details
from kleash.kl.position_bins import POSITIONS, first_position
from kleash.report.token_heatmap import spaced
from kleash.rollout.top_tokens import TopTokens, decode, text_of_id

RESOLVABLE = 3.0
"""A KL below so many times the floor is rounding."""
HEAVY_SHARE = 0.2
"""Of all KL in one response, from which on the mean is that response's."""
CONTEXT = 12
"""Tokens shown before and after a worst token."""
MOVED = 20
"""Words shown that gained or lost most."""
COARSE = PER_DECADE // 8
"""Bins of the histogram that are shown as one."""


def part_of(account: AuditAccumulator, *, kind: Kind, floor: float) -> Part:
    """What follows from the records, without running the models again.

    Args:
        account: the account, its windows closed.
        kind: of the headline's intervals.
        floor: KL per token that rounding alone makes.
    """
    names = ["kl", "reverse_kl", "entropy", "ref_entropy"]
    names += (
        ["k1", "k3"] if account.by in ("policy", "reference") else ["nll", "ref_nll", "same_top"]
    )
    headline = account.headline
    measures = {
        name: Measure(
            account.mean(name, "token", kind=kind if name == headline else "fixed"),
            account.mean(name, "response", kind=kind if name == headline else "fixed"),
        )
        for name in names
    }
    given = "nll" in measures
    return Part(
        by=account.by,
        responses=round(account.moments.total("responses")),
        prompts=account.moments.clusters,
        tokens=round(account.moments.total("tokens")),
        headline=headline,
        measures=measures,
        perplexity={
            who: _exponential(measures[name].per_token)
            for who, name in (("policy", "nll"), ("reference", "ref_nll"))
            if given
        },
        percentiles={
            **{f"{100 * share:g}": account.percentile(share) for share in (0.5, 0.9, 0.99)},
            "max": account.largest_token,
        },
        histogram=_histogram(account),
        positions=_positions(account),
        classes=_classes(account),
        groups=_groups(account),
        tail=_tail(account),
        floor=floor,
        verdict=verdict(measures[headline].per_token.mean, account, floor),
    )


def verdict(mean: float, account: AuditAccumulator, floor: float) -> Verdict:
    """Whether a mean KL per token is more than rounding."""
    if mean == 0 and account.largest_token == 0:
        return "identical"
    return "resolved" if abs(mean) >= RESOLVABLE * floor else "not resolvable"


def floor_of(account: AuditAccumulator, pair: ModelPair, *, budget: int) -> float:
    """The floor, from responses drawn at random: the larger one of the two models."""
    items = [item_of(record) for record in account.drawn(FLOOR_RESPONSES)]
    return max(noise_floor(items, model, budget=budget) for model in (pair.policy, pair.reference))


def with_details(
    part: Part, account: AuditAccumulator, pair: ModelPair, *, temperature: float
) -> Part:
    """Add the responses and tokens that are worth looking at, and what both models wanted there."""
    worst, chance = account.worst(), account.at_random()
    tokens = account.worst_tokens()
    every = {record.number: record for record in (*worst, *chance, *(r for r, _ in tokens))}
    closer: dict[int, ResponseDetails] = {}
    moved = torch.zeros(pair.policy.words, dtype=torch.float64)
    random_numbers = {record.number for record in chance}
    places = _places(tokens, whole={record.number for record in (*worst, *chance)})
    for number, record in sorted(every.items()):
        closer[number], mass = response_details(
            record, pair, temperature=temperature, places=places.get(number)
        )
        if number in random_numbers:
            moved += mass
    count = sum(len(record.ids) for record in chance)
    tokenizer = pair.policy.tokenizer
    samples = [_sample(r, "worst", account, closer[r.number], tokenizer) for r in worst]
    shown = {record.number for record in worst}
    samples += [
        _sample(r, "random", account, closer[r.number], tokenizer)
        for r in chance
        if r.number not in shown
    ]
    mean = moved / max(1, count)
    return replace(
        part,
        samples=samples,
        worst_tokens=[
            _worst_token(
                r,
                at,
                account,
                _at(closer[r.number], places[r.number].index(at) if r.number in places else at),
                tokenizer,
            )
            for r, at in tokens
        ],
        gained=_moved_most(mean),
        lost=_moved_most(-mean),
        mass_tokens=count,
    )


def texts_of_ids(parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Texts of all ids that the parts name."""
    ids: set[int] = set()
    for part in parts:
        ids.update(number for number, _ in (*part.gained, *part.lost))
        for sample in part.samples:
            for wanted in (*sample.policy_top, *sample.reference_top):
                ids.update(wanted.ids)
        for token in part.worst_tokens:
            ids.update((*token.policy_top.ids, *token.reference_top.ids))
    return {str(number): text_of_id(tokenizer, number) for number in sorted(ids)}


def _places(
    tokens: Sequence[tuple[Record, int]], *, whole: Collection[int]
) -> dict[int, list[int]]:
    """Places of the tokens by record, of records that are not looked at as a whole."""
    found: dict[int, list[int]] = {}
    for record, place in tokens:
        if record.number not in whole:
            found.setdefault(record.number, []).append(place)
    return found


def _at(details: ResponseDetails, index: int) -> tuple[TopTokens, TopTokens]:
    """What policy and reference wanted at one of the tokens that were looked at."""
    return details.policy_top[index], details.reference_top[index]


def _exponential(of: ConfidenceInterval) -> ConfidenceInterval:
    """The interval of e^x from that of x."""
    ends = [None if end is None else math.exp(end) for end in (of.low, of.high)]
    return replace(of, mean=math.exp(of.mean), low=ends[0], high=ends[1], standard_error=None)


def _histogram(account: AuditAccumulator) -> list[tuple[float, int]]:
    counts = account.histogram.copy()
    counts[1] += counts[0]
    counts[-2] += counts[-1]
    coarse = np.add.reduceat(counts[1:-1], np.arange(0, len(counts) - 2, COARSE))
    inside = np.flatnonzero(coarse)
    if not len(inside):
        return []
    span = range(int(inside[0]), int(inside[-1]) + 1)
    return [(LOWEST + k * COARSE / PER_DECADE, int(coarse[k])) for k in span]


def _share(account: AuditAccumulator, name: str, start: float, kl: str, count: str) -> Share | None:
    moments = account.moments
    tokens = round(moments.total(count))
    if tokens == 0:
        return None
    return Share(
        name=name,
        start=start,
        kl=moments.ratio(kl, count),
        tokens=tokens,
        share=_part_of_all(moments.total(kl), account),
    )


def _part_of_all(amount: float, account: AuditAccumulator) -> float:
    whole = account.moments.total(account.headline)
    return amount / whole if 0 < whole < math.inf else 0.0


def _positions(account: AuditAccumulator) -> list[Share]:
    starts = [first_position(place) for place in range(POSITIONS)]
    found = [
        _share(
            account, f"{math.ceil(start)}", float(math.ceil(start)), f"kl at {k}", f"count at {k}"
        )
        for k, start in enumerate(starts)
    ]
    return [one for one in found if one is not None]


def _classes(account: AuditAccumulator) -> list[Share]:
    found = [
        _share(account, name, float(k), f"kl {name}", f"count {name}")
        for k, name in enumerate(TOKEN_CLASSES)
    ]
    return [one for one in found if one is not None]


def _groups(account: AuditAccumulator) -> list[Share]:
    headline = account.headline
    return [
        Share(
            name=name,
            start=float(k),
            kl=moments.ratio(headline, "tokens"),
            tokens=round(moments.total("tokens")),
            share=_part_of_all(moments.total(headline), account),
        )
        for k, (name, moments) in enumerate(sorted(account.groups.items()))
    ]


def _tail(account: AuditAccumulator) -> Tail:
    largest = account.largest()
    index = tail_index(largest)
    share = _part_of_all(largest[0], account)
    few = len(largest) >= 10 and share > HEAVY_SHARE
    return Tail(index, share, few or (index is not None and index < 2))


def _sample(
    record: Record,
    kind: str,
    account: AuditAccumulator,
    closer: ResponseDetails,
    tokenizer: PreTrainedTokenizerBase,
) -> AuditedResponse:
    response = decode(tokenizer, record.ids.tolist())
    kl = record.reverse_kl if account.headline == "reverse_kl" else record.kl
    return AuditedResponse(
        number=record.number,
        kind="worst" if kind == "worst" else "random",
        by=account.by,
        group=record.group,
        prompt=decode(tokenizer, record.prompt_ids.tolist()),
        response=response,
        kl=float(kl.sum(dtype=np.float64)),
        tokens=spaced([decode(tokenizer, [i]) for i in record.ids.tolist()], response),
        token_kl=_short(record.kl),
        reverse_kl=_short(record.reverse_kl),
        logprobs=_short(record.logprobs),
        ref_logprobs=_short(record.ref_logprobs),
        entropy=_short(record.entropy),
        ref_entropy=_short(record.ref_entropy),
        policy_top=closer.policy_top,
        reference_top=closer.reference_top,
    )


def _worst_token(
    record: Record,
    at: int,
    account: AuditAccumulator,
    tops: tuple[TopTokens, TopTokens],
    tokenizer: PreTrainedTokenizerBase,
) -> WorstToken:
    ids = record.ids.tolist()
    kl = record.reverse_kl if account.headline == "reverse_kl" else record.kl
    before = (record.prompt_ids.tolist() + ids[:at])[-CONTEXT:]
    texts = _three(tokenizer, before, ids[at], ids[at + 1 :][:CONTEXT])
    return WorstToken(
        number=record.number,
        position=at,
        token=texts[1],
        before=texts[0],
        after=texts[2],
        kl=float(kl[at]),
        logprob=float(record.logprobs[at]),
        ref_logprob=float(record.ref_logprobs[at]),
        policy_top=tops[0],
        reference_top=tops[1],
    )


def _three(
    tokenizer: PreTrainedTokenizerBase, before: list[int], token: int, after: list[int]
) -> tuple[str, str, str]:
    """Texts of a token and its surroundings; decoded together, so that no space is lost."""
    one, two = decode(tokenizer, before), decode(tokenizer, [*before, token])
    whole = decode(tokenizer, [*before, token, *after])
    if len(one) < len(two) and two.startswith(one) and whole.startswith(two):
        return one, two[len(one) :], whole[len(two) :]
    return one, text_of_id(tokenizer, token), decode(tokenizer, after)


def _moved_most(mass: torch.Tensor) -> list[tuple[int, float]]:
    values, ids = mass.topk(min(MOVED, len(mass)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [(number, value) for number, value in pairs if value > 0]


def _short(values: np.ndarray) -> list[float]:
    # Six digits: what float32 holds.
    return [float(f"{value:.6g}") for value in values.tolist()]
