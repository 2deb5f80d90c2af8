"""A run directory without a run: plausible curves and responses, for tests of what reads them."""

import math
import random
from pathlib import Path

from kleash.storage.events import Event
from kleash.storage.run_directory import RunWriter
from kleash.storage.samples import Likely, Sample
from kleash.training.evaluation import TOPS_PER_SAMPLE

HOSTILE = (
    "<script>document.title='owned'</script>",
    "</style></script><style>body{display:none}</style>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "pay \u202e001\u202c now \u2066isolated\u2069 \u200f",
    "a\x00b\x07c\x1b[31m",
    "lone \ud800 and \udfff surrogates",
    "line\u2028separator\u2029 and \ufeff mark",
    "{{ 7 * 7 }} {% raw %} ${7*7} javascript:alert(1)",
    "x" * 100_000,
    "</script <!-- <script <b>\u202ebold\u202c</b>",
)
"""Text that must show as text."""

_TEXT = """please open the settings page and choose your account then save the new address and wait
for the mail you are a valued customer restart the router check the cable and call us"""
_WORDS = _TEXT.split()


def write_synthetic_run(
    path: Path,
    *,
    steps: int = 60,
    target: float | None = 5.0,
    beta: float = 0.1,
    gold_falls: bool = False,
    responses: int = 4,
    tokens: int = 24,
    seed: int = 0,
    extra_samples: tuple[Sample, ...] = (),
    events: tuple[Event, ...] = (),
) -> Path:
    """Write a finished run of which every number is drawn, none is measured."""
    rng = random.Random(seed)
    config = {"policy": "models/sft", "beta": {"target_kl": target, "initial": beta}, "seed": seed}
    meta = {
        "argv": ["kleash", "train", "recipes/world.yaml"],
        "versions": {"kleash": "0.1.0", "torch": "2.13.0"},
        "seed": seed,
        "reference": {"path": "models/sft", "sha256": "9f2c" * 16},
    }
    with RunWriter.create(path, settings=config, meta=meta) as run:
        for step in range(1, steps + 1):
            run.append_metrics(_metrics(step, steps, target, beta, gold_falls, rng))
            if step == 1 or step % max(1, steps // 6) == 0:
                run.append_samples(_pairs(step, steps, responses, tokens, rng))
        for sample in extra_samples:
            run.append_samples([sample])
        for event in events:
            run.append_event(event)
    return path


def synthetic_sample(text: str = "", *, step: int = 1, tokens: int = 12, seed: int = 0) -> Sample:
    """One response of the policy; with a text, that text is one of its tokens and its prompt."""
    rng = random.Random(seed)
    words = [" " + rng.choice(_WORDS) for _ in range(tokens)]
    if text:
        words.insert(1, text)
    logprobs = [-rng.expovariate(1.0) for _ in words]
    kl = [rng.expovariate(3.0) ** 2 for _ in words]
    # A run keeps the likeliest words where the KL is largest, and nowhere else.
    order = range(len(words))
    shown = sorted(order, key=lambda at: -kl[at])[:TOPS_PER_SAMPLE]
    return Sample(
        step=step,
        kind="worst",
        who="policy",
        prompt=text or "how do I change my address ?",
        response="".join(words),
        score=rng.gauss(0, 1),
        kl=sum(kl),
        tokens=words,
        logprobs=logprobs,
        ref_logprobs=[logprob - rng.gauss(0.2, 0.5) for logprob in logprobs],
        token_kl=kl,
        policy_top=[_likely(rng, words[at]) if at in shown else None for at in order],
        reference_top=[_likely(rng, words[at]) if at in shown else None for at in order],
    )


def _likely(rng: random.Random, word: str) -> Likely:
    """Five words, the one that was written among them."""
    others = [" " + other for other in rng.sample(sorted(set(_WORDS)), 4)]
    return Likely([word[:200], *others], [0.4, 0.25, 0.12, 0.05, 0.01])


def _metrics(
    step: int,
    steps: int,
    target: float | None,
    beta: float,
    gold_falls: bool,
    rng: random.Random,
) -> dict[str, float | int | None]:
    done = (step - 1) / max(1, steps - 1)
    settle = 1 - math.exp(-6 * done)
    kl = (target or 40.0) * settle * (1 + 0.25 * math.exp(-3 * done) * math.sin(14 * done))
    kl_se = 0.02 + 0.015 * kl
    score = -0.1 + 1.4 * settle + rng.gauss(0, 0.04)
    now = beta * (1 + 0.6 * math.sin(9 * done) * math.exp(-2 * done))
    line: dict[str, float | int | None] = {
        "step": step,
        "seconds": 2.3 * step,
        "episodes": 64 * step,
        "tokens_per_second": 1450 + rng.gauss(0, 60),
        "objective/kl_ref": kl + rng.gauss(0, kl_se) * (step > 1),
        "objective/kl_ref_se": kl_se * (step > 1),
        "objective/kl_ref_k1": kl + rng.gauss(0, 3 * kl_se) * (step > 1),
        "objective/kl_ref_k1_se": 3 * kl_se * (step > 1),
        "objective/kl_ref_per_token": kl / 24,
        "objective/entropy": 38 - 14 * settle + rng.gauss(0, 0.5),
        "objective/entropy_per_token": (38 - 14 * settle) / 24,
        "objective/scores": score,
        "objective/scores_se": 0.05,
        "objective/non_score_reward": -now * kl,
        "objective/rlhf_reward": score - now * kl,
        "objective/beta": now,
        "objective/target_kl": target,
        "objective/accounting_residual": 1e-8,
        "policy/approx_kl": 0.008 + 0.002 * rng.random(),
        "policy/clipfrac": 0.12 + 0.03 * rng.random(),
        "policy/ratio_first_error": 1e-7,
        "policy/ratio_min": 0.6,
        "policy/ratio_max": 1.8,
        "loss/policy": -0.02 + rng.gauss(0, 0.004),
        "loss/value": 0.4 * math.exp(-3 * done) + 0.1,
        "value/explained_variance": 0.8 * settle,
        "rollout/length": 22 + 3 * settle + rng.gauss(0, 0.4),
        "rollout/eos_fraction": 0.93 + 0.03 * settle,
        "rollout/kl_sampler": 1e-6,
        "rollout/kl_sampler_per_token": 1e-9,
        "rollout/kl_sampler_floor": 1e-9,
        "rollout/distinct_2": 0.95 - (0.55 if target is None else 0.03) * settle,
        "reward/total": score,
        "reward/helpful": score * 0.8,
        "reward/polite": 0.3 + 0.2 * settle,
        "optim/lr": 1e-4,
        "optim/grad_norm": 0.8 + 0.2 * rng.random(),
        "time/generate": 1.1,
        "time/score": 0.3,
        "time/update": 0.8,
    }
    if step == 1 or step % max(1, steps // 6) == 0:
        fall = 2.4 * max(0.0, done - 0.3) if gold_falls else 0.0
        line |= _evaluation(score - 0.05, (kl, kl_se), gold=0.9 + 0.8 * settle - fall)
    return line


def _evaluation(score: float, kl: tuple[float, float], *, gold: float) -> dict[str, float]:
    """What a held-out evaluation adds to a line; the KL with its standard error."""
    return {
        "heldout/responses": 128,
        "heldout/scores": score,
        "heldout/scores_se": 0.06,
        "heldout/kl_ref": kl[0],
        "heldout/kl_ref_se": kl[1],
        "heldout/gold": gold,
        "heldout/gold_se": 0.09,
    }


def _pairs(step: int, steps: int, count: int, tokens: int, rng: random.Random) -> list[Sample]:
    samples: list[Sample] = []
    for row in range(count):
        prompt = f"question {row}: how do I {rng.choice(_WORDS)} my {rng.choice(_WORDS)} ?"
        policy = synthetic_sample(step=step, tokens=tokens, seed=rng.getrandbits(32))
        reference = synthetic_sample(step=step, tokens=tokens, seed=rng.getrandbits(32))
        kind = "heldout" if row == 0 else "worst" if row % 2 else "random"
        samples += [
            Sample(**{**vars(policy), "prompt": prompt, "kind": kind}),
            Sample(**{**vars(reference), "prompt": prompt, "kind": kind, "who": "reference"}),
        ]
    return samples
