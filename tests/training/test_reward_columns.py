"""Columns of the prompts, and the tokens of responses, on their way to rewards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_material import material as material
from training_material import settings
from transformers import AutoModelForSequenceClassification

from kleash.errors import RewardError
from kleash.models.reward_model import ClassifierReward
from kleash.training.assembly import assemble
from kleash.training.components import Components
from kleash.training.responses import JudgedResponses


def run(material: Path, tmp_path: Path, **changes: Any) -> Components:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"w{i} w3", "answer": f"w{i}", "group": "a"} for i in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": str(prompts), "heldout": str(prompts)}
    return assemble(settings(material, tmp_path / "run", prompts=files, **changes))


def write(components: Components, prompts: list[Any]) -> JudgedResponses:
    return components.judge(components.write(prompts, responses_per_prompt=8, microbatch=16))


def test_a_gold_answer_reaches_every_kind_of_reward(material: Path, tmp_path: Path) -> None:
    rewards = {
        "lists": {"callable": "reward_functions:answers_right"},
        "each": {"callable": "reward_functions:answers_right_each", "concurrency": 3},
    }
    components = run(material, tmp_path, reward_models=rewards, heldout={"gold": rewards["lists"]})
    for prompts in (components.prompts, components.heldout):
        written = write(components, prompts)
        golds = [prompt.columns["answer"] for prompt in prompts for _ in range(8)]
        tokenizer, right = components.policy.tokenizer, []
        for row, gold in enumerate(golds):
            ids = written.rollout.response_ids[row][written.rollout.response_mask[row]].tolist()
            assert written.columns["completion_ids"][row] == ids
            right.append(float(tokenizer.convert_tokens_to_ids(gold) in ids))
        assert 0 < sum(right) < len(right)
        assert written.parts["lists"].tolist() == written.parts["each"].tolist() == right
        assert components.gold is not None
        scores = components.gold.score(written.prompts, written.texts, written.columns)
        assert scores.tolist() == right


def test_a_column_that_the_prompts_lack_is_named(material: Path, tmp_path: Path) -> None:
    rewards = {"r": {"callable": "reward_functions:needs_gold"}}
    components = run(material, tmp_path, reward_models=rewards)
    message = r"columns 'gold_answer' in the prompts, .*'needs_gold' takes|got 'answer', 'group'"
    with pytest.raises(RewardError, match=message):
        write(components, components.prompts)
    limits = {"r": {"callable": "reward_functions:needs_gold", "retries": 7}}
    with pytest.raises(RewardError, match="an async function for `concurrency`"):
        run(material, tmp_path, reward_models=limits)


def test_a_classifier_reads_in_the_type_and_the_number_of_texts_that_are_given(
    material: Path, tmp_path: Path
) -> None:
    """The oracle: the classifier by plain transformers, one text at a time, in bfloat16."""
    section = {"path": str(material / "reward"), "dtype": "bfloat16", "microbatch_size": 3}
    components = run(material, tmp_path, reward_models={"judge": section})
    judge, _ = components.reward.rewards["judge"]
    assert isinstance(judge, ClassifierReward)
    plain = AutoModelForSequenceClassification.from_pretrained(
        material / "reward", dtype=torch.bfloat16
    )
    sizes: list[int] = []
    judge.model.register_forward_pre_hook(
        lambda _, __, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )
    written = write(components, components.prompts)
    rows = [
        judge.encode(prompt.content, text, i)
        for i, (prompt, text) in enumerate(
            zip(
                [prompt for prompt in components.prompts for _ in range(8)],
                written.responses.texts,
                strict=True,
            )
        )
    ]
    expected = [plain(input_ids=torch.tensor([row])).logits.item() for row in rows]
    torch.testing.assert_close(written.parts["judge"], torch.tensor(expected), atol=0.02, rtol=0.02)
    assert max(sizes) == 3 and sum(sizes) == len(rows)
