"""The policy of a run, its reference and its teacher, opened where the configuration wants them."""

from dataclasses import replace
from typing import cast

import torch

from kleash.config.algorithm import (
    TeacherConfig,
)
from kleash.config.leash import ReferenceConfig
from kleash.config.schema import (
    PolicyConfig,
)
from kleash.errors import ConfigError
from kleash.mesh import Mesh, is_distributed, own_gpu
from kleash.models.frozen_weights import shrink_frozen
from kleash.models.lora import AdapterSpec
from kleash.models.policy import (
    Policy,
    Reference,
    check_compatible,
    freeze_copy,
    load_policy,
    load_reference,
)
from kleash.models.precision import compute_dtype, weights_dtype
from kleash.models.quantization import compute_in
from kleash.models.recomputation import enable_recomputation
from kleash.models.reference_offload import (
    FrozenReference,
    OffloadedReference,
    open_cache,
    underlying,
)
from kleash.models.sharding import Sharding, is_sharded
from kleash.models.trunk import trunk_of
from kleash.training.teacher import load_teacher


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one (of several processes each its own), else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{own_gpu()}" if is_distributed() else "cuda"
    elif is_distributed() and name != "cpu":
        raise ConfigError(f"with several processes each takes a GPU of its own, got {name!r}: auto")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"expected a device this machine has, got {name!r}: {reason}") from None
    return device


def load_models(
    policy_section: PolicyConfig,
    reference_section: ReferenceConfig,
    device: torch.device,
    *,
    teacher_section: TeacherConfig | None = None,
    sharding: Sharding | None = None,
    mesh: Mesh | None = None,
) -> tuple[Policy, FrozenReference, Reference | None]:
    """The policy of a run at its start, its reference, and its teacher if that is another model.

    Tokens that one of them lacks have probability 0 for all.

    Raises:
        ModelError: they cannot be used, or not together.
    """
    policy = _policy(policy_section, device, sharding)
    teacher = load_teacher(teacher_section, policy_section, policy, device)
    if teacher is not None:
        policy = replace(policy, words=teacher.words)
    mesh = Mesh() if mesh is None else mesh
    reference = _reference(reference_section, policy_section, policy, device, mesh)
    policy = replace(policy, words=underlying(reference).words)
    if teacher is not None:
        teacher = replace(teacher, words=policy.words)
    return policy, reference, teacher


def _policy(section: PolicyConfig, device: torch.device, sharding: Sharding | None) -> Policy:
    lora = section.lora
    adapter = None
    if lora is not None:
        targets = () if lora.targets == "auto" else tuple(lora.targets)
        adapter = AdapterSpec(
            rank=lora.rank,
            alpha=lora.alpha,
            targets=targets,
            modules_to_save=tuple(lora.modules_to_save),
        )
    policy = load_policy(
        section.path,
        dtype=weights_dtype(section.precision, frozen=section.base_is_frozen),
        device=str(device),
        attention=section.attention,
        adapter=adapter,
        revision=section.revision,
        merge=section.adapter,
        sharding=sharding,
        quantization=section.quantization,
    )
    compute_in(policy.model, compute_dtype(section.precision))
    if section.gradient_checkpointing:
        enable_recomputation(trunk_of(policy.model))
    return replace(policy, precision=section.precision)


def _reference(
    wanted: ReferenceConfig, start: PolicyConfig, policy: Policy, device: torch.device, mesh: Mesh
) -> FrozenReference:
    """The reference, where the configuration wants it to live."""
    own = wanted.path is None
    kind = wanted.kind
    alike = wanted.quantization == start.quantization
    if kind == "adapter_off" or (kind == "copy" and own and alike and policy.adapter is None):
        return freeze_copy(policy)
    # What the policy was loaded from, if no path is given: base and merged adapter, nothing new.
    source = start if wanted.path is None else wanted
    reference = load_reference(
        cast(str, source.path),
        dtype=weights_dtype(start.precision, frozen=start.base_is_frozen),
        device="cpu" if kind == "cpu_offload" else str(device),
        attention=start.attention,
        revision=source.revision,
        merge=source.adapter,
        sharding=None if kind == "cpu_offload" else policy.sharding,
        quantization="none" if wanted.quantization == "auto" else wanted.quantization,
    )
    compute_in(reference.model, compute_dtype(start.precision))
    if not is_sharded(reference.model):
        shrink_frozen(reference.model, start.precision)
    words = check_compatible(policy, reference).words
    reference = replace(reference, words=words, precision=start.precision)
    match kind:
        case "cpu_offload":
            return OffloadedReference(reference, device)
        case "cached":
            opened = mesh.first(lambda: open_cache(reference, cast(str, wanted.cache)))
            return opened if mesh.size == 1 else opened.of_process(mesh.rank, mesh.size)
        case "copy":
            return reference
        case "auto":
            raise AssertionError("a Config says what `reference.kind: auto` stands for")
