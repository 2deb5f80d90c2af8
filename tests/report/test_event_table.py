"""The report's files: the page and its twin say what the run directory says."""

import json

import pytest
from synthetic_run import write_synthetic_run

from kleash.errors import RunError
from kleash.report.event_table import SHOWN
from kleash.report.html import write_report
from kleash.storage.events import new_event
from kleash.storage.run_directory import RunWriter, read_run


def test_the_twin_is_strict_json_with_the_same_numbers(tmp_path):
    path = write_synthetic_run(tmp_path / "run", steps=5)
    page, twin = write_report([path])
    assert (page, twin) == (path / "report.html", path / "report.json")
    report = json.loads(twin.read_text(), parse_constant=pytest.fail)
    assert report["schema"] == "kleash.report/1"
    (run,) = report["runs"]
    assert run["metrics"] == list(read_run(path).metrics)
    assert run["summary"]["kl"] == run["metrics"][-1]["objective/kl_ref"]
    assert run["summary"]["score_first"] == run["metrics"][0]["objective/scores"]
    assert (run["status"], run["samples"]) == ("finished", len(report["samples"]))


def test_where_a_comparison_goes(tmp_path):
    a = write_synthetic_run(tmp_path / "x" / "run", steps=3)
    b = write_synthetic_run(tmp_path / "y" / "run", steps=3)
    page, twin = write_report([a, b])
    assert page.parent == a.parent
    assert [r["name"] for r in json.loads(twin.read_text())["runs"]] == ["x/run", "y/run"]
    page, twin = write_report([a, a], into=tmp_path)
    assert page.parent == tmp_path
    assert [r["name"] for r in json.loads(twin.read_text())["runs"]] == [
        "x/run (1)",
        "x/run (2)",
    ]


def test_what_cannot_be_reported_is_said(tmp_path):
    with pytest.raises(RunError, match="at least one"):
        write_report([])
    RunWriter.create(tmp_path / "run", settings={}, meta={})
    with pytest.raises(RunError, match="no step to report"):
        write_report([tmp_path / "run"])
    path = write_synthetic_run(tmp_path / "other", steps=2)
    with pytest.raises(RunError, match="cannot write"):
        write_report([path], into=tmp_path / "nowhere")


def test_what_went_wrong_is_on_the_page(tmp_path):
    path = write_synthetic_run(tmp_path / "run", steps=9, gold_falls=True)
    file = path / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    meta = json.loads((path / "run.json").read_text())
    meta |= {"status": "failed", "message": "lost <b>power</b>"}
    (path / "run.json").write_text(json.dumps(meta))
    text = write_report([path])[0].read_text("utf-8")
    assert "breaks off and was left out" in text and "Evidence of over-optimisation" in text
    assert "lost &lt;b&gt;power&lt;/b&gt;" in text and "lost <b>" not in text


def test_events_are_listed_and_a_run_without_any_has_no_list(tmp_path):
    events = tuple(new_event(step, "alarm", f"<b>KL {step}</b> \u202e") for step in range(1, 71))
    path = write_synthetic_run(tmp_path / "run", steps=9, events=events)
    page, twin = write_report([path])
    listed = json.loads(twin.read_text())["events"]
    assert len(listed) == 70 and listed[0]["sentence"] == "<b>KL 1</b> \u202e"
    text = page.read_text("utf-8")
    assert "&lt;b&gt;KL 60&lt;/b&gt; [U+202E]" in text and "<b>KL" not in text
    assert text.count('class="sentence"') == SHOWN and "10 more are in report.json" in text
    calm = write_report([write_synthetic_run(tmp_path / "calm", steps=9)])[0].read_text("utf-8")
    assert 'class="sentence"' not in calm and '<g class="mark' not in calm


def test_the_worst_responses_stand_beside_a_warning_sign(tmp_path):
    worst = [
        {"step": 7, "prompt": "<i>why</i>", "response": "so \u202e so", "score": 2.5, "kl": 61.25},
        {"step": 8, "prompt": "p", "response": "r", "score": None, "kl": "Infinity"},
        "no response",
    ]
    event = new_event(9, "alarm", "it collapsed", sign="length", worst=worst)
    odd = new_event(9, "alarm", "another", sign="length", worst=3)
    path = write_synthetic_run(tmp_path / "run", steps=9, events=(event, odd))
    page, twin = write_report([path])
    text = page.read_text("utf-8")
    assert "the 2 responses farthest from the reference" in text
    assert "step 7, 61.25 nats, score 2.5: <bdi>&lt;i&gt;why&lt;/i&gt;</bdi>" in text
    assert "so [U+202E] so" in text and "<i>why" not in text
    assert "step 8, Infinity nats, score —" in text
    assert [len(one["worst"]) for one in json.loads(twin.read_text())["events"]] == [2, 0]


def test_a_run_from_before_the_likeliest_words_still_opens(tmp_path):
    path = write_synthetic_run(tmp_path / "run", steps=5)
    file = path / "samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        del line["policy_top"], line["reference_top"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = json.loads(write_report([path])[1].read_text())
    assert report["words"] == [] and {len(s["policy_top"]) for s in report["samples"]} == {0}
