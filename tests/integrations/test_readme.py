"""The README's lines for TRL run as they are written."""

import re
from pathlib import Path

import pytest
import tiny_models
from trl_trainers import make_trainer

from kleash.cli.main import app

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and transformers' own, of each other

README = Path(__file__).parents[2] / "README.md"


def test_the_three_lines_run_as_written_and_the_report_opens(tmp_path: Path) -> None:
    section = README.read_text(encoding="utf-8").split("## Inside TRL")[1]
    (block,) = re.findall(r"```py\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    assert len([line for line in block.splitlines() if line]) == 3
    base = tiny_models.save_model(tmp_path / "base", attention_dropout=0.0)
    trainer = make_trainer("grpo", str(base), tmp_path / "out", max_steps=11)
    exec(block, {"trainer": trainer})
    trainer.train()
    measured = [line for line in trainer.state.log_history if "kleash/kl_ref_se" in line]
    assert [line["step"] for line in measured] == list(range(1, 12))
    assert measured[-1]["kleash/kl_ref"] > 0
    assert trainer.beta != 0.1
    app(["report", str(tmp_path / "out" / "kleash")], result_action="return_value")
    assert "KL to the reference" in (tmp_path / "out/kleash/report.html").read_text("utf-8")
