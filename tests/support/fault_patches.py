"""Ways to plant a fault in a world of `fault_types.py`."""

import json
import pkgutil
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import tiny_models
import torch
from fault_types import SPECIAL, World, save_policy
from torch import Tensor, nn

from kleash.models.policy import Reference
from kleash.training.components import Components
from kleash.types import Rollout, ScoredRollout

# --- scoring -----------------------------------------------------------------------------------


def set_key(dotted: str, value: Any) -> Callable[[World], None]:
    def plant(world: World) -> None:
        filled = str(value).replace("{m}", str(world.material)) if isinstance(value, str) else value
        # A copy: a world may change it, and other worlds are planted from the same value.
        world.set(dotted, deepcopy(filled))

    return plant


def several(*plants: Callable[[World], None]) -> Callable[[World], None]:
    def plant(world: World) -> None:
        for one in plants:
            one(world)

    return plant


def on_components(change: Callable[[Components], Any]) -> Callable[[World], None]:
    """Change a components in place, or give another."""

    def meddle(components: Components) -> Components:
        changed = change(components)
        return changed if isinstance(changed, Components) else components

    return lambda world: world.meddle.append(meddle)


def patch(target: str, make: Callable[[Any], Any]) -> Callable[[World], None]:
    """Replace a function by one made from it, once the run is assembled."""

    def plant(world: World) -> None:
        def meddle(components: Components) -> Components:
            owner, _, name = target.rpartition(".")
            original = getattr(pkgutil.resolve_name(owner), name)
            world.patch.setattr(pkgutil.resolve_name(owner), name, make(original))
            return components

        world.meddle.append(meddle)

    return plant


