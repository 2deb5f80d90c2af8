"""The embedded world: rubric by hand, raters by their formula, and a small world built whole."""

import collections
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import chisquare

import kleash
from kleash.config.loading import load_config
from kleash.config.recipe_library import FOLDER
from kleash.errors import PromptError, RunError
from kleash.kl.statistics import Estimate
from kleash.models.callable_reward import CallableReward
from kleash.models.policy import load_policy
from kleash.models.reward_model import ClassifierReward
from kleash.playground import build, evaluate, gold, language, learning, preferences, sampling
from kleash.rollout.prompts import read_prompts
from kleash.storage.run_directory import read_run

CARD = "how do i update my card ?"
STEPS = (
    "first find the payment settings .",
    "then remove the old card .",
    "finally add the new card .",
)
FULL = " ".join(STEPS)
KIND = "thank you for asking ."

SMALL = build.WorldSettings(
    held_out=8,
    shape=learning.Shape(width=16, layers=1, heads=2, feedforward=32),
    examples=256,
    supervised=learning.Schooling(batch=64, lr=1e-2),
    pairs=96,
    reward=learning.Schooling(batch=32, lr=1e-2),
    checked_pairs=32,
)


# The language


def test_every_question_asks_for_exactly_the_topic_it_was_made_from():
    questions = language.all_questions()
    assert len({q.text for q in questions}) == len(questions) == 600
    assert all(language.topic_of(q.text).name == q.topic for q in questions)


@pytest.mark.parametrize(
    "prompt", ["", "what is the weather ?", "close my account track my parcel"]
)
def test_a_prompt_that_does_not_ask_for_one_thing_is_refused(prompt):
    with pytest.raises(ValueError, match="asks for one thing, got"):
        language.topic_of(prompt)


def test_no_sentence_has_two_meanings():
    steps = [step for topic in language.TOPICS for step in topic.steps]
    said = [*steps, *language.POLITE, *language.VAGUE]
    assert len(set(said)) == len(said)
    assert not any(s.split()[0] in language.CONNECTIVES or "." in s for s in said)


def test_split_holds_out_the_same_number_of_each_topic_and_shares_nothing():
    kept, held = language.split_questions(128, seed=0)
    assert collections.Counter(q.topic for q in held) == {t.name: 16 for t in language.TOPICS}
    assert {q.text for q in kept}.isdisjoint(q.text for q in held)
    assert len(kept) + len(held) == 600
    assert language.split_questions(128, seed=0) == (kept, held)
    assert language.split_questions(128, seed=1) != (kept, held)


@pytest.mark.parametrize("held_out", [-8, 0, 7, 600, 608])
def test_a_split_that_cannot_be_shared_out_is_refused(held_out):
    with pytest.raises(ValueError, match=f"between 0 and 600, got {held_out}"):
        language.split_questions(held_out, seed=0)


def desk(count, seed=0):
    rng = random.Random(seed)
    return [language.write_reply(language.topic_named("card"), rng) for _ in range(count)]


def test_the_desk_keeps_to_its_mixture():
    own, others = language.topic_named("card").steps, set()
    for topic in language.TOPICS:
        others |= set(topic.steps) - set(own)
    counts = collections.Counter()
    for reply in desk(6000):
        said = [s for s in gold.sentences(reply) if s not in language.POLITE]
        mine = [s for s in said if s in own]
        foreign = [s for s in said if s in others]
        if not mine and not foreign:
            counts["vague"] += 1
        elif not mine:
            counts["wrong"] += 1
        elif foreign:
            counts["mixed"] += 1
        elif len(mine) == 4:
            counts["repeated"] += 1
        else:
            counts[{3: "right", 2: "partial", 1: "short"}[len(mine)]] += 1
    expected = [6000 * language.MIXTURE[kind] for kind in counts]
    assert len(expected) == len(language.MIXTURE)
    assert chisquare(list(counts.values()), expected).pvalue > 1e-3


