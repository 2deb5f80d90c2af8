"""Carrying out a remedy by its own words: what `planted_faults.py` says against each of its faults.

A fix is given the remedy's text and takes from it what it names: keys, values, files, tokens. A
text too vague to be followed by a reader cannot be followed here either. Code that a remedy asks
for is written anew and slowly, one row at a time or without padding, from the sentence alone.
"""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from fault_patches import on_components, patch, settings, written
from fault_types import World
from torch import Tensor

from kleash.models.lm_head import apply_head
from kleash.models.policy import freeze_copy
from kleash.models.reward_model import ClassifierReward
from kleash.preflight.findings import Verdict
from kleash.training.components import Components
from kleash.types import Head, Rollout, ScoredRollout

Kind = Literal["setting", "file", "code", "restored"]
"""A key is set; a file changed; the behaviour named is written anew; or, where the fault is a
defect that no reader of the text can fix, it is taken out again."""


@dataclass(frozen=True)
class Fix:
    kind: Kind
    words: tuple[str, ...]
    """What is carried out, as the remedy must literally say it."""
    apply: Callable[[World, str], None]


# --- settings and files ---------------------------------------------------------------------------


def set_as_advised(key: str) -> Fix:
    """Set a key to the value that the text gives it: `key: value`."""

    def apply(world: World, text: str) -> None:
        world.set(key, value_of(key, text))

    return Fix("setting", (f"{key}: ",), apply)


def value_of(key: str, text: str) -> Any:
    """The value behind `key: `, as YAML would read it."""
    found = re.search(rf"{re.escape(key)}: (\S+)", text)
    assert found, f"no value for {key} in: {text}"
    word = found[1].rstrip(".,;)")
    try:
        return int(word)
    except ValueError:
        pass
    try:
        return float(word)
    except ValueError:
        return word


def set_to(key: str, value: Any, *words: str) -> Fix:
    """Set a key that the text names to a value that only its reader can know."""

    def apply(world: World, text: str) -> None:
        filled = value.replace("{m}", str(world.material)) if isinstance(value, str) else value
        world.set(key, deepcopy(filled))

    return Fix("setting", (key, *words), apply)


def left_out(key: str, *words: str) -> Fix:
    """Take a key out of the configuration."""

    def apply(world: World, text: str) -> None:
        *parents, last = key.split(".")
        node = world.tree
        for name in parents:
            node = node[name]
        del node[last]

    return Fix("setting", (key, *words), apply)


def both(one: Fix, other: Fix) -> Fix:
    def apply(world: World, text: str) -> None:
        one.apply(world, text)
        other.apply(world, text)

    return Fix(one.kind, (*one.words, *other.words), apply)


def sampler_as_advised(*keys: str) -> Fix:
    """Give the sampler the settings of the text."""

    def apply(world: World, text: str) -> None:
        settings(**{key: value_of(key, text) for key in keys})(world)

    return Fix("setting", tuple(f"{key}: " for key in keys), apply)


def sampler_without(key: str) -> Fix:
    """Take a setting from the sampler."""
    return Fix("setting", ("Remove ", key), lambda world, text: settings(**{key: None})(world))


def prompt_rows(words: str, change: Callable[[list[str], str], list[str]]) -> Fix:
    """Change the lines of the prompt files that the text names."""

    def apply(world: World, text: str) -> None:
        for path in _paths(text, ".jsonl"):
            path.write_text("\n".join(change(path.read_text().splitlines(), text)))

    return Fix("file", (words,), apply)


def unmarked(lines: list[str], text: str) -> list[str]:
    """The text says which mark to remove."""
    (mark,) = re.findall(r"Remove '([^']+)'", text)
    return [line.replace(mark, "") for line in lines]


def without_copies(lines: list[str], text: str) -> list[str]:
    return list(dict.fromkeys(lines))


def without_heldout(lines: list[str], text: str) -> list[str]:
    """`Remove the prompts of ONE FILE from THE OTHER`."""
    held = Path(re.findall(r"of (\S+\.jsonl) from", text)[0]).read_text().splitlines()
    # The first file stays as it is.
    return lines if set(lines) <= set(held) else [line for line in lines if line not in held]


def shortened(lines: list[str], text: str) -> list[str]:
    return [json.dumps({"prompt": "w1 w2"}) for _ in lines]


