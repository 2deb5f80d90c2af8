"""A run's whole life: trained two steps, saved, opened by others, audited, resumed.

Every number is a distance from an oracle that kleash has no part in: the logits of the model that
was held at the moment of saving, what plain transformers and peft make of the directory, and a KL
that is summed here from those logits.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny_architectures as tiny
import torch
from training_material import mark_unfinished

import kleash
from kleash.auditing.model_pair import open_checkpoint
from kleash.models.policy import Policy
from kleash.training.assembly import assemble
from kleash.training.loop import train

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 3, 4, 1, 12, 13]])
TEXT, TEXT_IDS = "w1 w2 w3 w4 w5", torch.tensor([[6, 7, 8, 9, 10]])
LAYER: dict[str, Any] = {
    "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2, "max_new_tokens": 4},
    "algorithm": {"name": "rloo", "epochs": 1, "minibatches": 1},
    "logging": {"checkpoint_every": 1, "samples_per_step": 0},
    "optimizer": {"lr": 1e-1},
    "leash": {"beta": 0.1},
    "steps": 2,
    "reward_models": {"sum": {"callable": "tiny_architectures:sum_of_words"}},
}


@dataclass(frozen=True)
class Life:
    """Distances in nats."""

    moved: float
    """Of the second checkpoint from the start: what training did."""
    opened: float
    """Of both checkpoints, as plain transformers and peft open them, from the policies held."""
    resumed: float
    """Of the run continued from its first checkpoint from the run that never stopped."""
    own: float
    """KL per token of the checkpoint to itself, by an audit."""
    audited: float
    """Of the audit's KL per token to the start from the sum over the logits."""
    kl: float
    """That sum."""

    @property
    def worst(self) -> float:
        """The largest of those that must be 0."""
        return max(self.opened, self.resumed, abs(self.own), self.audited)


def live(policy: dict[str, Any], folder: Path, material: Path) -> Life:
    """Lead a run through its life.

    Args:
        policy: how it begins: a section of the configuration, by `tiny_architectures.way`.
        folder: where to write.
        material: prompt files, by `small_run.save_material`.
    """
    prompts = {"train": str(material / "prompts.jsonl"), "heldout": None}
    config = small_run.settings(material, folder / "run", LAYER, policy=policy, prompts=prompts)
    begun = assemble(config).policy
    start, given = (tiny.reading(begun.model, ids) for ids in (IDS, TEXT_IDS))
    held: list[torch.Tensor] = []
    save = Policy.save

    def record(self: Policy, path: str | Path, **options: Any) -> None:
        held.append(tiny.reading(self.model, IDS))
        save(self, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "save", record)
        run = train(config)
        saved = [path / "policy" for path in sorted((run / "checkpoints").iterdir())]
        assert len(saved) == len(held) == 2
        opened = [tiny.open_plainly(path) for path in saved]
        last = open_checkpoint(saved[1], dtype="float32", device="cpu")
        own = kleash.audit(last, last, prompts["train"], max_new_tokens=2)
        apart = kleash.audit(last, begun, texts=[TEXT])
        # As a run that was killed after its first step.
        shutil.rmtree(saved[1].parent)
        mark_unfinished(run)
        train(config)
        assert len(held) == 3, "it began anew"
    ours, theirs = (now[0, :-1] for now in (tiny.reading(opened[1], TEXT_IDS), given))
    kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    return Life(
        moved=_apart(held[1], start),
        opened=max(
            _apart(tiny.reading(model, IDS), was) for model, was in zip(opened, held, strict=False)
        ),
        resumed=_apart(held[2], held[1]),
        own=own.kl.per_token.mean,
        audited=abs(apart.kl.per_token.mean - kl),
        kl=kl,
    )


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
