"""Refused steps leave no trace in the run's state and every trace in its log."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import numbers, weights
from training_hooks import before_each_step
from training_material import mark_unfinished, settings
from training_material import material as material  # the fixture

import kleash.algorithms.ppo
import kleash.training.loop
import kleash.training.recovery
from kleash.config.leash import TripwiresConfig
from kleash.config.schema import Config
from kleash.errors import ConfigError, NonFiniteError, RefusedError, TripwireError
from kleash.storage.atomic_directories import load_tensors, verify_checkpoint
from kleash.storage.run_directory import Run, read_run
from kleash.training.components import Components
from kleash.training.evaluation import HeldoutEvaluator
from kleash.training.loop import train
from kleash.training.optimization import PolicyUpdater
from kleash.training.session import Session
from kleash.training.snapshot import put_back, remember

LORA = {"lora": {"rank": 2, "targets": ["q_proj"]}}


def kinds(run: Run) -> list[tuple[int, str]]:
    return [(event.step, event.kind) for event in run.events]


def steps(path: Path) -> list[str]:
    return sorted(entry.name for entry in (path / "checkpoints").iterdir())


def test_beyond_its_bound_the_run_stops_with_the_evidence(material: Path, tmp_path: Path) -> None:
    free = {"leash": {"beta": 0.0}, "optimizer": {"lr": 3e-3}, "steps": 6}
    whole = train(settings(material, tmp_path / "whole", **free))
    kls = [line["objective/kl_ref"] for line in numbers(whole)[1:]]
    bound = (kls[2] + kls[3]) / 2
    assert kls[2] < bound < kls[3], "the runs of this test are meant to drift"
    config = settings(material, tmp_path / "run", **free, tripwires={"stop_kl": bound})
    with pytest.raises(TripwireError, match=r"beyond the bound stop_kl .*step 4 was not made, the"):
        train(config)
    run = read_run(tmp_path / "run")
    assert run.status == "failed"
    assert kinds(run) == [(4, "refused"), (4, "stopped")]
    assert numbers(run.path) == numbers(whole)[:4]
    # The state before the refused step is there, though no checkpoint was due.
    assert steps(run.path) == ["step-000002", "step-000003"]

    refusal = run.events[0].details
    evidence = run.path / refusal["evidence"]
    verify_checkpoint(evidence)
    batch, record = load_tensors(evidence / "batch.safetensors"), evidence / "refusal.json"
    told = json.loads(record.read_text())
    row = int(torch.where(batch["response_mask"], batch["kl"], 0).sum(-1).argmax())
    token = int(batch["kl"][row].argmax())
    assert (told["response"], told["token"]) == (row, token)
    assert told["offender"] == told["responses"][row]
    assert (refusal["response"], refusal["token"], refusal["wire"]) == (row, token, "stop_kl")
    assert float(batch["kl"].sum(-1).mean()) == pytest.approx(kls[3])

    # The same configuration comes to the same end, and says it once.
    with pytest.raises(TripwireError):
        train(config)
    assert kinds(read_run(run.path)) == [(4, "refused"), (4, "stopped")]


def test_a_collapsing_entropy_stops_too(material: Path, tmp_path: Path) -> None:
    with pytest.raises(TripwireError, match="below the bound min_entropy of 50"):
        train(settings(material, tmp_path / "run", tripwires={"min_entropy": 50}))
    assert kinds(read_run(tmp_path / "run")) == [(1, "refused"), (1, "stopped")]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_rollback_goes_behind_the_fault_and_shortens_the_leash(
    material: Path, tmp_path: Path
) -> None:
    fast: dict[str, Any] = {
        "leash": {"beta": 0.01},
        "optimizer": {"lr": 3e-3},
        "steps": 6,
        "logging": {"checkpoint_every": 1, "keep": 3},
    }
    whole = train(settings(material, tmp_path / "whole", **fast))
    kls = [line["objective/kl_ref"] for line in numbers(whole)[1:]]
    bound = (kls[2] + kls[3]) / 2
    assert kls[2] < bound < kls[3], "the runs of this test are meant to drift"
    wires = {"stop_kl": bound, "then": "rollback", "beta_factor": 1000}
    check, trips = kleash.training.recovery.check_bounds, [0]

    def once(*arguments: Any) -> None:
        """A bound for the first policy that passes it: what follows may drift as it likes."""
        if trips[0] == 0:
            try:
                check(*arguments)
            except TripwireError:
                trips[0] += 1
                raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kleash.training.loop, "check_bounds", once)
        patch.setattr(kleash.training.recovery, "check_bounds", once)
        path = train(settings(material, tmp_path / "run", **fast, tripwires=wires))
    run = read_run(path)
    assert run.status == "finished"
    # The policy of step 3 was the one out of bounds: the last good checkpoint is that of step 2.
    assert kinds(run) == [(4, "refused"), (4, "rolled_back")]
    assert run.events[1].details == {"to_step": 2, "beta_before": 0.01, "beta": 10.0}
    assert [line["step"] for line in run.metrics] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["objective/beta"] for line in run.metrics[1:]] == [0.01, 0.01, *[10.0] * 4]
    ours = numbers(path)
    assert ours[:3] == numbers(whole)[:3]
    # Other responses are drawn the second time.
    assert ours[3]["objective/kl_ref_k1"] != numbers(whole)[3]["objective/kl_ref_k1"]


@pytest.mark.parametrize("then", ["stop", "rollback"])
def test_what_the_last_update_did_is_looked_at(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """A jump in the last update of all, which no later step would see."""
    update, jumps = PolicyUpdater.update, [0]

    def leaps(self: PolicyUpdater, experience: Any, *, done: int, **more: Any) -> Any:
        numbers = update(self, experience, done=done, **more)
        if done == self.config.steps - 1 and jumps[0] == 0:
            jumps[0] += 1
            with torch.no_grad():
                for parameter in self.components.policy.parameters():
                    parameter.mul_(1.5)
        return numbers

    def config(name: str, **wires: Any) -> Config:
        often = {"checkpoint_every": 1, "keep": 3}
        return settings(material, tmp_path / name, logging=often, tripwires=wires)

    monkeypatch.setattr(PolicyUpdater, "update", leaps)
    unbound = train(config("unbound"))
    assert "objective/kl_after" not in numbers(unbound)[-1]
    far = numbers(unbound)[-1]["heldout/kl_ref"]
    jumps[0] = 0
    wires = {"stop_kl": far / 2, "then": then}
    if then == "stop":
        with pytest.raises(TripwireError, match=r"after the last update, .* step 4 was not made"):
            train(config("run", **wires))
    else:
        train(config("run", **wires))
    run = read_run(tmp_path / "run")
    assert numbers(run.path)[:4] == numbers(unbound)[:4]
    refused, then_event = run.events
    assert (refused.step, refused.details["wire"]) == (4, "stop_kl")
    batch = load_tensors(run.path / refused.details["evidence"] / "batch.safetensors")
    spent = torch.where(batch["response_mask"], batch["kl"], 0).sum(-1)
    assert float(spent.mean()) > far / 2 and int(spent.argmax()) == refused.details["response"]
    if then == "stop":
        assert steps(run.path)[-1] == "step-000003"
        return
    # The policy that wrote step 4 was within its bounds: back to it, not behind it.
    assert (then_event.kind, then_event.details["to_step"]) == ("rolled_back", 3)
    last = numbers(run.path)[-1]
    assert run.status == "finished" and 0 < last["objective/kl_after"] < far / 2


def test_rollbacks_come_to_an_end(material: Path, tmp_path: Path) -> None:
    """A bound that no β can keep: the reference is another model, and farther than that."""
    config = settings(
        material,
        tmp_path / "run",
        reference={"path": str(material / "other"), "reference_differs": True},
        tripwires={"then": "rollback", "max_rollbacks": 2},
        logging={"checkpoint_every": 1, "keep": 4},
    )
    rising = {"bound": 1e9}
    check = kleash.training.loop.check_bounds

    def tightening(wires: TripwiresConfig, *rest: Any) -> None:
        check(wires.model_copy(update={"stop_kl": rising["bound"]}), *rest)

    def late(session: Session) -> None:
        rising["bound"] = 1e-3 if session.state.step >= 2 else 1e9

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kleash.training.loop, "check_bounds", tightening)
        before_each_step(patch, late)
        with pytest.raises(TripwireError, match=r"rollbacks so far: 2, no more are allowed"):
            train(config)
    run = read_run(tmp_path / "run")
    assert [kind for _, kind in kinds(run)] == ["refused", "rolled_back"] * 2 + [
        "refused",
        "stopped",
    ]
    assert [e.details["beta"] for e in run.events if e.kind == "rolled_back"] == [0.2, 0.4]


def test_no_good_checkpoint_to_go_back_to(material: Path, tmp_path: Path) -> None:
    wires = {"min_entropy": 50, "then": "rollback"}
    with pytest.raises(TripwireError, match="no good checkpoint to go back to yet"):
        train(settings(material, tmp_path / "run", tripwires=wires))


@pytest.mark.parametrize("undo", ["memory", "checkpoint"])
def test_a_fault_between_updates_undoes_those_before_it(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undo: str
) -> None:
    """The third update of step 3 meets an infinite advantage; the second has moved the weights."""
    config = settings(material, tmp_path / "run", tripwires={"undo": undo}, steps=4)
    whole = train(settings(material, tmp_path / "whole", steps=4))
    backward, calls, poisoned = Components.backward_of_minibatch, [0], [-1]

    def poison(components: Any, minibatch: Any, **numbers: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4 * 2 + 3:
            minibatch.advantages[1, 0] = float("inf")
            poisoned[0] = 1
        return backward(components, minibatch, **numbers)

    with monkeypatch.context() as patch:
        patch.setattr(Components, "backward_of_minibatch", poison)
        with pytest.raises(
            NonFiniteError, match=r"step 3 was not made, the run stands at .*000002"
        ):
            train(config)
    (refused, _) = read_run(tmp_path / "run").events
    assert (refused.details["wire"], refused.details["token"]) == ("non_finite", None)
    assert steps(tmp_path / "run") == ["step-000002"]
    train(config)
    assert numbers(tmp_path / "run") == numbers(whole)
    ours, theirs = weights(tmp_path / "run"), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_gradient_of_infinity_is_traced_to_its_token(material: Path, tmp_path: Path) -> None:
    """One advantage of 1e38 is finite, and so is the loss; the gradient is not."""
    prepare = kleash.algorithms.ppo.prepare
    place: list[tuple[int, int]] = []

    def huge(scored: Any, *rest: Any) -> Any:
        made = prepare(scored, *rest)
        made.advantages[5, 0] = 3e38
        place.append((5, 0))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kleash.algorithms.ppo, "prepare", huge)
        with pytest.raises(NonFiniteError, match=r"by token 0 of response 5: the update was"):
            train(settings(material, tmp_path / "run", rollout={"max_new_tokens": 6}))
    told = read_run(tmp_path / "run").events[0].details
    assert (told["response"], told["token"]) == place[0]


@pytest.mark.parametrize("changes", [{}, {"policy": LORA}], ids=["whole", "adapter"])
def test_what_is_put_back_is_what_was(
    material: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Weights, moments and random numbers of a step that is made and then undone, twice over."""
    seen: list[dict[str, torch.Tensor]] = []

    def twice(session: Session) -> None:
        components = session.components
        before = remember(components.optimizer, weights=True)
        draws = torch.rand(3)
        put_back(components.optimizer, before)
        assert torch.equal(torch.rand(3), draws)
        with torch.no_grad():
            for parameter in components.policy.parameters():
                parameter.mul_(2)
        for moments in components.optimizer.state.values():
            moments["exp_avg"].add_(1)
            moments["step"].add_(1)
        put_back(components.optimizer, before)
        seen.append({n: p.detach().clone() for n, p in components.policy.model.named_parameters()})

    whole = train(settings(material, tmp_path / "whole", **changes))
    with pytest.MonkeyPatch.context() as patch:
        before_each_step(patch, twice)
        path = train(settings(material, tmp_path / "run", **changes))
    assert numbers(path) == numbers(whole)
    assert len(seen) == 4


