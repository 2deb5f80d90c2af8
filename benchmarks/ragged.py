"""Responses of ragged lengths: an iteration by budgets of tokens against padded microbatches.

    python benchmarks/ragged.py                    # both shapes, medians of 5
    python benchmarks/ragged.py --shape vocabulary --runs 3
    python benchmarks/ragged.py --generate         # writing the responses too

Random Llamas in float32; prompts of 16 to 48 tokens, responses of lognormal lengths cut to 16…512.
An iteration is the scoring pass (policy and reference, log-probabilities, exact KL and entropy of
every response token) and one update on the whole batch (RLOO's loss, forward and backward, AdamW):
no reward model. The systems read the same rollout, taking turns:

    batch        drawn order, every microbatch padded to the longest response of the batch, and the
                 vocabulary's products made for padding too, as plain training loops do
    microbatch   the same, padded to the longest prompt and response of each microbatch
    kept         that, and the vocabulary for real tokens alone (kleash's head)
    rows         kleash with `microbatch_size`: as many rows, sorted by length
    tokens       kleash with `microbatch_tokens`: rows × the longest row of the batch

Eight rows a microbatch but for `tokens`, whose budget is eight times the longest row: no system
needs more memory for its largest microbatch than `batch`. With `--generate` the first three carry
rows that have ended to the end of the longest, as the library does, and the others do not. Tokens
per second are real tokens. Exits 1 if a gradient differs from that of `microbatch` by more than
1e-6 of its norm.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from kleash.algorithms import rloo
from kleash.algorithms.common import select
from kleash.models.batching import Limit, TokenBudget
from kleash.models.policy import Policy
from kleash.models.trunk import trunk_of
from kleash.rollout import finished_rows, sampling
from kleash.rollout.prompts import PromptBatch
from kleash.rollout.scoring_pass import fresh, microbatches, row_lengths, score
from kleash.scoring import token_scores
from kleash.training.optimizers import make_optimizer
from kleash.types import Experience, Fresh, Rollout, ScoredRollout

SHAPES = {  # width, layers, heads, inner width, words
    "trunk": (192, 4, 4, 768, 4_096),
    "vocabulary": (160, 4, 5, 640, 50_257),
}
ROWS_AT_ONCE, PROMPT, LONGEST = 8, (16, 48), (16, 512)
STOP = 1


@dataclass(frozen=True)
class World:
    """Two models and the length of each response."""

    policy: Policy
    reference: Policy
    lengths: list[int]


def make_world(shape: str, rows: int) -> World:
    width, layers, heads, inner, words = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=words,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    tokenizer: Any = argparse.Namespace(bos_token_id=None, pad_token_id=0)
    policies = [Policy(m, tokenizer, "", words=words, stop_ids=(STOP,)) for m in models]
    drawn = (4.5 + torch.randn(rows)).exp().round().clamp(*LONGEST)
    return World(*policies, lengths=[int(n) for n in drawn.tolist()])


def make_prompts(rows: int, words: int) -> PromptBatch:
    least, most = PROMPT
    lengths = torch.randint(least, most + 1, (rows, 1))
    ids = torch.randint(2, words, (rows, most))
    return PromptBatch(ids, torch.arange(most) >= most - lengths, torch.arange(rows) // 4)


def make_rollout(world: World, prompts: PromptBatch) -> Rollout:
    """Responses of random words."""
    lengths = torch.tensor(world.lengths)[:, None]
    ids = torch.randint(2, world.policy.words, (len(lengths), int(lengths.max())))
    return Rollout(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        response_ids=ids,
        response_mask=torch.arange(ids.shape[1]) < lengths,
        ended=torch.ones(len(ids), dtype=torch.bool),
        prompt_index=prompts.index,
    )


@dataclass(frozen=True)
class System:
    """How a rollout is scored, and how a minibatch is read for its gradient."""

    score: Callable[[Rollout, Tensor], ScoredRollout]
    groups: Callable[[Rollout], list[Tensor]]
    read: Callable[[Experience], Fresh]


def kleash_system(world: World, limit: Limit) -> System:
    return System(
        score=lambda rollout, scores: score(
            rollout,
            policy=world.policy,
            reference=world.reference,
            scores=scores,
            microbatch=limit,
        ),
        groups=lambda rollout: microbatches(rollout, limit),
        read=lambda part: fresh(part, policy=world.policy),
    )


def padded_system(world: World, *, to_batch: bool, everywhere: bool) -> System:
    """A plain loop over rows in the order in which they were drawn."""

    def states(policy: Policy, part: Rollout) -> Tensor:
        ids = torch.cat([part.prompt_ids, part.response_ids], dim=1)
        mask = torch.cat([part.prompt_mask, part.response_mask], dim=1).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        trunk = trunk_of(policy.model)
        found = trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return found[0][:, part.prompt_ids.shape[1] - 1 : -1]

    def cut(rollout: Rollout) -> Rollout:
        if to_batch:
            return rollout
        first = int(rollout.prompt_mask.long().argmax(1).min())
        width = int(rollout.response_mask.sum(1).max())
        return Rollout(
            prompt_ids=rollout.prompt_ids[:, first:],
            prompt_mask=rollout.prompt_mask[:, first:],
            response_ids=rollout.response_ids[:, :width],
            response_mask=rollout.response_mask[:, :width],
            ended=rollout.ended,
            prompt_index=rollout.prompt_index,
        )

    def scored(part: Rollout, columns: int, *, both: bool) -> dict[str, Tensor]:
        part = cut(part)
        kept = torch.ones_like(part.response_mask) if everywhere else part.response_mask
        reference = (states(world.reference, part)[kept], world.reference.head) if both else None
        names = ("logprobs", "ref_logprobs", "kl", "entropy") if both else ("logprobs",)
        got = token_scores(
            states(world.policy, part)[kept],
            world.policy.head,
            part.response_ids[kept],
            reference=reference,
            want=cast(Any, names),
        )
        more = columns - kept.shape[1]
        zeros = torch.zeros(kept.shape)
        spread = {n: zeros.masked_scatter(kept, getattr(got, n)) for n in names}
        inside = {n: torch.where(part.response_mask, x, 0.0) for n, x in spread.items()}
        return {n: torch.nn.functional.pad(x, (0, more)) for n, x in inside.items()}

    def groups(rollout: Rollout) -> list[Tensor]:
        return list(torch.arange(len(rollout.ended)).split(ROWS_AT_ONCE))

    @torch.no_grad()
    def score_all(rollout: Rollout, scores: Tensor) -> ScoredRollout:
        columns = rollout.response_mask.shape[1]
        parts = [scored(rows_of(rollout, r), columns, both=True) for r in groups(rollout)]
        whole = {n: torch.cat([part[n] for part in parts]) for n in parts[0]}
        return ScoredRollout(
            rollout=rollout,
            rollout_logprobs=whole["logprobs"],
            ref_logprobs=whole["ref_logprobs"],
            kl=whole["kl"],
            entropy=whole["entropy"],
            scores=scores,
        )

    def read(part: Experience) -> Fresh:
        return Fresh(**scored(part.scored.rollout, part.mask.shape[1], both=False))

    return System(score_all, groups, read)


def rows_of(rollout: Rollout, rows: Tensor) -> Rollout:
    """Some rows of a rollout without log-probabilities of a sampler."""
    names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "ended", "prompt_index")
    return Rollout(**{name: getattr(rollout, name)[rows] for name in names})


def iteration(system: System, world: World, rollout: Rollout) -> tuple[float, float, Tensor]:
    """CPU-seconds of scoring and of the update, and the gradient; weights are put back."""
    scores = torch.arange(len(rollout.ended)).float().sin()
    start = time.process_time()
    scored = system.score(rollout, scores)
    read = time.process_time()
    parameters = list(world.policy.parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = make_optimizer([{"params": parameters, "lr": 1e-5, "peak_lr": 1e-5}])
    begun = time.process_time()
    settings = rloo.RLOOSettings()
    experience = rloo.prepare(scored, 0.1, settings)
    tokens = int(experience.mask.sum())
    for rows in system.groups(rollout):
        part = select(experience, rows)
        rloo.loss(part, system.read(part), settings, tokens=tokens).total.backward()
    gradient = torch.cat([cast(Tensor, p.grad).flatten() for p in parameters])
    optimizer.step()
    done = time.process_time()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
    return read - start, done - begun, gradient


def writing(world: World, prompts: PromptBatch, *, drop: bool) -> tuple[float, Rollout]:
    """CPU-seconds of writing responses that end where their lengths say, and the responses.

    Args:
        world: what writes, and the lengths.
        prompts: to what.
        drop: whether rows leave the batch when they have ended.
    """
    lengths, written = torch.tensor(world.lengths), 0

    def call(sampler: Any, input_ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal written
        rows = slice(None) if sampler._going is None else sampler._going
        chosen = own_call(sampler, input_ids, scores)
        written += 1
        words = chosen.argmax(dim=1)
        words = torch.where(words == STOP, STOP + 1, words)
        words = torch.where(lengths[rows] == written, STOP, words)
        return torch.zeros_like(chosen).scatter_(1, words[:, None], 1.0)

    def no_cache(model: object) -> None:
        """Carry ended rows."""

    sampler_class = cast(Any, sampling)._Sampler
    module = cast(Any, finished_rows)
    own_call, own_cache = sampler_class.__call__, module._cache_by_rows
    sampler_class.__call__ = call
    if not drop:
        module._cache_by_rows = no_cache
    spec = sampling.SamplingSpec(max_new_tokens=LONGEST[1])
    torch.manual_seed(1)
    start = time.process_time()
    try:
        rollout = sampling.generate(world.policy, prompts, spec)
    finally:
        sampler_class.__call__, module._cache_by_rows = own_call, own_cache
    seconds = time.process_time() - start
    assert rollout.response_mask.sum(1).tolist() == world.lengths
    return seconds, rollout


def compare(shape: str, *, rows: int, runs: int, generate: bool) -> bool:
    """Print the table of one shape."""
    world = make_world(shape, rows)
    prompts = make_prompts(rows, world.policy.words)
    write = {True: 0.0, False: 0.0}
    rollout = make_rollout(world, prompts)
    if generate:
        timed: dict[bool, list[float]] = {True: [], False: []}
        ids: list[Tensor] = []
        for run in range(runs + 1):
            for drop, seconds in timed.items():
                once, rollout = writing(world, prompts, drop=drop)
                ids.append(rollout.response_ids[rollout.response_mask])
                if run:
                    seconds.append(once)
        write = {drop: statistics.median(each) for drop, each in timed.items()}
        same = min(float((each == ids[0]).float().mean()) for each in ids)
        print(f"writing {write[False]:.2f} s, without ended rows {write[True]:.2f} s; ", end="")
        print(f"{same:.2%} of the tokens the same")
    whole = row_lengths(rollout)
    budget = TokenBudget(ROWS_AT_ONCE * max(whole))
    systems = {
        "batch": padded_system(world, to_batch=True, everywhere=True),
        "microbatch": padded_system(world, to_batch=False, everywhere=True),
        "kept": padded_system(world, to_batch=False, everywhere=False),
        "rows": kleash_system(world, ROWS_AT_ONCE),
        "tokens": kleash_system(world, budget),
    }
    found: dict[str, list[tuple[float, float, Tensor]]] = {name: [] for name in systems}
    for run in range(runs + 1):
        for name, system in systems.items():
            one = iteration(system, world, rollout)
            if run:  # the first is a warm-up
                found[name].append(one)
    wanted = found["microbatch"][0][2]
    real, good = sum(whole), True
    print(f"| {shape}: {rows} rows, {real:,} tokens | score, s | update, s | tokens/s | × ", end="")
    print("microbatch | with writing, tokens/s | × microbatch | gradient off by |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    total = {n: statistics.median(a + b for a, b, _ in each) for n, each in found.items()}
    for name, each in found.items():
        scoring = statistics.median(one[0] for one in each)
        updating = statistics.median(one[1] for one in each)
        off = float((each[0][2] - wanted).norm() / wanted.norm())
        good = good and off <= 1e-6
        cells = [f"{scoring:.2f}", f"{updating:.2f}", f"{real / total[name]:,.0f}"]
        cells.append(f"{total['microbatch'] / total[name]:.2f}")
        drops = name in ("rows", "tokens")
        both = [write[drops] + total[name], write[False] + total["microbatch"]]
        cells += [f"{real / both[0]:,.0f}", f"{both[1] / both[0]:.2f}"] if generate else ["", ""]
        print(f"| {name} | {' | '.join(cells)} | {off:.0e} |", flush=True)
    return good


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--generate", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread; torch ", end="")
    print(f"{torch.__version__}, transformers {transformers.__version__}; CPU-seconds")
    good = True
    for shape in given.shape or SHAPES:
        good &= compare(shape, rows=given.rows, runs=given.runs, generate=given.generate)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
