"""Tiny worlds to plant faults in, and how to look at them.

A fault changes the configuration, the files, or the objects and functions that training would
use, once the run is assembled: the ways are in `fault_patches.py`, the faults and the checks that
must find them in `planted_faults.py`, and what their remedies say in `fault_fixes.py`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from kleash.config.loading import parse_config
from kleash.config.schema import Config
from kleash.errors import KleashError
from kleash.preflight import runner
from kleash.preflight.checks import resources
from kleash.preflight.findings import Finding
from kleash.preflight.probe_batch import Size, draw
from kleash.training.assembly import assemble
from kleash.training.components import Components

Kind = Literal["gpt2", "llama", "gemma2"]
KINDS: tuple[Kind, ...] = ("gpt2", "llama", "gemma2")
FEW = Size(prompts=8, responses_per_prompt=2, texts=2)
# The faults in the words of a sampler need more words to be distinguished.
MANY = Size(prompts=26, responses_per_prompt=3, texts=1)
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "gemma2": {"final_logit_softcapping": 30.0},
}


def likes_w3(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [1.0 * response.split().count("w3") for response in responses]


def short(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A mild taste for brevity; one word over and over is no better than another."""
    return [-0.1 * abs(len(response.split()) - 6) for response in responses]


def calm(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Each word that is there again costs more than it can be worth."""
    words = [response.split() for response in responses]
    return [-3.0 * (len(some) - len(set(some))) for some in words]


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
    meddle: list[Callable[[Components], Components]] = field(default_factory=list)

    def set(self, dotted: str, value: Any) -> None:
        *parents, last = dotted.split(".")
        node = self.tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value

    def config(self) -> Config:
        return parse_config(self.tree, where="the test")

    def components(self) -> tuple[Config, Components]:
        config = self.config()
        components = assemble(config)
        for change in self.meddle:
            components = change(components)
        return config, components

    def prompts(self, name: str, rows: Sequence[dict[str, Any]]) -> str:
        path = self.folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)


def material(folder: Path, kind: Kind) -> Path:
    """Models, prompts and a reward model of one architecture."""
    tok = tiny_models.tokenizer(bos="<bos>")
    save_policy(folder / "policy", kind, tok=tok)
    save_policy(folder / "other", kind, tok=tok, seed=1)
    tiny_models.save_classifier(folder / "reward", kind, tok=tok, seed=2, **SPECIAL[kind])
    words = [f"w{i}" for i in range(20)]
    texts = [" ".join(words[(i * 7 + j * 3) % 20] for j in range(2 + i % 6)) for i in range(40)]
    texts = list(dict.fromkeys(texts))
    for name, chosen in (("prompts", texts[:26]), ("heldout", texts[26:32])):
        lines = [json.dumps({"prompt": text}) for text in chosen]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def save_policy(path: Path, kind: Kind, *, tok: Any, **settings: Any) -> Path:
    """A policy that ends most of its responses, as a fine-tuned one does.

    The end token's row of the head gets the direction in which hidden states lie on average.
    """
    tiny_models.save_model(path, kind, tok=tok, **SPECIAL[kind], **settings)
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    with torch.no_grad():
        states = model.base_model(torch.randint(len(tok), (16, 24)))[0].flatten(0, 1)
        mean, push = states.mean(0), {"gpt2": 3.0, "llama": 0.8, "gemma2": 1.5}[kind]
        model.get_output_embeddings().weight[tok.eos_token_id] += push * mean / mean.square().sum()
    model.save_pretrained(path)
    return path


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


def findings(world: World, examine: Callable[[Config, Components], list[Finding]]) -> list[Finding]:
    """What the checks say of a world; assembling it is the first of them."""
    try:
        config, components = world.components()
    except KleashError as error:
        return [runner.refused("assembly", error)]
    return examine(config, components)


def only(name: str, size: Size | None = None) -> Callable[[Config, Components], list[Finding]]:
    """The one check of that name; for `assembly`, to come so far is to pass."""

    def examine(config: Config, components: Components) -> list[Finding]:
        if name == "assembly":
            return [Finding(name, "ok", "assembled", "no error")]
        if name == "reference.vocabulary":
            return [runner.reference.vocabulary(components.policy, components.reference)]
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            trial = draw(config, components, size or (MANY if name == "sampling.law" else FEW))
            if name == "resources.memory":
                return resources.examine(trial)[:1]
            checks = [*runner.QUICK_CHECKS, runner.reward_model.probes]
            return runner.run_checks([c for c in checks if runner.name_of(c) == name], trial)

    return examine


def advice(finding: Finding) -> str:
    """What its reader should do; of a refusal, the error says it."""
    return finding.cause if finding.name == "assembly" else finding.remedy
