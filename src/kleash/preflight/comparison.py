"""Comparing two ways to give a token its log-probability; every result is in nats."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kleash.models.lm_head import as_scored
from kleash.models.policy import LanguageModel
from kleash.preflight.probe_batch import Text, Trial, logprobs_at, states_of

_GREEDY_TOKENS = 8


def gap(one: Float[Tensor, " token"], other: Float[Tensor, " token"]) -> float:
    """Largest difference; infinite where a number is not finite on one side alone."""
    return float(torch.nan_to_num((one.double() - other.double()).abs(), nan=torch.inf).max())


def at(
    table: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """The entry of each row that its target names."""
    return table.gather(1, targets[:, None]).squeeze(1)


def twice(model: LanguageModel, texts: tuple[Text, ...]) -> float:
    """How far two readings of the same texts lie apart."""
    readings = [
        torch.cat([logprobs_at(model.head, states_of(model, t), t.response) for t in texts])
        for _ in range(2)
    ]
    return gap(*readings)


def state_gap(trial: Trial, shift: int) -> float:
    """How far training's unpadded reading is from the model's own, `shift` positions away."""
    policy, apart = trial.components.policy, 0.0
    for text in trial.texts:
        own = text.of_response(shift)
        trained = states_of(policy, text)
        # A text of one token of prompt has no state before it; one less is compared.
        count = min(len(own), len(trained))
        own, trained = own[-count:] if shift < 0 else own[:count], trained
        trained = trained[-count:] if shift < 0 else trained[:count]
        targets = text.response[-count:] if shift < 0 else text.response[:count]
        apart = max(
            apart,
            gap(logprobs_at(policy.head, own, targets), logprobs_at(policy.head, trained, targets)),
        )
    return apart


@torch.no_grad()
def greedy(
    trial: Trial, prompt: Int[Tensor, " prompt"]
) -> tuple[Int[Tensor, " token"], Float[Tensor, " token"]]:
    """The likeliest words, one after the other, and their log-probabilities."""
    policy, heat = trial.components.policy, trial.components.sampling.temperature
    ids, tops = prompt, list[Tensor]()
    with as_scored(policy.model, policy.precision):
        for _ in range(_GREEDY_TOKENS):
            logits = policy.model(input_ids=ids[None], use_cache=False).logits[0, -1]
            top, word = (logits[: policy.words].double() / heat).log_softmax(-1).max(-1)
            ids, tops = torch.cat([ids, word[None]]), [*tops, top]
    return ids[len(prompt) :], torch.stack(tops)
