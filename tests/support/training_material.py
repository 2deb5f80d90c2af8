"""Material for training runs in tests: tiny models, prompts and a small configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_run
import tiny_models
from small_run import save_material, two_words

from kleash.config.schema import Config


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    save_material(folder, prompts=two_words(range(6)), heldout=two_words(range(3)))
    tiny_models.save_model(folder / "other", seed=1)
    tiny_models.save_classifier(folder / "reward")
    (folder / "texts.jsonl").write_text(json.dumps({"text": "w1 w2 w3 w4"}))
    return folder


def settings(material: Path, output: Path, **changes: Any) -> Config:
    """A small run that is looked at from outside every other step."""
    return small_run.settings(material, output, {"heldout": {"every": 2}}, **changes)


def mark_unfinished(path: Path) -> None:
    meta = path / "run.json"
    meta.write_text(meta.read_text().replace('"finished"', '"interrupted"'))
