"""Faults that look like learning dynamics, and which check must find each of them.

Used by the tests and by `benchmarks/preflight.py`, which plants all of them on all architectures.
"""

from collections.abc import Callable
from dataclasses import dataclass

from planting import (
    World,
    another_reference,
    base_learns,
    beyond_end,
    chat,
    copies,
    doubled_bos,
    drop,
    fewer_words,
    file_settings,
    fresh_head,
    half_vocabulary,
    holes,
    hot,
    judge_for_policy,
    leak,
    louder_head,
    never_ends,
    no_dedupe,
    no_end,
    no_head,
    no_mask,
    noisy_reference,
    off_by_one,
    on_crew,
    other_tokenizer,
    padded_rows,
    pads_with_a_word,
    patch,
    reference_in_half,
    reference_untempered,
    restarting_positions,
    reward_by,
    rolled,
    scored,
    sees_neighbours,
    sees_right,
    set_key,
    settings,
    several,
    shaped,
    share,
    stale,
    sum_everything,
    too_long,
    trained_adapter,
    two_outputs,
    unfreeze,
    untempered,
    whiten_everything,
    with_prompts,
    written,
    wrong_end,
)
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kleash.preflight.finding import Verdict


@dataclass(frozen=True)
class Fault:
    name: str
    check: str
    cause: str
    """A regular expression that the cause must match."""
    plant: Callable[[World], None]
    verdict: Verdict = "fail"


