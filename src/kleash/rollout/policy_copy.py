"""A second copy of the policy, which writes in a thread of its own while the policy learns."""

from copy import deepcopy
from dataclasses import replace

import torch

from kleash.models.policy import Policy
from kleash.rollout.engine import WritingRequest
from kleash.rollout.sampling import generate
from kleash.types import Rollout


class PolicyCopy:
    """A `RolloutEngine` that touches neither the policy nor torch's global generator.

    It costs the memory of the policy's weights once more, adapters included.
    """

    def __init__(self, policy: Policy) -> None:
        """Copy the model once; `take_weights` keeps it up to date."""
        # It never learns, and so has no gradient's memory to spare (`writing_products`).
        model = deepcopy(policy.model).requires_grad_(False)
        self._policy = replace(policy, model=model, adapter=None)

    @property
    def seeded(self) -> bool:
        """The first of a request's seeds decides all of its draws, in the order of the rows."""
        return True

    @torch.no_grad()
    def take_weights(self, policy: Policy) -> None:
        """Copy the policy's parameters and buffers, so that its next update is not seen here."""
        theirs = dict(policy.model.state_dict(keep_vars=True))
        for name, tensor in self._policy.model.state_dict(keep_vars=True).items():
            tensor.copy_(theirs[name])

    def write(self, request: WritingRequest) -> Rollout:
        """See `RolloutEngine`."""
        device = self._policy.device
        generator = torch.Generator(device).manual_seed(request.seeds[0])
        return generate(
            self._policy,
            request.prompts,
            request.sampling,
            microbatch=request.microbatch,
            generator=generator,
        )

    def close(self) -> None:
        """See `RolloutEngine`."""
