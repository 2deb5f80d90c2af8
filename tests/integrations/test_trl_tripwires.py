"""Bounds in TRL's trainers: a batch beyond them moves no weight."""

from pathlib import Path

import pytest
import tiny_models
import torch
from trl_trainers import make_trainer

from kleash.errors import NonFiniteError, TripwireError
from kleash.integrations._trl_tripwires import newest_checkpoint
from kleash.integrations.trl import KLAudit, KLBudget, Tripwires
from kleash.storage.atomic_directories import load_tensors
from kleash.storage.run_directory import read_run

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and transformers' own, of each other


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("trl") / "base", attention_dropout=0.0)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("bounds", [{"stop_kl": 0.02}, {"min_entropy": 2.65}], ids=str)
def test_a_batch_beyond_a_bound_is_raised_before_it_is_learnt_from(
    base: Path, tmp_path: Path, bounds
) -> None:
    trainer = make_trainer("grpo", str(base), tmp_path / "out", max_steps=8)
    KLAudit(every=1).attach(trainer)
    Tripwires(**bounds).attach(trainer)
    before = []
    generate = trainer._generate_and_score_completions

    def noted(inputs):
        before.append(weights(trainer))
        return generate(inputs)

    trainer._generate_and_score_completions = noted
    with pytest.raises(TripwireError, match=f"bound {next(iter(bounds))}.*response \\d"):
        trainer.train()
    assert same(weights(trainer), before[-1])
    run = read_run(tmp_path / "out" / "kleash")
    assert run.status == "failed"
    assert [event.kind for event in run.events] == ["refused"]


def test_a_run_stops_without_the_update_that_was_refused(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer("grpo", str(base), tmp_path / "out", max_steps=8, weight_decay=0.1)
    audit = KLAudit(every=1).attach(trainer)
    Tripwires(stop_kl=0.02, action="stop").attach(trainer)
    steps = []
    trainer.add_callback(_after_each_step(steps, lambda: weights(trainer)))
    trainer.train()
    assert trainer.state.global_step == len(steps) < 8
    assert audit.history[-1]["objective/kl_ref"] > 0.02
    assert same(steps[-1], steps[-2])
    assert not same(steps[0], weights_of(base))
    (event,) = read_run(tmp_path / "out" / "kleash").events
    assert event.kind == "stopped" and "stop_kl of 0.02" in event.sentence


def test_a_gradient_that_is_not_finite_moves_nothing(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer("grpo", str(base), tmp_path / "out")
    Tripwires().attach(trainer)
    loss = trainer._compute_loss
    trainer._compute_loss = lambda *a: loss(*a) * float("nan")
    with pytest.raises(NonFiniteError, match="finite gradients"):
        trainer.train()
    assert same(weights(trainer), weights_of(base))


def test_a_run_goes_back_to_a_policy_within_bounds(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        "grpo", str(base), tmp_path / "out", max_steps=7, save_strategy="steps", save_steps=1
    )
    KLAudit(every=1).attach(trainer)
    budget = KLBudget(target_kl=0.05).attach(trainer)
    wires = Tripwires(stop_kl=0.06, action="roll_back", rollbacks=1, beta_factor=2.0)
    wires.attach(trainer)
    steps = []
    trainer.add_callback(_after_each_step(steps, lambda: (weights(trainer), budget.state)))
    trainer.train()
    run = read_run(tmp_path / "out" / "kleash")
    first, *_ = run.events
    assert first.kind == "rolled_back"
    # The policy that was measured at this step is that of checkpoint step − 1.
    assert first.details["checkpoint"] == f"checkpoint-{first.step - 2}"
    assert run.metrics[first.step - 1]["objective/kl_ref"] > 0.06
    assert run.metrics[first.step - 2]["objective/kl_ref"] <= 0.06
    at = first.step - 1
    assert same(steps[at][0], steps[at - 2][0]) and not same(steps[at][0], steps[at - 1][0])
    assert wires.done == 1
    assert [event.kind for event in run.events[1:]] in ([], ["stopped"])


def test_checkpoints_after_the_bound_was_passed_are_not_gone_back_to(tmp_path: Path) -> None:
    for number in (1, 3, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").touch()
    (tmp_path / "checkpoint-2").mkdir()  # was never finished
    (tmp_path / "checkpoint-best").mkdir()
    found = [newest_checkpoint(tmp_path, through=step) for step in (0, 2, 9, 10)]
    assert [path and path.name for path in found] == [
        None,
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-10",
    ]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "model.safetensors")


def _after_each_step(into: list, what):
    from transformers import TrainerCallback

    class AfterEachStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            into.append(what())

    return AfterEachStep()
