"""The policy and its frozen reference: tokens in, hidden states and a head out, never logits.

A model is used in one way only: `hidden_states` of [left-padded prompt | right-padded response],
with explicit positions, so that a response gets the same numbers alone, padded or in a batch.
What becomes of hidden states is the business of `scoring`.
A model may be divided among processes (`sharding`); every one of them then has to read as often.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.errors import ModelError
from kleash.mesh import Mesh
from kleash.models.checkpoint import (
    gather_weights,
    restore_policy,
    save_policy,
    verify_sharded,
)
from kleash.models.fingerprint import all_weights, base_weights, weights_sha256, weights_sum
from kleash.models.frozen_weights import divided_copy, frozen_copy
from kleash.models.lm_head import check_causal, check_head, read_head
from kleash.models.loading import (
    Attention,
    Dtype,
    number_of_words,
    require_special_tokens,
    stop_ids,
)
from kleash.models.lora import AdapterSpec, add_adapter
from kleash.models.merged_loading import load_merged, open_divided, tokenizer_of
from kleash.models.precision import Precision
from kleash.models.probing import check_padding, own_code
from kleash.models.quantization import Quantization, require_exact_products
from kleash.models.sharding import Sharding, gather_ends, own, release
from kleash.models.trunk import trunk_of, trunk_states
from kleash.models.vocabulary import (
    SharedVocabulary,
    require_shared_ending,
    shared_vocabulary,
)
from kleash.types import Head


@runtime_checkable
class LanguageModel(Protocol):
    """What scoring needs of a language model; the tests' tabular oracle is one too."""

    @property
    def head(self) -> Head:
        """The step from hidden states to logits; its tensors are the live parameters."""
        ...

    def hidden_states(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        response_ids: Int[Tensor, "batch token"],
        response_mask: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "batch token+1 hidden"]:
        """State [:, t] predicts response token t; index `length` is the state after the last."""
        ...


@dataclass(frozen=True)
class Identity:
    """Which model exactly, for the run's record."""

    path: str
    how: str
    """How it came to be: "loaded", "copy of the policy" or "policy with its adapter off"."""
    dtype: str
    sha256: str
    """Hash of the weights; of an adapter, those that are merged into them and no others."""
    revision: str | None = None
    """Of a hub name."""
    merged: str | None = None
    """Adapter that was merged into the weights before anything else."""


