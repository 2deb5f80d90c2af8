"""Bounds on a rollout: how far it may have gone, and how decided it may have become.

A bound that is passed raises a `TripwireError` that names the worst response and its worst token;
within its bounds a rollout passes without a word. What happens then is the loop's business. What
is not finite or not possible is refused where it arises: in `generation`, `reward_models`,
`rollout` and the algorithms.

Units: nats; the bounded KL is per response, the bounded entropy per token.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from kleash.errors import TripwireError
from kleash.kl.statistics import response_kl
from kleash.masked import masked_mean


def check_kl(
    kl: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"], *, stop_kl: float
) -> None:
    r"""Refuse a rollout whose exact KL to the reference is beyond a hard bound.

        mean_y Σ_t KL(π(·|y<t) ‖ π_ref(·|y<t)) ≤ stop_kl

    Args:
        kl: exact KL at each token, in nats.
        mask: True on response tokens.
        stop_kl: nats per response.

    Raises:
        TripwireError: if the mean is above the bound, or NaN; it names the response of largest
            KL, and the token of largest KL in it.

    Example:
        >>> import torch
        >>> kl, mask = torch.tensor([[0.5, 0.25], [1.0, 2.0]]), torch.ones(2, 2) > 0
        >>> check_kl(kl, mask, stop_kl=2.0)
        >>> check_kl(kl, mask, stop_kl=1.5)
        Traceback (most recent call last):
            ...
        kleash.errors.TripwireError: the KL to the reference is 1.88 nats per response, beyond the
        bound stop_kl of 1.5; worst is response 1 with 3 nats, 2 of them at token 1
    """
    each = response_kl(kl, mask)
    mean = float(each.double().mean())
    if mean <= stop_kl:
        return
    row = int(each.argmax())
    token = int(kl[row].where(mask[row], -1.0).argmax())
    raise TripwireError(
        f"the KL to the reference is {mean:.3g} nats per response, beyond the bound stop_kl of "
        f"{stop_kl:g}; worst is response {row} with {float(each[row]):.3g} nats, "
        f"{float(kl[row, token]):.3g} of them at token {token}",
        wire="stop_kl",
        response=row,
        token=token,
    )


def check_entropy(
    entropy: Float[Tensor, "batch token"],
    mask: Bool[Tensor, "batch token"],
    *,
    min_entropy: float,
) -> None:
    r"""Refuse a rollout of a policy that has stopped being undecided.

        Σ_y Σ_t H(π(·|y<t)) / Σ_y length(y) ≥ min_entropy

    Args:
        entropy: entropy of the next-token distribution at each token, in nats.
        mask: True on response tokens.
        min_entropy: nats per token.

    Raises:
        TripwireError: if the mean is below the bound, or NaN; it names the response of smallest
            mean entropy, and the token of smallest entropy in it.

    Example:
        >>> import torch
        >>> entropy, mask = torch.tensor([[0.5, 0.25], [0.25, 0.0]]), torch.ones(2, 2) > 0
        >>> check_entropy(entropy, mask, min_entropy=0.25)
        >>> check_entropy(entropy, mask, min_entropy=0.5)
        Traceback (most recent call last):
            ...
        kleash.errors.TripwireError: the entropy is 0.25 nats per token, below the bound
        min_entropy of 0.5; least is in response 1, with 0 nats at token 1
    """
    mean = float(masked_mean(entropy, mask))
    if mean >= min_entropy:
        return
    each = response_kl(entropy, mask) / mask.sum(-1)
    row = int(each.argmin())
    token = int(entropy[row].where(mask[row], float("inf")).argmin())
    raise TripwireError(
        f"the entropy is {mean:.3g} nats per token, below the bound min_entropy of "
        f"{min_entropy:g}; least is in response {row}, with {float(entropy[row, token]):.3g} nats "
        f"at token {token}",
        wire="min_entropy",
        response=row,
        token=token,
    )
