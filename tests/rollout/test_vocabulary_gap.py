"""Both directions of the sampler's KL over the whole vocabulary, against plain transformers."""

import math
from collections.abc import Callable, Sequence

import pytest
import tiny_models
import torch
from torch import Tensor

from kleash.models.policy import Policy, load_policy
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec, generate
from kleash.rollout.vocabulary_gap import vocabulary_gap
from kleash.types import Rollout

HEAT = 0.7


def plain(policy: Policy, text: Sequence[int], heat: float) -> Tensor:
    """log-probabilities after every token, by the model's own forward pass alone."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([list(text)])).logits[0]
    return (logits[:, : policy.words].double() / heat).log_softmax(-1)


def elsewhere(law: Callable[[Sequence[int], float], Tensor]) -> Callable[..., list[Tensor]]:
    """What an engine with weights of its own answers: its law after each token but the last."""

    def laws(texts: Sequence[Sequence[int]], *, temperature: float) -> list[Tensor]:
        return [law(text, temperature)[:-1] for text in texts]

    return laws


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Policy, Rollout]:
    tok, folder = tiny_models.tokenizer(), tmp_path_factory.mktemp("models")
    path = tiny_models.save_model(folder / "m", request.param, tok=tok, rows=len(tok) + 3)
    policy = load_policy(path)
    rows = [Prompt("", ids, i) for i, ids in enumerate([(5, 6, 7), (9,), (8, 10, 5)])]
    torch.manual_seed(0)
    spec = SamplingSpec(max_new_tokens=9, temperature=HEAT)
    return policy, generate(policy, batch_prompts(rows, pad_id=policy.pad_id), spec)


def test_the_policy_that_wrote_by_itself_agrees_with_its_scores(
    written: tuple[Policy, Rollout],
) -> None:
    """One token at a time with a cache, and all at once: the same law but for rounding."""
    policy, rollout = written
    forward, reverse = vocabulary_gap(rollout, policy, temperature=HEAT)
    assert 0 <= forward < 1e-9 and 0 <= reverse < 1e-9


def test_another_temperature_is_measured_exactly_both_ways(
    written: tuple[Policy, Rollout],
) -> None:
    """Summed by hand over the states of the first two responses."""
    policy, rollout = written
    laws = elsewhere(lambda text, heat: plain(policy, text, 1.3 * heat))
    found = vocabulary_gap(
        rollout,
        policy,
        temperature=HEAT,
        engine_laws=laws,
        responses=2,
    )
    both: list[tuple[float, float]] = []
    for row in range(2):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        text = prompt + rollout.response_ids[row][rollout.response_mask[row]].tolist()
        pi, sigma = (plain(policy, text, heat) for heat in (HEAT, 1.3 * HEAT))
        for state in range(len(prompt) - 1, len(text) - 1):
            p, q = pi[state], sigma[state]
            both.append((float((q.exp() * (q - p)).sum()), float((p.exp() * (p - q)).sum())))
    expected = tuple(sum(x) / len(both) for x in zip(*both, strict=True))
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found[0] / found[1] - 1) > 0.01


def test_a_sampler_that_never_writes_a_word_is_infinitely_far_one_way(
    written: tuple[Policy, Rollout],
) -> None:
    policy, rollout = written

    def cut(text: Sequence[int], heat: float) -> Tensor:
        law = plain(policy, text, heat)
        law[:, 3] = -torch.inf
        return law.log_softmax(-1)

    forward, reverse = vocabulary_gap(rollout, policy, temperature=HEAT, engine_laws=elsewhere(cut))
    assert 0 < forward < math.inf and reverse == math.inf
