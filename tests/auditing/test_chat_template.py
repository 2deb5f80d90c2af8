"""Which of a tokenizer's chat templates an audit writes messages with.

The oracle: the same audit of prompts that are written out as texts beforehand.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from audit_models import change, noise
from chat_families import byte_tokenizer
from synthetic_run import write_synthetic_run
from tiny_models import save_model

from kleash.auditing.api import audit
from kleash.auditing.options import make_options
from kleash.cli.main import main
from kleash.errors import PromptError, UsageError

NAMED = {"plain": "{{ messages[0].content }}", "loud": "{{ messages[0].content | upper }}"}
CHATS = [{"prompt": [{"role": "user", "content": text}]} for text in ("rain", "sun")]
SMALL: dict[str, Any] = {"max_new_tokens": 4, "keep": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of a run that wrote its prompts with the template `loud`, and its base."""
    folder = tmp_path_factory.mktemp("models")
    tok = byte_tokenizer(NAMED, adds_bos=False)
    base = save_model(folder / "base", tok=tok, eos_token_id=1)
    run = write_synthetic_run(folder / "run", steps=4)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["prompts"] = {"chat_template": "loud"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = change(base, run / "checkpoints" / "step-000004" / "policy", noise)
    tok.save_pretrained(checkpoint)
    return checkpoint, base


def test_messages_are_written_with_the_template_that_is_named(models) -> None:
    with pytest.raises(PromptError, match=r"default chat template .* 'loud', 'plain': choose one"):
        audit(models[1], models[1], CHATS, **SMALL)
    for name, texts in (("plain", ["rain", "sun"]), ("loud", ["RAIN", "SUN"])):
        found = audit(models[1], models[0], CHATS, chat_template=name, **SMALL)
        written = audit(models[1], models[0], texts, **SMALL)
        assert found.kl == written.kl and found.kl.per_token.mean > 0
        assert found.settings["chat_template"] == name
        rows = [{**row, "response": "wet"} for row in CHATS]
        given = audit(models[1], models[0], responses=rows, chat_template=name, **SMALL)
        flat = [{"prompt": text, "response": "wet"} for text in texts]
        assert given.kl == audit(models[1], models[0], responses=flat, **SMALL).kl


def test_a_checkpoint_brings_the_template_of_its_run(models) -> None:
    found = audit(*models, CHATS, **SMALL)
    assert found.settings["chat_template"] == "loud"
    assert found.kl == audit(*models, ["RAIN", "SUN"], **SMALL).kl
    other = audit(*models, CHATS, chat_template="plain", **SMALL)
    (note,) = [note for note in other.notes if "Sampled otherwise" in note]
    assert "chat_template = plain here and loud in the run" in note


def test_a_template_for_texts_is_refused(models) -> None:
    with pytest.raises(UsageError, match=r"chat template 'loud', got texts, .*: leave"):
        audit(*models, texts=["rain"], chat_template="loud", keep=1)
    assert make_options({"chat_template": "loud"}).chat_template == "loud"


def test_the_command_line_names_it(
    models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    base, checkpoint = map(str, reversed(models))
    named = ["kleash", "audit", base, checkpoint, "--chat-template", "loud"]
    monkeypatch.setattr(
        sys, "argv", [*named, "--prompts", str(file), "--max-new-tokens", "4", "--json"]
    )
    with contextlib.suppress(SystemExit):
        main()
    said = json.loads(capsys.readouterr().out)
    assert said["settings"]["chat_template"] == "loud"
    monkeypatch.setattr(sys, "argv", [*named, "--texts", str(file), "--bytes"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "reads texts as they are: leave out --chat-template" in capsys.readouterr().err