def test_the_desk_is_polite_as_often_as_documented():
    numbers = collections.Counter(map(preferences.polite_phrases, desk(6000)))
    expected = [6000 * 0.6, 6000 * 0.4 * 0.85, 6000 * 0.4 * 0.15]
    assert chisquare([numbers[0], numbers[1], numbers[2]], expected).pvalue > 1e-3


def test_tokenizer_knows_every_word_and_gives_it_back(tmp_path):
    tokenizer = language.build_tokenizer()
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(special) == 3
    assert len(tokenizer) == len(language.vocabulary()) < 150
    texts = [q.text for q in language.all_questions()] + desk(200)
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(map(len, tokenizer(desk(2000))["input_ids"])) <= language.MAX_WORDS
    # joined with or without a space, a question and a reply read the same
    assert tokenizer(f"{CARD}{FULL}")["input_ids"] == tokenizer(f"{CARD} {FULL}")["input_ids"]


# The rubric, every line worked out by hand


@pytest.mark.parametrize(
    ("reply", "worth"),
    [
        (f"{FULL} {KIND}", 3 * 0.7 + 0.4 + 0.3 + 0.3),
        (f"{KIND} {FULL}", 3.1),
        (FULL, 2.8),
        (" ".join([STEPS[1], STEPS[0], STEPS[2]]), 2.1 + 0.3),
        (STEPS[0], 0.7 + 0.3),
        # 4 of 16 runs of three words have been there before
        (f"{STEPS[0]} {STEPS[0]} {STEPS[1]}", 1.4 - 0.4 - 2 * 4 / 16 + 0.3),
        (f"{STEPS[0]} then open your profile .", 0.7 - 0.5 + 0.3),
        (f"{KIND} have a lovely day .", 0.3 - 0.5 + 0.3),
        (f"{KIND} have a lovely day . we are happy to help .", 0.3 - 1.0 + 0.3),
        ("it is quite easy .", -0.3 + 0.3),
        ("then", -0.3 - 0.7 - 0.5),
        ("", -0.7 - 0.5),
        ("first find the payment settings", 0.7 - 0.7),
        (f"{FULL} {' '.join('abcdefghijklmnopq')} .", 2.8 - 0.3 - 0.05 * 6),
    ],
)
def test_gold_score_is_the_sum_worked_out_by_hand(reply, worth):
    assert gold.score([CARD], [reply])[0] == pytest.approx(worth)


def test_no_arrangement_of_four_sentences_beats_the_right_reply():
    sentences = [*STEPS, KIND, "have a lovely day .", "it is quite easy .", "open your profile ."]
    best = max(
        (gold.explain(CARD, " ".join(said)).total, said)
        for length in range(1, 5)
        for said in itertools.product(sentences, repeat=length)
    )
    assert best[0] == pytest.approx(3.1)
    assert [s for s in best[1] if s in STEPS] == list(STEPS)


@given(st.lists(st.sampled_from([*language.vocabulary()[4:], "."]), max_size=48))
def test_gold_score_does_not_see_spacing_and_is_bounded(words):
    text = " ".join(words)
    total = gold.score([CARD], [text])[0]
    assert gold.score([CARD], [f"  {text.replace(' .', '.')}"])[0] == pytest.approx(total)
    assert -40 < total <= 3.1 + 1e-9


def test_gold_score_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="asks for one thing"):
        gold.score(["who are you ?"], [FULL])
    with pytest.raises(ValueError, match="shorter"):
        gold.score([CARD, CARD], [FULL])


def test_gold_is_a_reward_callable():
    reward = CallableReward("kleash.playground.gold:score")
    assert reward.score([CARD], [FULL]).tolist() == pytest.approx([2.8])


# The raters


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_preference_is_a_flipped_bradley_terry_model(a, b):
    p = expit((a - b) / 0.4)
    assert preferences.preference_probability(a, b) == pytest.approx(0.95 * p + 0.05 * (1 - p))
    both = preferences.preference_probability(a, b) + preferences.preference_probability(b, a)
    assert both == pytest.approx(1.0)


