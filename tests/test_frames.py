"""How many of our own calls lie between the command line and the mathematics."""

import sys
from pathlib import Path

import pytest
import yaml
from training_material import material as material
from training_material import settings

import kleash.algorithms.common
import kleash.scoring.forward
from kleash.cli.main import app
from kleash.config.loading import dump_config

SOURCE = str(Path(kleash.__file__).parent)


def frames_of_ours() -> list[str]:
    """Our functions on the stack, outermost first; the test's own wrappers are not ours."""
    names: list[str] = []
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(SOURCE):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names[::-1]


@pytest.mark.parametrize(
    ("module", "function", "most"),
    [
        (kleash.scoring.forward, "tile_sums", 8),
        (kleash.algorithms.common, "kl_shaped_rewards", 6),
    ],
)
def test_the_way_from_the_command_to_the_number_is_short(
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module,
    function: str,
    most: int,
) -> None:
    """The called function itself counts as the last frame."""
    seen: list[list[str]] = []
    original = getattr(module, function)

    def counted(*arguments, **named):
        seen.append([*frames_of_ours(), function])
        return original(*arguments, **named)

    monkeypatch.setattr(module, function, counted)
    file = tmp_path / "run.yaml"
    tree = yaml.safe_load(dump_config(settings(material, tmp_path / "run", steps=1)))
    file.write_text(yaml.safe_dump(tree))
    app(["train", str(file), "--no-check"])
    steps = [stack for stack in seen if "_step" in stack]
    assert steps and all(stack[0] == "train" for stack in steps)
    shortest = min(steps, key=len)
    assert len(shortest) <= most, shortest
