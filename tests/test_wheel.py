"""What is installed elsewhere: the wheel alone is enough for every command of the README."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kleash.config.recipe_library import FOLDER

ROOT = Path(__file__).parents[1]
MARKS = {"[real]", "[minutes]", "[index]", "[interrupted]"}
"""What the README says of lines that do not run from the package alone within seconds."""
DISTRIBUTION = {
    "yaml": "pyyaml",
    "vaderSentiment": "vadersentiment",
    "huggingface_hub": "huggingface-hub",
}
"""Where the name of an import is not that of its distribution."""


def command_lines() -> list[tuple[str, set[str]]]:
    """Each command of the README's blocks without a language, and its marks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines: list[tuple[str, set[str]]] = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in [] if language else block.splitlines():
            command, _, comment = line.partition("  #")
            if command.strip() and not command.startswith("make "):
                lines.append((command.strip(), set(re.findall(r"\[\w+\]", comment))))
    return lines


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel; of its dependencies it sees those of these tests."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    (packages,) = home.glob("lib/python*/site-packages")
    # As a plain entry of the path: the editable kleash there is not followed from it.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    launcher = home / "bin" / "torchrun"
    launcher.write_text(f'#!/bin/sh\nexec "{python}" -m torch.distributed.run "$@"\n')
    launcher.chmod(0o755)
    return home


def environment(home: Path) -> dict[str, str]:
    """Nothing of the checkout, one thread, no hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "KLEASH", "COV"))}
    return kept | {
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(home / "cache"),
    }


def save_supervised_model(folder: Path) -> None:
    """A tiny model that reads any text: what the README calls `models/sft`."""
    rows = (FOLDER / "sample-prompts.jsonl").read_text(encoding="utf-8").splitlines()
    pieces = ByteLevelBPETokenizer()
    special = ["<s>", "</s>", "<pad>"]
    texts = [json.loads(row)["prompt"] for row in rows]
    pieces.train_from_iterator(texts, vocab_size=512, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer,  # pyright: ignore[reportPrivateUsage]
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=40,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_readme_has_commands_of_every_kind() -> None:
    lines = command_lines()
    assert {mark for _, marks in lines for mark in marks} == MARKS
    assert {shlex.split(line)[1] for line, _ in lines if line.startswith("kleash ")} == {
        *("kl", "recipes", "init", "check", "plan", "train", "report", "audit", "demo"),
    }


@pytest.mark.slow
def test_every_command_of_the_readme_runs_from_the_wheel_in_an_empty_folder(
    elsewhere: Path, tmp_path: Path
) -> None:
    save_supervised_model(tmp_path / "models" / "sft")
    variables = environment(elsewhere)
    where = subprocess.run(
        [elsewhere / "bin" / "python", "-c", "import kleash; print(kleash.__file__)"],
        cwd=tmp_path,
        env=variables,
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(elsewhere)
    lines = [line for line, marks in command_lines() if not marks]
    assert len(lines) >= 10
    for line in lines:
        result = subprocess.run(
            shlex.split(line), cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"


def test_the_wheel_holds_the_recipes_prompts_templates_and_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    data = [path for path in source.rglob("*") if path.suffix in (".yaml", ".jsonl", ".j2", ".css")]
    assert len(data) >= 14
    assert {str(path.relative_to(source)) for path in data} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "docs", "recipes")) for name in names)


def test_the_metadata_says_who_what_for_and_names_no_host(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    head, _, readme = archive.read(name).decode().partition("\n\n")
    for field in ("Author: kleash contributors", "License-Expression: MIT", "Keywords: ", "Classi"):
        assert f"\n{field}" in head
    assert "://" not in head
    assert readme.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_what_the_package_imports_it_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in ("dev", "docs")}
    declared = {
        Requirement(line).name.lower()
        for line in [*project["dependencies"], *(line for v in extras.values() for line in v)]
    }
    for path in (ROOT / "src").rglob("*.py"):
        names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
        # Triton comes with torch for CUDA.
        foreign = names - set(sys.stdlib_module_names) - {"kleash", "triton"}
        assert {DISTRIBUTION.get(name, name) for name in foreign} <= declared, path


def test_the_readme_explains_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = "".join(line for line in readme.splitlines() if line.startswith("| `"))
    for extra in project["optional-dependencies"]:
        assert f"`{extra}`" in table