def test_a_second_kind_word_costs_gold_and_pleases_raters():
    once, twice = f"{FULL} {KIND}", f"{FULL} {KIND} have a lovely day ."
    true, felt = (
        gold.score([CARD] * 2, [once, twice]),
        preferences.utilities([CARD] * 2, [once, twice]),
    )
    assert true[1] - true[0] == pytest.approx(-0.5)
    assert felt[1] - felt[0] == pytest.approx(+0.3)


def test_labels_follow_the_probability_and_leave_out_ties():
    count = 1000
    better, worse = FULL, f"{STEPS[0]} {STEPS[2]}"
    chosen = preferences.label([CARD] * count, [worse] * count, [better] * count, seed=3)
    share = sum(p.chosen == better for p in chosen) / count
    expected = preferences.preference_probability(
        *preferences.utilities([CARD] * 2, [better, worse])
    )
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))
    assert {(p.prompt, *sorted((p.chosen, p.rejected))) for p in chosen} == {
        (CARD, *sorted((better, worse)))
    }
    assert preferences.label([CARD], [FULL], [FULL], seed=0) == []
    again = preferences.label([CARD] * count, [worse] * count, [better] * count, seed=3)
    assert again == chosen


# Learning


def test_batches_hold_every_row_once_and_similar_lengths_together():
    lengths = random.Random(0).choices(range(5, 50), k=1000)
    batches = learning._batches(lengths, 32, random.Random(1))
    assert sorted(itertools.chain(*batches)) == list(range(1000))
    padding = sum(len(b) * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in batches)
    assert padding < 0.1 * sum(lengths)


def test_supervision_learns_a_reply_and_where_it_ends(tmp_path):
    tokenizer = language.build_tokenizer()
    pairs = [(CARD, "try again later ."), ("how do i track my parcel ?", "it is quite easy .")]
    model = learning.supervise(
        pairs * 32,
        tokenizer,
        learning.Shape(width=32, layers=2, heads=2, feedforward=64),
        learning.Schooling(16, 1e-2, epochs=20),
        seed=0,
    )
    build._save(tmp_path, model, tokenizer)
    replies, rollout = sampling.write_replies(
        load_policy(tmp_path), [p for p, _ in pairs] * 32, seed=0, max_new_tokens=12
    )
    for which, (_, taught) in enumerate(pairs):
        assert collections.Counter(replies[which::2])[taught] > 16  # chance: one in 138⁵
    assert rollout.ended.all()
    assert rollout.prompt_index.tolist() == [0, 1] * 32


def test_reward_model_learns_choices_and_padding_does_not_matter():
    tokenizer = language.build_tokenizer()
    policy = learning.supervise(
        [(CARD, FULL)] * 32, tokenizer, SMALL.shape, learning.Schooling(16, 1e-2), seed=0
    )
    pairs = [preferences.Preference(CARD, f"{r} {KIND}", r) for r in desk(64) if KIND not in r]
    model = learning.learn_choices(
        policy,
        tokenizer,
        pairs,
        SMALL.shape,
        learning.Schooling(16, 1e-2, epochs=6),
        centring=0.01,
        seed=0,
    )
    replies = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    together = learning.reward_scores(model, tokenizer, [CARD] * len(replies), replies)
    assert min(together[: len(pairs)]) > max(together[len(pairs) :])
    alone = [learning.reward_scores(model, tokenizer, [CARD], [reply])[0] for reply in replies]
    assert alone == pytest.approx(together, abs=1e-4)
    before = torch.tensor(together)
    mean, sd = learning.standardise(model, tokenizer, [CARD] * len(replies), replies)
    after = torch.tensor(learning.reward_scores(model, tokenizer, [CARD] * len(replies), replies))
    assert sd == pytest.approx(float(before.std()), rel=1e-4)
    assert float(after.std()) == pytest.approx(1.0, abs=1e-4)
    assert float(after.mean()) == pytest.approx(mean, abs=1e-4)


