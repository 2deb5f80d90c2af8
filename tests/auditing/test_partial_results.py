"""Audits that are stopped, resumed, decided and refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from audit_models import SMALL, change, noise, write_prompts
from tiny_models import save_model, tokenizer

from kleash.auditing.api import audit
from kleash.auditing.inputs import Item, Source
from kleash.auditing.model_pair import load_pair
from kleash.auditing.options import AuditOptions
from kleash.auditing.partial_results import NAME, PartFile
from kleash.auditing.result import Audit
from kleash.auditing.runner import audit_pair
from kleash.auditing.token_records import from_line, score_items, to_line
from kleash.errors import ConfigError, ModelError, NonFiniteError, PromptError, RunError


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def moved(base, tmp_path_factory) -> Path:
    return change(base, tmp_path_factory.mktemp("moved") / "model-2", noise)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


# ---- stopping, resuming, deciding ----------------------------------------------------------------


class Stop(KeyboardInterrupt):
    """Ctrl-C at a chosen moment."""


def stop_after(batches: int):
    seen = []

    def watch(step) -> None:
        seen.append(step)
        if len(seen) == batches:
            raise Stop

    return watch


@pytest.mark.parametrize("batches", [1, 3, 9])
def test_a_stopped_audit_goes_on_to_the_same_json(base, moved, prompts, tmp_path, batches) -> None:
    settings = dict(both=True, batch_tokens=80, **SMALL)
    whole = audit(moved, base, prompts, **settings)
    into = tmp_path / "audit"
    with pytest.raises(Stop):
        audit(moved, base, prompts, output=into, watch=stop_after(batches), **settings)
    partial = Audit.from_json((into / "audit.json").read_text())
    assert not partial.complete and 0 < partial.parts[0].responses <= whole.parts[0].responses
    # What a kill leaves: half a line.
    file = into / NAME
    with file.open("ab") as stream:
        stream.write(file.read_bytes().splitlines()[-1][:50])
    with pytest.raises(RunError, match="already holds an audit"):
        audit(moved, base, prompts, output=into, **settings)
    with pytest.raises(RunError, match="seed = 0 there and 1 here"):
        audit(moved, base, prompts, output=into, resume=True, seed=1, **settings)
    done = audit(moved, base, prompts, output=into, resume=True, **settings)
    assert done.to_json() == whole.to_json()
    assert audit(moved, base, prompts, output=into, resume=True, **settings) == whole
    again = audit(moved, base, prompts, output=into, resume=True, fail_above=0.0, **settings)
    assert again.gate.decision == "above" and again.kl == whole.kl


def test_a_part_file_that_was_changed_is_refused(base, moved, prompts, tmp_path) -> None:
    into = tmp_path / "audit"
    audit(moved, base, prompts, output=into, batch_tokens=80, **SMALL)
    file = into / NAME
    lines = file.read_text().splitlines(keepends=True)
    for changed, message in (
        ([*lines[:1], *lines[2:]], "expected batch"),
        ([lines[0], "{\n"], "not JSON"),
        ([lines[0], "[]\n"], "no object"),
        ([lines[0], lines[1].replace('"kl"', '"lk"', 1)], "a scored response"),
    ):
        file.write_text("".join(changed))
        with pytest.raises(RunError, match=message):
            audit(moved, base, prompts, output=into, resume=True, batch_tokens=80, **SMALL)
    # Not even the header is whole: there is nothing to go on with.
    file.write_text(lines[0][:20])
    assert PartFile.resume(into, {"a": 1}).take(("policy", 0, 0)) is None
    assert file.read_text() == '{"a":1}\n'


def test_a_directory_that_cannot_be_made(base, moved, prompts, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        audit(moved, base, prompts, output=tmp_path / "file" / "audit", **SMALL)


def test_records_survive_their_line(base, moved) -> None:
    pair = load_pair(moved, base)
    (record,) = score_items(
        [Item(3, (4,), (5, 6), "g", True)],
        pair,
        first_number=7,
        temperature=1.0,
        budget=9,
        agreement=True,
    )
    again = from_line(json.loads(json.dumps(to_line(record))))
    for name, value in vars(record).items():
        np.testing.assert_array_equal(getattr(again, name), value)


def test_precision_stops_when_narrow_or_says_the_cost(base, moved, tmp_path) -> None:
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": f"w{n % 20} w{n % 19} w{n % 7}"} for n in range(200)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wide = audit(moved, base, prompts, precision=0.5, **SMALL)
    assert wide.precision.reached and wide.precision.half_width <= 0.5
    assert wide.parts[0].prompts < 200
    assert wide.kl.per_token.kind == "anytime"
    assert wide.parts[0].measures["entropy"].per_token.kind == "fixed"
    narrow = audit(moved, base, prompts, precision=1e-4, **SMALL)
    assert not narrow.precision.reached and narrow.parts[0].prompts == 200
    assert narrow.precision.prompts_needed > 1000
    assert narrow.kl.per_token.half_width == narrow.precision.half_width


@pytest.mark.parametrize(
    ("threshold", "decision", "code"),
    [(0.0, "above", 3), (50.0, "below", 0), (None, "undecided", 4)],
)
def test_the_gate(base, moved, prompts, threshold, decision, code) -> None:
    if threshold is None:
        threshold = audit(moved, base, prompts, **SMALL).kl.per_token.mean
    found = audit(moved, base, prompts, fail_above=threshold, **SMALL)
    assert (found.gate.decision, found.gate.exit_code) == (decision, code)
    per = audit(moved, base, prompts, fail_above=threshold, per="response", **SMALL).gate
    assert per.per == "response"


def test_the_same_seed_is_the_same_audit_whatever_the_state(base, moved, prompts) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = audit(moved, base, prompts, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert audit(moved, base, prompts, **SMALL) == one
    assert audit(moved, base, prompts, seed=1, **SMALL) != one


# ---- what is refused -----------------------------------------------------------------------------


def test_settings_that_cannot_be(base, prompts) -> None:
    for settings, message in (
        ({"responses_per_prompt": 0}, "responses_per_prompt of at least 1"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"precision": 0.0}, "a precision above 0"),
        ({"fail_above": -1.0}, "fail_above"),
        ({"temperature": 0.0}, "a temperature above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            audit(base, base, prompts, **settings)
    with pytest.raises(ConfigError, match="got none"):
        audit(base, base)
    with pytest.raises(ConfigError, match="got prompts and texts"):
        audit(base, base, prompts, texts=prompts)


def test_different_tokens_are_refused_with_the_way_out(base, tmp_path, prompts) -> None:
    other = save_model(tmp_path / "other", tok=tokenizer(words=25))
    with pytest.raises(ModelError, match=r"token 'w20' with id None .* --bytes"):
        audit(base, other, prompts)


def test_files_that_cannot_be_used(base, tmp_path) -> None:
    for name, content, message in (
        ("a.jsonl", '{"txt": "w1"}', "the key 'text'"),
        ("a.jsonl", '{"text": "w1"}', "at least two tokens"),
        ("a.jsonl", "", "an empty file"),
        ("a.txt", "", "an empty file"),
        ("a.doc", "w1 w2", "of kind"),
        ("a.jsonl", "nonsense", "one JSON object per line"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(PromptError, match=message):
            audit(base, base, texts=tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(PromptError, match="UTF-8"):
        audit(base, base, texts=tmp_path / "a.txt")
    with pytest.raises(PromptError, match="check the path"):
        audit(base, base, texts=tmp_path / "none.jsonl")


def test_a_broken_model_is_named(base, tmp_path, prompts) -> None:
    def break_it(name: str, parameter: torch.Tensor) -> None:
        if "norm" in name:
            parameter.fill_(math.nan)

    # One directory would be one model, whose policy could not write either.
    pair = load_pair(base, shutil.copytree(base, tmp_path / "broken"))
    with torch.no_grad():
        for name, parameter in pair.reference.model.named_parameters():
            break_it(name, parameter)
    with pytest.raises(NonFiniteError, match="got NaN for kl of response 0"):
        audit_pair(pair, Source("prompts", prompts, 4), AuditOptions(max_new_tokens=4))
