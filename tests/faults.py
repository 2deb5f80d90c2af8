"""Faults that look like learning dynamics, each planted in an otherwise clean tiny set-up.

A fault changes the configuration, the files, or the objects and functions that training would
use; `FAULTS` says which check must find it and what its cause must name. Used by the tests and by
`benchmarks/faults.py`, which plants all of them on all architectures.
"""

import functools
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import tiny
import torch
from torch import nn

from kleash.assembly import Crew, assemble
from kleash.config import Config, parse_config
from kleash.errors import KleashError
from kleash.models import Reference
from kleash.preflight.finding import Finding, Verdict
from kleash.preflight.runner import refused
from kleash.types import Rollout, ScoredRollout

Kind = Literal["gpt2", "llama", "gemma2"]
KINDS: tuple[Kind, ...] = ("gpt2", "llama", "gemma2")
_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "gemma2": {"final_logit_softcapping": 30.0},
}
EXACT_TOKENS = 24


def likes_w3(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [1.0 * response.split().count("w3") for response in responses]


def short(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A mild taste for brevity; one word over and over is no better than another."""
    return [-0.1 * abs(len(response.split()) - 6) for response in responses]


def constant(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [0.5] * len(responses)


def ranked(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    order = sorted(range(len(responses)), key=lambda i: len(responses[i]))
    return [order.index(i) / len(order) for i in range(len(order))]


@dataclass
class World:
    """A clean set-up, and what a fault changes in it."""

    kind: Kind
    folder: Path
    patch: pytest.MonkeyPatch
    tree: dict[str, Any]
    material: Path
    """Models and files shared by all worlds of an architecture: not to be changed."""
    meddle: list[Callable[[Crew], Crew]] = field(default_factory=list)

    def set(self, dotted: str, value: Any) -> None:
        *parents, last = dotted.split(".")
        node = self.tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value

    def config(self) -> Config:
        return parse_config(self.tree, where="the test")

    def crew(self) -> tuple[Config, Crew]:
        config = self.config()
        crew = assemble(config)
        for change in self.meddle:
            crew = change(crew)
        return config, crew

    def prompts(self, name: str, rows: Sequence[dict[str, Any]]) -> str:
        path = self.folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)


def material(folder: Path, kind: Kind) -> Path:
    """Models, prompts and a reward model of one architecture."""
    tok = tiny.tokenizer(bos="<bos>", chat_template=None)
    special = _SPECIAL[kind]
    tiny.save_model(folder / "policy", kind, tok=tok, **special)
    tiny.save_model(folder / "other", kind, tok=tok, seed=1, **special)
    tiny.save_classifier(folder / "reward", kind, tok=tok, seed=2, **special)
    words = [f"w{i}" for i in range(20)]
    texts = [" ".join(words[(i * 7 + j * 3) % 20] for j in range(2 + i % 6)) for i in range(40)]
    texts = list(dict.fromkeys(texts))
    for name, chosen in (("prompts", texts[:26]), ("heldout", texts[26:32])):
        lines = [json.dumps({"prompt": text}) for text in chosen]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def clean(folder: Path, kind: Kind, patch: pytest.MonkeyPatch, scratch: Path) -> World:
    """The set-up without a fault; `folder` holds its `material`, `scratch` takes what is new."""
    tree = {
        "policy": {"path": str(folder / "policy")},
        "reward_models": {"rm": {"path": str(folder / "reward")}},
        "prompts": {
            "train": str(folder / "prompts.jsonl"),
            "heldout": str(folder / "heldout.jsonl"),
        },
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 28},
        "leash": {"beta": 0.2},
        "output": str(scratch / "run"),
    }
    return World(kind, scratch, patch, tree, material=folder)


@dataclass(frozen=True)
class Fault:
    name: str
    check: str
    cause: str
    """A regular expression that the cause must match."""
    plant: Callable[[World], None]
    verdict: Verdict = "fail"


def findings(world: World, examine: Callable[[Config, Crew], list[Finding]]) -> list[Finding]:
    """What the checks say of a world; assembling it is the first of them."""
    try:
        config, crew = world.crew()
    except KleashError as error:
        return [refused("assembly", error)]
    return examine(config, crew)


# --- scoring -----------------------------------------------------------------------------------


def _set(dotted: str, value: Any) -> Callable[[World], None]:
    def plant(world: World) -> None:
        filled = str(value).replace("{m}", str(world.material)) if isinstance(value, str) else value
        world.set(dotted, filled)

    return plant


def _several(*plants: Callable[[World], None]) -> Callable[[World], None]:
    def plant(world: World) -> None:
        for one in plants:
            one(world)

    return plant


def _on_crew(change: Callable[[Crew], Any]) -> Callable[[World], None]:
    """Change a crew in place, or give another."""

    def meddle(crew: Crew) -> Crew:
        changed = change(crew)
        return changed if isinstance(changed, Crew) else crew

    return lambda world: world.meddle.append(meddle)


def _patch(target: str, make: Callable[[Any], Any]) -> Callable[[World], None]:
    """Replace a function by one made from it."""

    def plant(world: World) -> None:
        module, _, name = target.rpartition(".")
        original = functools.reduce(getattr, module.split(".")[1:], __import__(module))
        world.patch.setattr(target, make(getattr(original, name)))

    return plant


def _drop(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        for name, rate in list(vars(module).items()):
            if "drop" in name and isinstance(rate, float):
                setattr(module, name, 0.5)


def _restarting_positions(original: Any) -> Any:
    """The response's positions count from 0 again."""

    def states(trunk: Any, prompt_ids: Any, prompt_mask: Any, ids: Any, mask: Any) -> Any:
        tokens = torch.cat([prompt_ids, ids], 1)
        both = torch.cat([prompt_mask, mask], 1).long()
        before = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
        after = torch.arange(ids.shape[1]).expand_as(ids)
        positions = torch.cat([before, after], 1)
        out = trunk(input_ids=tokens, attention_mask=both, position_ids=positions, use_cache=False)
        return out[0][:, prompt_ids.shape[1] - 1 :]

    return states


def _off_by_one(original: Any) -> Any:
    def states(*parts: Any) -> Any:
        return original(*parts).roll(-1, dims=1)

    return states


def _no_mask(original: Any) -> Any:
    def states(trunk: Any, prompt_ids: Any, prompt_mask: Any, ids: Any, mask: Any) -> Any:
        tokens = torch.cat([prompt_ids, ids], 1)
        return trunk(input_ids=tokens, use_cache=False)[0][:, prompt_ids.shape[1] - 1 :]

    return states


def _sees_right(original: Any) -> Any:
    def states(trunk: Any, prompt_ids: Any, prompt_mask: Any, ids: Any, mask: Any) -> Any:
        found = original(trunk, prompt_ids, prompt_mask, ids, mask)
        return found * (1 - 0.1 * (~mask).sum(1)[:, None, None])

    return states


def _sees_neighbours(original: Any) -> Any:
    def states(*parts: Any) -> Any:
        found = original(*parts)
        return found + 0.3 * (found.mean(0, keepdim=True) - found)

    return states


def _louder_head(original: Any) -> Any:
    return lambda model, words: replace(original(model, words), scale=2.0)


def _scored(change: Callable[[ScoredRollout, dict[str, Any]], ScoredRollout]) -> Any:
    """A `score` whose answer is changed."""

    def make(original: Any) -> Any:
        def score(rollout: Rollout, **settings: Any) -> ScoredRollout:
            return change(original(rollout, **settings), settings | {"original": original})

        return score

    return make


def _untempered(original: Any) -> Any:
    return lambda rollout, **settings: original(rollout, **{**settings, "temperature": 1.0})


def _reference_untempered(scored: ScoredRollout, settings: dict[str, Any]) -> ScoredRollout:
    plain = settings.pop("original")(scored.rollout, **{**settings, "temperature": 1.0})
    return replace(scored, ref_logprobs=plain.ref_logprobs)


def _rolled(scored: ScoredRollout, _: dict[str, Any]) -> ScoredRollout:
    return replace(scored, rollout_logprobs=scored.rollout_logprobs.roll(1, dims=1))


def _noisy_reference(scored: ScoredRollout, _: dict[str, Any]) -> ScoredRollout:
    noise = torch.where(scored.rollout.response_mask, 0.01, 0.0)
    return replace(scored, ref_logprobs=scored.ref_logprobs - noise)


def _with_prompts(scored: ScoredRollout, settings: dict[str, Any]) -> ScoredRollout:
    """The KL of the prompt's tokens, added to that of the first token."""
    rollout, original = scored.rollout, settings.pop("original")
    lengths = rollout.prompt_mask.sum(1)
    kl = scored.kl.clone()
    for row, length in enumerate(lengths.tolist()):
        ids = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        if length < 2:
            continue
        ones = torch.ones(1, length - 1, dtype=torch.bool)
        prompt = Rollout(
            ids[None, :1], ones[:, :1], ids[None, 1:], ones, ones[:, 0], torch.tensor([0])
        )
        part = original(prompt, **{**settings, "scores": torch.zeros(1), "value": None})
        kl[row, 0] += part.kl.sum()
    return replace(scored, kl=kl)


def _half_vocabulary(original: Any) -> Any:
    def scores(hidden: Any, head: Any, targets: Any, **settings: Any) -> Any:
        found = original(hidden, head, targets, **settings)
        return replace(found, kl=found.kl * 0.9)

    return scores


# --- sampling ----------------------------------------------------------------------------------


def _settings(**changes: Any) -> Callable[[World], None]:
    """Sampling settings of the model's own file take effect."""

    def make(original: Any) -> Any:
        def settings(policy: Any, spec: Any) -> Any:
            made = original(policy, spec)
            for name, value in changes.items():
                if value == "eos":
                    value = [policy.tokenizer.eos_token_id]
                setattr(made, name, value)
            return made

        return settings

    return _patch("kleash.generation._clean_settings", make)


def _written(change: Callable[..., Rollout]) -> Callable[[World], None]:
    """A `generate` whose rollout is changed."""

    def make(original: Any) -> Any:
        def generate(policy: Any, prompts: Any, spec: Any, **settings: Any) -> Rollout:
            return change(original, policy, prompts, spec, settings)

        return generate

    return _patch("kleash.evaluation.generate", make)


def _stale(original: Any, policy: Any, prompts: Any, spec: Any, settings: Any) -> Rollout:
    older = replace(policy, model=deepcopy(policy.model))
    with torch.no_grad():
        for parameter in older.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return original(older, prompts, spec, **settings)


def _hot(original: Any, policy: Any, prompts: Any, spec: Any, settings: Any) -> Rollout:
    return original(policy, prompts, replace(spec, temperature=1.0), **settings)


def _holes(original: Any, policy: Any, prompts: Any, spec: Any, settings: Any) -> Rollout:
    """The mask is made by comparing ids with a padding id that the policy writes too."""
    rollout = original(policy, prompts, spec, **settings)
    common = int(rollout.response_ids[rollout.response_mask].mode().values)
    mask = rollout.response_mask & (rollout.response_ids != common)
    mask[:, 0] = True
    return replace(rollout, response_mask=mask)


def _no_end(original: Any, policy: Any, prompts: Any, spec: Any, settings: Any) -> Rollout:
    rollout = original(policy, prompts, spec, **settings)
    last = rollout.response_mask.sum(1) - 1
    mask = rollout.response_mask.clone()
    kept = (last > 0) & rollout.ended
    mask[kept, last[kept]] = False
    return replace(rollout, response_mask=mask)


def _beyond_end(original: Any, policy: Any, prompts: Any, spec: Any, settings: Any) -> Rollout:
    rollout = original(policy, prompts, spec, **settings)
    ids = torch.where(rollout.response_mask, rollout.response_ids, policy.tokenizer.eos_token_id)
    everywhere = torch.ones_like(rollout.response_mask)
    return replace(rollout, response_ids=ids, response_mask=everywhere)


def _never_ends(crew: Crew) -> None:
    for model in (crew.policy.model, crew.reference.model):
        layer = cast(nn.Linear, model.get_output_embeddings())
        bias = torch.zeros(layer.weight.shape[0])
        bias[list(crew.policy.stop_ids)] = -100.0
        layer.bias = nn.Parameter(bias, requires_grad=False)


def _file_settings(**settings: Any) -> Callable[[World], None]:
    def change(crew: Crew) -> None:
        for name, value in settings.items():
            setattr(crew.policy.model.generation_config, name, value)

    return _on_crew(change)


# --- masks, reference, reward, leash, reading ---------------------------------------------------


def _whiten_everything(original: Any) -> Any:
    return lambda x, mask: original(x, torch.ones_like(mask))


def _sum_everything(original: Any) -> Any:
    return lambda kl, mask: kl.sum(-1)


def _unfreeze(crew: Crew) -> None:
    crew.reference.model.requires_grad_(True)


def _share(crew: Crew) -> Crew:
    policy = crew.policy
    return replace(
        crew, reference=Reference(policy.model, policy.tokenizer, policy.path, policy.words, "it")
    )


def _trained_adapter(crew: Crew) -> None:
    with torch.no_grad():
        for name, parameter in crew.policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)


def _base_learns(crew: Crew) -> None:
    for name, parameter in crew.policy.model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(True)


def _fewer_words(crew: Crew) -> Crew:
    return replace(crew, reference=replace(crew.reference, words=crew.reference.words - 1))


def _reference_in_half(crew: Crew) -> None:
    crew.reference.model.to(torch.bfloat16)


def _judge(crew: Crew) -> Any:
    return crew.reward.rewards["rm"][0]


def _fresh_head(crew: Crew) -> None:
    nn.init.normal_(_judge(crew).model.score.weight)


def _pads_with_a_word(crew: Crew) -> None:
    _judge(crew).model.config.pad_token_id = crew.policy.tokenizer.convert_tokens_to_ids("w7")


def _no_dedupe(original: Any) -> Any:
    def encode(self: Any, prompt: Any, response: str, index: int = 0) -> list[int]:
        return [self.tokenizer.bos_token_id, *original(self, prompt, response, index)]

    return encode


def _two_outputs(world: World) -> None:
    path = tiny.save_classifier(world.folder / "two", world.kind, labels=2, **_SPECIAL[world.kind])
    world.set("reward_models.rm.path", str(path))


def _no_head(world: World) -> None:
    path = tiny.save_model(world.folder / "none", world.kind, num_labels=1, **_SPECIAL[world.kind])
    world.set("reward_models.rm.path", str(path))


def _copies(world: World) -> None:
    rows = [{"prompt": f"w{i % 5} w{i % 5 + 1}"} for i in range(30)]
    world.set("prompts.train", world.prompts("copies", rows))


def _leak(world: World) -> None:
    world.set("prompts.heldout", world.tree["prompts"]["train"])


def _chat(world: World, content: str) -> None:
    tok = tiny.tokenizer(bos="<bos>", chat_template=tiny.CHAT_TEMPLATE)
    path = tiny.save_model(world.folder / "chat", world.kind, tok=tok, **_SPECIAL[world.kind])
    world.set("policy.path", str(path))
    world.set("reward_models", {"short": {"callable": "faults:short"}})
    for name in ("train", "heldout"):
        rows = [
            {"messages": [{"role": "user", "content": f"{content} w{i} w{i + j}"}]}
            for i in range(9)
            for j in ((1, 2) if name == "train" else (3,))
        ]
        world.set(f"prompts.{name}", world.prompts(name, rows))


def _doubled_bos(world: World) -> None:
    rows = [{"prompt": f"<bos> w{i} w{i + 1}"} for i in range(12)]
    world.set("prompts.train", world.prompts("bos", rows))


def _too_long(world: World) -> None:
    world.set("prompts.train", world.prompts("long", [{"prompt": " ".join(["w1"] * 80)}]))


def _wrong_end(world: World) -> None:
    world.set("rollout.max_new_tokens", 2)


def _callable(name: str) -> Callable[[World], None]:
    return lambda world: world.set("reward_models", {"mine": {"callable": f"faults:{name}"}})


FAULTS: tuple[Fault, ...] = (
    Fault(
        "a wrong reference",
        "scoring.start",
        "has other weights",
        _set("reference.path", "{m}/other"),
    ),
    Fault(
        "dropout in the policy",
        "scoring.dropout",
        "Dropout is on in the policy",
        _on_crew(lambda c: _drop(c.policy.model)),
    ),
    Fault(
        "dropout in the reference",
        "scoring.dropout",
        "Dropout is on in the reference",
        _on_crew(lambda c: _drop(c.reference.model)),
    ),
    Fault(
        "positions restart at the response",
        "scoring.positions",
        "Position ids are wrong",
        _patch("kleash.models.trunk_states", _restarting_positions),
    ),
    Fault(
        "states off by one",
        "scoring.alignment",
        "off by one",
        _patch("kleash.models.trunk_states", _off_by_one),
    ),
    Fault(
        "no attention mask",
        "scoring.left_padding",
        "Padding on the left",
        _patch("kleash.models.trunk_states", _no_mask),
    ),
    Fault(
        "padding ids are seen",
        "masks.padding_ids",
        "Ids in the padding change",
        _patch("kleash.models.trunk_states", _no_mask),
    ),
    Fault(
        "right padding is seen",
        "scoring.right_padding",
        "Padding on the right",
        _patch("kleash.models.trunk_states", _sees_right),
    ),
    Fault(
        "rows see each other",
        "scoring.batching",
        "what shares its batch",
        _patch("kleash.models.trunk_states", _sees_neighbours),
    ),
    Fault(
        "a head read twice as loud",
        "scoring.head",
        "is read wrong",
        _patch("kleash.models.read_head", _louder_head),
    ),
    Fault(
        "log-probabilities off by one",
        "scoring.canary",
        "off by one",
        _patch("kleash.rollout.score", _scored(_rolled)),
    ),
    Fault(
        "two sides computed differently",
        "scoring.self_kl",
        "not computed alike",
        _patch("kleash.rollout.score", _scored(_noisy_reference)),
    ),
    Fault(
        "a kernel that is wrong",
        "scoring.streaming",
        "computes something else",
        _patch("kleash.preflight.scoring.token_scores", _half_vocabulary),
    ),
    Fault(
        "temperature in sampling alone",
        "scoring.temperature",
        "policy is scored at temperature 1 but",
        _several(_set("rollout.temperature", 0.7), _patch("kleash.rollout.score", _untempered)),
    ),
    Fault(
        "temperature in the policy alone",
        "scoring.temperature",
        "reference is scored at temperature 1 but",
        _several(
            _set("rollout.temperature", 0.7),
            _patch("kleash.rollout.score", _scored(_reference_untempered)),
        ),
    ),
    Fault(
        "a target below rounding",
        "scoring.floor",
        "cannot be resolved",
        _set("leash", {"target_kl": 1e-9}),
    ),
    Fault(
        "a reference in half precision",
        "scoring.floor",
        "computed differently",
        _on_crew(_reference_in_half),
        "warn",
    ),
    Fault(
        "top-p left over", "sampling.law", "tail of the distribution is cut", _settings(top_p=0.7)
    ),
    Fault("top-k left over", "sampling.law", "tail of the distribution is cut", _settings(top_k=4)),
    Fault(
        "min-p left over", "sampling.law", "tail of the distribution is cut", _settings(min_p=0.4)
    ),
    Fault(
        "a repetition penalty left over",
        "sampling.law",
        "repetition penalty",
        _settings(repetition_penalty=3.0),
    ),
    Fault(
        "another temperature in the sampler",
        "sampling.law",
        "drawn at a temperature",
        _settings(temperature=0.6),
    ),
    Fault(
        "the end token suppressed",
        "sampling.law",
        "end token is suppressed",
        _settings(suppress_tokens="eos"),
    ),
    Fault("a least length", "sampling.law", "suppressed at first", _settings(min_new_tokens=12)),
    Fault("stale weights in the sampler", "sampling.ratio", "another model", _written(_stale)),
    Fault(
        "the sampler at temperature 1",
        "sampling.ratio",
        "wrote at temperature 1 and",
        _several(_set("rollout.temperature", 0.7), _written(_hot)),
    ),
    Fault("no end is ever produced", "sampling.ending", "never produced", _on_crew(_never_ends)),
    Fault("responses cut short", "sampling.ending", "cut by the length limit", _wrong_end, "warn"),
    Fault(
        "settings in the model's own file",
        "sampling.leftovers",
        "top_p = 0.9",
        _file_settings(top_p=0.9),
        "warn",
    ),
    Fault("holes in the mask", "masks.shape", "has holes", _written(_holes)),
    Fault(
        "the end token masked",
        "masks.end_token",
        "left out of the response mask",
        _written(_no_end),
    ),
    Fault(
        "tokens after the end counted",
        "masks.end_token",
        "after the end token are counted",
        _written(_beyond_end),
    ),
    Fault(
        "whitening over padding",
        "masks.numbers",
        "advantages",
        _patch("kleash.algorithms.ppo.whiten", _whiten_everything),
    ),
    Fault(
        "metrics over padding",
        "masks.numbers",
        "objective/kl_ref",
        _patch("kleash.measures.response_kl", _sum_everything),
    ),
    Fault(
        "prompts in the KL",
        "masks.prompt_tokens",
        "KL of the prompt's tokens",
        _patch("kleash.rollout.score", _scored(_with_prompts)),
    ),
    Fault("a reference that learns", "reference.frozen", "not frozen", _on_crew(_unfreeze)),
    Fault(
        "a reference that is the policy", "reference.storage", "shares storage", _on_crew(_share)
    ),
    Fault(
        "an adapter that was trained",
        "reference.adapter",
        "bare base",
        _several(_set("policy.lora", {"rank": 2}), _on_crew(_trained_adapter)),
    ),
    Fault(
        "a base that learns",
        "reference.storage",
        "under the adapter learn",
        _several(_set("policy.lora", {"rank": 2}), _on_crew(_base_learns)),
    ),
    Fault(
        "another vocabulary",
        "reference.vocabulary",
        "do not share a vocabulary",
        _on_crew(_fewer_words),
    ),
    Fault("two outputs", "assembly", "num_labels = 2", _two_outputs),
    Fault("no head", "assembly", "would be random", _no_head),
    Fault("a fresh head", "reward.head", "freshly initialised", _on_crew(_fresh_head)),
    Fault(
        "a score on a word taken for padding",
        "reward.last_token",
        "another token than the last",
        _on_crew(_pads_with_a_word),
    ),
    Fault(
        "a doubled BOS for the judge",
        "reward.bos",
        "doubled BOS",
        _patch("kleash.reward_models.ClassifierReward.encode", _no_dedupe),
    ),
    Fault(
        "a template applied twice",
        "reward.template",
        "applied twice",
        _set("reward_models.rm.template", "{prompt} {prompt}{response}"),
    ),
    Fault(
        "scores that depend on the batch",
        "reward.alone",
        "depends on the batch",
        _callable("ranked"),
    ),
    Fault("a reward that repetition wins", "reward.probes", "w3 w3", _callable("likes_w3"), "warn"),
    Fault("a constant reward", "leash.score_spread", "the same score", _callable("constant")),
    Fault("β far too large", "leash.strength", "far too large", _set("leash.beta", 1e4)),
    Fault("β far too small", "leash.strength", "far too small", _set("leash.beta", 1e-6)),
    Fault(
        "a penalty without a gradient",
        "leash.gradient",
        "zero gradient",
        _set("leash", {"beta": 0.2, "placement": "loss_k1", "allow_biased": True}),
    ),
    Fault(
        "a biased placement, permitted",
        "leash.gradient",
        "biased gradient",
        _set("leash", {"beta": 0.2, "placement": "loss_k3", "allow_biased": True}),
        "warn",
    ),
    Fault(
        "a biased placement",
        "assembly",
        "has a biased gradient",
        _set("leash", {"beta": 0.2, "placement": "loss_k3"}),
    ),
    Fault(
        "a target per token",
        "leash.target",
        "looks like a target per token",
        _set("leash", {"target_kl": 0.01}),
        "warn",
    ),
    Fault(
        "a target out of reach",
        "leash.target",
        "more than responses",
        _set("leash", {"target_kl": 1e4}),
    ),
    Fault(
        "options that do nothing",
        "leash.inert",
        "leash.allow_biased",
        _set("leash", {"beta": 0.2, "allow_biased": True}),
        "warn",
    ),
    Fault("duplicate prompts", "reading.duplicates", "duplicated", _copies),
    Fault("a leak into the held-out set", "reading.leak", "leaks", _leak),
    Fault(
        "a chat template twice",
        "reading.chat_template",
        "applied twice",
        lambda world: _chat(world, "<user>"),
    ),
    Fault("a doubled BOS in the prompts", "reading.chat_template", "doubled BOS", _doubled_bos),
    Fault(
        "a prompt longer than the context", "assembly", "expected a prompt of at most", _too_long
    ),
    Fault(
        "too little memory",
        "resources.memory",
        "the machine has",
        _patch("kleash.preflight.resources.machine_bytes", lambda original: lambda device: 10**6),
    ),
)
