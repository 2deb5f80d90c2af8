"""Where the frozen reference lives: beside the policy, inside it, in main memory, or on the disk.

    copy           a model of its own, on the policy's device
    adapter_off    the policy's own weights, read with its adapter off; no second copy
    cpu_offload    a model of its own in main memory, lent to the device for each reading
    cached         one of the others, whose hidden states are kept on the disk and read again

All give the same log-probabilities. `copy` and `adapter_off` are `models.Reference` itself; here
are the other two, and the anchor: a policy of some step, frozen, to which the leash is moved.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kleash.errors import ModelError
from kleash.models.frozen_weights import divided_copy, frozen_copy
from kleash.models.policy import Identity, LanguageModel, Policy, Reference
from kleash.models.trunk import trunk_of, trunk_states
from kleash.storage.atomic_files import replace_file
from kleash.types import Head


@runtime_checkable
class FrozenReference(LanguageModel, Protocol):
    """A language model that can prove that it is still the one it was."""

    def identity(self) -> Identity:
        """Which model this is, hashed from its weights as they are now."""
        ...

    def fingerprint(self) -> int:
        """A number that is cheap to read and changes when a weight does."""
        ...


@dataclass(frozen=True, eq=False)
class OffloadedReference:
    """A reference whose weights stay in main memory.

    For each reading copies of the weights go to the device and are given up afterwards: the
    device holds them while the reference reads, and not while the policy learns, which is when
    memory is dearest. On a CPU nothing is copied.
    """

    inner: Reference
    """On the CPU."""
    device: torch.device
    """Where the readings happen."""

    @property
    def head(self) -> Head:
        """The head, on the device: it is multiplied with the policy's states there."""
        head = self.inner.head
        bias = None if head.bias is None else head.bias.to(self.device)
        return dataclasses.replace(head, weight=head.weight.to(self.device), bias=bias)

    def hidden_states(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        response_ids: Int[Tensor, "batch token"],
        response_mask: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "batch token+1 hidden"]:
        """See `LanguageModel`; no gradient flows."""
        trunk = trunk_of(self.inner.model)
        named = [*trunk.named_parameters(), *trunk.named_buffers()]
        lent = {name: tensor.detach().to(self.device) for name, tensor in named}
        with torch.no_grad():
            return trunk_states(
                trunk,
                prompt_ids,
                prompt_mask,
                response_ids,
                response_mask,
                weights=lent,
                precision=self.inner.precision,
            )

    def identity(self) -> Identity:
        """See `FrozenReference`."""
        return self.inner.identity()

    def fingerprint(self) -> int:
        """See `FrozenReference`; the weights are read where they lie."""
        return self.inner.fingerprint()


@dataclass(frozen=True, eq=False)
class CachedReference:
    """A reference that reads no text twice: its hidden states are kept in a directory.

    A file per text, named by a hash of the tokens, in a directory that belongs to one identity.
    Hidden states are kept rather than log-probabilities, because the exact KL needs the whole
    distribution; they do not depend on the temperature, so neither does the name.

    When it helps: where the same tokens come again. That is so for fixed texts, for a run that is
    repeated or resumed, and for several runs that begin with the same rollouts. Tokens that a
    policy has just sampled are almost always new, and for them it costs what writing them costs:
    4 bytes × tokens × hidden width.

    Where one text of a batch is new, the whole batch is read, and texts that are known keep their
    old numbers: numbers then depend neither on luck nor on interruptions, to the last bit.
    """

    inner: Reference
    folder: Path

    @property
    def head(self) -> Head:
        """The head."""
        return self.inner.head

    def hidden_states(
        self,
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        response_ids: Int[Tensor, "batch token"],
        response_mask: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "batch token+1 hidden"]:
        """See `LanguageModel`; no gradient flows. States after the last token's are 0."""
        lengths = [int(n) + 1 for n in response_mask.sum(dim=1)]
        files = [
            self.folder / f"{_name_of(prompt[given], response[written])}.safetensors"
            for prompt, given, response, written in zip(
                prompt_ids, prompt_mask, response_ids, response_mask, strict=True
            )
        ]
        known = {file: _read(file, prompt_ids.device) for file in files if file.exists()}
        if len(known) < len(set(files)):
            read = self.inner.hidden_states(prompt_ids, prompt_mask, response_ids, response_mask)
            for states, length, file in zip(read, lengths, files, strict=True):
                if file not in known:
                    known[file] = states[:length].clone()
                    _write(file, known[file])
        shape = (len(files), response_ids.shape[1] + 1, known[files[0]].shape[-1])
        together = known[files[0]].new_zeros(shape)
        for row, (file, length) in enumerate(zip(files, lengths, strict=True)):
            together[row, :length] = known[file]
        return together

    def identity(self) -> Identity:
        """See `FrozenReference`."""
        return self.inner.identity()

    def fingerprint(self) -> int:
        """See `FrozenReference`."""
        return self.inner.fingerprint()

    def of_process(self, rank: int, size: int) -> "CachedReference":
        """The part of the cache that one of several processes keeps: the rows it reads.

        Did they share their files, a text that two of them come to at once would have the numbers
        of whichever was faster.
        """
        folder = self.folder / f"process-{rank}-of-{size}"
        folder.mkdir(exist_ok=True)
        return dataclasses.replace(self, folder=folder)


