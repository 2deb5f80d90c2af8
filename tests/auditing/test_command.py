"""`kleash audit` as a stranger meets it, in process: tables, files, exit codes, one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_model, tokenizer
from transformers import AutoModelForCausalLM

from kleash.auditing import model_pair
from kleash.auditing.bits_per_byte import audit_bytes, raw_texts
from kleash.auditing.inputs import Source
from kleash.auditing.model_pair import ModelPair, open_checkpoint
from kleash.auditing.options import AuditOptions
from kleash.auditing.result import Audit
from kleash.cli import main
from kleash.errors import NonFiniteError, PromptError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three checkpoints that go further and further, one with other tokens, prompts and texts."""
    folder = tmp_path_factory.mktemp("audit")
    save_model(folder / "base")
    save_model(folder / "other", tok=tokenizer(words=30), seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(1)
    for step in (100, 200):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / f"step-{step}")
        tokenizer().save_pretrained(folder / f"step-{step}")
    rows = [{"prompt": f"w{n % 20} w{n % 7}", "group": "ab"[n % 2]} for n in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"text": f"w{n % 20} w{n % 7} w3"} for n in range(24)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def kleash(folder, monkeypatch, capsys):
    """Run the command line; exit code, output and errors."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kleash", "audit", *arguments])
        code = 0
        try:
            main.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_table_and_its_files(kleash, tmp_path) -> None:
    code, out, _ = kleash(
        "step-100", "base", "--prompts", "prompts.jsonl", "--both", "--max-new-tokens", "6",
        "--keep", "3", "--output", str(tmp_path / "a"),
    )  # fmt: skip
    assert code == 0
    for text in ("KL(policy ‖ reference)", "estimated by k3", "written by the reference", "floor"):
        assert text in out
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names == {"audit.html", "audit.json", "responses.jsonl"}
    found = Audit.from_json((tmp_path / "a" / "audit.json").read_text())
    assert found.complete and found.settings["both"] and found.policy.path == "step-100"
    page = (tmp_path / "a" / "audit.html").read_text()
    assert "step-100" in page and "KL by position" in page


@pytest.mark.parametrize(("threshold", "code"), [("0", 3), ("100", 0)])
def test_the_exit_code_is_the_gate(kleash, threshold, code) -> None:
    found, out, _ = kleash(
        "step-100", "base", "--prompts", "prompts.jsonl", "--max-new-tokens", "6",
        "--fail-above", threshold, "--keep", "2",
    )  # fmt: skip
    assert found == code and f"(exit {code})" in out


def test_one_prompt_leaves_the_gate_undecided(kleash, tmp_path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "w1"}\n')
    arguments = ("--prompts", str(file), "--max-new-tokens", "6", "--fail-above", "0.1")
    code, out, _ = kleash("step-100", "base", *arguments)
    assert code == 4 and "not distinguished from the threshold" in " ".join(out.split())


def test_json_is_all_that_is_printed(kleash) -> None:
    code, out, _ = kleash("step-100", "base", "--texts", "texts.jsonl", "--json", "--keep", "2")
    found = Audit.from_json(out)
    assert code == 0 and found.parts[0].by == "text" and "same_top" in found.parts[0].measures


def test_the_cost_of_a_precision_is_said(kleash) -> None:
    _, out, _ = kleash(
        "step-100", "base", "--prompts", "prompts.jsonl", "--max-new-tokens", "4",
        "--precision", "0.0001", "--keep", "2",
    )  # fmt: skip
    assert "was not reached with 24 prompts" in out and "would do" in out


def test_a_row_of_checkpoints_is_a_curve(kleash, tmp_path) -> None:
    code, _, _ = kleash(
        "step-100", "step-200", "base", "--prompts", "prompts.jsonl", "--max-new-tokens", "6",
        "--keep", "2", "--output", str(tmp_path), "--fail-above", "0",
    )  # fmt: skip
    drift = json.loads((tmp_path / "drift.json").read_text())
    assert code == 3 and [point["at"] for point in drift["points"]] == [100.0, 200.0]
    first, second = (point["kl"]["per_token"]["mean"] for point in drift["points"])
    assert 0 < first < second
    for name in ("1-step-100", "2-step-200"):
        assert (tmp_path / name / "audit.html").is_file()
    assert "step-200" in (tmp_path / "drift.html").read_text()


@pytest.mark.parametrize(
    ("models", "opened"), [(("step-100", "step-200", "base"), 3), (("base", "./base"), 1)]
)
def test_no_directory_is_opened_twice(kleash, monkeypatch, models, opened) -> None:
    paths: list[str] = []
    load = model_pair.load_policy
    monkeypatch.setattr(
        model_pair, "load_policy", lambda path, **named: paths.append(path) or load(path, **named)
    )
    code, out, _ = kleash(*models, "--texts", "texts.jsonl", "--keep", "1")
    assert code == 0 and len(paths) == opened
    assert ("identical" in out) == (opened == 1)


def test_errors_are_one_sentence(kleash, tmp_path) -> None:
    for arguments, sentence in (
        (("base", "other", "--texts", "texts.jsonl"), "--texts FILE --bytes"),
        (("base", "nowhere", "--texts", "texts.jsonl"), "expected a model at 'nowhere'"),
        (("base", "base", "--texts", "nowhere.jsonl"), "expected a file of texts"),
        (("base", "other", "--texts", "texts.jsonl", "--bytes", "--fail-above", "1"), "no KL"),
        (("step-100", "step-200", "other", "--texts", "texts.jsonl", "--bytes"), "a drift curve"),
        (("base", "base", "--texts", "texts.jsonl", "--into", "a"), "--into is called --output"),
        (("base", "base", "--texts", "texts.jsonl", "--into=a"), "--into is called --output"),
        (("base", "base", "--texts", "texts.jsonl", "--resume"), "--output DIR"),
        (("base", "base", "--texts", "texts.jsonl", "--keep", "0"), "keep of at least 1"),
    ):
        code, _, err = kleash(*arguments)
        assert code in (1, 2) and err.startswith("kleash: ") and sentence in err
        assert err.count("\n") == 1


def test_ctrl_c_leaves_a_result_that_can_be_resumed(kleash, tmp_path, monkeypatch) -> None:
    from kleash.auditing.console import AuditDisplay

    into = tmp_path / "a"
    arguments = (
        "step-100", "base", "--prompts", "prompts.jsonl", "--max-new-tokens", "6",
        "--batch-tokens", "40", "--keep", "2", "--output", str(into),
    )  # fmt: skip

    def stop(_display, step) -> None:
        if step.done > 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AuditDisplay, "show", stop)
        code, out, _ = kleash(*arguments)
    assert code == 130 and "--resume goes on" in out
    assert not Audit.from_json((into / "audit.json").read_text()).complete
    assert "not complete" in (into / "audit.html").read_text()
    assert kleash(*arguments, "--resume")[0] == 0
    assert Audit.from_json((into / "audit.json").read_text()).complete


# ---- different tokens ----------------------------------------------------------------------------


def test_bits_per_byte_of_different_tokens(kleash, tmp_path) -> None:
    code, out, _ = kleash(
        "base", "other", "--texts", "texts.jsonl", "--bytes", "--output", str(tmp_path / "a")
    )
    assert code == 0 and "bits per byte" in out and "it is no KL" in out
    found = Audit.from_json((tmp_path / "a" / "audit.json").read_text())
    bits = found.bits_per_byte
    assert bits.log_ratio.mean == pytest.approx(bits.reference.mean - bits.policy.mean)
    with pytest.raises(ValueError, match="no KL"):
        _ = found.kl
    assert {row["per"] for row in found.rows()} == {"byte"}


def test_bits_per_byte_against_the_dense_path(folder, tmp_path) -> None:
    models = [open_checkpoint(folder / n, dtype="float32", device="cpu") for n in ("base", "other")]
    file = tmp_path / "book.txt"
    file.write_text(" ".join(f"w{n % 20}" for n in range(300)))
    found = audit_bytes(ModelPair(*models), Source("texts", file), AuditOptions(batch_tokens=50))
    texts = list(raw_texts(file))
    for model, one in zip(
        models, (found.bits_per_byte.policy, found.bits_per_byte.reference), strict=True
    ):
        bits = 0.0
        for text in texts:
            ids = model.tokenizer(text)["input_ids"]
            for start in range(0, len(ids), 63):
                row = torch.tensor([[1, *ids[start : start + 63]]])
                with torch.no_grad():
                    logp = model.model(input_ids=row).logits[0, :-1, : model.words].double()
                logp = logp.log_softmax(-1).gather(1, row[0, 1:, None])
                bits -= float(logp.sum()) / torch.tensor(2.0).log().item()
        size = sum(len(text.encode()) for text in texts)
        assert one.mean == pytest.approx(bits / size, rel=1e-5)


def test_bits_of_what_cannot_be_read(folder, tmp_path) -> None:
    for name, content, message in (
        ("a.jsonl", b'{"text": ""}', "the key 'text'"),
        ("a.jsonl", b"", "an empty file"),
        ("a.txt", b"\xff\xfe\xfa", "UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PromptError, match=message):
            list(raw_texts(tmp_path / name))
    with pytest.raises(PromptError, match="check the path"):
        list(raw_texts(tmp_path / "none"))
    model = open_checkpoint(folder / "base", dtype="float32", device="cpu")
    for parameter in model.model.parameters():
        parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="got NaN"):
        audit_bytes(
            ModelPair(model, model), Source("texts", folder / "texts.jsonl"), AuditOptions()
        )


def test_importing_kleash_is_light() -> None:
    program = (
        "import sys, kleash\n"
        "assert 'torch' not in sys.modules\n"
        "assert callable(kleash.audit) and kleash.Audit\n"
        "assert not hasattr(kleash, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
