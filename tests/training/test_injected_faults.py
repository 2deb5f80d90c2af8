"""Six faults, each refused with its sentence, and nothing lost: the run goes on as if unharmed.

A run of four steps meets its fault after the second; the fault is fixed, the run resumed, and
its numbers and weights compared with those of a run that met none.
"""

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import numbers, weights
from training_hooks import before_each_step
from training_material import mark_unfinished, settings
from training_material import material as material  # the fixture

import kleash.training.session
from kleash.config.schema import Config
from kleash.errors import KleashError, NonFiniteScoreError
from kleash.storage.run_directory import read_run
from kleash.training.loop import train
from kleash.training.optimization import PolicyUpdater
from kleash.training.session import Session
from kleash.training.state import latest_checkpoint

broken = {"reward": False}


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    scores = [float(response.split().count("w3")) for response in responses]
    return [*scores[:-1], float("nan")] if broken["reward"] else scores


def configuration(material: Path, output: Path) -> Config:
    rewards = {"w3": {"callable": f"{__name__}:reward"}}
    return settings(material, output, reward_models=rewards)


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(configuration(material, tmp_path_factory.mktemp("whole") / "run"))


def refused(config: Config, sentence: str, at: Any = None) -> Path:
    """Train with a fault before step 3; the run says why it ended."""

    def faulty(session: Session) -> None:
        if at is not None and session.state.step == 2:
            at(session.components)

    with pytest.MonkeyPatch.context() as patch:
        before_each_step(patch, faulty)
        with pytest.raises(KleashError, match=sentence) as caught:
            train(config)
    message = str(caught.value)
    assert "\n" not in message
    run = read_run(config.output)
    assert (run.status, run.meta["message"]) == ("failed", message)
    return run.path


def require_unharmed(config: Config, whole: Path) -> None:
    train(config)
    path = Path(config.output)
    assert numbers(path) == numbers(whole)
    ours, theirs = weights(path), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_reward_that_is_not_a_number(material: Path, tmp_path: Path, whole: Path) -> None:
    def breaks(_: Any) -> None:
        broken["reward"] = True

    config = configuration(material, tmp_path / "run")
    sentence = r"a finite score from the reward function .* for response 7, .*, got nan; step 3 was"
    try:
        path = refused(config, sentence, breaks)
    finally:
        broken["reward"] = False
    event = read_run(path).events[0]
    assert (event.kind, event.details["response"]) == ("refused", 7)
    assert (path / event.details["evidence"] / "batch.safetensors").is_file()
    assert issubclass(NonFiniteScoreError, KleashError)
    require_unharmed(config, whole)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_infinite_logit(material: Path, tmp_path: Path, whole: Path, value: float) -> None:
    def damages(components: Any) -> None:
        with torch.no_grad():
            components.policy.head.weight[5] = value

    config = configuration(material, tmp_path / "run")
    path = refused(config, r"finite logits from the policy.* for token \d of response \d", damages)
    assert read_run(path).events[0].details["token"] == 0
    require_unharmed(config, whole)


def test_a_reference_overwritten(material: Path, tmp_path: Path, whole: Path) -> None:
    """Written to during step 2, found before step 3 reads it."""

    config = configuration(material, tmp_path / "run")
    update = PolicyUpdater.update

    def overwrites(self: PolicyUpdater, experience: Any, *, done: int, **more: Any) -> Any:
        if done == 2:
            with torch.no_grad():
                next(self.components.reference.model.parameters()).view(-1)[3] += 1e-6
        return update(self, experience, done=done, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyUpdater, "update", overwrites)
        path = refused(config, "the reference changed while training: .* step 4 was not made")
    assert latest_checkpoint(path / "checkpoints") == path / "checkpoints" / "step-000003"
    require_unharmed(config, whole)


def test_a_disk_that_is_full_while_saving(material: Path, tmp_path: Path, whole: Path) -> None:
    """A real refusal of the kernel: files may not grow beyond a limit while step 4 is saved."""
    config = configuration(material, tmp_path / "run")
    save, limits = (
        kleash.training.session.save_run_state,
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(parent: Path, components: Any, state: Any, *rest: Any, **options: Any) -> Any:
        if state.step < 4:
            return save(parent, components, state, *rest, **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            return save(parent, components, state, *rest, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kleash.training.session, "save_run_state", limited)
            path = refused(config, r"cannot write the checkpoint .*step-000004: .*(large|written)")
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["step-000002"]
    require_unharmed(config, whole)


def test_a_checkpoint_short_of_a_byte(material: Path, tmp_path: Path, whole: Path) -> None:
    config = configuration(material, tmp_path / "run")
    path = train(config)
    mark_unfinished(path)
    newest = path / "checkpoints" / "step-000004"
    file = newest / "policy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    sentence = r"step-000004 is damaged: policy/model.safetensors should have \d+ bytes.*move it"
    with pytest.raises(KleashError, match=sentence):
        train(config)
    newest.rename(tmp_path / "away")  # as the sentence says
    require_unharmed(config, whole)


def test_another_reference_on_resuming(material: Path, tmp_path: Path, whole: Path) -> None:
    """The directory that the reference was loaded from holds another model when it resumes."""
    config = configuration(material, tmp_path / "run")
    path = train(config)
    newest = path / "checkpoints" / "step-000004"
    newest.rename(tmp_path / "away")
    mark_unfinished(path)
    mine, other = (material / name / "model.safetensors" for name in ("policy", "other"))
    kept = mine.read_bytes()
    mine.write_bytes(other.read_bytes())
    try:
        with pytest.raises(KleashError, match=r"tied to another reference: it was .*policy with"):
            train(config)
    finally:
        mine.write_bytes(kept)
    require_unharmed(config, whole)
