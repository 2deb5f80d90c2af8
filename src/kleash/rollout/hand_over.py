"""The policy's weights to an engine that holds its own, and the proof that they arrived.

After each hand-over both read a few fixed texts, and their log-probabilities must agree to the
rounding of two implementations. Where they do not, the engine is asked for the cause: groups of
parameters (a layer, the embedding, the head) are sent again one by one. A group whose second coming
changes the answers had not arrived the first time; one whose values change nothing, whatever they
are, is not taken at all.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from kleash.errors import EngineError, EngineLostError
from kleash.mesh import ALONE, Mesh
from kleash.models.fingerprint import weights_sum
from kleash.models.policy import Policy
from kleash.models.probing import LENGTH, probe_texts, text_logprobs
from kleash.models.sharding import release, whole
from kleash.rollout.engine import NamedTensors, SeparateEngine, WritingRequest
from kleash.types import Rollout

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of log-probabilities that rounding makes, relative to the largest of them (at
least 1); in half precision every layer rounds, and two implementations round in other places."""
PROBE_TOKENS = LENGTH + 1
"""What an engine must be able to read to be verified: a fixed text and one more token."""
_PIECE = 2**30
_CHANGED = 1e-7
"""A smaller change of the answers is none."""
_LAYER = re.compile(r"(.+?\.\d+)\.")


def hand_over(engine: SeparateEngine, policy: Policy, *, mesh: Mesh = ALONE) -> bool:
    """Make sure that the engine holds the policy's weights as they are now.

    They are sent if they are others than those sent last, or if the engine, restarted in the
    meantime, has forgotten those; that it holds them is proven every time.

    Args:
        engine: what writes.
        policy: whose weights; those of an adapter are merged into the matrices they change.
        mesh: the processes of the run, all of which call this together.

    Returns:
        Whether anything was sent.

    Raises:
        EngineError: the engine holds other weights afterwards, which names the groups of
            parameters that differ; or it did not answer.
    """
    release(policy.model)
    current = weights_sum(policy.model.named_parameters())
    probe = _Probe(engine, policy, mesh)
    if engine.loaded == current and probe.difference() <= probe.tolerance:
        return False
    # Whatever happens from here on, the engine's weights are unproven.
    engine.loaded = None
    engine.load_weights(policy_weights(policy))
    _require_agreement(probe)
    engine.loaded = current
    return True


def write_with(
    engine: SeparateEngine, policy: Policy, request: WritingRequest, *, mesh: Mesh = ALONE
) -> Rollout:
    """Let an engine write with the policy's weights; if it is lost on the way, once more.

    The second time it is given the same seeds, and the weights again, so what it writes is what it
    would have written.

    Raises:
        EngineError: as `hand_over` and `RolloutEngine.write`.
    """
    try:
        hand_over(engine, policy, mesh=mesh)
        return engine.write(request)
    except EngineLostError:
        engine.wait_until_back()
        hand_over(engine, policy, mesh=mesh)
        return engine.write(request)


