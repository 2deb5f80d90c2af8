"""A run that collapsed or exploits its reward is told from one that did neither."""

from pathlib import Path
from typing import Any

import pytest
from training_material import material as material  # the fixture
from training_material import settings

from kleash.storage.run_directory import read_run
from kleash.training.loop import train
from kleash.training.warning_signs import STEPS, warning_signs

KNOWN = 3.0


def series(**last: float) -> list[dict[str, Any]]:
    """A sound run: its score rises, its KL stays at 2; `last` replaces numbers from step 11 on."""
    steps = 20
    sound: list[dict[str, Any]] = [{"step": 0, "heldout/gold": 1.0, "heldout/gold_se": 0.1}]
    for step in range(1, steps + 1):
        done = step / steps
        line = {
            "step": step,
            "objective/kl_ref": 2 * done,
            "objective/scores": 0.0 + done,
            "objective/scores_se": 0.1,
            "rollout/distinct_2": 0.9 - 0.3 * done,
            "objective/entropy_per_token": 3.0 - done,
            "rollout/length": 20 + 10 * done,
        }
        if step == steps:
            line |= {"heldout/gold": 0.9, "heldout/gold_se": 0.1}
        changed = {key.replace("__", "/"): value for key, value in last.items()}
        sound.append({**line, **{k: v for k, v in changed.items() if step > 10 and k in line}})
    return sound


def test_a_sound_run_has_none() -> None:
    assert warning_signs(series(), known_kl=KNOWN) == []
    assert warning_signs([], known_kl=None) == []


@pytest.mark.parametrize(
    ("last", "name", "since"),
    [
        ({"objective__kl_ref": 40.0}, "kl_beyond_plan", 11),
        ({"rollout__distinct_2": 0.2}, "distinct_2", 11),
        ({"objective__entropy_per_token": 0.4}, "entropy_per_token", 11),
        ({"rollout__length": 90.0}, "length", 11),
        ({"rollout__length": 4.0}, "length", 11),
        ({"heldout__gold": 0.3}, "heldout_gold", 20),
    ],
)
def test_each_sign_and_since_when(last: dict[str, float], name: str, since: int) -> None:
    (sign,) = warning_signs(series(**last), known_kl=KNOWN)
    assert (sign.name, sign.since) == (name, since)
    assert next(f"{value:.3g}" for value in last.values()) in sign.sentence


def test_what_is_no_sign() -> None:
    # A large KL at which no score was gained, one without a plan, and what passed or just began.
    still = {"objective__kl_ref": 40.0, "objective__scores": 0.0}
    assert warning_signs(series(**still), known_kl=KNOWN) == []
    assert warning_signs(series(objective__kl_ref=40.0), known_kl=None) == []
    passed = series(rollout__distinct_2=0.1)[:-1] + series()[-1:]
    assert warning_signs(passed, known_kl=KNOWN) == []
    begun = series()[: -(STEPS - 1)] + series(rollout__distinct_2=0.1)[-(STEPS - 1) :]
    assert warning_signs(begun, known_kl=KNOWN) == []


def test_a_clean_run_ends_without_and_a_wrecked_one_with_a_warning(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = read_run(train(settings(material, tmp_path / "clean", steps=8)))
    assert run.meta["warning_signs"] == [] and run.events == []
    assert "warning" not in capsys.readouterr().out

    wrecked = {"optimizer": {"lr": 10.0}, "leash": {"beta": 0.0}}
    run = read_run(train(settings(material, tmp_path / "wrecked", steps=8, **wrecked)))
    assert run.status == "finished"
    names = {sign["name"] for sign in run.meta["warning_signs"]}
    assert "entropy_per_token" in names
    assert {event.kind for event in run.events} == {"alarm"}
    # Beside each sign stand the responses that went farthest since it began.
    for event, sign in zip(run.events, run.meta["warning_signs"], strict=True):
        kept = [s for s in run.samples if s.step >= sign["since"] and s.who == "policy"]
        farthest = sorted((s.kl for s in kept if s.kl is not None), reverse=True)
        assert [one["kl"] for one in event.details["worst"]] == farthest[:3] != []
        assert all(one["response"] for one in event.details["worst"])
    lines = " ".join(capsys.readouterr().out.split())
    assert "warning: the entropy per token fell to" in lines