def drop(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        for name, rate in list(vars(module).items()):
            if "drop" in name and isinstance(rate, float):
                setattr(module, name, 0.5)


def restarting_positions(original: Any) -> Any:
    """The response's positions count from 0 again."""

    def states(
        trunk: Any, prompt_ids: Any, prompt_mask: Any, ids: Any, mask: Any, **options: Any
    ) -> Any:
        tokens = torch.cat([prompt_ids, ids], 1)
        both = torch.cat([prompt_mask, mask], 1).long()
        before = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
        after = torch.arange(ids.shape[1]).expand_as(ids)
        positions = torch.cat([before, after], 1)
        out = trunk(input_ids=tokens, attention_mask=both, position_ids=positions, use_cache=False)
        return out[0][:, prompt_ids.shape[1] - 1 :]

    return states


def off_by_one(original: Any) -> Any:
    def states(*parts: Any, **options: Any) -> Any:
        return original(*parts, **options).roll(-1, dims=1)

    return states


def no_mask(original: Any) -> Any:
    def states(
        trunk: Any, prompt_ids: Any, prompt_mask: Any, ids: Any, mask: Any, **options: Any
    ) -> Any:
        tokens = torch.cat([prompt_ids, ids], 1)
        return trunk(input_ids=tokens, use_cache=False)[0][:, prompt_ids.shape[1] - 1 :]

    return states


def sees_right(original: Any) -> Any:
    def states(
        trunk: Any, prompt_ids: Any, prompt_mask: Any, ids: Any, mask: Any, **options: Any
    ) -> Any:
        found = original(trunk, prompt_ids, prompt_mask, ids, mask, **options)
        return found * (1 - 0.1 * (~mask).sum(1)[:, None, None])

    return states


def sees_neighbours(original: Any) -> Any:
    def states(*parts: Any, **options: Any) -> Any:
        found = original(*parts, **options)
        return found + 0.3 * (found.mean(0, keepdim=True) - found)

    return states


def louder_head(original: Any) -> Any:
    return lambda model, words: replace(original(model, words), scale=2.0)


def scored(change: Callable[[ScoredRollout, dict[str, Any]], ScoredRollout]) -> Any:
    """A `score` whose answer is changed."""

    def make(original: Any) -> Any:
        def score(rollout: Rollout, **settings: Any) -> ScoredRollout:
            return change(original(rollout, **settings), settings | {"original": original})

        return score

    return make


def untempered(original: Any) -> Any:
    return lambda rollout, **settings: original(rollout, **{**settings, "temperature": 1.0})


def reference_untempered(scored: ScoredRollout, settings: dict[str, Any]) -> ScoredRollout:
    plain = settings.pop("original")(scored.rollout, **{**settings, "temperature": 1.0})
    return replace(scored, ref_logprobs=plain.ref_logprobs)


def rolled(scored: ScoredRollout, _: dict[str, Any]) -> ScoredRollout:
    return replace(scored, rollout_logprobs=scored.rollout_logprobs.roll(1, dims=1))


def noisy_reference(scored: ScoredRollout, _: dict[str, Any]) -> ScoredRollout:
    noise = torch.where(scored.rollout.response_mask, 0.01, 0.0)
    return replace(scored, ref_logprobs=scored.ref_logprobs - noise)


def with_prompts(scored: ScoredRollout, settings: dict[str, Any]) -> ScoredRollout:
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


def half_vocabulary(original: Any) -> Any:
    def scores(hidden: Any, head: Any, targets: Any, **settings: Any) -> Any:
        found = original(hidden, head, targets, **settings)
        return replace(found, kl=found.kl * 0.9)

    return scores


# --- sampling ----------------------------------------------------------------------------------


def settings(**changes: Any) -> Callable[[World], None]:
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

    return patch("kleash.rollout.sampling._clean_settings", make)


def shaped(warper: Callable[[Any, Tensor], Tensor]) -> Callable[[World], None]:
    """Something bends the distribution between the log-probability that is noted and the draw."""

    def make(original: Any) -> Any:
        def draw(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
            words, _ = original(warper(None, weights.log()).exp(), uniform)
            return words, weights.sum(-1, keepdim=True, dtype=torch.float64)

        return draw

    return patch("kleash.rollout.sampling._draw", make)


def written(change: Callable[..., Rollout]) -> Callable[[World], None]:
    """A `generate` whose rollout is changed."""

    def make(original: Any) -> Any:
        def generate(policy: Any, prompts: Any, spec: Any, **settings: Any) -> Rollout:
            return change(original, policy, prompts, spec, settings)

        return generate

    return patch("kleash.rollout.scoring_pass.generate", make)


def stale(original: Any, policy: Any, prompts: Any, spec: Any, settings: Any) -> Rollout:
    older = replace(policy, model=deepcopy(policy.model))
    with torch.no_grad():
        for parameter in older.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return original(older, prompts, spec, **settings)


def hot(original: Any, policy: Any, prompts: Any, spec: Any, settings: Any) -> Rollout:
    return original(policy, prompts, replace(spec, temperature=1.0), **settings)


def holes(original: Any, policy: Any, prompts: Any, spec: Any, settings: Any) -> Rollout:
    """The mask is made by comparing ids with a padding id that the policy writes too."""
    rollout = original(policy, prompts, spec, **settings)
    words = rollout.response_ids[rollout.response_mask]
    common = int(words[~torch.isin(words, torch.tensor(policy.stop_ids))].mode().values)
    mask = rollout.response_mask & (rollout.response_ids != common)
    mask[:, 0] = True
    return replace(rollout, response_mask=mask)


def no_end(original: Any, policy: Any, prompts: Any, spec: Any, settings: Any) -> Rollout:
    rollout = original(policy, prompts, spec, **settings)
    last = rollout.response_mask.sum(1) - 1
    mask = rollout.response_mask.clone()
    kept = (last > 0) & rollout.ended
    mask[kept, last[kept]] = False
    return replace(rollout, response_mask=mask)


def beyond_end(original: Any, policy: Any, prompts: Any, spec: Any, settings: Any) -> Rollout:
    rollout = original(policy, prompts, spec, **settings)
    ids = torch.where(rollout.response_mask, rollout.response_ids, policy.tokenizer.eos_token_id)
    everywhere = torch.ones_like(rollout.response_mask)
    return replace(rollout, response_ids=ids, response_mask=everywhere)


def never_ends(components: Components) -> None:
    for model in (components.policy.model, components.reference.model):
        layer = cast(nn.Linear, model.get_output_embeddings())
        bias = torch.zeros(layer.weight.shape[0])
        bias[list(components.policy.stop_ids)] = -100.0
        layer.bias = nn.Parameter(bias, requires_grad=False)


def file_settings(**settings: Any) -> Callable[[World], None]:
    def plant(world: World) -> None:
        world.set("policy.path", edited(world, "policy", "generation_config.json", **settings))

    return plant


# --- masks, reference, reward, leash, reading ---------------------------------------------------


def whiten_everything(original: Any) -> Any:
    return lambda x, mask: original(x, torch.ones_like(mask))


def sum_everything(original: Any) -> Any:
    return lambda kl, mask: kl.sum(-1)


def unfreeze(components: Components) -> None:
    components.reference.model.requires_grad_(True)


def share(components: Components) -> Components:
    policy = components.policy
    return replace(
        components,
        reference=Reference(policy.model, policy.tokenizer, policy.path, policy.words, "it"),
    )


def trained_adapter(components: Components) -> None:
    with torch.no_grad():
        for name, parameter in components.policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)


def base_learns(components: Components) -> None:
    for name, parameter in components.policy.model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(True)


def fewer_words(components: Components) -> Components:
    return replace(
        components, reference=replace(components.reference, words=components.reference.words - 1)
    )


def reference_in_half(components: Components) -> None:
    components.reference.model.to(torch.bfloat16)


def judge(components: Components) -> Any:
    return components.reward.rewards["rm"][0]


def fresh_head(components: Components) -> None:
    nn.init.normal_(judge(components).model.score.weight)


def pads_with_a_word(world: World) -> None:
    word = tiny_models.tokenizer(bos="<bos>").convert_tokens_to_ids("w7")
    world.set("reward_models.rm.path", edited(world, "reward", "config.json", pad_token_id=word))


def edited(world: World, model: str, file: str, **changes: Any) -> str:
    """A copy of a model's directory with other values in one of its files."""
    folder = world.folder / f"edited-{model}"
    shutil.copytree(world.material / model, folder, dirs_exist_ok=True)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))
    return str(folder)


