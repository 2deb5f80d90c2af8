"""Every key of a file has its line, and a file that drops one of its own keys is refused."""

from pathlib import Path

import pytest

from kleash.config.sources import Sources, read_yaml
from kleash.errors import ConfigError

TEXT = """# a comment
policy:
  path: p

leash: {schedule: [[0, 1],
                   [5, 2]]}
"""


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(TEXT)
    tree, lines = read_yaml(file)
    assert tree["leash"] == {"schedule": [[0, 1], [5, 2]]}
    assert lines["policy",] == 2
    assert lines["policy", "path"] == 3
    assert lines["leash", "schedule"] == 5
    assert lines["leash", "schedule", "1", "0"] == 6


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps: 1\nseed: 2\nsteps: 3\n", r"c.yaml, line 3: `steps` is there already, in line 1"),
        ("a: {b: 1,\n c: 2, b: 3}\n", r"line 2: `a.b` is there already, in line 1"),
        ("a: 1\nb: 'x\n", r"c.yaml, line 3, column 1: not YAML"),
        (
            "a: !!python/name:os.system\n",
            r"line 1, column 4: not YAML: could not determine",
        ),
        ("", "should hold keys and values, got NoneType"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_line(
    tmp_path: Path, text: str, sentence: str
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_yaml(tmp_path / "c.yaml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="is not YAML: 'utf-8'"):
        read_yaml(tmp_path / "c.yaml")


def test_an_option_speaks_for_all_below_it() -> None:
    sources = Sources("c.yaml", {("leash",): 4}, {("leash", "groups"): "--leash.groups"})
    assert sources.of(("leash", "groups", "a")) == "--leash.groups"
    assert sources.is_flag(("leash", "groups", "a"))
    assert not sources.is_flag(("leash",))