@dataclass(frozen=True, eq=False)
class Policy:
    """The model that learns, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: str
    words: int
    """Token ids that stand for text; the rows of the head beyond have probability 0."""
    stop_ids: tuple[int, ...]
    """Ids that end a response."""
    adapter: Any = None
    """The peft model around `model`, if only an adapter is trained."""
    revision: str | None = None
    merged: str | None = None
    """Directory of the adapter that was merged into the weights when they were loaded."""
    sharding: Sharding | None = None
    """How the model is divided among processes; None: it is whole in each."""
    structure: nn.Module | None = None
    """The `blueprint` of a divided model."""
    precision: Precision = "float32"
    """In which it computes; see `precision`."""

    @property
    def head(self) -> Head:
        """The head, with the live parameters; of a divided model it is whole until `release`."""
        gather_ends(self.model)
        return read_head(self.model, self.words)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return read_head(self.model, self.words).weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return read_head(self.model, self.words).weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the trunk's products: what rounding errors are to be expected of."""
        own = read_head(self.model, self.words).weight.dtype
        return torch.bfloat16 if self.precision == "bf16" else own

    @property
    def context(self) -> int | None:
        """Longest prompt + response the model has positions for; None: no limit known."""
        return context_length(self.model)

    @property
    def pad_id(self) -> int:
        """Id that fills a batch; never compared, since masks come from lengths.

        A padding token that the matrix has no row for (added, and never resized) cannot be read,
        so another id stands in for it.
        """
        pad = cast(int, self.tokenizer.pad_token_id)
        return pad if pad < self.words else 0

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def hidden_states(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        response_ids: Int[Tensor, "batch token"],
        response_mask: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "batch token+1 hidden"]:
        """See `LanguageModel`; gradients flow."""
        return trunk_states(
            trunk_of(self.model),
            prompt_ids,
            prompt_mask,
            response_ids,
            response_mask,
            model=self.model,
            precision=self.precision,
        )

    def identity(self) -> Identity:
        """Which model this is now."""
        release(self.model)
        return _identity(self, "loaded", base_weights(self.model))

    def gather_weights(self, *, keep: bool) -> dict[str, Tensor] | None:
        """The weights of a divided policy for `save`; all processes together. None: it is whole.

        Args:
            keep: whether this process is the one that saves them.
        """
        if self.sharding is None:
            return None
        return gather_weights(self.model, self.adapter, keep=keep)

    def save(self, path: str | Path, *, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write model (or adapter) and tokenizer in Hugging Face format, as safetensors.

        What was written is verified; see `checkpoint`.

        Args:
            path: the directory.
            tensors: what `gather_weights` gave, of a divided policy; `verify` is then to follow.

        Raises:
            ModelError: it does not open as this policy.
        """
        save_policy(
            path,
            self.model,
            self.tokenizer,
            words=self.words,
            adapter=self.adapter,
            base=self.path,
            merged=self.merged is not None,
            tensors=tensors,
        )

    def verify(self, path: str | Path, mesh: Mesh) -> None:
        """Of a divided policy: the first of its checkpoints opens as this policy.

        Raises:
            ModelError: it does not.
        """
        if self.sharding is not None:
            verify_sharded(Path(path), self.model, mesh, words=self.words, precision=self.precision)

    def restore(self, path: str | Path) -> None:
        """Take the weights that `save` wrote.

        Raises:
            RunError: the directory holds another model.
        """
        restore_policy(Path(path), self.model, adapter=self.adapter)


@dataclass(frozen=True, eq=False)
class Reference:
    """The model that stays: no gradient, no change."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: str
    words: int
    how: str
    adapter: Any = None
    """If set, `model` is the policy's own and is read with this adapter off."""
    revision: str | None = None
    merged: str | None = None
    """Directory of the adapter that was merged into the weights when they were loaded."""
    precision: Precision = "float32"
    """In which it computes; see `precision`."""

    @property
    def head(self) -> Head:
        """The head; where it is the policy's own, as it was before it was trained."""
        off = contextlib.nullcontext() if self.adapter is None else self.adapter.disable_adapter()
        gather_ends(self.model)
        with off:
            return read_head(self.model, self.words)

    def hidden_states(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        response_ids: Int[Tensor, "batch token"],
        response_mask: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "batch token+1 hidden"]:
        """See `LanguageModel`; no gradient flows, whatever the caller's mode."""
        off = contextlib.nullcontext() if self.adapter is None else self.adapter.disable_adapter()
        with off, torch.no_grad():
            return trunk_states(
                trunk_of(self.model),
                prompt_ids,
                prompt_mask,
                response_ids,
                response_mask,
                model=self.model,
                precision=self.precision,
            )

    def identity(self) -> Identity:
        """Which model this is: it must say the same at the end of a run as at its start."""
        return _identity(self, self.how, self._weights())

    def fingerprint(self) -> int:
        """A number that is cheap to read and changes when a weight does."""
        return weights_sum(self._weights())

    def _weights(self) -> Iterable[tuple[str, Tensor]]:
        """The weights it reads with."""
        release(self.model)
        return all_weights(self.model) if self.adapter is None else base_weights(self.model)


def load_policy(
    path: str | Path,
    *,
    dtype: Dtype = "float32",
    device: str = "cpu",
    attention: Attention = "auto",
    adapter: AdapterSpec | None = None,
    revision: str | None = None,
    merge: str | None = None,
    padded: bool = True,
    sharding: Sharding | None = None,
    quantization: Quantization = "none",
) -> Policy:
    """Open the model that will learn.

    Args:
        path: a Hugging Face directory or hub name of a causal language model, with tokenizer.
        dtype: of the parameters; "auto" is that of the file.
        device: a torch device.
        attention: implementation of attention; "auto" leaves the choice to the library.
        adapter: train only a LoRA adapter; the reference is then the model with it off.
        revision: of a hub name.
        merge: directory of an adapter to merge into the weights first: where supervised training
            left an adapter, the policy begins as base + that adapter, and so does the reference.
            Its own tokenizer, chat template and added rows are used, where it has them.
        sharding: divide the model among processes; it is never whole in one of them, unless its
            files have to be opened as a whole (`sharded_loading`).
        padded: whether texts will be read padded: then padding must change nothing, which is
            measured.
        quantization: how the base under an adapter is kept; see `quantization`.

    Raises:
        ModelError: if the model or tokenizer cannot be used; see `loading`, `merging`, `lm_head`
            and `probing`.
    """
    wrapped = structure = None
    if sharding is None:
        model = load_merged(path, merge, dtype, device, attention, revision, quantization)
    else:
        assert quantization == "none", "a configuration refuses to divide quantised weights"
        opened = open_divided(path, merge, dtype, attention, revision, sharding, adapter)
        model, wrapped, structure = opened.model, opened.adapter, opened.structure
    tokenizer = tokenizer_of(path, merge, revision)
    require_special_tokens(tokenizer, path)
    words = _checked_words(model, tokenizer, path, padded=padded)
    if sharding is None and adapter is not None:
        wrapped = add_adapter(model, adapter, revision=revision)
    return Policy(
        model=model,
        tokenizer=tokenizer,
        path=str(path),
        words=words,
        stop_ids=stop_ids(model, tokenizer),
        adapter=wrapped,
        revision=revision,
        merged=merge,
        sharding=sharding,
        structure=structure,
    )


def load_reference(
    path: str | Path,
    *,
    dtype: Dtype = "float32",
    device: str = "cpu",
    attention: Attention = "auto",
    revision: str | None = None,
    merge: str | None = None,
    sharding: Sharding | None = None,
    quantization: Quantization = "none",
) -> Reference:
    """Open a frozen reference of its own; the arguments are those of `load_policy`.

    Raises:
        ModelError: if the model or tokenizer cannot be used.
    """
    if sharding is None:
        model = load_merged(path, merge, dtype, device, attention, revision, quantization)
    else:
        assert quantization == "none", "a configuration refuses to divide quantised weights"
        opened = open_divided(path, merge, dtype, attention, revision, sharding, frozen=True)
        model = opened.model
    tokenizer = tokenizer_of(path, merge, revision)
    words = _checked_words(model, tokenizer, path, padded=True)
    model.requires_grad_(False)
    return Reference(model, tokenizer, str(path), words, "loaded", revision=revision, merged=merge)


def freeze_copy(policy: Policy) -> Reference:
    """Freeze the policy as it is now: a copy that shares no storage with it.

    With an adapter there is nothing to copy: the reference is the same model with the adapter off.
    """
    if policy.adapter is not None:
        model, how = policy.model, "policy with its adapter off"
    elif policy.sharding is not None and policy.structure is not None:
        how = "copy of the policy"
        model = divided_copy(policy.sharding, policy.structure, policy.model)
    else:
        model, how = frozen_copy(policy.model, policy.precision), "copy of the policy"
    return Reference(
        model,
        policy.tokenizer,
        policy.path,
        policy.words,
        how,
        policy.adapter,
        revision=policy.revision,
        merged=policy.merged,
        precision=policy.precision,
    )


def check_compatible(policy: Policy, reference: Reference) -> SharedVocabulary:
    """Check that policy and reference speak of the same tokens and that the reference is frozen.

    Returns:
        The tokens that both can produce; score both over these.

    Raises:
        ModelError: naming the first difference of their basic vocabularies, the token that ends
            the policy's responses and that the reference lacks, or the parameter that the
            reference shares with the policy or would train.
    """
    words = policy.words, reference.words
    shared = shared_vocabulary(
        policy.tokenizer, reference.tokenizer, words=words, path=reference.path
    )
    require_shared_ending(policy.tokenizer, policy.stop_ids, shared, policy.path)
    if reference.adapter is not None:
        return shared
    for model in (policy.model, reference.model):
        release(model)
    # A slice of a divided weight may be empty, and has no address then.
    learning = {own(p).data_ptr() for p in policy.model.parameters() if own(p).numel()}
    for name, parameter in reference.model.named_parameters():
        if parameter.requires_grad or own(parameter).data_ptr() in learning:
            raise ModelError(
                f"expected a frozen reference of its own, got {name!r} that learns or is shared "
                "with the policy: make the reference with freeze_copy or load_reference"
            )
    return shared


def compare_tokenizers(
    ours: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, role: str, path: str
) -> None:
    """Check that two tokenizers give every token, special ones included, the same id.

    Raises:
        ModelError: naming the first token whose ids differ.
    """
    mine, theirs = ours.get_vocab(), other.get_vocab()
    for token in sorted(mine.keys() | theirs.keys()):
        if mine.get(token) != theirs.get(token):
            raise ModelError(
                f"expected the {role} in {path!r} to have the policy's vocabulary, got token "
                f"{token!r} with id {mine.get(token)} in the policy and {theirs.get(token)} in the "
                f"{role} ({len(mine)} and {len(theirs)} tokens): take models of one tokenizer"
            )
    for special in ("bos_token_id", "eos_token_id"):
        if getattr(ours, special) != getattr(other, special):
            raise ModelError(
                f"expected the {role} in {path!r} to have the policy's special tokens, got "
                f"{special} {getattr(ours, special)} in the policy and "
                f"{getattr(other, special)} in the {role}"
            )


def context_length(model: PreTrainedModel) -> int | None:
    """Number of positions a model has; None if its configuration names no limit."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def _checked_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path, *, padded: bool
) -> int:
    rows = read_head(model, 1).weight.shape[0]
    words = number_of_words(tokenizer, rows, path)
    gather_ends(model)
    with own_code(model, path):
        check_causal(trunk_of(model), path)
        check_head(model, read_head(model, words), path)
        if padded:
            check_padding(model, words, path)
    require_exact_products(model)
    release(model)
    return words


def _identity(
    owner: Policy | Reference, how: str, weights: Iterable[tuple[str, Tensor]]
) -> Identity:
    return Identity(
        path=owner.path,
        how=how,
        dtype=str(read_head(owner.model, 1).weight.dtype).removeprefix("torch."),
        sha256=weights_sha256(weights),
        revision=owner.revision,
        merged=owner.merged,
    )
