"""Names of tensor axes, and the data of one step: Rollout → ScoredRollout → Experience.

Axes
    batch     responses
    prompt    prompt positions, padded on the left
    token     response positions, padded on the right; time indices count from 0
    vocab     rows of the language-model head
    hidden    width of the hidden states
    N, D, V   inside kernels only: rows (selected tokens), hidden width, vocabulary size

Units: KL, log-probabilities and entropy in nats; a KL is positive when the policy has drifted.
Masks: True = keep. They come from lengths and roles, never from comparing ids with a padding id.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

Beta = float | Float[Tensor, " batch"]
"""β in score per nat: one for all responses, or one for each."""


@dataclass(frozen=True)
class Head:
    """The last step of a language model, hidden state → logits, as data.

        z = scale · (W h + b),   then   z ← softcap · tanh(z / softcap)   if soft-capped

    Only the first `vocab_size` rows are words; rows beyond are padding and have probability 0.
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int = -1
    """True vocabulary size; -1 means every row of `weight` is a word."""

    @classmethod
    def of(cls, model: Any) -> "Head":
        """The head of a transformers causal language model, or of a PEFT model around one.

        Its tensors are the live parameters. The first time a model is seen, its head is compared
        with the model's own logits.

        Raises:
            ModelError: if the model has no output matrix, an adapter on it, or transforms its
                logits in a way that is not known here.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
            >>> config = LlamaConfig(vocab_size=9, num_attention_heads=1, **sizes)
            >>> Head.of(LlamaForCausalLM(config)).weight.shape
            torch.Size([9, 8])
        """
        # By name: what a model looks like is known to a package above this one alone.
        reading = import_module("kleash.models.lm_head")
        head: Head = reading.read_checked_head(reading.unwrapped(model))
        return head

    @property
    def words(self) -> int:
        """Number of rows that are words."""
        return self.weight.shape[0] if self.vocab_size < 0 else self.vocab_size


@dataclass(frozen=True)
class Rollout:
    """Prompts and what the policy wrote to them."""

    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    response_ids: Int[Tensor, "batch token"]
    response_mask: Bool[Tensor, "batch token"]
    """True on the tokens the policy wrote, its end-of-sequence token included."""
    ended: Bool[Tensor, " batch"]
    """True where the policy itself ended the response; False where the length limit did."""
    prompt_index: Int[Tensor, " batch"]
    """Index of the prompt of each response: the cluster of every standard error."""
    sampler_logprobs: Float[Tensor, "batch token"] | None = None
    """log-probability of each token as the generation engine computed it."""


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout seen by everyone: policy, frozen reference, value model, reward model.

    Per-token numbers are zero outside the response.
    """

    rollout: Rollout
    rollout_logprobs: Float[Tensor, "batch token"]
    ref_logprobs: Float[Tensor, "batch token"]
    kl: Float[Tensor, "batch token"]
    """Exact KL(π‖π_ref) of the next-token distributions at each position, in nats."""
    entropy: Float[Tensor, "batch token"]
    scores: Float[Tensor, " batch"]
    """Reward-model score of each response, after normalisation and end-of-sequence policy."""
    values: Float[Tensor, "batch token"] | None = None
    """Value of the state *before* each token is written."""
    final_values: Float[Tensor, " batch"] | None = None
    """Value of the state after the last token: what a bootstrapped truncation continues with."""
    ref_hidden: Float[Tensor, "batch token ref_hidden"] | None = None
    """Reference hidden states, kept when the loss needs the exact KL again."""
    teacher_kl: Float[Tensor, "batch token"] | None = None
    """In distillation: exact KL(student‖teacher) at each position, in nats."""
    teacher_forward_kl: Float[Tensor, "batch token"] | None = None
    """In distillation: exact KL(teacher‖student) at each position, in nats."""
    teacher_hidden: Float[Tensor, "batch token teacher_hidden"] | None = None
    """Teacher hidden states, kept for the loss."""


@dataclass(frozen=True)
class Experience:
    """What an algorithm learns from: the scored rollout and the numbers derived from it.

    No gradient flows through any of them.
    """

    scored: ScoredRollout
    mask: Bool[Tensor, "batch token"]
    """Tokens that take part in the losses: the response mask less dropped responses."""
    rewards: Float[Tensor, "batch token"]
    advantages: Float[Tensor, "batch token"]
    returns: Float[Tensor, "batch token"]
    pathwise: Float[Tensor, "batch token"] | None = None
    """Weight of the differentiable exact KL_t in the loss (β, or β·c); None: no such term."""


@dataclass(frozen=True)
class Fresh:
    """What the models say *now* about the tokens of a minibatch; gradients flow."""

    logprobs: Float[Tensor, "batch token"]
    values: Float[Tensor, "batch token"] | None = None
    kl: Float[Tensor, "batch token"] | None = None
    """Exact KL(π‖π_ref) now; needed where the placement has a pathwise term."""
    divergence: Float[Tensor, "batch token"] | None = None
    """In distillation: divergence of student and teacher now."""


@dataclass(frozen=True)
class Loss:
    """A loss to go down, and what to say about it."""

    total: Float[Tensor, ""]
    metrics: dict[str, float]
