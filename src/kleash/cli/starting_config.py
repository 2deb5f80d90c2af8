"""The commented YAML that `kleash init` writes, with what a model's own files say about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kleash.models.loading import load_config, load_tokenizer

_RESPONSE = 128
"""Tokens of a response, where the context has room for four times as many."""


@dataclass(frozen=True)
class ModelFacts:
    """What a starting configuration depends on."""

    path: str
    architecture: str
    """The `model_type` of its config.json."""
    context: int | None
    """Positions of prompt and response together; None: no limit is written there."""
    chat: bool
    """Whether the tokenizer has a chat template."""


def facts_of(path: str) -> ModelFacts:
    """Read them from a directory or hub name; no weights are loaded.

    Raises:
        ModelError: there is no model or no tokenizer.
    """
    config, tokenizer = load_config(path), load_tokenizer(path)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return ModelFacts(
        path=path,
        architecture=config.model_type,
        context=context if isinstance(context, int) and context > 0 else None,
        chat=tokenizer.chat_template is not None,
    )


def starting_config(facts: ModelFacts) -> str:
    """A configuration as YAML, each of whose keys has its comment."""
    length = _RESPONSE if facts.context is None else max(1, min(_RESPONSE, facts.context // 4))
    context = "no limit of its context" if facts.context is None else f"context {facts.context}"
    chat = "a chat template" if facts.chat else "no chat template"
    folder = Path(facts.path)
    name = folder.name if folder.name.isprintable() and folder.name else "model"
    return _TEMPLATE.format(
        about=_comment(f"{facts.architecture}, {context}, {chat}"),
        path=_quoted(facts.path),
        prompts=_CHAT if facts.chat else _TEXT,
        sample="sample-chat-prompts" if facts.chat else "sample-prompts",
        remaining=""
        if facts.context is None
        else f"; prompts keep {facts.context - length} tokens",
        length=length,
        output=_quoted(f"runs/{name}"),
    )


def _quoted(value: Any) -> str:
    """A value as YAML reads it back, on one line."""
    text = yaml.safe_dump(value, allow_unicode=True, width=float("inf"), default_style='"')
    return text.strip()


def _comment(text: str) -> str:
    """Text that cannot leave its comment: a model's own files wrote part of it."""
    return "".join(char if char.isprintable() else "?" for char in text)


_TEXT = """\
  # JSON lines (or CSV, Parquet) with `prompt`: text that the model continues. `kleash check`
  # says at once which row it cannot use."""
_CHAT = """\
  # JSON lines (or Parquet) with `prompt`: messages [{{"role": "user", "content": ...}}], which go
  # through the model's chat template; plain text is read as it stands.""".replace(
    "{{", "{"
).replace("}}", "}")
_TEMPLATE = """\
# Written by `kleash init` for a model of type {about}.
# Every key and its default: docs/configuration.md. Next:
#
#   kleash recipes copy {sample} --output prompts.jsonl    # or prompts of your own
#   kleash check THIS-FILE      # is anything wrong?
#   kleash plan THIS-FILE       # which budget buys which score
#   kleash train THIS-FILE

policy:
  path: {path}
  precision: float32  # or bf16: float32 weights, products in bfloat16
  # lora: {{rank: 16, alpha: 32}}    # train an adapter only; needs kleash[lora]

# The frozen model that KL is measured to: the policy as it is before the first update.
# reference: {{path: another/directory}}    # with `reference_differs: true`

reward_models:
  example:
    # Any Python function of lists of prompts and responses, `module:function`. This one comes
    # with kleash and serves to try the configuration; for a trained classifier give `path`.
    callable: kleash.playground.example_reward:word_length
    weight: 1.0
score_normalisation: none    # running, initial: standardise scores whose scale is arbitrary

prompts:
{prompts}
  train: prompts.jsonl
  # heldout: heldout.jsonl    # never trained on; the report then shows both

rollout:
  prompts_per_step: 64
  responses_per_prompt: 1
  max_new_tokens: {length}    # per response{remaining}
  temperature: 1.0
  truncated: score    # a response cut by the limit: score, penalise, drop, bootstrap
  microbatch_size: 16    # responses scored at once: memory and speed, not results

leash:
  # KL to hold, in nats per response; β moves by itself and starts from a plan. Instead:
  # `beta: 0.1` (fixed, in score per nat) or `target_kl_per_token: 0.05`.
  target_kl: 5.0
  placement: reward_k1    # where KL is charged: docs/placements.md

# tripwires: {{stop_kl: 50.0}}    # refuse a step beyond this KL, in nats per response

algorithm:
  name: ppo    # or grpo, rloo: these take several responses to a prompt
  epochs: 2    # passes over a rollout
  minibatches: 2    # optimiser steps in one pass
  microbatch_size: 16    # responses in one backward pass: memory and speed, not the gradient
  clip_range: 0.2

optimizer:
  lr: 1.0e-5    # an adapter usually wants ten times as much
  schedule: constant    # or linear, to zero
  warmup_steps: 0

logging:
  checkpoint_every: 20    # steps; 0: after the last only
  samples_per_step: 2    # responses kept for the report
  trackers: []    # tensorboard, wandb, trackio; each is an extra of its name

device: auto
steps: 100
seed: 0
output: {output}
"""