FAULTS: tuple[Fault, ...] = (
    Fault(
        "a wrong reference",
        "scoring.start",
        "has other weights",
        set_key("reference.path", "{m}/other"),
    ),
    Fault(
        "dropout in the policy",
        "scoring.dropout",
        "Dropout is on in the policy",
        on_crew(lambda c: drop(c.policy.model)),
    ),
    Fault(
        "dropout in the reference",
        "scoring.dropout",
        "Dropout is on in the reference",
        on_crew(lambda c: drop(c.reference.model)),
    ),
    Fault(
        "positions restart at the response",
        "scoring.positions",
        "Position ids are wrong",
        patch("kleash.models.trunk_states", restarting_positions),
    ),
    Fault(
        "a judge for a policy",
        "scoring.architecture",
        "was saved as GPT2",
        judge_for_policy,
    ),
    Fault(
        "states off by one",
        "scoring.alignment",
        "off by one",
        patch("kleash.models.trunk_states", off_by_one),
    ),
    Fault(
        "no attention mask",
        "scoring.left_padding",
        "Padding on the left",
        patch("kleash.models.trunk_states", no_mask),
    ),
    Fault(
        "padding ids are seen",
        "masks.padding_ids",
        "Ids in the padding change",
        patch("kleash.models.trunk_states", no_mask),
    ),
    Fault(
        "right padding is seen",
        "scoring.right_padding",
        "Padding on the right",
        patch("kleash.models.trunk_states", sees_right),
    ),
    Fault(
        "rows see each other",
        "scoring.batching",
        "what shares its batch",
        patch("kleash.models.trunk_states", sees_neighbours),
    ),
    Fault(
        "a head read twice as loud",
        "scoring.head",
        "is read wrong",
        patch("kleash.models.read_head", louder_head),
    ),
    Fault(
        "log-probabilities off by one",
        "scoring.canary",
        "off by one",
        patch("kleash.rollout.score", scored(rolled)),
    ),
    Fault(
        "two sides computed differently",
        "scoring.self_kl",
        "not computed alike",
        patch("kleash.rollout.score", scored(noisy_reference)),
    ),
    Fault(
        "a kernel that is wrong",
        "scoring.streaming",
        "computes something else",
        patch("kleash.preflight.scoring.token_scores", half_vocabulary),
    ),
    Fault(
        "temperature in sampling alone",
        "scoring.temperature",
        "policy is scored at temperature 1 but",
        several(set_key("rollout.temperature", 0.7), patch("kleash.rollout.score", untempered)),
    ),
    Fault(
        "temperature in the policy alone",
        "scoring.temperature",
        "reference is scored at temperature 1 but",
        several(
            set_key("rollout.temperature", 0.7),
            patch("kleash.rollout.score", scored(reference_untempered)),
        ),
    ),
    Fault(
        "a target below rounding",
        "scoring.floor",
        "cannot be resolved",
        set_key("leash", {"target_kl": 1e-9}),
    ),
    Fault(
        "a reference in half precision",
        "scoring.floor",
        "computed differently",
        on_crew(reference_in_half),
        "warn",
    ),
    Fault("top-p left over", "sampling.law", "as top-p does", shaped(TopPLogitsWarper(0.7))),
    Fault("top-k left over", "sampling.law", "as top-k does", shaped(TopKLogitsWarper(4))),
    Fault("min-p left over", "sampling.law", "as min-p does", shaped(MinPLogitsWarper(0.4))),
    Fault(
        "a repetition penalty left over",
        "sampling.law",
        "repetition penalty",
        settings(repetition_penalty=3.0),
    ),
    Fault(
        "another temperature in the sampler",
        "sampling.law",
        "drawn at a temperature",
        shaped(TemperatureLogitsWarper(0.6)),
    ),
    Fault(
        "the end token suppressed",
        "sampling.law",
        "end token is suppressed",
        settings(suppress_tokens="eos"),
    ),
    Fault("a least length", "sampling.law", "suppressed at first", settings(min_new_tokens=12)),
    Fault("stale weights in the sampler", "sampling.ratio", "another model", written(stale)),
    Fault(
        "the sampler at temperature 1",
        "sampling.ratio",
        "wrote at temperature 1 and",
        several(set_key("rollout.temperature", 0.7), written(hot)),
    ),
    Fault("no end is ever produced", "sampling.ending", "never produced", on_crew(never_ends)),
    Fault("responses cut short", "sampling.ending", "cut by the length limit", wrong_end, "warn"),
    Fault(
        "all responses cut and dropped",
        "sampling.ending",
        "nothing to learn from",
        several(
            set_key("rollout.max_new_tokens", 2),
            set_key("rollout.truncated", "drop"),
            settings(suppress_tokens="eos"),
        ),
    ),
    Fault(
        "settings in the model's own file",
        "sampling.leftovers",
        "top_p = 0.9",
        file_settings(top_p=0.9),
        "warn",
    ),
    Fault("holes in the mask", "masks.shape", "has holes", written(holes)),
    Fault(
        "the end token masked",
        "masks.end_token",
        "left out of the response mask",
        written(no_end),
    ),
    Fault(
        "tokens after the end counted",
        "masks.end_token",
        "after the end token are counted",
        written(beyond_end),
    ),
    Fault(
        "whitening over padding",
        "masks.numbers",
        "advantages",
        patch("kleash.algorithms.ppo.whiten", whiten_everything),
    ),
    Fault(
        "metrics over padding",
        "masks.numbers",
        "objective/kl_ref",
        patch("kleash.measures.response_kl", sum_everything),
    ),
    Fault(
        "prompts in the KL",
        "masks.prompt_tokens",
        "KL of the prompt's tokens",
        patch("kleash.rollout.score", scored(with_prompts)),
    ),
    Fault("a reference that learns", "reference.frozen", "not frozen", on_crew(unfreeze)),
    Fault("a reference that is the policy", "reference.storage", "shares storage", on_crew(share)),
    Fault(
        "an adapter that was trained",
        "reference.adapter",
        "bare base",
        several(set_key("policy.lora", {"rank": 2}), on_crew(trained_adapter)),
    ),
    Fault(
        "a base that learns",
        "reference.storage",
        "under the adapter learn",
        several(set_key("policy.lora", {"rank": 2}), on_crew(base_learns)),
    ),
    Fault(
        "another vocabulary",
        "reference.vocabulary",
        "do not share a vocabulary",
        on_crew(fewer_words),
    ),
    Fault("two outputs", "assembly", "num_labels = 2", two_outputs),
    Fault("no head", "assembly", "would be random", no_head),
    Fault("a fresh head", "reward.head", "freshly initialised", on_crew(fresh_head)),
    Fault(
        "a score on a word taken for padding",
        "reward.last_token",
        "another token than the last",
        on_crew(pads_with_a_word),
    ),
    Fault(
        "a doubled BOS for the judge",
        "reward.bos",
        "doubled BOS",
        patch("kleash.reward_models.ClassifierReward.encode", no_dedupe),
    ),
    Fault(
        "a template applied twice",
        "reward.template",
        "applied twice",
        set_key("reward_models.rm.template", "{prompt} {prompt}{response}"),
    ),
    Fault(
        "scores that depend on the batch",
        "reward.alone",
        "depends on the batch",
        reward_by("ranked"),
    ),
    Fault("a reward that repetition wins", "reward.probes", "w3 w3", reward_by("likes_w3"), "warn"),
    Fault("a constant reward", "leash.score_spread", "the same score", reward_by("constant")),
    Fault("β far too large", "leash.strength", "far too large", set_key("leash.beta", 1e4)),
    Fault("β far too small", "leash.strength", "far too small", set_key("leash.beta", 1e-6)),
    Fault(
        "a penalty without a gradient",
        "leash.gradient",
        "zero gradient",
        set_key("leash", {"beta": 0.2, "placement": "loss_k1", "allow_biased": True}),
    ),
    Fault(
        "a biased placement, permitted",
        "leash.gradient",
        "biased gradient",
        set_key("leash", {"beta": 0.2, "placement": "loss_k3", "allow_biased": True}),
        "warn",
    ),
    Fault(
        "a biased placement",
        "assembly",
        "has a biased gradient",
        set_key("leash", {"beta": 0.2, "placement": "loss_k3"}),
    ),
    Fault(
        "a target per token",
        "leash.target",
        "looks like a target per token",
        set_key("leash", {"target_kl": 0.01}),
        "warn",
    ),
    Fault(
        "a target out of reach",
        "leash.target",
        "more than responses",
        set_key("leash", {"target_kl": 1e4}),
    ),
    Fault(
        "options that do nothing",
        "leash.inert",
        "leash.allow_biased",
        set_key("leash", {"beta": 0.2, "allow_biased": True}),
        "warn",
    ),
    Fault("duplicate prompts", "reading.duplicates", "duplicated", copies),
    Fault("a leak into the held-out set", "reading.leak", "leaks", leak),
    Fault(
        "a chat template twice",
        "reading.chat_template",
        "applied twice",
        lambda world: chat(world, "<user>"),
    ),
    Fault("a doubled BOS in the prompts", "reading.chat_template", "doubled BOS", doubled_bos),
    Fault("a prompt longer than the context", "assembly", "expected a prompt of at most", too_long),
    Fault(
        "too little memory",
        "resources.memory",
        "the machine has",
        patch("kleash.preflight.resources.machine_bytes", lambda original: lambda device: 10**6),
    ),
)

VARIANTS: dict[str, Callable[[World], None]] = {
    "as it is": several(),
    "temperature 0.7": set_key("rollout.temperature", 0.7),
    "padding is the end token": other_tokenizer(pad="<eos>"),
    "one token begins and ends": other_tokenizer(bos="<eos>"),
    "a chat template": lambda world: chat(world, "hello"),
    "an adapter": set_key("policy.lora", {"rank": 2}),
    "bfloat16": set_key("policy.dtype", "bfloat16"),
    "a value model of its own": several(
        set_key("value.kind", "model"), set_key("value.path", "{m}/reward")
    ),
    "a budget": set_key("leash", {"target_kl": 3.0}),
    "the exact placement": set_key("leash", {"beta": 0.2, "placement": "exact"}),
    "eager attention, a callable reward": several(
        set_key("policy.attention", "eager"), reward_by("short")
    ),
    "a padded vocabulary": padded_rows,
    "another reference, on purpose": another_reference,
    "scores in the hundreds": several(
        set_key("reward_models.rm.weight", 300.0), set_key("leash.beta", 60.0)
    ),
}
"""Set-ups without a fault: nothing may fail."""
