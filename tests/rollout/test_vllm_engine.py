"""vLLM in this process, on the real engine: what it holds, what it writes, and from which law."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny_models
import torch
from real_vllm import NEEDS_VLLM
from scipy import stats

from kleash.config.schema import Config
from kleash.errors import EngineError
from kleash.models.policy import load_policy
from kleash.preflight.probe_batch import Trial
from kleash.preflight.sampling_distribution import Explanation, explain, weigh
from kleash.rollout import vllm_engine
from kleash.rollout.engine import writing_request
from kleash.rollout.hand_over import hand_over, policy_weights
from kleash.rollout.prompts import Prompt, batch_prompts
from kleash.rollout.sampling import SamplingSpec
from kleash.rollout.vllm_engine import VLLMEngine, VLLMSettings, start_vllm
from kleash.training.assembly import assemble
from kleash.training.components import Components
from kleash.types import Rollout

pytestmark = NEEDS_VLLM

# The least head that its attention supports.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.2,
}
TOKENS = 100_000
LENGTH = 40
STALE = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("run")
    tok = tiny_models.tokenizer()
    # Rows beyond the words, as large models have them.
    tiny_models.save_model(folder / "policy", tok=tok, rows=len(tok) + 7, **SIZES)
    for name in ("prompts", "heldout"):
        lines = [json.dumps({"prompt": text}) for text in small_run.two_words(range(8))]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    vllm = {"kv_cache_gib": 0.1, "enforce_eager": True}
    rollout = {"engine": "vllm", "vllm": vllm, "max_new_tokens": LENGTH}
    return small_run.settings(folder, folder / "out", {"rollout": rollout})


@pytest.fixture(scope="module")
def components(config: Config) -> Iterator[Components]:
    made = assemble(config)
    yield made
    made.close()


def engine_of(components: Components) -> VLLMEngine:
    assert isinstance(components.engine, VLLMEngine)
    return components.engine


def laws(components: Components, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """[token, word] probability of every word at every token, by plain transformers."""
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], dim=1)
    mask = torch.cat([rollout.prompt_mask, rollout.response_mask], dim=1)
    width, words = rollout.response_ids.shape[1], components.policy.words
    found: list[torch.Tensor] = []
    for part, keep, kept in zip(
        ids.split(256), mask.split(256), rollout.response_mask.split(256), strict=True
    ):
        positions = (keep.long().cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = components.policy.model(
                input_ids=part, attention_mask=keep.long(), position_ids=positions
            ).logits[:, -width - 1 : -1, :words]
        found.append((logits[kept].double() / temperature).softmax(-1))
    return torch.cat(found)


def p_value(components: Components, rollout: Rollout) -> float:
    """Of χ² over 20 cells: where a drawn word falls in its law, the likeliest words first.

        u = Σ_{p(w) > p(drawn)} p(w) + V · p(drawn),   V uniform,

    which is uniform and independent from token to token if and only if the law is that of the draw.
    """
    law = laws(components, rollout)
    drawn = law.gather(1, rollout.response_ids[rollout.response_mask][:, None])
    noise = torch.rand(len(law), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = torch.where(law > drawn, law, 0.0).sum(1) + noise * drawn.squeeze(1)
    cells = torch.histc(u, bins=20, min=0, max=1)
    return float(stats.chisquare(cells.numpy()).pvalue)


def many(components: Components, tokens: int, temperature: float = 1.0) -> Rollout:
    """So many tokens, at least, from the engine."""
    hotter = replace(components, sampling=SamplingSpec(LENGTH, temperature))
    torch.manual_seed(5)
    rows = 64
    rollout = hotter.write(components.prompts, responses_per_prompt=rows, microbatch=1).rollout
    per_row = float(rollout.response_mask.sum()) / len(rollout.response_ids)
    rows = int(1.1 * tokens / per_row / len(components.prompts))
    rollout = hotter.write(components.prompts, responses_per_prompt=rows, microbatch=1).rollout
    assert int(rollout.response_mask.sum()) >= tokens
    return rollout


def named(config: Config, components: Components, rollout: Rollout, rows: int) -> Explanation:
    """What kleash check says of the law of the first rows of a rollout."""
    few = Rollout(
        *(getattr(rollout, name)[:rows] for name in Rollout.__dataclass_fields__)  # every tensor
    )
    scores = torch.zeros(rows)
    scored = components.score(few, scores, microbatch=64, critic=False)
    responses = components.write(components.prompts[:1], responses_per_prompt=1, microbatch=1)
    judged = replace(
        components.judge(responses),
        responses=replace(responses, rollout=few),
        raw_scores=scores,
        parts={},
    )
    trial = Trial(config, components, judged, scored, scored, (), at_start=True)
    return explain(trial, weigh(trial))


def test_it_says_of_its_words_what_the_trainer_says(components: Components) -> None:
    spec = SamplingSpec(LENGTH, temperature=1.3)
    hotter = replace(components, sampling=spec)
    rollout = hotter.write(components.prompts, responses_per_prompt=8, microbatch=64).rollout
    assert rollout.response_ids.max() < components.policy.words
    assert rollout.ended.any()
    expected = laws(components, rollout, 1.3).log()
    drawn = rollout.response_ids[rollout.response_mask][:, None]
    assert rollout.sampler_logprobs is not None
    got = rollout.sampler_logprobs[rollout.response_mask].double()
    torch.testing.assert_close(got, expected.gather(1, drawn).squeeze(1), atol=1e-4, rtol=0)


def test_its_likeliest_words_are_those_of_transformers(components: Components) -> None:
    """Each word that it finds likeliest has no likelier one by transformers, but for ties."""
    engine, policy = engine_of(components), components.policy
    hand_over(engine, policy)
    texts = [list(prompt.ids) for prompt in components.prompts]
    greedy = {"temperature": 0.0, "max_tokens": LENGTH, "ignore_eos": True}
    found = engine._generate(texts, [greedy] * len(texts))
    same = 0
    for text, one in zip(texts, found, strict=True):
        words = torch.tensor(one.outputs[0].token_ids)
        ids = torch.cat([torch.tensor(text), words])[None]
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, len(text) - 1 : -1, : policy.words]
        best = logits.max(-1)
        chosen = logits.gather(1, words[:, None]).squeeze(1)
        assert bool((best.values - chosen < 1e-4).all())
        same += int((best.indices == words).sum())
    assert same >= 0.95 * LENGTH * len(texts)


def test_a_temperature_that_it_would_raise_is_refused(components: Components) -> None:
    """It takes 0.01 for everything below, and says so in its log alone."""
    with pytest.raises(EngineError, match=r"of at least 0\.01 for vLLM, got 0\.005"):
        replace(components, sampling=SamplingSpec(LENGTH, 0.005)).write(
            components.prompts, responses_per_prompt=1, microbatch=1
        )


def test_the_same_seeds_write_the_same_and_nothing_else_is_drawn_from(
    components: Components,
) -> None:
    engine = engine_of(components)
    hand_over(engine, components.policy)
    batch = batch_prompts(components.prompts * 4, pad_id=components.policy.pad_id)
    torch.manual_seed(3)
    request = writing_request(engine, batch, SamplingSpec(LENGTH), microbatch=64)
    state, threads, function = torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads
    first = engine.write(request)
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.set_num_threads) == (threads, function)
    second = engine.write(request)
    assert torch.equal(first.response_ids, second.response_ids)
    other = engine.write(replace(request, seeds=tuple(seed + 1 for seed in request.seeds)))
    assert not torch.equal(first.response_ids[:, :3], other.response_ids[:, :3])


def test_more_prompts_than_it_reads_at_once_are_read_whole(components: Components) -> None:
    """A seeded response whose prompt is read in parts cannot be written on a CPU."""
    engine = engine_of(components)
    hand_over(engine, components.policy)
    at_once = engine._open().llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompts = [Prompt("", tuple(4 + (i + j) % 15 for j in range(31)), i) for i in range(200)]
    assert 31 * len(prompts) > at_once and at_once % 31
    batch = batch_prompts(prompts, pad_id=components.policy.pad_id)
    request = writing_request(engine, batch, SamplingSpec(3), microbatch=200)
    whole = engine.write(request)
    last = replace(
        request.prompts, ids=batch.ids[-2:], mask=batch.mask[-2:], index=batch.index[-2:]
    )
    again = engine.write(replace(request, prompts=last, seeds=request.seeds[-2:]))
    width = again.response_ids.shape[1]
    assert torch.equal(whole.response_ids[-2:, :width], again.response_ids)


def test_whole_laws_are_those_of_the_trainer(components: Components) -> None:
    engine = engine_of(components)
    hand_over(engine, components.policy)
    text = [4, 5, 6, 7, 8, 9]
    (got,) = engine.next_token_logprobs([text], temperature=0.7)
    with torch.no_grad():
        logits = components.policy.model(input_ids=torch.tensor([text])).logits[0, :-1]
    expected = (logits[:, : components.policy.words].double() / 0.7).log_softmax(-1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_hundred_thousand_words_come_from_the_trainers_law(components: Components) -> None:
    assert p_value(components, many(components, TOKENS)) > 1e-3


def test_another_temperature_is_rejected_and_named(config: Config, components: Components) -> None:
    rollout = many(components, TOKENS, temperature=1.02)
    assert p_value(components, rollout) < 1e-3
    found = named(config, components, rollout, len(rollout.response_ids))
    assert found.name == "another temperature" and found.gain > 7
    assert "about 1.02 and scored at 1" in found.cause


def test_a_cut_tail_is_rejected_and_named(
    config: Config, components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = vllm_engine.import_vllm()
    plain = vllm.SamplingParams
    monkeypatch.setattr(vllm, "SamplingParams", lambda **given: plain(**given, top_p=0.99))
    rollout = many(components, TOKENS)
    monkeypatch.undo()
    assert p_value(components, rollout) < 1e-3
    found = named(config, components, rollout, 300)
    assert found.name == "top-p" and found.gain > 7


def test_a_stale_matrix_is_rejected_and_named(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, policy = engine_of(components), components.policy
    hand_over(engine, policy)
    matrix = policy.model.get_parameter(STALE)
    before = matrix.detach().clone()
    late = iter([(STALE, before)])
    with torch.no_grad():
        matrix.add_(torch.randn(matrix.shape, generator=torch.Generator().manual_seed(4)) / 10)

    def without_the_update(self: VLLMEngine, weights: Any) -> None:
        kept = dict(weights) | dict(late)
        load(self, kept.items())

    load = VLLMEngine.load_weights
    try:
        monkeypatch.setattr(VLLMEngine, "load_weights", without_the_update)
        with pytest.raises(EngineError, match=r"model\.layers\.1 had not arrived, and arrived"):
            hand_over(engine, policy)
        # Where the answers are not compared, the words show it.
        load(engine, (dict(policy_weights(policy)) | {STALE: before}).items())
        batch = batch_prompts(components.prompts * 100, pad_id=policy.pad_id)
        rollout = engine.write(writing_request(engine, batch, SamplingSpec(LENGTH), microbatch=1))
        assert p_value(components, rollout) < 1e-3
    finally:
        with torch.no_grad():
            matrix.copy_(before)


def test_a_head_that_is_the_embedding_arrives_as_well(tmp_path: Path) -> None:
    """vLLM on a CPU leaves a tied head as it was when new weights come."""
    folder = tiny_models.save_model(tmp_path / "qwen2", "qwen2", **SIZES)
    policy = load_policy(folder)
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
    engine = start_vllm(policy, VLLMSettings(max_tokens=32, kv_cache_gib=0.1, enforce_eager=True))
    try:
        for _ in range(2):
            assert hand_over(engine, policy)
            with torch.no_grad():
                policy.model.lm_head.weight.mul_(1.2)
    finally:
        engine.close()


@pytest.mark.parametrize("version", ["0.31.4", "0.9.2", "unknown"])
def test_an_old_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = vllm_engine.import_vllm()
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(EngineError, match=rf"expected vLLM 0\.32 or newer, got {version}"):
        vllm_engine.import_vllm()


def test_a_head_it_cannot_read_is_said_at_the_start(config: Config, tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path / "policy", tok=tiny_models.tokenizer())
    policy = config.policy.model_copy(update={"path": str(tmp_path / "policy")})
    with pytest.raises(EngineError, match=r"expected vLLM to write, got .*head_dim=8"):
        assemble(config.model_copy(update={"policy": policy}))


def test_weights_of_another_shape_are_refused(components: Components) -> None:
    """The last test of this engine, which is of no use afterwards."""
    with pytest.raises(EngineError, match="expected vLLM to take the policy's weights, got"):
        engine_of(components).load_weights([("model.norm.weight", torch.ones(3))])
