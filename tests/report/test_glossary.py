"""The table of what every number means: complete, and the same in the documentation."""

import re
from pathlib import Path

from synthetic_run import write_synthetic_run

from kleash.report.glossary import GLOSSARY, define
from kleash.report.glossary_page import markdown
from kleash.storage.run_directory import read_run

ROOT = Path(__file__).parents[2]


def test_the_documentation_is_the_table():
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == markdown()


def test_every_key_is_defined_once_and_no_kl_is_bare():
    keys = [metric.key for metric in GLOSSARY]
    assert len(set(keys)) == len(keys)
    assert not [key for key in keys if re.search(r"(^|/)kl$", key) and key != "loss/kl"]
    for metric in GLOSSARY:
        assert all(vars(metric).values()), metric.key


def test_every_key_of_a_run_is_defined(tmp_path):
    run = read_run(write_synthetic_run(tmp_path / "run", steps=3))
    assert [key for line in run.metrics for key in line if define(key) is None] == []
    assert define("made/up") is None and define("heldout/made_up") is None


def test_every_literal_key_of_the_source_is_defined():
    pattern = r'"((?:objective|policy|loss|value|rollout|reward|optim|time|heldout)/[a-z0-9_]+)"'
    sources = (ROOT / "src" / "kleash").rglob("*.py")
    keys = {key for file in sources for key in re.findall(pattern, file.read_text("utf-8"))}
    assert len(keys) > 20 and sorted(key for key in keys if define(key) is None) == []
