"""Sampler against trainer over the whole vocabulary, in the states of a few responses.

Both directions of the KL, exact: the log-probabilities of the drawn tokens alone only estimate
them. The trainer reads a response at once, as it is scored; the engine as it was written, one token
after the other.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.kl.sampler_gap import exact_gap
from kleash.models.lm_head import apply_head
from kleash.models.policy import Policy
from kleash.types import Rollout


@torch.no_grad()
def vocabulary_gap(
    rollout: Rollout,
    policy: Policy,
    *,
    temperature: float,
    engine_laws: Callable[..., list[Tensor]] | None = None,
    responses: int = 4,
) -> tuple[float, float]:
    r"""KL(σ‖π) and KL(π‖σ) in nats per token, over the whole vocabulary.

        mean over tokens of KL(σ(·|y<t) ‖ π(·|y<t)), and the other way round

    Args:
        rollout: whose states; its first responses are read.
        policy: the trainer's law π.
        temperature: that of sampling and scoring.
        engine_laws: `SeparateEngine.next_token_logprobs` of what wrote the responses, with the same
            weights as when it did; None: the policy itself wrote, by `generate`.
        responses: how many are read.

    Returns:
        Both directions; infinite where one law writes what the other never does.

    Raises:
        EngineError: the engine did not answer.
    """
    texts = [_text(rollout, row) for row in range(min(responses, len(rollout.response_ids)))]
    if engine_laws is None:
        laws = [_written(policy, *text, temperature) for text in texts]
    else:
        ids = [torch.cat(text).tolist() for text in texts]
        whole = engine_laws(ids, temperature=temperature)
        laws = [law[len(text[0]) - 1 :] for law, text in zip(whole, texts, strict=True)]
    forward, reverse = list[Tensor](), list[Tensor]()
    for law, text in zip(laws, texts, strict=True):
        one, other = exact_gap(_scored(policy, *text, temperature).cpu(), law.cpu())
        forward.append(one)
        reverse.append(other)
    return float(torch.cat(forward).mean()), float(torch.cat(reverse).mean())


def _text(rollout: Rollout, row: int) -> tuple[Int[Tensor, " prompt"], Int[Tensor, " token"]]:
    """A prompt and its response without padding."""
    return (
        rollout.prompt_ids[row][rollout.prompt_mask[row]],
        rollout.response_ids[row][rollout.response_mask[row]],
    )


def _scored(
    policy: Policy,
    prompt: Int[Tensor, " prompt"],
    response: Int[Tensor, " token"],
    temperature: float,
) -> Float[Tensor, "token vocab"]:
    """log π of every word at every token, read at once."""
    ones = (torch.ones_like(prompt).bool(), torch.ones_like(response).bool())
    states = policy.hidden_states(prompt[None], ones[0][None], response[None], ones[1][None])
    logits = apply_head(policy.head, states[0, : len(response)])
    return (logits[:, : policy.words].double() / temperature).log_softmax(-1)


def _written(
    policy: Policy,
    prompt: Int[Tensor, " prompt"],
    response: Int[Tensor, " token"],
    temperature: float,
) -> Float[Tensor, "token vocab"]:
    """The same with a cache, one token after the other, as `generate` computes them."""
    rows, cache, ids = list[Tensor](), None, prompt[None]
    for token in response:
        step = policy.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = step.past_key_values, token[None, None]
        rows.append(step.logits[0, -1, : policy.words].double())
    return (torch.stack(rows) / temperature).log_softmax(-1)
