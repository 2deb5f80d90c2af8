"""examples/one_file_ppo.py against the engine: same tokens, same numbers; and it runs.

The two share no code: one makes whole logits through the model's own forward, with arithmetic of
its own; the other goes from hidden states through `scoring`, `rewards` and `algorithms`.
"""

import copy
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from kleash.algorithms import ppo
from kleash.algorithms.ppo import PPOSettings
from kleash.kl.control.controllers import AdaptiveBeta, Measurement
from kleash.models.policy import Policy, Reference, freeze_copy, load_policy
from kleash.models.value_model import ValueHead
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.scoring_pass import SamplingSpec, fresh, generate, score
from kleash.types import Experience, Rollout, ScoredRollout

FILE = Path(__file__).parents[2] / "examples" / "one_file_ppo.py"
BETA = 0.3
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
PROMPTS = [[5, 9, 7], [6, 8], [10, 11, 12, 13, 5], [7], [12, 6, 6], [9, 13]]
TOKENS = 12


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_file_ppo", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drift(parameters: list[nn.Parameter], *, seed: int, by: float) -> None:
    """Move parameters a little, so that policy, reference and rollout policy are three."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += by * torch.randn(parameter.shape, generator=noise)


@dataclass(frozen=True, eq=False)
class Both:
    """One rollout, seen by the engine and by the page."""

    policy: Policy
    reference: Reference
    head: ValueHead
    critic: nn.Sequential
    texts: Any
    scored: ScoredRollout
    experience: Experience
    lesson: Any
    ref_logprobs: Tensor
    rewards: Tensor


def engine_rollout(texts: Any) -> Rollout:
    ids, mask, prompt = texts
    return Rollout(
        prompt_ids=ids[:, :prompt],
        prompt_mask=mask[:, :prompt],
        response_ids=ids[:, prompt:],
        response_mask=mask[:, prompt:],
        ended=torch.zeros(len(ids), dtype=torch.bool),
        prompt_index=torch.arange(len(ids)),
    )


@pytest.fixture(scope="module")
def both(page: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Both:
    policy = load_policy(tiny_models.save_model(tmp_path_factory.mktemp("llama"), seed=1))
    reference = freeze_copy(policy)
    drift(policy.parameters(), seed=1, by=0.05)
    head = ValueHead(policy.hidden_size)
    drift(list(head.parameters()), seed=2, by=0.5)
    critic = nn.Sequential(head.inner, nn.Tanh(), head.outer)

    torch.manual_seed(3)
    texts = page.write(policy.model, PROMPTS, TOKENS, policy.tokenizer.eos_token_id)
    scores = torch.linspace(-1, 2, len(PROMPTS))
    scored = score(
        engine_rollout(texts), policy=policy, reference=reference, scores=scores, value=head
    )
    experience = ppo.prepare(scored, BETA, PPOSettings())

    mask = texts.mask[:, texts.prompt :]
    with torch.no_grad():
        logprobs, hidden = page.read(policy.model, texts)
        ref_logprobs, _ = page.read(reference.model, texts)
        values = critic(hidden).squeeze(-1)
    rewards = page.shaped_rewards(scores, logprobs - ref_logprobs, mask, BETA)
    advantages, returns = page.gae(rewards, values, mask)
    lesson = page.Lesson(logprobs, values, page.whiten(advantages, mask), returns)
    return Both(
        policy, reference, head, critic, texts, scored, experience, lesson, ref_logprobs, rewards
    )


def test_what_is_written_equals_the_engines_with_the_same_seed(
    page: ModuleType, both: Both
) -> None:
    rows = [Prompt(content="", ids=tuple(ids), index=i) for i, ids in enumerate(PROMPTS)]
    batch = batch_prompts(rows, pad_id=both.policy.pad_id)
    torch.manual_seed(3)
    rollout = generate(both.policy, batch, SamplingSpec(max_new_tokens=TOKENS))
    mask = both.texts.mask[:, both.texts.prompt :]
    assert mask.sum(1).unique().numel() > 1, "the fixture is to have responses of several lengths"
    assert torch.equal(mask, rollout.response_mask)
    written = both.texts.ids[:, both.texts.prompt :]
    assert torch.equal(written[mask], rollout.response_ids[mask])


def test_logprobs_of_both_models_equal_the_engines(both: Both) -> None:
    mask, scored = both.scored.rollout.response_mask, both.scored
    pairs = [
        (both.lesson.logprobs, scored.rollout_logprobs),
        (both.ref_logprobs, scored.ref_logprobs),
    ]
    for ours, engines in pairs:
        torch.testing.assert_close(ours[mask], engines[mask], **CLOSE)
    assert float((pairs[0][0] - pairs[1][0])[mask].abs().max()) > 0.05, "two different models"


@pytest.mark.parametrize("name", ["rewards", "advantages", "returns", "values"])
def test_numbers_per_token_equal_the_engines(both: Both, name: str) -> None:
    ours = both.rewards if name == "rewards" else getattr(both.lesson, name)
    engines = both.scored.values if name == "values" else getattr(both.experience, name)
    assert isinstance(engines, Tensor)
    mask = both.experience.mask
    torch.testing.assert_close(ours[mask], engines[mask], **CLOSE)
    if name != "values":  # the page leaves the critic's opinion of padding where it is
        assert not ours[~mask].any()


def test_losses_and_the_gradient_of_a_minibatch_equal_the_engines(
    page: ModuleType, both: Both
) -> None:
    """After the policy and the critic have moved, so that ratios and clipping are at work."""
    rows = torch.tensor([4, 0, 2, 1])
    mask = both.experience.mask[rows]
    drift([*both.policy.parameters(), *both.head.parameters()], seed=4, by=0.02)
    moved = copy.deepcopy(both.policy.model)
    critic = copy.deepcopy(both.critic)

    part = ppo.select(both.experience, rows)
    now = fresh(part, policy=both.policy, value=both.head)
    engines = ppo.loss(part, now, PPOSettings(), tokens=int(mask.sum()))
    engines.total.backward()
    assert 0 < engines.metrics["policy/clipfrac"] < 1, "clipping is to be at work in the fixture"

    some = page.Texts(both.texts.ids[rows], both.texts.mask[rows], both.texts.prompt)
    lesson = page.Lesson(*(numbers[rows] for numbers in both.lesson))
    policy_loss, value_loss = page.losses(moved, critic, some, lesson)
    (policy_loss + page.VALUE_COEF * value_loss).backward()

    assert policy_loss.item() == pytest.approx(engines.metrics["loss/policy"], abs=1e-5)
    assert value_loss.item() == pytest.approx(engines.metrics["loss/value"], abs=1e-5)
    for mine, theirs in (
        (moved, both.policy.model),
        (critic, nn.Sequential(both.head.inner, nn.Tanh(), both.head.outer)),
    ):
        grown = dict(theirs.named_parameters())
        for name, parameter in mine.named_parameters():
            assert parameter.grad is not None and grown[name].grad is not None, name
            torch.testing.assert_close(
                parameter.grad, grown[name].grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("program")
    model = tiny_models.save_model(folder / "model", seed=5)
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(12)]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sizes = ["--steps", "2", "--batch", "12", "--tokens", "12", "--lr", "0.01"]
    leash = ["--beta", "0.1", "--target-kl", "4"]
    done = subprocess.run(
        [sys.executable, str(FILE), str(model), str(prompts), *sizes, *leash],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_as_a_program_for_two_iterations(printed: str) -> None:
    steps = [line.split() for line in printed.splitlines()]
    assert [step[:2] for step in steps] == [["step", "1"], ["step", "2"]]
    kl = [float(step[5]) for step in steps]
    assert kl[0] == 0, "the policy starts at the reference"
    assert kl[1] != 0, "and moves"


def test_beta_moves_by_the_gain_of_the_paper(printed: str) -> None:
    first, second = (line.split() for line in printed.splitlines())
    controller = AdaptiveBeta(target_kl=4.0, initial=0.1)
    measured = Measurement(float(first[5]), 0.0, 12)
    expected = controller.update(controller.init(), measured).beta
    assert float(first[-1]) == 0.1
    assert float(second[-1]) == pytest.approx(expected, rel=1e-3)


def test_it_imports_nothing_of_the_engine_and_fits_on_its_page() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert "import kleash" not in text and "from kleash" not in text
    assert len(text.splitlines()) <= 200
