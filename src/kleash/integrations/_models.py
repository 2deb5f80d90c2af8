"""A trainer's own models as the policy and the reference that scoring reads."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.errors import ConfigError, ModelError
from kleash.models.lm_head import check_head, read_head
from kleash.models.loading import load_causal_lm, number_of_words, stop_ids
from kleash.models.policy import Policy, Reference

ReferenceSource = str | Path | nn.Module
"""A checkpoint's path or hub name, or a model."""


def policy_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """A trainer's model, an adapter included, as it is now and while it learns.

    Every row of its head counts as a word, as in the trainer's own sampling and loss.

    Raises:
        ModelError: if it is no causal language model whose head can be read.
    """
    wrapped, inner = unwrap_adapter(model)
    name = str(inner.config.name_or_path or type(inner).__name__)
    rows = read_head(inner, 1).weight.shape[0]
    check_head(inner, read_head(inner, rows), name)
    return Policy(
        model=inner,
        tokenizer=tokenizer,
        path=name,
        words=rows,
        stop_ids=stop_ids(inner, tokenizer),
        adapter=wrapped,
    )


def unwrap_adapter(model: nn.Module) -> tuple[Any, PreTrainedModel]:
    """The peft model, or None, and the language model inside.

    Raises:
        ModelError: if there is no transformers model.
    """
    wrapped = cast(Any, model) if callable(getattr(model, "get_base_model", None)) else None
    inner = model if wrapped is None else wrapped.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"expected a transformers or PEFT language model, got {type(inner).__name__}: kleash "
            "reads hidden states and head of such models alone"
        )
    return wrapped, inner


def reference_of(
    policy: Policy, own: nn.Module | None, given: ReferenceSource | None
) -> tuple[Policy, Reference]:
    """The model that a trainer's policy is measured against, and the policy over their words.

    Args:
        policy: of `policy_of`.
        own: the trainer's own reference model, if it has one.
        given: what the user named instead. None: the trainer's own; else the adapter turned off
            (or the adapter named "ref", which TRL loads beside one that is trained on); else the
            checkpoint that the model was loaded from.

    Raises:
        ConfigError: if no reference can be found.
        ModelError: if it cannot be used.
    """
    if given is None and own is None and policy.adapter is not None:
        named = "ref" in cast("dict[str, Any]", policy.adapter.peft_config)
        adapter = _NamedAdapter(policy.adapter, "ref") if named else policy.adapter
        how = "the adapter named ref" if named else "policy with its adapter off"
        reference = Reference(
            policy.model, policy.tokenizer, policy.path, policy.words, how, adapter
        )
        return policy, reference
    source = given if given is not None else own
    how = "the trainer's reference" if given is None and own is not None else "loaded"
    if source is None:
        source = _path_of(policy.model)
    if isinstance(source, str | Path):
        model, path = load_like(policy, source), str(source)
    else:
        _, model = unwrap_adapter(source)
        path = str(model.config.name_or_path or type(model).__name__)
        how = how if given is None else "given"
    return _over_same_words(policy, model, path, how)


def load_like(policy: Policy, path: str | Path) -> PreTrainedModel:
    """A frozen checkpoint in the policy's dtype and on its device."""
    dtype = {"torch.bfloat16": "bfloat16", "torch.float16": "float16"}
    kind: Any = dtype.get(str(policy.head.weight.dtype), "float32")
    model = load_causal_lm(path, dtype=kind, device=str(policy.device), attention="auto")
    if str(policy.head.weight.dtype) == "torch.float64":
        model = cast(Any, model).double()
    return model.requires_grad_(False)


def _over_same_words(
    policy: Policy, model: PreTrainedModel, path: str, how: str
) -> tuple[Policy, Reference]:
    rows = read_head(model, 1).weight.shape[0]
    words = policy.words
    if rows != words:
        # Copies of one model may be padded differently; the tokenizer says what both can write.
        words = min(number_of_words(policy.tokenizer, count, path) for count in (words, rows))
    check_head(model, read_head(model, words), path)
    narrowed = Policy(
        model=policy.model,
        tokenizer=policy.tokenizer,
        path=policy.path,
        words=words,
        stop_ids=policy.stop_ids,
        adapter=policy.adapter,
    )
    return narrowed, Reference(model, policy.tokenizer, path, words, how)


def _path_of(model: PreTrainedModel) -> str:
    path = str(model.config.name_or_path or "")
    if not path:
        raise ConfigError(
            "expected a reference, got a trainer without one (β is 0, no adapter) whose model was "
            "not loaded from a checkpoint: name one with reference=PATH, or give a model"
        )
    return path


class _NamedAdapter:
    """Reads with another adapter of the same peft model where a reference turns its own off."""

    def __init__(self, model: Any, name: str) -> None:
        self._model, self._name = model, name

    @contextlib.contextmanager
    def disable_adapter(self) -> Generator[None]:
        """Inside, the named adapter is in force."""
        before = self._model.active_adapter
        self._model.set_adapter(self._name)
        try:
            yield
        finally:
            self._model.set_adapter(before)
