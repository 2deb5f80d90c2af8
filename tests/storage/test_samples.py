"""What a run keeps of both models' likeliest words, against whole distributions by transformers."""

from pathlib import Path

import fault_types
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kleash.training.evaluation
from kleash.rollout.top_tokens import TOP
from kleash.storage.run_directory import read_run
from kleash.storage.samples import Likely, Sample
from kleash.training.evaluation import tokens_to_keep
from kleash.training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A short run at another temperature, and the folder of its models."""
    material = fault_types.material(tmp_path_factory.mktemp("material"), "gemma2")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("run")
        world = fault_types.clean(material, "gemma2", patch, folder)
        world.tree |= {"steps": 2, "optimizer": {"lr": 0.01}}
        world.tree["logging"] = {"samples_per_step": 4}
        world.set("rollout.temperature", 0.8)
        return train(world.config()), material


def expected(model_path: Path, sample: Sample) -> list[list[tuple[str, float]]]:
    """The five likeliest words at each token, from the logits of the model itself."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    prompt = tokenizer(sample.prompt)["input_ids"]
    written = [tokenizer.convert_tokens_to_ids(token) for token in sample.tokens]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
    shares, ids = (logits.double() / 0.8).softmax(-1).topk(TOP)
    return [
        [(tokenizer.convert_ids_to_tokens(i), p) for i, p in zip(row, masses, strict=True)]
        for row, masses in zip(ids.tolist(), shares.tolist(), strict=True)
    ]


def agrees(likely: Likely | None, words: list[tuple[str, float]]) -> bool:
    assert likely is not None
    pairs = zip(likely.probabilities, (p for _, p in words), strict=True)
    close = all(abs(mine - theirs) < 1e-3 * theirs for mine, theirs in pairs)
    return close and list(likely.words) == [word for word, _ in words]


def test_before_the_first_update_both_models_want_what_the_reference_does(run) -> None:
    """The policy that wrote, not the one that has learnt from it since."""
    path, material = run
    first = [s for s in read_run(path).samples if s.step == 1]
    assert {s.kind for s in first} == {"worst", "random"} and len(first) == 4
    for sample in first:
        words = expected(material / "policy", sample)
        assert len(sample.policy_top) == len(sample.tokens) == len(words)
        for ours, theirs, row in zip(sample.policy_top, sample.reference_top, words, strict=True):
            assert agrees(ours, row) and agrees(theirs, row)


def test_at_the_end_each_model_wants_its_own(run) -> None:
    path, material = run
    last = [s for s in read_run(path).samples if s.step == 2 and s.kind == "heldout"]
    assert last
    policy = sorted((path / "checkpoints").iterdir())[-1] / "policy"
    differ = 0
    for sample in last:
        ours, theirs = expected(policy, sample), expected(material / "policy", sample)
        assert all(map(agrees, sample.policy_top, ours))
        assert all(map(agrees, sample.reference_top, theirs))
        differ += ours != theirs
    assert differ > 0


def test_of_a_long_response_the_tokens_of_largest_kl_are_looked_at(monkeypatch) -> None:
    monkeypatch.setattr(kleash.training.evaluation, "TOPS_PER_SAMPLE", 2)
    kl = torch.tensor([0.1, 3.0, 0.0, 2.0])
    assert tokens_to_keep(kl).tolist() == [False, True, False, True]
    assert tokens_to_keep(kl[:1]).tolist() == [True]
