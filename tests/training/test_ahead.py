"""One step ahead: whose weights wrote, that nothing depends on timing, and every way to stop."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from config_trees import minimal
from small_run import numbers, policy_weights, save_material, two_words
from stand_in_engine import StandInEngine
from training_hooks import before_each_step, interrupt_after

from kleash.config.loading import parse_config
from kleash.config.schema import Config
from kleash.errors import ConfigError, EngineLostError, NonFiniteError
from kleash.mesh import Mesh
from kleash.rollout.policy_copy import PolicyCopy
from kleash.storage.run_directory import read_run
from kleash.training import assembly
from kleash.training.callbacks import RolloutEvent
from kleash.training.loop import train
from kleash.training.optimization import PolicyUpdater
from kleash.training.session import Session
from kleash.types import Rollout

AHEAD = {"ahead": 1, "correction": "sequence_truncated"}
LAYER: dict[str, Any] = {
    "algorithm": {"name": "rloo"},
    "rollout": {"prompts_per_step": 4, "responses_per_prompt": 2, **AHEAD},
    "optimizer": {"lr": 1e-2},
    "logging": {"checkpoint_every": 1, "keep": 9},
    "prompts": {"heldout": None},
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    return save_material(folder, prompts=two_words(range(8)), heldout=two_words(range(10, 13)))


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of four steps."""
    return train(settings(material, tmp_path_factory.mktemp("whole") / "run"))


def settings(material: Path, output: Path, **changes: Any) -> Config:
    return small_run.settings(material, output, LAYER, **changes)


def require_same(path: Path, whole: Path) -> None:
    assert numbers(path) == numbers(whole)
    ours, theirs = policy_weights(path), policy_weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def replay(model: Any, rollout: Rollout) -> torch.Tensor:
    """log-probabilities of the responses by a model's own forward pass, a text at a time."""
    found = torch.zeros(rollout.response_mask.shape)
    for row, mask in enumerate(rollout.response_mask):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row][mask]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0].double()
        table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found[row, : len(response)] = table.gather(1, response[:, None]).squeeze(1).float()
    return found


class Watch:
    """Keeps, of each step, the policy as it is and what was written for it."""

    def __init__(self) -> None:
        self.models: list[Any] = []
        self.rollouts: list[Rollout] = []
        self.flags: list[bool] = []

    def on_rollout(self, event: RolloutEvent) -> None:
        self.models.append(deepcopy(event.components.policy.model))
        self.rollouts.append(event.scored.rollout)
        self.flags.append(event.written_ahead)


def test_with_an_adapter_the_copy_has_it_too(material: Path, tmp_path: Path) -> None:
    watch = Watch()
    adapter = {"lora": {"rank": 2, "targets": ["v_proj", "down_proj"]}}
    config = settings(material, tmp_path / "run", policy=adapter, optimizer={"lr": 0.3}, steps=3)
    train(config, callbacks=[watch])
    rollout, mask = watch.rollouts[2], watch.rollouts[2].response_mask
    assert rollout.sampler_logprobs is not None
    said = rollout.sampler_logprobs[mask]
    assert float((said - replay(watch.models[1], rollout)[mask]).abs().max()) < 1e-4
    assert float((said - replay(watch.models[2], rollout)[mask]).abs().max()) > 1e-3


def test_each_rollout_is_of_the_weights_before_the_last_update(
    material: Path, tmp_path: Path, whole: Path
) -> None:
    watch = Watch()
    path = train(settings(material, tmp_path / "run"), callbacks=[watch])
    assert watch.flags == [False, True, True, True]
    for step, rollout in enumerate(watch.rollouts):
        writer, learner = watch.models[max(step - 1, 0)], watch.models[step]
        assert rollout.sampler_logprobs is not None
        mask = rollout.response_mask
        said = rollout.sampler_logprobs[mask]
        assert float((said - replay(writer, rollout)[mask]).abs().max()) < 1e-4
        if step:
            assert float((said - replay(learner, rollout)[mask]).abs().max()) > 1e-3
    # Watching changed nothing; the gap is that of one update, and none before the first.
    require_same(path, whole)
    gaps = [line["rollout/kl_sampler_per_token"] for line in numbers(path)]
    assert gaps[0] < 1e-9 and all(gap > 1e-6 for gap in gaps[1:])
    # Each prompt is written to as often as without.
    indices = [rollout.prompt_index.tolist() for rollout in watch.rollouts]
    plain = Watch()
    train(settings(material, tmp_path / "plain", rollout={"ahead": 0}), callbacks=[plain])
    assert indices == [rollout.prompt_index.tolist() for rollout in plain.rollouts]


@pytest.mark.parametrize("slow", ["writer", "update"])
def test_nothing_depends_on_which_of_the_two_is_faster(
    material: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    def slowed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            time.sleep(0.3)
            return original(*arguments, **more)

        return call

    if slow == "writer":
        monkeypatch.setattr(PolicyCopy, "write", slowed(PolicyCopy.write))
    else:
        monkeypatch.setattr(PolicyUpdater, "update", slowed(PolicyUpdater.update))
    require_same(train(settings(material, tmp_path / "run")), whole)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    material: Path, tmp_path: Path, whole: Path
) -> None:
    config = settings(material, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert (tmp_path / "run/checkpoints/step-000002/next_rollout.safetensors").is_file()
    require_same(train(config), whole)
    last = tmp_path / "run/checkpoints/step-000004"
    assert not (last / "next_rollout.safetensors").exists()


def test_a_step_that_was_refused_is_made_from_the_same_rollout_when_resumed(
    material: Path, tmp_path: Path, whole: Path
) -> None:
    """Step 3 fails in its update; no checkpoint of step 2 was due."""
    config = settings(material, tmp_path / "run", logging={"checkpoint_every": 4})
    update = PolicyUpdater.update

    def fails(self: PolicyUpdater, experience: Any, *, done: int, **more: Any) -> Any:
        numbers = update(self, experience, done=done, **more)
        if done == 2:
            raise NonFiniteError("planted")
        return numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyUpdater, "update", fails)
        with pytest.raises(NonFiniteError, match="planted; step 3 was not made"):
            train(config)
    require_same(train(config), whole)


