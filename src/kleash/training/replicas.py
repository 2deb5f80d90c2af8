"""Every process came to the same step: digests are compared, and one that differs is named."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256

from kleash.errors import RunError
from kleash.models.fingerprint import weights_sum
from kleash.training.metrics import Number
from kleash.training.random_state import random_states
from kleash.training.session import Session

_CLOCK = ("seconds", "tokens_per_second")
"""Measured by each process for itself, beside all that begins with `time/`."""


def require_same_step(metrics: Mapping[str, Number], session: Session) -> None:
    """Compare what every process decided in a step, and what it goes on from.

    Compared are the metrics but for timings, the state of the run, the random generator of the CPU
    and the bits of all weights that every process holds whole.

    Raises:
        RunError: naming the processes that differ from most others, and the first number that does.
    """
    mesh = session.components.mesh
    if mesh.size == 1:
        return
    numbers = {
        key: value
        for key, value in metrics.items()
        if key not in _CLOCK and not key.startswith("time/")
    }
    parts = {
        **numbers,
        "state": {**asdict(session.state), "seconds": None},
        "random numbers": sha256(random_states()["cpu"].numpy().tobytes()).hexdigest(),
        "weights": weights_sum(
            (str(i), p) for i, p in enumerate(session.components.replicated_parameters())
        ),
    }
    digests = mesh.gather(_digest(parts))
    usual, count = Counter(digests).most_common(1)[0]
    if count == mesh.size:
        return
    said = mesh.gather({key: json.dumps(value, default=str) for key, value in parts.items()})
    other = [rank for rank, digest in enumerate(digests) if digest != usual]
    of_usual = said[digests.index(usual)]
    key = next(key for key in of_usual if said[other[0]].get(key) != of_usual[key])
    raise RunError(
        f"expected the same step {session.state.step} in all {mesh.size} processes, got another in "
        f"process {', '.join(map(str, other))}: {key} is {said[other[0]].get(key)} there and "
        f"{of_usual[key]} elsewhere; give all of them the same machine, libraries and files, and "
        "resume from the newest checkpoint"
    )


def _digest(parts: Mapping[str, object]) -> str:
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
