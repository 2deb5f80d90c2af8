"""The trial update: its size follows the square of the rate, and it leaves nothing behind."""

from pathlib import Path

import pytest
import small_run
import torch

from kleash.errors import PreflightError
from kleash.preflight import runner
from kleash.preflight.checks.learning_rate import kl_of_one_update, one_update
from kleash.preflight.probe_batch import QUICK, Trial, draw
from kleash.training.assembly import assemble
from kleash.training.loop import train


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    return small_run.save_material(
        folder, prompts=small_run.two_words(range(8)), heldout=small_run.two_words(range(10, 14))
    )


def trial_of(material: Path, lr: float, **changes: object) -> Trial:
    config = small_run.settings(material, material / "run", optimizer={"lr": lr}, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return draw(config, assemble(config), QUICK)


def test_the_kl_of_a_small_update_grows_with_the_square_of_the_rate(material: Path) -> None:
    one, two = (kl_of_one_update(trial_of(material, lr)) for lr in (1e-4, 2e-4))
    assert one > 1e-8
    assert two / one == pytest.approx(4, rel=0.05)


def test_nothing_of_it_is_left(material: Path) -> None:
    trial = trial_of(material, 0.1)
    components = trial.components
    before = [parameter.detach().clone() for parameter in components.parameters()]
    rates = [group["lr"] for group in components.optimizer.param_groups]
    drawn = torch.get_rng_state()
    first = kl_of_one_update(trial)
    assert first > 1
    assert all(map(torch.equal, before, components.parameters()))
    assert not components.optimizer.state
    assert [group["lr"] for group in components.optimizer.param_groups] == rates
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in components.parameters())
    assert kl_of_one_update(trial) == first


@pytest.mark.parametrize(
    ("lr", "leash", "verdict"),
    [
        (1e-3, {"beta": 0.1}, "ok"),
        (10.0, {"beta": 0.1}, "fail"),
        (10.0, {"beta": None, "target_kl": 2.0}, "fail"),
        (1e-3, {"beta": None, "target_kl": 2.0}, "ok"),
    ],
)
def test_an_absurd_rate_is_known_by_its_number(
    material: Path, lr: float, leash: dict[str, object], verdict: str
) -> None:
    found = one_update(trial_of(material, lr, leash=leash))
    assert found.verdict == verdict, found
    assert f"nats per response at optimizer.lr {lr:g}" in found.measured
    if verdict == "fail":
        number = found.measured.partition(" ")[0]
        assert float(number) > 3.5 and number in found.cause
        assert found.remedy.startswith("Lower optimizer.lr to ")
        # The rate that is advised passes.
        advised = float(found.remedy.split()[3].rstrip(","))
        assert one_update(trial_of(material, advised, leash=leash)).verdict == "ok"


def test_a_run_with_an_absurd_rate_does_not_begin(material: Path, tmp_path: Path) -> None:
    config = small_run.settings(material, tmp_path / "run", optimizer={"lr": 10.0})
    with pytest.raises(PreflightError, match=r"learning_rate\.one_update: One update at"):
        train(config, preflight=runner.require_sound)
    assert not (tmp_path / "run").exists()