def test_after_a_rollback_the_policy_writes_anew(material: Path, tmp_path: Path) -> None:
    wires = {"then": "rollback", "stop_kl": 1e6, "beta_factor": 2.0}
    begun: list[tuple[int, bool]] = []
    failed: list[int] = []

    def act(session: Session) -> None:
        begun.append((session.state.step + 1, session.next_rollout is not None))
        if session.state.step == 2 and not failed:
            failed.append(2)
            raise NonFiniteError("planted")

    with pytest.MonkeyPatch.context() as patch:
        before_each_step(patch, act)
        path = train(settings(material, tmp_path / "run", tripwires=wires))
    assert [event.kind for event in read_run(path).events] == ["refused", "rolled_back"]
    # The step that was refused had a rollout already; the first one after the rollback has none.
    again = begun[3][0]
    assert begun[:4] == [(1, False), (2, True), (3, True), (again, False)]
    assert all(ahead for _, ahead in begun[4:])
    gaps = {line["step"]: line["rollout/kl_sampler_per_token"] for line in numbers(path)}
    assert gaps[again] < 1e-9 < gaps[4]


def test_a_writer_that_fails_is_an_error_of_the_run(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PolicyCopy, request: Any) -> Rollout:
        raise NonFiniteError("the writer has no finite logits")

    monkeypatch.setattr(PolicyCopy, "write", fail)
    with pytest.raises(NonFiniteError, match="no finite logits; step 1 was not made"):
        train(settings(material, tmp_path / "run"))


def test_an_engine_of_its_own_writes_ahead_with_the_weights_before(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's stand-in: handed over once a step, and resumed to the same numbers."""
    engines: list[StandInEngine] = []

    def begin(*arguments: Any, **more: Any) -> Any:
        components = assembly.assemble(*arguments, **more)
        engines.append(StandInEngine(components.policy))
        return replace(components, engine=engines[-1])

    monkeypatch.setattr("kleash.training.startup.assemble", begin)
    watch = Watch()
    config = settings(material, tmp_path / "run", steps=3)
    path = train(config, callbacks=[watch])
    for step, rollout in enumerate(watch.rollouts):
        assert rollout.sampler_logprobs is not None
        mask = rollout.response_mask
        said = rollout.sampler_logprobs[mask]
        writer = replay(watch.models[max(step - 1, 0)], rollout)[mask]
        assert float((said - writer).abs().max()) < 1e-4
    # Once before the first rollout, and before the update of the second step; not after the last.
    assert len(engines[0].handed_over) == 2
    cut = settings(material, tmp_path / "cut", steps=3)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    require_same(train(cut), path)


def test_an_engine_that_is_lost_ahead_ends_the_run_before_the_step(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not asked again: the weights that were to write are not there any more."""

    class Lost(StandInEngine):
        def write(self, request: Any) -> Rollout:
            if self.writes == 2:
                raise EngineLostError("the connection broke")
            self.writes += 1
            return super().write(request)

        writes = 0

    def begin(*arguments: Any, **more: Any) -> Any:
        components = assembly.assemble(*arguments, **more)
        return replace(components, engine=Lost(components.policy))

    monkeypatch.setattr("kleash.training.startup.assemble", begin)
    with pytest.raises(EngineLostError, match="the connection broke; step 2 was not made"):
        train(settings(material, tmp_path / "run", steps=3))
    assert [line["step"] for line in numbers(tmp_path / "run")] == [1]


def test_several_processes_are_refused(material: Path, tmp_path: Path) -> None:
    config = settings(material, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"expected one process with rollout\.ahead: 1, got 2"):
        assembly.assemble(config, mesh=Mesh(size=2))


def test_vllm_in_the_process_of_the_trainer_is_refused() -> None:
    """It would draw from the random numbers of the update."""
    own = minimal(rollout={"ahead": 1, "correction": "sequence_truncated", "engine": "vllm"})
    with pytest.raises(ConfigError, match=r"give `rollout\.vllm\.url` of a server"):
        parse_config(own, where="here")


@pytest.mark.parametrize(
    ("rollout", "leash", "says"),
    [
        ({"correction": "none"}, {}, "give a `rollout.correction`"),
        ({"correction": "token_truncated"}, {}, "biases the gradient of `leash.placement: rew"),
        ({"correction": "masked"}, {"placement": "exact"}, "biases the gradient"),
        ({"correction": "masked"}, {"placement": "exact_weighted"}, None),
        ({"correction": "masked"}, {"placement": "exact", "allow_biased": True}, None),
        ({"correction": "sequence_truncated"}, {"placement": "exact"}, None),
    ],
)
def test_what_it_would_bias_is_refused(
    rollout: dict[str, Any], leash: dict[str, Any], says: str | None
) -> None:
    tree = minimal(rollout={"ahead": 1, **rollout}, leash={"beta": 0.1, **leash})
    if says is None:
        assert parse_config(tree, where="here").rollout.ahead == 1
        return
    with pytest.raises(ConfigError, match=says):
        parse_config(tree, where="here")
