"""The exact KL loss in TRL's real trainer: its gradient by enumeration on a table of logits."""

from pathlib import Path

import pytest
import tiny_models
import torch
from tabular_lm import LONGEST, PREFIXES, STATES, WORDS, TabularLM, log_probability, responses
from trl_trainers import make_trainer

from kleash.errors import ConfigError
from kleash.integrations.trl import exact_kl_loss

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and transformers' own, of each other

BETA = 0.3


def tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the policy, its reference, and the policy that sampled."""
    draw = torch.Generator().manual_seed(3)
    policy, reference, noise = (
        torch.randn(STATES, WORDS, generator=draw, dtype=torch.float64) for _ in range(3)
    )
    return policy, reference, policy + 0.4 * noise


def expected_gradient(trainer, sampler: torch.Tensor, *, fresh: bool) -> torch.Tensor:
    """Σ_y μ(y) ∇ of the trainer's own loss of y alone, in the shape of the table."""
    total = torch.zeros(STATES, WORDS, dtype=torch.float64)
    for number, written in enumerate(responses()):
        length = len(written)
        inputs = {
            "prompt_ids": torch.tensor([[1]]),
            "prompt_mask": torch.tensor([[1]]),
            "completion_ids": torch.tensor([[*written, *[0] * (LONGEST - length)]]),
            "completion_mask": (torch.arange(LONGEST) < length).long()[None],
            "advantages": torch.tensor([0.1 * number - 0.5], dtype=torch.float64),
            "num_items_in_batch": torch.tensor(1.0),
        }
        if not fresh:
            logs = [log_probability(sampler, written[: t + 1]) for t in range(length)]
            steps = torch.stack(logs).diff(prepend=torch.zeros(1, dtype=torch.float64))
            padded = torch.zeros(1, LONGEST, dtype=torch.float64)
            padded[0, :length] = steps
            inputs["old_per_token_logps"] = padded
        loss = trainer._compute_loss(trainer.model, inputs)
        (gradient,) = torch.autograd.grad(loss, [trainer.model.lm_head.weight])
        total += log_probability(sampler, written).exp() * gradient.T
    return total


def row(policy: torch.Tensor, reference: torch.Tensor, gradient: str) -> torch.Tensor:
    """The gradient that is stated, from the definition of the KL of whole responses."""
    table = policy.clone().requires_grad_()
    every = responses()
    logs = [log_probability(table, y) for y in every]
    if gradient == "sequence":
        kl = torch.stack(
            [
                p.exp() * (p - log_probability(reference, y))
                for p, y in zip(logs, every, strict=True)
            ]
        ).sum()
    else:
        # Each state's own KL, at the rate at which the state is come to now.
        p, q = table.log_softmax(-1), reference.log_softmax(-1)
        each = (p.exp() * (p - q)).sum(-1)
        reached = [log_probability(policy, x).exp() if x else torch.tensor(1.0) for x in PREFIXES]
        kl = sum(rate * each[n] for n, rate in enumerate(reached))
    return torch.autograd.grad(kl, [table])[0]


@pytest.mark.parametrize(
    ("gradient", "loss_type", "fresh"),
    [
        ("sequence", "dr_grpo", True),
        ("sequence", "dr_grpo", False),
        ("sequence", "luspo", True),
        ("sequence", "dapo", False),
        ("token", "dr_grpo", True),
        ("token", "luspo", True),
    ],
)
def test_the_gradient_is_that_of_its_row(
    tmp_path: Path, gradient: str, loss_type: str, fresh: bool
) -> None:
    policy, reference, other = tables()
    trainer = make_trainer(
        "grpo",
        TabularLM(policy),
        tmp_path / "out",
        beta=0.0,
        loss_type=loss_type,
        max_completion_length=LONGEST,
        processing_class=tiny_models.tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    sampler = policy if fresh else other
    without = expected_gradient(trainer, sampler, fresh=fresh)
    exact_kl_loss(trainer, gradient=gradient, reference=TabularLM(reference))
    assert torch.equal(expected_gradient(trainer, sampler, fresh=fresh), without)  # β is still 0
    trainer.beta = BETA
    found = (expected_gradient(trainer, sampler, fresh=fresh) - without) / BETA
    assert trainer.beta == BETA
    if loss_type == "dr_grpo":
        found = found * LONGEST
    stated = row(policy, reference, gradient)
    assert stated.abs().max() > 0.05
    torch.testing.assert_close(found, stated, rtol=0, atol=1e-6)


def test_the_two_rows_differ() -> None:
    policy, reference, _ = tables()
    rows = [row(policy, reference, gradient) for gradient in ("sequence", "token")]
    assert (rows[0] - rows[1]).abs().max() > 0.01


def test_a_trainer_trains_with_it(tmp_path: Path) -> None:
    """Pulled hard enough, the policy stays; TRL's own k3 term is gone from the log."""
    base = tiny_models.save_model(tmp_path / "base", attention_dropout=0.0)
    far = {}
    for beta in (0.01, 3.0):
        trainer = make_trainer("grpo", str(base), tmp_path / f"{beta}", beta=beta, max_steps=6)
        exact_kl_loss(trainer)
        trainer.train()
        assert not any("kl" in line for line in trainer.state.log_history)
        far[beta] = trainer.state.log_history[-2]["kleash/kl_ref_per_token"]
    assert far[3.0] < 0.7 * far[0.01]


def test_another_loss_is_refused(tmp_path: Path) -> None:
    base = tiny_models.save_model(tmp_path / "base", attention_dropout=0.0)
    trainer = make_trainer("grpo", str(base), tmp_path / "out")
    trainer.loss_type = "unheard of"
    with pytest.raises(ConfigError, match=r"expected a loss_type out of .* got 'unheard of'"):
        exact_kl_loss(trainer)
    trainer.loss_type = "dapo"
    trainer.liger_loss = object()
    with pytest.raises(ConfigError, match="use_liger_kernel=False"):
        exact_kl_loss(trainer)
