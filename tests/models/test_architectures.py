"""Architecture × way of beginning: trained, saved, opened by others, audited, resumed.

The oracle: the logits of the held model at the moment of saving, and what plain transformers and
peft make of the directory. `benchmarks/architectures.py` does every architecture there is.
"""

from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny_architectures as tiny
import torch

import kleash
from kleash.models.policy import Policy
from kleash.training.assembly import assemble
from kleash.training.loop import train

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 3, 4, 1, 12, 13]])
TEXT = torch.tensor([[6, 7, 8, 9, 10]])
"""w1 w2 w3 w4 w5"""
LAYER: dict[str, Any] = {
    "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2, "max_new_tokens": 4},
    "algorithm": {"name": "rloo", "epochs": 1, "minibatches": 1},
    "logging": {"checkpoint_every": 1, "samples_per_step": 0},
    "optimizer": {"lr": 1e-1},
    "leash": {"beta": 0.1},
    "steps": 2,
    "reward_models": {"sum": {"callable": "tiny_architectures:sum_of_words"}},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    return small_run.save_material(folder, prompts=["w1 w2", "w4"], heldout=["w5"])


@pytest.mark.slow
@pytest.mark.parametrize("way", tiny.WAYS)
@pytest.mark.parametrize("kind", tiny.TWELVE)
def test_a_checkpoint_is_the_policy_that_was_held(
    kind: str,
    way: str,
    bases: Path,
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[torch.Tensor] = []
    save = Policy.save

    def record(self: Policy, path: str | Path) -> None:
        held.append(tiny.reading(self.model, IDS))
        save(self, path)

    monkeypatch.setattr(Policy, "save", record)
    base = bases / kind
    if not base.is_dir():
        tiny.save(base, kind)
    policy = tiny.way(way, tmp_path, base)
    prompts = {"train": str(material / "prompts.jsonl")}
    config = small_run.settings(
        material, tmp_path / "run", LAYER, policy=policy, prompts={**prompts, "heldout": None}
    )
    before = assemble(config)
    start = tiny.reading(before.policy.model, IDS)
    reference = tiny.reading(before.policy.model, TEXT)[0, :-1]
    saved = [path / "policy" for path in sorted((train(config) / "checkpoints").iterdir())]
    assert len(saved) == len(held) == 2
    assert (held[1] - start).abs().max() > 1e-3

    # Opened by transformers and peft alone.
    for folder, was in zip(saved, held, strict=True):
        got = tiny.reading(tiny.open_plainly(folder), IDS)
        torch.testing.assert_close(got, was, atol=1e-5, rtol=0)

    # Resumed.
    before.policy.restore(saved[1])
    assert torch.equal(tiny.reading(before.policy.model, IDS), held[1])

    # Audited, against itself and against what the run began with.
    file = material / "prompts.jsonl"
    same = kleash.audit(saved[1], saved[1], file, max_new_tokens=2)
    assert same.kl.per_token.mean == pytest.approx(0, abs=1e-6)
    ours, theirs = tiny.reading(before.policy.model, TEXT)[0, :-1], reference
    expected = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    apart = kleash.audit(saved[1], assemble(config).policy, texts=["w1 w2 w3 w4 w5"])
    assert expected > 1e-4
    assert apart.kl.per_token.mean == pytest.approx(expected, abs=1e-6)
