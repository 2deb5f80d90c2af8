"""Which charts a report shows, and which numbers they draw."""

import math
from typing import get_args

from synthetic_run import write_synthetic_run

from kleash.report.event_table import WORDS, event_rows
from kleash.report.html import write_report
from kleash.report.metric_charts import chart_groups, responses_per_step
from kleash.storage.events import EventKind, new_event
from kleash.storage.run_directory import RunWriter, read_run


def test_charts_follow_the_run(tmp_path):
    run = read_run(write_synthetic_run(tmp_path / "run", steps=20))
    groups = dict(chart_groups([run], ["run"]))
    kl, beta, frontier, gold_frontier, by_position = groups["The leash"]
    assert (kl.unit, kl.sample) == ("nats per response", "n = 64 responses a point")
    assert [s.name for s in kl.series] == ["exact ± s.e.", "sampled k1"]
    assert [p.y for p in kl.series[0].points] == [m["objective/kl_ref"] for m in run.metrics]
    assert kl.series[0].points[3].error == run.metrics[3]["objective/kl_ref_se"]
    assert kl.bands[0].points[0].y == 5.0 and beta.sample == ""
    roots = [math.sqrt(max(m["objective/kl_ref"], 0)) for m in run.metrics]
    assert [p.x for p in frontier.series[0].points] == roots
    golds = [m for m in run.metrics if "heldout/gold" in m]
    assert [p.y for p in gold_frontier.series[0].points] == [m["heldout/gold"] for m in golds]
    assert [p.x for p in gold_frontier.series[0].points] == [
        math.sqrt(max(m["heldout/kl_ref"], 0)) for m in golds
    ]
    assert by_position.sample == "6 kept responses of steps 15 to 18"
    assert (by_position.unit, len(by_position.series[0].points)) == ("nats per token", 24)
    titles = [one.title for one in groups["What it earned"]]
    assert "Gold score, held-out prompts" in titles and "Reward: polite" in titles
    gold = groups["What it earned"][titles.index("Gold score, held-out prompts")]
    assert gold.sample == "n = 128 responses a point"


def test_runs_are_overlaid(tmp_path):
    runs = [read_run(write_synthetic_run(tmp_path / n, steps=9, target=t)) for n, t in
            (("a", 5.0), ("b", 2.0), ("c", None))]  # fmt: skip
    kl = dict(chart_groups(runs, list("abc")))["The leash"][0]
    assert [s.name for s in kl.series if s.style == "line"] == ["a", "b", "c"]
    assert len(kl.bands) == 2
    by_position = dict(chart_groups(runs, list("abc")))["The leash"][-1]
    assert by_position.title == "KL by position" and by_position.sample.endswith(" each")


def test_a_bare_run_still_has_charts(tmp_path):
    with RunWriter.create(tmp_path / "run", settings={}, meta={}) as run:
        run.append_metrics({"step": 0, "heldout/gold": 1.0})
        run.append_metrics({"step": 1, "objective/kl_ref": 0.0, "objective/scores": math.nan})
        run.append_metrics({"step": 2, "objective/kl_ref": math.inf, "reward/a\ud800<b>": 1.0})
    page, _ = write_report([tmp_path / "run"])
    assert "KL to the reference" in page.read_text("utf-8")


def test_responses_per_step():
    lines = [{"step": 0}, *({"step": k, "episodes": 32 * k} for k in (1, 2, 3, 5))]
    assert responses_per_step(lines) == 32
    assert (
        responses_per_step([*lines, lines[-1]]) == 32 and responses_per_step([{"step": 1}]) is None
    )


def test_events_stand_on_kl_and_beta(tmp_path):
    events = (new_event(3, "refused", "too far"), new_event(12, "stopped", "no more"))
    runs = [
        read_run(write_synthetic_run(tmp_path / "a", steps=9, events=events)),
        read_run(write_synthetic_run(tmp_path / "b", steps=9)),
    ]
    kl, beta, *others = dict(chart_groups(runs[:1], ["a"]))["The leash"]
    assert kl.marks == beta.marks and all(not one.marks for one in others)
    assert [(m.x, m.kind, m.text, m.colour) for m in kl.marks] == [
        (3.0, "refused", "too far", None),
        (12.0, "stopped", "no more", None),
    ]
    both = dict(chart_groups(runs, ["a", "b"]))["The leash"][0]
    assert [(m.text, m.colour) for m in both.marks] == [("a: too far", 0), ("a: no more", 0)]
    assert dict(chart_groups(runs[1:], ["b"]))["The leash"][0].marks == []
    assert [row["kind"] for row in event_rows(runs, ["a", "b"])] == ["refused", "stopped"]


def test_every_kind_of_event_has_its_word():
    assert set(WORDS) == set(get_args(EventKind))
