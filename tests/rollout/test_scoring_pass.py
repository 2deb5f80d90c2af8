"""Scoring what was written: the same numbers whatever the padding and the batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import TabularModel, World
from torch import Tensor, nn

from kleash.errors import NonFiniteError, ScoringError
from kleash.models.policy import (
    AdapterSpec,
    Policy,
    Reference,
    freeze_copy,
    load_policy,
    load_reference,
)
from kleash.models.value_model import ValueHead, ValueModel, load_value_model
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.scoring_pass import SamplingSpec, fresh, generate, microbatches, score
from kleash.types import Experience, Rollout, ScoredRollout

FIELDS = ("rollout_logprobs", "ref_logprobs", "kl", "entropy", "values", "final_values")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(tiny_models.save_model(tmp_path_factory.mktemp("models") / "policy"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference(tiny_models.save_model(tmp_path_factory.mktemp("models") / "ref", seed=1))


@pytest.fixture(scope="module")
def value(policy: Policy) -> ValueHead:
    torch.manual_seed(5)
    head = ValueHead(policy.hidden_size)
    nn.init.normal_(head.outer.weight)
    return head


def write(policy: Policy, *ids: list[int], copies: int = 4, n: int = 10, t: float = 1.0) -> Rollout:
    made = [Prompt("", tuple(x), i) for i, x in enumerate(ids) for _ in range(copies)]
    torch.manual_seed(0)
    return generate(policy, batch_prompts(made, pad_id=policy.pad_id), SamplingSpec(n, t))


@pytest.fixture(scope="module")
def rollout(policy: Policy) -> Rollout:
    return write(policy, [5, 6, 7], [9], [8, 10, 5, 6, 7])


def read(
    rollout: Rollout, policy: Policy, reference: Reference, value: Any = None, **more: Any
) -> ScoredRollout:
    scores = torch.zeros(len(rollout.ended))
    return score(rollout, policy=policy, reference=reference, value=value, scores=scores, **more)


def same(a: ScoredRollout, b: ScoredRollout, atol: float) -> None:
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=atol, rtol=0)


def tables(model: nn.Module, rollout: Rollout, row: int, temperature: float) -> Tensor:
    """Next-token log-probabilities of one response from the whole model alone, in float64."""
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
    response = rollout.response_ids[row][rollout.response_mask[row]]
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0].double()
    return (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_numbers_are_those_of_the_definitions(
    policy: Policy, reference: Reference, rollout: Rollout, temperature: float
) -> None:
    scored = read(rollout, policy, reference, temperature=temperature)
    for row in range(len(rollout.ended)):
        n = int(rollout.response_mask[row].sum())
        ids = rollout.response_ids[row, :n, None]
        p = tables(policy.model, rollout, row, temperature)
        q = tables(reference.model, rollout, row, temperature)
        expected = {
            "rollout_logprobs": p.gather(1, ids).squeeze(1),
            "ref_logprobs": q.gather(1, ids).squeeze(1),
            "kl": (p.exp() * (p - q)).sum(1),
            "entropy": -(p.exp() * p).sum(1),
        }
        for name, numbers in expected.items():
            got = getattr(scored, name)[row]
            torch.testing.assert_close(got[:n].double(), numbers, atol=1e-5, rtol=0)
            assert not got[n:].any()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_scorer_agrees_with_the_sampler(
    policy: Policy, reference: Reference, temperature: float
) -> None:
    rollout = write(policy, [5, 6, 7], [9], n=30, t=temperature)
    scored = read(rollout, policy, reference, temperature=temperature)
    assert rollout.sampler_logprobs is not None
    torch.testing.assert_close(scored.rollout_logprobs, rollout.sampler_logprobs, atol=1e-5, rtol=0)
    wrong = read(rollout, policy, reference, temperature=temperature + 0.1)
    assert (wrong.rollout_logprobs - rollout.sampler_logprobs).abs().max() > 1e-2


def test_microbatches_change_nothing(
    policy: Policy, reference: Reference, value: ValueHead, rollout: Rollout
) -> None:
    whole = read(rollout, policy, reference, value, microbatch=12)
    for size in (1, 5):
        same(read(rollout, policy, reference, value, microbatch=size), whole, 1e-5)


def test_padding_changes_not_a_bit(
    policy: Policy, reference: Reference, value: ValueHead, rollout: Rollout
) -> None:
    def widen(x: Tensor, left: int, right: int, fill: int) -> Tensor:
        return nn.functional.pad(x, (left, right), value=fill)

    def other(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, ids, 19)

    plain = read(rollout, policy, reference, value, microbatch=5)
    changed = replace(
        rollout,
        prompt_ids=widen(other(rollout.prompt_ids, rollout.prompt_mask), 50, 0, 11),
        prompt_mask=widen(rollout.prompt_mask, 50, 0, False),
        response_ids=widen(other(rollout.response_ids, rollout.response_mask), 0, 50, 12),
        response_mask=widen(rollout.response_mask, 0, 50, False),
        sampler_logprobs=None,
    )
    padded = read(changed, policy, reference, value, microbatch=5)
    width = rollout.response_ids.shape[1]
    for name in FIELDS:
        numbers, before = getattr(padded, name), getattr(plain, name)
        if numbers.dim() == 2:
            assert not numbers[:, width:].any()
            numbers = numbers[:, :width]
        assert torch.equal(numbers, before), name


@pytest.mark.parametrize("kind", tiny_models.ARCHITECTURES)
def test_a_response_is_scored_the_same_alone(
    tmp_path: Path, kind: tiny_models.Architecture
) -> None:
    policy = load_policy(tiny_models.save_model(tmp_path / "a", kind))
    reference = load_reference(tiny_models.save_model(tmp_path / "b", kind, seed=1))
    rollout = write(policy, [5, 6, 7], [9], copies=3)
    together = read(rollout, policy, reference, microbatch=6)
    for row in range(6):
        n = int(rollout.response_mask[row].sum())
        one = replace(
            rollout,
            prompt_ids=rollout.prompt_ids[row][rollout.prompt_mask[row]][None],
            prompt_mask=torch.ones(1, int(rollout.prompt_mask[row].sum()), dtype=torch.bool),
            response_ids=rollout.response_ids[row : row + 1, :n],
            response_mask=rollout.response_mask[row : row + 1, :n],
            ended=rollout.ended[row : row + 1],
            prompt_index=rollout.prompt_index[row : row + 1],
            sampler_logprobs=None,
        )
        alone = read(one, policy, reference)
        for name in ("rollout_logprobs", "ref_logprobs", "kl", "entropy"):
            got = getattr(together, name)[row, :n]
            torch.testing.assert_close(got, getattr(alone, name)[0], atol=1e-5, rtol=0)


def test_a_copy_of_the_policy_is_at_no_distance(policy: Policy, rollout: Rollout) -> None:
    scored = read(rollout, policy, freeze_copy(policy))
    assert not scored.kl.any()
    assert torch.equal(scored.rollout_logprobs, scored.ref_logprobs)


def test_an_adapter_off_is_at_no_distance_until_it_learns(tmp_path: Path) -> None:
    policy = load_policy(tiny_models.save_model(tmp_path), adapter=AdapterSpec(rank=2))
    reference = freeze_copy(policy)
    rollout = write(policy, [5, 6, 7])
    assert not read(rollout, policy, reference).kl.any()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05)
    assert read(rollout, policy, reference).kl[rollout.response_mask].min() > 0


def test_padded_vocabularies_of_different_size_agree(tmp_path: Path) -> None:
    tok = tiny_models.tokenizer()
    policy = load_policy(tiny_models.save_model(tmp_path / "a", tok=tok, rows=len(tok) + 7))
    rollout = write(policy, [5, 6, 7], n=20)
    wide = freeze_copy(policy)
    narrow = freeze_copy(policy)
    narrow.model.resize_token_embeddings(len(tok))
    for reference in (wide, narrow):
        scored = read(rollout, policy, reference)
        torch.testing.assert_close(scored.kl, torch.zeros_like(scored.kl), atol=1e-6, rtol=0)
    assert rollout.sampler_logprobs is not None
    torch.testing.assert_close(scored.rollout_logprobs, rollout.sampler_logprobs, atol=1e-5, rtol=0)


def test_importance_weights_have_mean_one(policy: Policy) -> None:
    """E_π[exp(−Σ k1)] = E_π[π_ref / π] = 1, when both stop at the same tokens."""
    reference = freeze_copy(policy)
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    rollout = write(policy, [5, 6, 7], copies=1500, n=12, t=0.9)
    scored = read(rollout, policy, reference, temperature=0.9, microbatch=500)
    k1 = (scored.rollout_logprobs - scored.ref_logprobs).sum(1)
    weights = (-k1).exp()
    error = weights.std() / len(weights) ** 0.5
    assert abs(weights.mean() - 1) < 4 * error
    assert 0.001 < error < 0.1
    assert k1.mean() > 5 * k1.std() / len(k1) ** 0.5  # a real distance, or nothing is shown
    # The exact KL has the same mean as k1, and a smaller error.
    exact = scored.kl.sum(1)
    gap = k1 - exact
    assert abs(gap.mean()) < 4 * gap.std() / len(gap) ** 0.5
    assert exact.std() < k1.std()


def test_values_are_those_before_each_token_and_after_the_last(
    policy: Policy, reference: Reference, value: ValueHead, rollout: Rollout
) -> None:
    scored = read(rollout, policy, reference, value, microbatch=5)
    assert scored.values is not None
    assert scored.final_values is not None
    for row in range(len(rollout.ended)):
        n = int(rollout.response_mask[row].sum())
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        ids = torch.cat([prompt, rollout.response_ids[row, :n]])[None]
        with torch.no_grad():
            states = policy.model.base_model(input_ids=ids)[0][0]
            values = value.outer(torch.tanh(value.inner(states))).squeeze(1)
        expected = values[len(prompt) - 1 :]
        torch.testing.assert_close(scored.values[row, :n], expected[:-1], atol=1e-5, rtol=0)
        torch.testing.assert_close(scored.final_values[row], expected[-1], atol=1e-5, rtol=0)
        assert not scored.values[row, n:].any()


def experience(scored: ScoredRollout, mask: Tensor | None = None) -> Experience:
    zeros = torch.zeros_like(scored.kl)
    kept = scored.rollout.response_mask if mask is None else mask
    return Experience(scored=scored, mask=kept, rewards=zeros, advantages=zeros, returns=zeros)


@pytest.mark.parametrize("keep", [True, False])
def test_fresh_numbers_repeat_the_scored_ones(
    policy: Policy, reference: Reference, value: ValueHead, rollout: Rollout, keep: bool
) -> None:
    scored = read(
        rollout, policy, reference, value, microbatch=12, temperature=0.7, keep_ref_hidden=keep
    )
    assert (scored.ref_hidden is not None) == keep
    now = fresh(
        experience(scored),
        policy=policy,
        value=value,
        reference=reference,
        temperature=0.7,
        want=("logprobs", "kl"),
    )
    assert now.kl is not None
    assert now.values is not None
    assert scored.values is not None
    assert (now.logprobs - scored.rollout_logprobs).exp().sub(1).abs().max() < 1e-5
    torch.testing.assert_close(now.kl, scored.kl, atol=1e-5, rtol=0)
    torch.testing.assert_close(now.values, scored.values, atol=1e-5, rtol=0)
    (now.logprobs.sum() + now.kl.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.parameters())
    assert all(p.grad is None for p in reference.model.parameters())
    policy.model.zero_grad()


def test_fresh_computes_what_is_asked(
    policy: Policy, reference: Reference, rollout: Rollout
) -> None:
    scored = read(rollout, policy, reference)
    now = fresh(experience(scored), policy=policy)
    assert now.kl is None
    assert now.values is None
    with pytest.raises(ValueError, match="reference for the exact KL"):
        fresh(experience(scored), policy=policy, want=("logprobs", "kl"))


def test_dropped_responses_are_not_computed(
    policy: Policy, reference: Reference, value: ValueHead, rollout: Rollout
) -> None:
    scored = read(rollout, policy, reference, value)
    mask = rollout.response_mask.clone()
    mask[::2] = False
    seen: list[int] = []

    def counting(hidden: Tensor, *rest: Any, **more: Any) -> Any:
        from kleash.scoring import token_scores

        seen.append(len(hidden))
        return token_scores(hidden, *rest, **more)

    now = fresh(experience(scored, mask), policy=policy, value=value, scorer=counting)
    assert seen == [int(mask.sum())]
    assert now.values is not None
    assert not now.logprobs[~mask].any()
    assert not now.values[~mask].any()
    expected = torch.where(mask, scored.rollout_logprobs, 0.0)
    torch.testing.assert_close(now.logprobs.detach(), expected, atol=1e-5, rtol=0)
    nothing = fresh(experience(scored, torch.zeros_like(mask)), policy=policy, value=value)
    nothing.logprobs.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in policy.parameters())
    policy.model.zero_grad()


def test_the_gradient_does_not_depend_on_the_split(
    policy: Policy, reference: Reference, rollout: Rollout
) -> None:
    from kleash.algorithms.common import select

    scored = read(rollout, policy, reference)
    whole = experience(scored)
    gradients: list[list[Tensor]] = []
    for size in (12, 5, 1):
        policy.model.zero_grad()
        for rows in microbatches(rollout, size):
            fresh(select(whole, rows), policy=policy).logprobs.sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    policy.model.zero_grad()
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_value_model_of_its_own(policy: Policy, reference: Reference, tmp_path: Path) -> None:
    value = load_value_model(tiny_models.save_classifier(tmp_path, seed=2), policy)
    assert isinstance(value, ValueModel)
    rollout = write(policy, [5, 6, 7], [9])
    scored = read(rollout, policy, reference, value, microbatch=3)
    now = fresh(experience(scored), policy=policy, value=value)
    assert now.values is not None
    torch.testing.assert_close(now.values, scored.values, atol=1e-5, rtol=0)
    now.values.sum().backward()
    assert all(p.grad is None for p in policy.parameters())
    assert any(p.grad is not None for p in value.parameters())


def test_enumerated_strings_are_scored_exactly() -> None:
    """The tabular oracle behind the same interface, in float64, against its own enumeration."""
    world = World(vocabulary=4, max_length=3)
    logits = [world.random_logits(seed) for seed in (0, 1)]
    policy, reference = (TabularModel(world, x) for x in logits)
    scores = world.random_scores(2)
    scored = score(world.rollout, policy=policy, reference=reference, scores=scores, microbatch=7)
    p = world.probabilities(logits[0])
    expected = world.string_logprobs(logits[0])
    torch.testing.assert_close(scored.rollout_logprobs.sum(1), expected, atol=1e-12, rtol=0)
    whole = (p * (scored.rollout_logprobs - scored.ref_logprobs).sum(1)).sum()
    torch.testing.assert_close((p * scored.kl.sum(1)).sum(), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(world.kl(*logits), whole, atol=1e-12, rtol=0)
    assert torch.equal(scored.scores, scores)


class _Broken:
    """A language model whose hidden states are spoilt at one place."""

    def __init__(self, inner: Policy | Reference, row_ids: list[int], column: int, by: float):
        self.inner, self.row_ids, self.column, self.by = inner, row_ids, column, by

    @property
    def head(self) -> Any:
        return self.inner.head

    def hidden_states(self, *inputs: Tensor) -> Tensor:
        hidden = self.inner.hidden_states(*inputs).clone()
        for row, ids in enumerate(inputs[2].tolist()):
            if ids[: len(self.row_ids)] == self.row_ids:
                hidden[row, self.column] = self.by
        return hidden


@pytest.mark.parametrize("where", ["policy", "reference"])
def test_what_is_not_finite_is_named(
    policy: Policy, reference: Reference, rollout: Rollout, where: str
) -> None:
    row = int(rollout.response_mask.sum(1).argmax())
    ids = rollout.response_ids[row].tolist()
    models: dict[str, Any] = {"policy": policy, "reference": reference}
    models[where] = _Broken(models[where], ids, 3, float("nan"))
    scores = torch.zeros(len(rollout.ended))
    with pytest.raises(NonFiniteError, match=rf"token 3 of response {row}: .*= nan.*KL = nan"):
        score(rollout, **models, scores=scores, microbatch=5)
    scored = read(rollout, policy, reference)
    if where == "policy":
        with pytest.raises(NonFiniteError, match=rf"token 3 of response {row}: log π = nan"):
            fresh(experience(scored), policy=models["policy"])


def test_what_is_outside_a_response_does_not_matter(
    policy: Policy, reference: Reference, value: ValueHead, rollout: Rollout
) -> None:
    lengths = rollout.response_mask.sum(1)
    row = int(torch.where(lengths < lengths.max(), lengths, 0).argmax())
    broken: Any = _Broken(
        policy, rollout.response_ids[row].tolist(), int(lengths[row]) + 1, float("nan")
    )
    good = read(rollout, policy, reference, value, microbatch=12)
    same(read(rollout, broken, reference, value, microbatch=12), good, 0.0)
    now = fresh(experience(good), policy=broken, value=value)
    assert now.logprobs.isfinite().all()
    assert now.values is not None
    assert now.values.isfinite().all()
    policy.model.zero_grad()
    value.zero_grad()
    (now.logprobs.sum() + now.values.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in value.parameters())
    policy.model.zero_grad()
    value.zero_grad()


@pytest.mark.parametrize(
    ("quantity", "by", "message"),
    [
        ("logprobs", 0.5, "a log-probability of at most 0"),
        ("ref_logprobs", 0.5, "a reference log-probability of at most 0"),
        ("kl", -0.5, "a KL of at least 0"),
    ],
)
def test_impossible_numbers_are_refused(
    policy: Policy, reference: Reference, rollout: Rollout, quantity: str, by: float, message: str
) -> None:
    def wrong(*inputs: Any, **more: Any) -> Any:
        from kleash.scoring import token_scores

        right = token_scores(*inputs, **more)
        return replace(right, **{quantity: torch.full_like(right.kl, by)})  # type: ignore

    place = "token 0 of response 0"
    with pytest.raises(ScoringError, match=f"expected {message}, got {place}: log π ="):
        read(rollout, policy, reference, scorer=wrong)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=9),
    size=st.integers(1, 10),
)
def test_microbatches_take_each_row_once_and_the_longest_first(
    lengths: list[tuple[int, int]], size: int
) -> None:
    p, t = torch.tensor(lengths).T
    columns = torch.arange(6)
    rollout = Rollout(
        prompt_ids=torch.zeros(len(p), 6, dtype=torch.long),
        prompt_mask=columns.flip(0) < p[:, None],
        response_ids=torch.zeros(len(p), 6, dtype=torch.long),
        response_mask=columns < t[:, None],
        ended=torch.ones(len(p), dtype=torch.bool),
        prompt_index=torch.arange(len(p)),
    )
    groups = microbatches(rollout, size)
    assert all(0 < len(g) <= size for g in groups)
    order = torch.cat(groups)
    assert sorted(order.tolist()) == list(range(len(p)))
    assert (p + t)[order].diff().le(0).all()


def test_microbatches_have_a_size(rollout: Rollout) -> None:
    with pytest.raises(ValueError, match="at least 1 response, got 0"):
        microbatches(rollout, 0)


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_real_models_agree_with_themselves(name: str) -> None:
    path = tiny_models.REAL / "models" / name
    if not path.is_dir():
        pytest.skip("no real inputs beside the checkout")
    policy = load_policy(path)
    reference = freeze_copy(policy)
    ids = [policy.tokenizer(t)["input_ids"] for t in ("One day,", "Lucy had a little dog. It")]
    rollout = write(policy, *ids, copies=8, n=48, t=0.8)
    scored = read(rollout, policy, reference, temperature=0.8)
    assert not scored.kl.any()
    assert rollout.sampler_logprobs is not None
    difference = (scored.rollout_logprobs - rollout.sampler_logprobs)[rollout.response_mask]
    # k3 of sampler against scorer, per token: what the run logs as rollout/kl_sampler.
    assert (difference.expm1() - difference).mean() < 1e-9
    assert difference.abs().mean() < 1e-5
    alone = read(rollout, policy, reference, temperature=0.8, microbatch=1)
    moved = (alone.rollout_logprobs - scored.rollout_logprobs).abs().max()
    assert moved <= 1e-5