def policy_weights(policy: Policy, *, group: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names of a checkpoint of the plain model, one tensor at a time.

        W + (alpha / rank) · B A     for a matrix with an adapter; computed in float32

    A divided weight is gathered when it is asked for, and every process has to ask for it.
    Embedding and head end with the policy's words. Where they are one matrix it comes under both
    names: an engine keeps them apart, for vLLM on a CPU packs the head when it loads it and leaves
    a tied one as it was when new weights come.

    Args:
        policy: whose weights.
        group: those of one `parameter_group` alone; None: all.
    """
    layers = dict(policy.model.named_modules())
    tables = _tables(policy)
    for plain, name, tensor in _plain_weights(policy):
        if group is not None and parameter_group(plain) != group:
            continue
        layer: Any = layers.get(name.rpartition(".base_layer.")[0])
        value = whole(tensor.detach())
        if layer is not None and name.endswith(".base_layer.weight"):
            delta = whole(layer.get_delta_weight("default").detach())
            value = (value.float() + delta.float()).to(value.dtype)
        yield plain, value[: policy.words] if plain.startswith(tables) else value


def _plain_weights(policy: Policy) -> Iterator[tuple[str, str, Tensor]]:
    """Name in a checkpoint of the plain model, name here, and the weight, as it lies here."""
    tables = _tables(policy)
    seen: set[int] = set()
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if "lora_" in name or ".original_module." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        if id(tensor) in seen and not plain.startswith(tables):
            continue
        seen.add(id(tensor))
        yield plain, name, tensor


def write_weights(weights: NamedTensors, folder: Path, *, piece: int = _PIECE) -> None:
    """Weights as files of safetensors, in the place of those that a folder holds.

    Args:
        weights: names and tensors; no two of the written ones share their numbers.
        folder: where the files go.
        piece: bytes from which on a file is finished; no more of the model is held here at once.
    """
    for file in folder.glob("*.safetensors"):
        file.unlink()
    held: dict[str, Tensor] = {}
    files = 0

    def finish() -> None:
        nonlocal files
        save_file(held, folder / f"weights-{files:05d}.safetensors", metadata={"format": "pt"})
        held.clear()
        files += 1

    for name, tensor in weights:
        held[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if sum(t.nbytes for t in held.values()) >= piece:
            finish()
    if held:
        finish()


def _tables(policy: Policy) -> tuple[str, ...]:
    """How the names of the embedding's and the head's tensors begin."""
    ends = (policy.model.get_input_embeddings(), policy.model.get_output_embeddings())
    return tuple(f"{name}." for name, one in policy.model.named_modules() if one in ends)


def parameter_group(name: str) -> str:
    """The group that a parameter is named by: its numbered layer, or its own module.

    Example:
        >>> parameter_group("model.layers.3.mlp.up_proj.weight")
        'model.layers.3'
        >>> parameter_group("model.embed_tokens.weight")
        'model.embed_tokens'
    """
    layer = _LAYER.match(name)
    return layer[1] if layer else name.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class _Probe:
    """Both sides read the same few texts."""

    engine: SeparateEngine
    policy: Policy
    mesh: Mesh

    @property
    def tolerance(self) -> float:
        """See `_TOLERANCE`; the coarser type where a model has several."""
        return max(_TOLERANCE[p.dtype] for p in self.policy.model.parameters())

    def ours(self) -> Float[Tensor, "text token"]:
        ids = probe_texts(self.policy.words, device=self.policy.device)
        laws = text_logprobs(self.policy.model, ids, self.policy.words)[:, :-1]
        release(self.policy.model)
        return laws.gather(2, ids[:, 1:, None].cpu()).squeeze(2)

    def theirs(self) -> Float[Tensor, "text token"]:
        ids = probe_texts(self.policy.words)
        return torch.stack(self.engine.text_logprobs(ids.tolist()))

    def difference(self) -> float:
        """Between the two, relative to the largest log-probability; see `_apart`.

        That of the first process, for what follows from it must be the same in all.
        """
        return self.mesh.gather(_apart(self.ours(), self.theirs()))[0]


def _apart(ours: Float[Tensor, "text token"], theirs: Float[Tensor, "text token"]) -> float:
    """The largest difference, relative to the largest log-probability (at least 1).

    Infinite where a number is not finite.
    """
    scale = max(1.0, float(ours.abs().max()))
    return float((ours - theirs).abs().nan_to_num(torch.inf).max()) / scale


def _require_agreement(probe: _Probe) -> None:
    found, tolerance = probe.difference(), probe.tolerance
    if found <= tolerance:
        return
    stale, refused = _groups_at_fault(probe)
    still = probe.difference()
    if refused:
        cause = f"whatever is sent for {_listed(refused)} changes nothing in it"
    elif stale:
        cause = f"{_listed(stale)} had not arrived, and arrived when sent again"
    else:
        cause = "every group of parameters arrives"
    if still > tolerance:
        cause += (
            f"; with all of them sent again it still differs by {still:.3g}: it serves another "
            "model or type of numbers, or computes this architecture otherwise"
        )
    raise EngineError(
        "expected the engine to hold the policy's weights after they were handed over, got "
        f"log-probabilities of fixed texts with a relative difference of {found:.3g} (rounding "
        f"makes at most {tolerance:g}): {cause}; restart the engine and resume the run"
    )


def _groups_at_fault(probe: _Probe) -> tuple[list[str], list[str]]:
    """Groups that had not arrived, and groups that the engine does not take."""
    stale: list[str] = []
    refused: list[str] = []
    answers = probe.theirs()
    groups = dict.fromkeys(parameter_group(name) for name, _, _ in _plain_weights(probe.policy))
    for group in groups:
        probe.engine.load_weights(_of_group(probe.policy, group, 1.0))
        again = probe.theirs()
        if _apart(answers, again) > _CHANGED:
            stale.append(group)
        else:
            # The same answers: because they were right before, or because nothing is taken.
            probe.engine.load_weights(_of_group(probe.policy, group, 1.5))
            if _apart(again, probe.theirs()) <= _CHANGED:
                refused.append(group)
            probe.engine.load_weights(_of_group(probe.policy, group, 1.0))
            again = probe.theirs()
        answers = again
    return stale, refused


def _of_group(policy: Policy, group: str, factor: float) -> NamedTensors:
    for name, tensor in policy_weights(policy, group=group):
        yield name, tensor * factor


def _listed(groups: list[str]) -> str:
    return ", ".join(groups[:4]) + (f" and {len(groups) - 4} more" if len(groups) > 4 else "")
