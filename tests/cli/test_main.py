"""The command line as a stranger meets it: each test runs the real program."""

import gc
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kleash.cli.console import without_collection
from kleash.cli.main import split_overrides
from kleash.errors import UsageError
from kleash.storage.plan_file import make_frontier, write_frontier


def kleash(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kleash", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
    )


def one_sentence(result: subprocess.CompletedProcess[str]) -> str:
    """The error message: a single line on stderr, and no traceback."""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("kleash: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_kl_prints_every_term_and_both_directions() -> None:
    result = kleash("kl", "0.7,0.3", "0.5,0.5")
    assert result.returncode == 0
    for number in ("+0.2355", "-0.1532", "KL(p‖q) = 0.0823 nats", "KL(q‖p) = 0.0872 nats"):
        assert number in result.stdout


def test_kl_as_json() -> None:
    result = kleash("kl", "1,0", "0.5,0.5", "--json")
    found = json.loads(result.stdout)
    assert found["unit"] == "nats"
    assert round(found["kl_p_q"], 6) == 0.693147
    assert found["kl_q_p"] == "Infinity"


def test_kl_from_samples_works_a_token_and_converges() -> None:
    ask = ("kl", "0.25,0.75", "0.05,0.95", "--samples", "1,100,1000000", "--seed", "1")
    text = " ".join(kleash(*ask).stdout.split())
    assert "log 0.25 − log 0.05 = 1.609; k1 = 1.609, k2 = 1.295, k3 = 0.8094" in text
    found = json.loads(kleash(*ask, "--json").stdout)
    exact, sampled = found["kl_p_q"], found["sampled"]
    assert exact == pytest.approx(0.25 * math.log(5) + 0.75 * math.log(0.75 / 0.95))
    assert sampled["token"]["k1"] == pytest.approx(math.log(0.25) - math.log(0.05))
    assert [row["samples"] for row in sampled["estimates"]] == [1, 100, 1_000_000]
    last = sampled["estimates"][-1]
    for name in ("k1", "k3"):
        assert abs(last[name]["mean"] - exact) < 4 * last[name]["standard_error"] < 0.01
    k2 = 0.25 * math.log(5) ** 2 / 2 + 0.75 * math.log(0.75 / 0.95) ** 2 / 2
    assert sampled["limits"] == pytest.approx({"k1": exact, "k2": k2, "k3": exact})
    assert abs(last["k2"]["mean"] - k2) < 4 * last["k2"]["standard_error"]
    assert sampled["estimates"][0]["k1"] == {
        "mean": sampled["token"]["k1"], "standard_error": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("kl", "1,0", "0.5,0.5", "--samples", "10,x"), "separated by commas, got '10,x'"),
        (("kl", "1,0", "0.5,0.5", "--samples", "0"), "from 1 to 10,000,000"),
        (("kl", "0.7,0.2", "0.5,0.5"), "sum to 1, got 0.9"),
        (("kl", "0.7;0.3", "0.5,0.5"), "numbers separated by commas, got '0.7;0.3'"),
        (("kl", "0.7,0.3"), "requires an argument"),
        (("trian",), 'Did you mean "train"?'),
        (("train", "--leash.taget-kl", "6"), "did you mean --leash.target_kl?"),
        (("train", "--stesp", "6"), "did you mean --steps?"),
        (("train", "--steps"), "--steps needs a value"),
        (("train", "a.yaml", "b.yaml"), "expected one CONFIG"),
        (("audit", "a"), "needs two checkpoints"),
        (("audit", "a", "b"), "--prompts FILE, --texts FILE or --responses FILE"),
        (("audit", "a", "b", "--prompts", "p", "--bytes"), "give --texts FILE with it"),
        (("audit", "a", "b", "--texts", "t", "--resume"), "--output DIR"),
        (("plan", "--beta", "tight"), "numbers separated by commas, got 'tight'"),
        (("plan", "--scores", "plan.json", "--responses", "8"), "--scores has its samples"),
        (("plan", "--leash.taget-kl", "6"), "did you mean --leash.target_kl?"),
    ],
)
def test_a_usage_error_is_one_sentence_and_exit_2(
    arguments: tuple[str, ...], sentence: str
) -> None:
    result = kleash(*arguments)
    assert result.returncode == 2
    assert sentence in one_sentence(result)


def test_another_error_of_the_user_is_one_sentence_and_exit_1(tmp_path: Path) -> None:
    result = kleash("report", "missing", cwd=tmp_path)
    assert result.returncode == 1
    assert "missing" in one_sentence(result)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = kleash("train", "missing.yaml", "--debug", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def without_torch(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command line; it fails where anything slow to import was imported before the end."""
    program = (
        f"import atexit, os, sys; sys.argv = {['kleash', *arguments]!r}\n"
        "from kleash.cli.main import main\n"
        "def look():\n"
        "    slow = {'torch', 'transformers', 'pydantic', 'plotly', 'datasets'}\n"
        "    slow &= set(sys.modules)\n"
        "    if slow:\n"
        "        print(f'imported {slow}', file=sys.stderr, flush=True)\n"
        "        os._exit(99)\n"
        "atexit.register(look)\n"
        "main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


def test_help_imports_no_torch_and_ends_with_examples() -> None:
    result = without_torch("--help")
    assert result.returncode == 0, result.stderr
    assert "kleash kl 0.7,0.3 0.5,0.5" in result.stdout.split("Examples:")[1]


def test_a_mistake_in_the_arguments_of_an_audit_is_said_before_anything_is_imported() -> None:
    for arguments in (("a",), ("a", "b"), ("a", "b", "--texts", "t", "--bytes", "--resume")):
        result = without_torch("audit", *arguments)
        assert result.returncode == 2, result.stderr


@pytest.mark.parametrize("command", ["kl", "demo", "check", "plan", "train", "audit", "report"])
def test_help_of_every_command_ends_with_examples(command: str) -> None:
    result = kleash(command, "--help")
    assert result.returncode == 0
    assert f"kleash {command}" in result.stdout.split("Examples:")[1]


def test_a_plan_is_printed_kept_and_asked_again(tmp_path: Path) -> None:
    scores = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    made = make_frontier(scores, prompts=list(range(16)), about={})
    write_frontier(tmp_path / "plan.json", made)
    ask = ("plan", "--scores", str(tmp_path / "plan.json"), "--beta", "2,1", "--kl", "0.1,9")
    result = kleash(*ask, "--output", str(tmp_path / "again"))
    assert result.returncode == 0, result.stderr
    assert "E*[score]" in result.stdout and "not known, KL 9" in result.stdout
    assert (tmp_path / "again" / "plan.html").is_file()
    told = json.loads(kleash(*ask, "--json").stdout)
    assert told == json.loads((tmp_path / "again" / "plan.json").read_text())
    assert [row["beta"]["value"] for row in told["rows"]] == [2.0, 1.0]
    assert [row["known"] for row in told["budgets"]] == [True, False]


def test_overrides_are_split_from_the_configuration() -> None:
    path, overrides = split_overrides(("c.yaml", "--leash.target-kl", "6", "--steps=3"))
    assert path == Path("c.yaml")
    assert overrides == {"leash.target-kl": "6", "steps": "3"}
    with pytest.raises(UsageError, match="--seed needs a value"):
        split_overrides(("--seed", "--steps"))


def test_the_collector_is_back_after_the_imports_even_when_they_fail() -> None:
    with pytest.raises(ImportError), without_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
