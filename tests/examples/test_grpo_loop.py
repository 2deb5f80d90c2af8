"""examples/grpo_loop.py: it holds its budget, stays on its page, and uses public names alone."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import tiny_models
import torch

import kleash
from kleash.report.html import write_report
from kleash.storage.run_directory import read_run

FILE = Path(__file__).parents[2] / "examples" / "grpo_loop.py"
PROMPTS = [f"w{i} w{i + 1}" for i in range(8)]
BUDGET = 1.0


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo_loop", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_holds_its_budget(page: ModuleType, model: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    run = tmp_path / "run"
    page.train(str(model), PROMPTS, str(run), lambda text: text.split().count("w7"), BUDGET)
    measured = [line["objective/kl_ref"] for line in read_run(run).metrics]
    assert len(measured) == page.STEPS
    last = torch.tensor(measured[-page.STEPS // 3 :], dtype=torch.float64).mean()
    assert float(last) == pytest.approx(BUDGET, rel=0.15)
    assert write_report([run], into=tmp_path)[0].is_file()


def test_it_is_a_page_of_public_names() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    tree = ast.parse(text)
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imported for alias in node.names}
    modules = {node.module for node in imported if isinstance(node, ast.ImportFrom)}
    assert "kleash" in names
    assert not [name for name in modules | names if name and name.startswith("kleash.")]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "kleash"
    }
    assert used <= set(kleash.__all__)