def open_cache(reference: Reference, folder: str | Path) -> CachedReference:
    """Keep a reference's hidden states in a directory that is its own.

    Args:
        reference: who reads what is not there yet.
        folder: the directory; made if missing.

    Raises:
        ModelError: the directory was begun with another reference, or holds something else.
    """
    folder = Path(folder)
    file, now = folder / "identity.json", reference.identity()
    if file.is_file():
        stored = cast("dict[str, str]", json.loads(file.read_text(encoding="utf-8")))
        if stored.get("sha256") != now.sha256:
            raise ModelError(
                f"the cache in {str(folder)!r} belongs to another reference: {stored.get('path')} "
                f"with weights {str(stored.get('sha256'))[:12]}…, got {now.path} with "
                f"{now.sha256[:12]}…; give each reference a directory of its own"
            )
    elif folder.exists() and any(not found.name.startswith(".") for found in folder.iterdir()):
        raise ModelError(
            f"expected an empty directory or a cache at {str(folder)!r}, got one with other "
            "files and no identity.json: give another directory"
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(dataclasses.asdict(now), indent=1))
    return CachedReference(reference, folder)


def anchor_at(policy: Policy, step: int, *, like: FrozenReference) -> FrozenReference:
    """The policy as it is after a step, frozen, its adapter included; shares no storage with it.

    Args:
        policy: the policy.
        step: the step, for its identity.
        like: a reference; the anchor lives in main memory if this one does.
    """
    if policy.sharding is not None and policy.structure is not None:
        model = divided_copy(policy.sharding, policy.structure, policy.model)
    else:
        model = frozen_copy(policy.model, policy.precision)
    # A divided anchor takes the device one slice, and stays there.
    offloaded = isinstance(like, OffloadedReference) and policy.sharding is None
    anchor = Reference(
        model.cpu() if offloaded else model,
        policy.tokenizer,
        policy.path,
        policy.words,
        f"policy after step {step}",
        revision=policy.revision,
        merged=policy.merged,
        precision=policy.precision,
    )
    return OffloadedReference(anchor, policy.device) if offloaded else anchor


def underlying(reference: FrozenReference) -> Reference:
    """The reference that does the reading, wherever its weights or its numbers are kept."""
    assert isinstance(reference, Reference | OffloadedReference | CachedReference)
    return reference if isinstance(reference, Reference) else reference.inner


def _name_of(prompt: Int[Tensor, " given"], response: Int[Tensor, " written"]) -> str:
    text = ",".join(map(str, prompt.tolist())) + "|" + ",".join(map(str, response.tolist()))
    return hashlib.sha256(text.encode()).hexdigest()


def _read(file: Path, device: torch.device) -> Float[Tensor, "length hidden"]:
    try:
        return load_file(file, device=str(device))["hidden"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(
            f"the cache file {str(file)!r} is damaged: {error}; delete it and it is made anew"
        ) from None


def _write(file: Path, states: Float[Tensor, "length hidden"]) -> None:
    """Whole or not at all: a killed process leaves a temporary name behind, and no half text."""
    temporary = file.with_suffix(".tmp")
    save_file({"hidden": states.contiguous()}, temporary)
    temporary.replace(file)