def in_json(words: str, change: Callable[[dict[str, Any], str], None]) -> Fix:
    """Change the JSON file of a model that the text names."""

    def apply(world: World, text: str) -> None:
        (path,) = _paths(text, ".json")
        content = json.loads(path.read_text())
        change(content, text)
        path.write_text(json.dumps(content))

    return Fix("file", (words,), apply)


def removed(content: dict[str, Any], text: str) -> None:
    (key,) = re.findall(r"Remove (\w+) from", text)
    del content[key]


def pad_as_advised(content: dict[str, Any], text: str) -> None:
    content["pad_token_id"] = value_of("pad_token_id", text)


def new_checkpoint(words: str, save: Callable[[World], None]) -> Fix:
    """Put a checkpoint as the text wants it where the broken one was."""
    return Fix("file", (words,), lambda world, text: save(world))


def mark_out_of_template(world: World, text: str) -> None:
    (mark, key) = re.findall(r"Remove '([^']+)' from (reward_models\.\w+\.template)", text)[0]
    judge = world.tree["reward_models"][key.split(".")[1]]
    judge["template"] = judge["template"].replace(mark, "")


def merged(world: World, text: str) -> None:
    """The trained adapter goes into the weights; the run begins from them with a fresh one."""
    _, components = world.components()
    folder = world.folder / "merged"
    components.policy.adapter.merge_and_unload().save_pretrained(folder)
    components.policy.tokenizer.save_pretrained(folder)
    world.meddle.clear()
    world.set("policy.path", str(folder))


def _paths(text: str, ending: str) -> list[Path]:
    """The files of this kind that the text names."""
    found = re.findall(rf"/[^\s'\"]+{re.escape(ending)}\b", text)
    assert found, f"no {ending} file in: {text}"
    return [Path(one) for one in dict.fromkeys(found)]


# --- code -----------------------------------------------------------------------------------------


def code(words: str, plant: Callable[[World], None]) -> Fix:
    """Put code that does what the words say where the faulty code was."""
    return Fix("code", (words,), lambda world, text: plant(world))


def restored(words: str, plant: Callable[[World], None] | None = None) -> Fix:
    """Take the fault out again; the words only say where it is."""

    def apply(world: World, text: str) -> None:
        world.meddle.clear() if plant is None else plant(world)

    return Fix("restored", (words,), apply)


def anew(target: str, function: Any) -> Callable[[World], None]:
    """Another function in the place of `target`, whatever was there."""
    return patch(target, lambda original: function)


def states_by_mask(
    trunk: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    ids: Tensor,
    mask: Tensor,
    **options: Any,
) -> Tensor:
    """Positions by counting a row's real tokens, the mask passed, state t − 1 for token t."""
    keep = torch.cat([prompt_mask, mask], 1)
    positions = torch.zeros_like(keep, dtype=torch.long)
    for row, column in keep.nonzero().tolist():
        positions[row, column] = int(keep[row, :column].sum())
    out = trunk(
        input_ids=torch.cat([prompt_ids, ids], 1),
        attention_mask=keep.long(),
        position_ids=positions,
        use_cache=False,
    )
    return out[0][:, -ids.shape[1] - 1 :]


def states_by_row(
    trunk: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    ids: Tensor,
    mask: Tensor,
    **options: Any,
) -> Tensor:
    """Each row by itself, without any padding; 0 where there is no token to predict."""
    rows: list[Tensor] = []
    for prompt, kept, response, real in zip(prompt_ids, prompt_mask, ids, mask, strict=True):
        text = torch.cat([prompt[kept], response[real]])
        states = trunk(input_ids=text[None], use_cache=False)[0][0, int(kept.sum()) - 1 :]
        rows.append(torch.nn.functional.pad(states, (0, 0, 0, len(real) + 1 - len(states))))
    return torch.stack(rows)


def head_of_config(model: Any, words: int) -> Head:
    """Scale and cap as config.json has them."""
    own, layer = model.config.to_dict(), model.get_output_embeddings()
    scale = own.get("logit_scale", 1.0) / own.get("logits_scaling", 1.0)
    cap = own.get("final_logit_softcapping")
    return Head(layer.weight, layer.bias, scale=scale, softcap=cap, vocab_size=words)