def judge_for_policy(world: World) -> None:
    """Its embedding is tied to a head that it never had, so that nothing is missing."""
    tok = tiny_models.tokenizer(bos="<bos>")
    path = tiny_models.save_classifier(world.folder / "judge", "gpt2", tok=tok)
    world.set("policy.path", str(path))


def two_outputs(world: World) -> None:
    path = tiny_models.save_classifier(
        world.folder / "two", world.kind, labels=2, **SPECIAL[world.kind]
    )
    world.set("reward_models.rm.path", str(path))


def one_output(world: World) -> None:
    tiny_models.save_classifier(world.folder / "two", world.kind, **SPECIAL[world.kind])


def no_head(world: World) -> None:
    path = tiny_models.save_model(
        world.folder / "none", world.kind, num_labels=1, **SPECIAL[world.kind]
    )
    world.set("reward_models.rm.path", str(path))


def trained_head(world: World) -> None:
    tiny_models.save_classifier(world.folder / "none", world.kind, **SPECIAL[world.kind])


def punish_repetition(world: World) -> None:
    world.set("reward_models.calm", {"callable": "fault_types:calm"})


def copies(world: World) -> None:
    rows = [{"prompt": f"w{i % 5} w{i % 5 + 1}"} for i in range(30)]
    world.set("prompts.train", world.prompts("copies", rows))


def same_file(world: World) -> None:
    world.set("prompts.heldout", world.tree["prompts"]["train"])


def leak(world: World) -> None:
    """Half of the held-out prompts are trained on."""
    held = [json.loads(line) for line in (world.material / "heldout.jsonl").read_text().split("\n")]
    train = (world.material / "prompts.jsonl").read_text().split("\n")
    world.set("prompts.heldout", world.prompts("kept", held))
    rows = [*(json.loads(line) for line in train), *held[::2]]
    world.set("prompts.train", world.prompts("mixed", rows))


def chat(world: World, content: str) -> None:
    tok = tiny_models.tokenizer(bos="<bos>", chat_template=tiny_models.CHAT_TEMPLATE)
    path = save_policy(world.folder / "chat", world.kind, tok=tok)
    world.set("policy.path", str(path))
    world.set("reward_models", {"short": {"callable": "fault_types:short"}})
    for name in ("train", "heldout"):
        rows = [
            {"messages": [{"role": "user", "content": f"{content} w{i} w{i + j}"}]}
            for i in range(9)
            for j in ((1, 2) if name == "train" else (3,))
        ]
        world.set(f"prompts.{name}", world.prompts(name, rows))


def doubled_bos(world: World) -> None:
    rows = [{"prompt": f"<bos> w{i} w{i + 1}"} for i in range(12)]
    world.set("prompts.train", world.prompts("bos", rows))


def too_long(world: World) -> None:
    world.set("prompts.train", world.prompts("long", [{"prompt": " ".join(["w1"] * 80)}]))


def wrong_end(world: World) -> None:
    world.set("rollout.max_new_tokens", 2)


def reward_by(name: str) -> Callable[[World], None]:
    return lambda world: world.set("reward_models", {"mine": {"callable": f"fault_types:{name}"}})
