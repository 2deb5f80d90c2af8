"""Architecture × way of beginning: trained, saved, opened by others, audited, resumed.

`benchmarks/architectures.py` does every architecture there is.
"""

from pathlib import Path

import pytest
import small_run
import tiny_architectures as tiny
from run_life import live


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
    kind: str, way: str, bases: Path, material: Path, tmp_path: Path
) -> None:
    base = bases / kind
    if not base.is_dir():
        tiny.save(base, kind)
    found = live(tiny.way(way, tmp_path, base), tmp_path, material)
    assert found.moved > 1e-3 and found.kl > 1e-4
    assert found.opened < 1e-5
    assert found.resumed == 0
    assert abs(found.own) < 1e-6
    assert found.audited < 1e-6
