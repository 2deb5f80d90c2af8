"""Two distributions written out, and every term of the KL between them.

Plain floats and no torch, so that `kleash kl` prints at once. The tests hold it against
`kleash.kl.exact` and against scipy.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ExplicitKL:
    """KL divergence of two explicit distributions, both directions, term by term, in nats."""

    p: tuple[float, ...]
    q: tuple[float, ...]
    forward_terms: tuple[float, ...]
    """p_i · ln(p_i / q_i); their sum is KL(p‖q)."""
    reverse_terms: tuple[float, ...]
    """q_i · ln(q_i / p_i); their sum is KL(q‖p)."""

    @property
    def forward(self) -> float:
        """KL(p‖q)."""
        return math.fsum(self.forward_terms)

    @property
    def reverse(self) -> float:
        """KL(q‖p)."""
        return math.fsum(self.reverse_terms)


def explicit_kl(p: list[float], q: list[float]) -> ExplicitKL:
    r"""KL divergence of two explicit distributions over the same outcomes.

        KL(p‖q) = Σ_i p_i · ln(p_i / q_i)        0 · ln 0 = 0;  p_i > 0 = q_i gives ∞

    Args:
        p: probabilities of the first distribution (the policy).
        q: probabilities of the second (the reference), outcome by outcome.

    Returns:
        Both directions in nats, with their terms.

    Raises:
        ValueError: the lengths differ, a probability is outside [0, 1], or a sum is not 1.

    Example:
        >>> result = explicit_kl([0.7, 0.3], [0.5, 0.5])
        >>> f"{result.forward:.4f}", [f"{term:.4f}" for term in result.forward_terms]
        ('0.0823', ['0.2355', '-0.1532'])

    References:
        Kullback and Leibler, "On Information and Sufficiency", 1951, eq. 2.2.
    """
    if len(p) != len(q):
        raise ValueError(
            f"both distributions need the same outcomes, got {len(p)} and {len(q)} probabilities"
        )
    for name, values in (("first", p), ("second", q)):
        for value in values:
            if not 0 <= value <= 1:
                raise ValueError(f"a probability lies between 0 and 1, got {value} in the {name}")
        total = math.fsum(values)
        # Six digits: what a person types when a third is written 0.333333.
        if abs(total - 1) > 1e-6:
            raise ValueError(f"probabilities sum to 1, got {total:.6g} in the {name} distribution")
    return ExplicitKL(
        p=tuple(p),
        q=tuple(q),
        forward_terms=tuple(map(_term, p, q)),
        reverse_terms=tuple(map(_term, q, p)),
    )


def _term(a: float, b: float) -> float:
    if a == 0:
        return 0.0
    if b == 0:
        return math.inf
    # The difference of logarithms, for a / b overflows where b is tiny.
    return a * (math.log(a) - math.log(b))