def scored_anew(scored: ScoredRollout, given: dict[str, Any]) -> ScoredRollout:
    """Both models' log-probabilities and the KL from whole tables, row by row, at one heat."""
    rollout, heat = scored.rollout, given["temperature"]
    found = [torch.zeros_like(scored.kl) for _ in range(3)]
    for row, real in enumerate(rollout.response_mask):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]][None]
        response = rollout.response_ids[row][real][None]
        ones = torch.ones_like(prompt).bool(), torch.ones_like(response).bool()
        mine, theirs = (
            (_table(given[who], prompt, ones[0], response, ones[1]) / heat).log_softmax(-1)
            for who in ("policy", "reference")
        )
        count = torch.arange(response.shape[1])
        found[0][row, count] = mine[count, response[0]].float()
        found[1][row, count] = theirs[count, response[0]].float()
        found[2][row, count] = (mine.exp() * (mine - theirs)).sum(-1).float()
    return replace(scored, rollout_logprobs=found[0], ref_logprobs=found[1], kl=found[2])


@torch.no_grad()
def _table(model: Any, *text: Tensor) -> Tensor:
    states = model.hidden_states(*text)[0, :-1]
    return apply_head(model.head, states)[:, : model.head.words].double()


def drawn(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The library's own draw from the whole distribution."""
    del uniform
    weights = weights.double()
    return torch.multinomial(weights, 1), weights.sum(-1, keepdim=True)


@torch.no_grad()
def generated(policy: Any, prompts: Any, spec: Any, *, microbatch: int | None = None) -> Rollout:
    """One word after the other from the policy's present weights; no padding, no cache."""
    lengths = prompts.mask.sum(1)
    ids = torch.full((len(lengths), spec.max_new_tokens), policy.pad_id)
    logprobs = torch.zeros(ids.shape)
    for length in lengths.unique().tolist():
        some = (lengths == length).nonzero().flatten()
        text = prompts.ids[some, -length:]
        for place in range(spec.max_new_tokens):
            logits = policy.model(input_ids=text, use_cache=False).logits[:, -1, : policy.words]
            table = (logits.double() / spec.temperature).log_softmax(-1)
            words = torch.multinomial(table.exp(), 1)
            ids[some, place] = words[:, 0]
            logprobs[some, place] = table.gather(1, words)[:, 0].float()
            text = torch.cat([text, words], 1)
    everywhere = torch.ones_like(ids).bool()
    ended = torch.isin(ids, torch.tensor(policy.stop_ids)).any(1)
    whole = Rollout(prompts.ids, prompts.mask, ids, everywhere, ended, prompts.index, logprobs)
    return masked_by_length(whole, policy)


def masked_by_length(rollout: Rollout, policy: Any) -> Rollout:
    """A response is as long as the place of its first stop token + 1."""
    stop = torch.isin(rollout.response_ids, torch.tensor(policy.stop_ids))
    place = torch.arange(stop.shape[1]).expand_as(stop)
    length = torch.where(stop, place + 1, stop.shape[1]).amin(1)
    return replace(rollout, response_mask=place < length[:, None])


def from_lengths(words: str) -> Fix:
    """Make the response mask of what was written again, from lengths."""

    def change(original: Any, policy: Any, prompts: Any, spec: Any, more: Any) -> Rollout:
        return masked_by_length(original(policy, prompts, spec, **more), policy)

    return code(words, written(change))


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    kept = torch.where(mask, x, 0.0)
    centred = torch.where(mask, kept - kept.sum() / mask.sum(), 0.0)
    return centred / (centred.square().sum() / mask.sum() + 1e-8).sqrt()


def summed(kl: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, kl, 0.0).sum(-1)


def evaluating(components: Components) -> None:
    components.policy.model.eval()
    components.reference.model.eval()


def same_dtype(components: Components) -> None:
    components.reference.model.to(components.policy.model.dtype)


def frozen(components: Components) -> None:
    components.reference.model.requires_grad_(False)


def own_copy(components: Components) -> Components:
    return replace(components, reference=freeze_copy(components.policy))


def only_adapter_learns(components: Components) -> None:
    for name, parameter in components.policy.model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def loaded_judge(components: Components) -> Components:
    old, weight = components.reward.rewards["rm"]
    assert isinstance(old, ClassifierReward)
    rewards = {"rm": (ClassifierReward(old.path), weight)}
    return replace(components, reward=replace(components.reward, rewards=rewards))


def fix_components(words: str, change: Callable[[Components], Any]) -> Fix:
    return code(words, on_components(change))


@dataclass(frozen=True)
class Fault:
    name: str
    check: str
    cause: str
    """A regular expression that the cause must match."""
    plant: Callable[[World], None]
    fix: Fix
    """What the check's remedy says, carried out."""
    verdict: Verdict = "fail"
