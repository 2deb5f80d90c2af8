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
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kleash.errors import EngineError
from kleash.models.fingerprint import weights_sum
from kleash.models.policy import Policy
from kleash.models.probing import distance, probe_texts, text_logprobs
from kleash.rollout.engine import NamedTensors, SeparateEngine

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest distance of two laws of a token (`probing.distance`) that rounding explains, in nats; in
half precision every layer rounds, and the two implementations round in other places."""
_CHANGED = 1e-7
"""A smaller change of the answers is none."""
_LAYER = re.compile(r"(.+?\.\d+)\.")


def hand_over(engine: SeparateEngine, policy: Policy) -> bool:
    """Give the engine the policy's weights, if they are other than those it was given last.

    Args:
        engine: what writes.
        policy: whose weights; those of an adapter are merged into the matrices they change.

    Returns:
        Whether anything was handed over.

    Raises:
        EngineError: the engine holds other weights afterwards, which names the groups of
            parameters that differ; or it did not answer.
    """
    current = weights_sum(policy.model.named_parameters())
    if engine.loaded == current:
        return False
    # Whatever happens from here on, the engine's weights are unproven.
    before, engine.loaded = engine.loaded, None
    engine.load_weights(policy_weights(policy))
    _require_agreement(engine, policy, first=before is None)
    engine.loaded = current
    return True


def policy_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names of a checkpoint of the plain model, one tensor at a time.

        W + (alpha / rank) · B A     for a matrix with an adapter; computed in float32

    Tied matrices come once, under the name that comes first.
    """
    layers = dict(policy.model.named_modules())
    seen: set[int] = set()
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if "lora_" in name or ".original_module." in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        layer: Any = layers.get(name.rpartition(".base_layer.")[0])
        value = tensor.detach()
        if layer is not None and name.endswith(".base_layer.weight"):
            delta = layer.get_delta_weight("default").detach()
            value = (value.float() + delta.float()).to(value.dtype)
        yield plain, value


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

    def ours(self) -> list[Float[Tensor, "token vocab"]]:
        ids = probe_texts(self.policy.words, device=self.policy.device)
        return list(text_logprobs(self.policy.model, ids, self.policy.words)[:, :-1])

    def theirs(self) -> list[Float[Tensor, "token vocab"]]:
        ids = probe_texts(self.policy.words)
        return self.engine.next_token_logprobs(ids.tolist())

    def apart(self, ours: list[Tensor], theirs: list[Tensor]) -> float:
        """The largest distance of two laws, in nats; infinite where a number is not finite."""
        found = torch.stack([distance(a, b).max() for a, b in zip(ours, theirs, strict=True)])
        return float(found.nan_to_num(torch.inf).max())


def _require_agreement(engine: SeparateEngine, policy: Policy, *, first: bool) -> None:
    probe = _Probe(engine, policy)
    ours, theirs = probe.ours(), probe.theirs()
    dtype = next(p.dtype for p in policy.model.parameters())
    tolerance = _TOLERANCE[dtype]
    found = probe.apart(ours, theirs)
    if found <= tolerance:
        return
    stale, deaf = _groups_at_fault(probe, theirs)
    still = probe.apart(ours, probe.theirs())
    if deaf:
        cause = f"whatever is sent for {_listed(deaf)} changes nothing in it"
    elif stale:
        cause = f"{_listed(stale)} had not arrived and changed when sent again"
    else:
        cause = "every group of parameters arrives"
    if still > tolerance:
        cause += (
            f", and with all of them sent again it still differs by {still:.3g}: it serves another "
            "model or type of numbers, or computes this architecture otherwise"
        )
    when = "the first hand-over" if first else "a hand-over"
    raise EngineError(
        f"expected the engine to hold the policy's weights after {when}, got log-probabilities "
        f"of fixed texts that differ by {found:.3g} nats (rounding makes {tolerance:g}): {cause}; "
        "restart the engine and resume the run"
    )


def _groups_at_fault(probe: _Probe, answers: list[Tensor]) -> tuple[list[str], list[str]]:
    """Groups that had not arrived, and groups that the engine does not take."""
    stale: list[str] = []
    deaf: list[str] = []
    groups = dict.fromkeys(parameter_group(name) for name, _ in policy_weights(probe.policy))
    for group in groups:
        probe.engine.load_weights(_of_group(probe.policy, group, 1.0))
        again = probe.theirs()
        if probe.apart(answers, again) > _CHANGED:
            stale.append(group)
        else:
            # The same answers: because they were right before, or because nothing is taken.
            probe.engine.load_weights(_of_group(probe.policy, group, 1.5))
            if probe.apart(again, probe.theirs()) <= _CHANGED:
                deaf.append(group)
            probe.engine.load_weights(_of_group(probe.policy, group, 1.0))
            again = probe.theirs()
        answers = again
    return stale, deaf


def _of_group(policy: Policy, group: str, factor: float) -> NamedTensors:
    for name, tensor in policy_weights(policy):
        if parameter_group(name) == group:
            yield name, tensor * factor


def _listed(groups: list[str]) -> str:
    return ", ".join(groups[:4]) + (f" and {len(groups) - 4} more" if len(groups) > 4 else "")