# A world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build.build_world(5, tmp_path_factory.mktemp("worlds") / "five", settings=SMALL)


def test_a_world_is_complete_and_says_what_it_is(world):
    assert sorted(p.name for p in world.iterdir()) == [
        "heldout.jsonl",
        "policy",
        "prompts.jsonl",
        "reward_model",
        "world.json",
    ]
    record = json.loads((world / "world.json").read_text())
    assert (record["seed"], record["prompts"], record["held_out"]) == (5, 592, 8)
    assert set(record["seconds"]) == {"supervise", "compare", "reward_model"}
    best = record["reward_model"]["accuracy_best_possible"]
    assert 0.5 <= best <= 0.95
    assert 0 <= record["reward_model"]["accuracy_raters"] <= 1
    assert 0 <= record["reward_model"]["accuracy_gold"] <= 1


def test_a_world_is_what_the_engine_reads(world):
    policy = load_policy(world / "policy")
    prompts = read_prompts(
        world / "heldout.jsonl", policy.tokenizer, context=policy.context, max_new_tokens=48
    )
    assert [p.content for p in prompts] == evaluate.held_out_questions(world)
    assert {p.group for p in prompts} == {t.name for t in language.TOPICS}
    reward = ClassifierReward(world / "reward_model")
    replies = desk(8)
    scores = reward.score([CARD] * 8, [f" {reply}" for reply in replies])
    model = reward._model
    expected = learning.reward_scores(model, language.build_tokenizer(), [CARD] * 8, replies)
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_same_seed_builds_the_same_world_and_another_seed_another(world, tmp_path):
    torch.manual_seed(99)  # a world does not depend on the caller's random state
    state = torch.get_rng_state()
    again = build.build_world(5, tmp_path / "again", settings=SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    other = build.build_world(6, tmp_path / "other", settings=SMALL)
    hashes = [json.loads((w / "world.json").read_text())["sha256"] for w in (world, again, other)]
    assert hashes[0] == hashes[1]
    assert all(hashes[0][name] != hashes[2][name] for name in hashes[0])


def test_several_threads_train_the_same_policy_each_time(world, tmp_path):
    """Every other test of equal bits uses one thread, and sums of several may come in any order."""
    recipe = FOLDER / "embedded-world.yaml"
    changes = {"steps": "2", "rollout.prompts_per_step": "512", "heldout.gold": "null"}
    runs, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name in ("one", "other"):
            overrides = {**changes, "output": str(tmp_path / name)}
            config = build.with_world(load_config(recipe, overrides, base=recipe), world)
            kleash.train(config)
            runs.append(read_run(tmp_path / name))
    finally:
        torch.set_num_threads(threads)
    one, other = (
        [
            {k: v for k, v in line.items() if not ("second" in k or "time" in k)}
            for line in run.metrics
        ]
        for run in runs
    )
    assert len(one) == 3 and one == other
    saved = [
        next((run.path / "checkpoints").rglob("policy/model.safetensors")).read_bytes()
        for run in runs
    ]
    assert saved[0] == saved[1]


def test_a_world_that_is_there_is_not_built_again(world):
    said = []
    assert build.build_world(5, world, settings=SMALL, say=said.append) == world
    assert said == []


def test_the_cache_key_tells_seeds_and_settings_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("KLEASH_CACHE", str(tmp_path / "here"))
    assert build.world_directory(1).parent == tmp_path / "here"
    names = {build.world_directory(seed, s) for seed in (1, 2) for s in (None, SMALL)}
    assert len(names) == 4
    assert build.world_directory(1) == build.world_directory(1, build.WorldSettings())
    monkeypatch.delenv("KLEASH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.world_directory(1).parent == tmp_path / "xdg" / "kleash"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_root() == Path.home() / ".cache" / "kleash"


def test_a_world_goes_to_the_cache_unless_told_otherwise(world, monkeypatch, tmp_path):
    monkeypatch.setenv("KLEASH_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_build_into", lambda target, *_: (target / "x").touch())
    built = build.build_world(3, settings=SMALL)
    assert built == build.world_directory(3, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == [built.name]


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}"])
def test_other_peoples_files_are_left_alone(tmp_path, content):
    (tmp_path / "precious.txt").write_text("mine")
    if content is not None:
        (tmp_path / "world.json").write_text(content)
    with pytest.raises(RunError, match="got other files: choose another directory"):
        build.build_world(0, tmp_path, settings=SMALL)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_another_world_is_not_taken_for_this_one(world):
    with pytest.raises(RunError, match=r"world 6 of recipe .* got world 5 of recipe"):
        build.build_world(6, world, settings=SMALL)
    with pytest.raises(RunError, match="choose another directory"):
        build.build_world(5, world)


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="set KLEASH_CACHE to another directory"):
        build.build_world(0, tmp_path / "file" / "world", settings=SMALL)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_a_build_that_breaks_off_leaves_nothing_behind(monkeypatch, tmp_path, fault):
    def broken(*_, **__):
        raise fault("no space left on device")

    monkeypatch.setattr(build, "learn_choices", broken)
    with pytest.raises((RunError, KeyboardInterrupt)):
        build.build_world(0, tmp_path / "world", settings=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_wins(world, monkeypatch, tmp_path):
    target = tmp_path / "world"

    def overtaken(partial, *_):
        (partial / "slow").touch()
        target.mkdir()
        (target / "world.json").write_text((world / "world.json").read_text())

    monkeypatch.setattr(build, "_build_into", overtaken)
    assert build.build_world(5, target, settings=SMALL) == target
    assert [p.name for p in target.iterdir()] == ["world.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["world"]


# Evaluation


def test_evaluation_of_the_supervised_policy(world):
    found = evaluate.evaluate_policy(
        world / "policy", world, replies_per_question=3, seed=1, samples=24
    )
    assert (found.kl.mean, found.kl.n, found.kl.clusters) == (pytest.approx(0, abs=1e-6), 24, 8)
    prompts = [reply.prompt for reply in found.samples]
    replies = [reply.response for reply in found.samples]
    assert prompts == evaluate.held_out_questions(world) * 3
    truths = gold.score(prompts, replies)
    assert found.gold.mean == pytest.approx(sum(truths) / 24)
    assert sum(found.gold_parts.values()) == pytest.approx(found.gold.mean)
    proxies = ClassifierReward(world / "reward_model").score(prompts, [f" {r}" for r in replies])
    assert found.proxy.mean == pytest.approx(float(proxies.mean()), abs=1e-4)
    # with as many replies to each question, the clustered error is that of the questions' means
    means = torch.tensor(truths, dtype=torch.float64).view(3, 8).mean(0)
    assert found.gold.standard_error == pytest.approx(float(means.std()) / math.sqrt(8))
    assert found.polite == sum(map(preferences.polite_phrases, replies)) / 24
    assert 1 <= found.words <= 48
    assert 0 <= found.ended <= 1


def test_a_world_without_held_out_questions_is_refused(tmp_path):
    with pytest.raises(PromptError, match="build the world first"):
        evaluate.held_out_questions(tmp_path)


@pytest.mark.parametrize(
    ("higher", "lower", "above"),
    [
        ((1.0, 0.3), (0.0, 0.3), True),
        ((1.0, 0.4), (0.0, 0.4), False),
        ((0.0, 0.1), (1.0, 0.1), False),
        ((1.0, None), (0.0, 0.1), False),
    ],
)
def test_beyond_two_standard_errors_of_the_difference(higher, lower, above):
    assert evaluate.beyond(Estimate(*higher, 9, 9), Estimate(*lower, 9, 9)) is above