def test_the_best_checkpoint_stays(material: Path, tmp_path: Path) -> None:
    config = settings(
        material,
        tmp_path / "run",
        steps=8,
        leash={"beta": 0.0},
        optimizer={"lr": 1e-2},
        heldout={"every": 1},
        logging={"checkpoint_every": 1, "keep": 1},
    )
    best = {"step": 0}
    evaluate = HeldoutEvaluator.evaluate

    def peaked(self: HeldoutEvaluator, *, step: int, **rest: Any) -> Any:
        metrics, samples = evaluate(self, step=step, **rest)
        metrics["heldout/rlhf_reward"] = -abs(step - 3.0)
        best["step"] = step
        return metrics, samples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldoutEvaluator, "evaluate", peaked)
        train(config)
    assert steps(tmp_path / "run") == ["step-000003", "step-000008"]
    assert read_run(tmp_path / "run").meta["best_checkpoint"] == 3


@pytest.mark.parametrize("policy", [{}, LORA], ids=["whole", "adapter"])
def test_a_moved_anchor_and_the_original(
    material: Path, tmp_path: Path, policy: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {"policy": policy, "steps": 6, "optimizer": {"lr": 5e-3}}
    path = train(settings(material, tmp_path / "run", **changes, leash={"reanchor_every": 2}))
    run = read_run(path)
    assert kinds(run) == [(2, "reanchored"), (4, "reanchored")]
    lines = numbers(path)[1:]
    for line in lines[:2]:
        assert line["objective/kl_original"] == line["objective/kl_ref"]
    # Just moved, the anchor is the policy itself; the original is as far as ever.
    for line in (lines[2], lines[4]):
        assert line["objective/kl_ref"] == pytest.approx(0, abs=1e-6)
        assert line["objective/kl_original"] > 1e-4
    assert lines[5]["objective/kl_original"] > lines[5]["objective/kl_ref"] > 0


@pytest.mark.parametrize("offload", [False, True], ids=["copy", "cpu_offload"])
def test_a_moved_anchor_is_where_it_was_after_resuming(
    material: Path, tmp_path: Path, offload: bool
) -> None:
    changes: dict[str, Any] = {"steps": 6, "leash": {"reanchor_every": 2}}
    if offload:
        changes["reference"] = {"kind": "cpu_offload"}
    whole = train(settings(material, tmp_path / "whole", **changes, logging={"keep": 9}))
    run = train(settings(material, tmp_path / "run", **changes, logging={"keep": 9}))
    newest = run / "checkpoints" / "step-000006"
    newest.rename(tmp_path / "away")
    mark_unfinished(run)
    train(settings(material, run, **changes, logging={"keep": 9}))
    assert numbers(run) == numbers(whole)
    ours, theirs = weights(run), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tripwires": {"beta_factor": 2}}, "is for `then: rollback` alone"),
        ({"tripwires": {"then": "rollback"}, "logging": {"checkpoint_every": 0}}, "needs `logging"),
        ({"tripwires": {"then": "rollback"}, "leash": {"beta": 0}}, "raises β, which is 0"),
        (
            {"tripwires": {"stop_kl": 2}, "leash": {"beta": None, "target_kl": 3}},
            "within the target of 3",
        ),
        ({"reference": {"kind": "adapter_off"}}, "needs `policy.lora`"),
        ({"reference": {"kind": "adapter_off", "path": "x"}}, "give no `path`"),
        ({"reference": {"kind": "cached"}}, "`kind: cached` needs `cache`"),
        ({"reference": {"cache": "x"}}, "`cache` goes with `kind: cached`"),
        ({"reference": {"revision": "x"}}, "goes with `path`"),
        (
            {"reference": {"kind": "cached", "cache": "x"}, "leash": {"reanchor_every": 2}},
            "take one of them",
        ),
        (
            {"reward_models": {"w3": {"callable": "a:b", "revision": "x"}}},
            "does nothing for a callable",
        ),
        (
            {"reward_models": {"w3": {"callable": "a:b", "dtype": "bfloat16"}}},
            "does nothing for a callable",
        ),
    ],
)
def test_settings_that_contradict_each_other(
    material: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        settings(material, tmp_path / "run", **changes)


def test_a_refusal_names_its_place() -> None:
    assert str(RefusedError("{place} is bad")) == "no response in particular is bad"
    error = NonFiniteError("expected better of {place}", response=1, token=4)
    error.among([7, 9])
    assert str(error) == "expected better of token 4 of response 9"
