"""The run directory: what is written is read back, whatever stops the writing."""

import errno
import json
import math
import os
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import HOSTILE, synthetic_sample, write_synthetic_run

from kleash.errors import RunError
from kleash.storage import atomic_files
from kleash.storage.run_directory import MAX_SAMPLES_PER_STEP, RunWriter, holds_run, read_run
from kleash.storage.samples import MAX_TOKENS_PER_SAMPLE, Sample
from kleash.training.evaluation import rows_to_keep


def begin(path):
    return RunWriter.create(path, settings={"beta": 0.1, "kind": None}, meta={"seed": 3})


def test_what_is_written_is_read(tmp_path):
    sample = synthetic_sample("hello", step=2)
    with begin(tmp_path / "run") as run:
        run.append_metrics({"step": 1, "objective/kl_ref": 0.25, "objective/target_kl": None})
        run.append_metrics({"step": 2, "objective/kl_ref": 0.5})
        run.append_samples([sample])
        run.update_meta(reference={"path": "a"})
        assert read_run(tmp_path / "run").status == "running"
    read = read_run(tmp_path / "run")
    assert read.config == {"beta": 0.1, "kind": None}
    assert (read.status, read.name, read.notes) == ("finished", "run", ())
    assert read.meta["seed"] == 3 and read.meta["reference"] == {"path": "a"}
    assert read.meta["started"] <= read.meta["ended"]
    assert list(read.metrics) == [
        {"step": 1, "objective/kl_ref": 0.25, "objective/target_kl": None},
        {"step": 2, "objective/kl_ref": 0.5},
    ]
    (back,) = read.samples
    assert back.tokens == sample.tokens and back.prompt == "hello"
    assert back.token_kl == pytest.approx(sample.token_kl, rel=1e-5)
    assert (back.policy_top, back.reference_top) == (sample.policy_top, sample.reference_top)
    assert run.checkpoints == tmp_path / "run" / "checkpoints"


def test_numbers_that_json_lacks(tmp_path):
    with begin(tmp_path / "run") as run:
        run.append_metrics({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf})
        run.append_samples(
            [Sample(1, "worst", "policy", "p", "NaN", math.nan, math.inf, ["NaN"], [-math.inf])]
        )
    for name in ("metrics.jsonl", "samples.jsonl"):
        # Strict parsers, such as a browser's, must be able to read every line.
        for line in (tmp_path / "run" / name).read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)
    read = read_run(tmp_path / "run")
    line, (sample,) = read.metrics[0], read.samples
    assert math.isnan(line["a"]) and line["b"] == math.inf and line["c"] == -math.inf
    assert math.isnan(sample.score) and sample.kl == math.inf
    assert list(sample.logprobs) == [-math.inf]
    assert sample.response == "NaN" and list(sample.tokens) == ["NaN"]


@settings(max_examples=40)
@given(text=st.text(st.characters(exclude_categories=())), value=st.floats())
def test_any_text_and_any_float_survive(tmp_path_factory, text, value):
    path = tmp_path_factory.mktemp("runs") / "run"
    with begin(path) as run:
        run.append_metrics({"step": 0, text + "!": value})
        run.append_samples([Sample(0, "random", "reference", text, text, None, None, [text])])
    assert (path / "samples.jsonl").read_bytes().isascii()
    read = read_run(path)
    assert read.samples[0].prompt == text and read.samples[0].tokens == [text]
    assert read.metrics[0][text + "!"] == pytest.approx(value, nan_ok=True, rel=0, abs=0)


def test_hostile_text_stays_on_its_line(tmp_path):
    write_synthetic_run(
        tmp_path / "run", steps=1, extra_samples=tuple(synthetic_sample(text) for text in HOSTILE)
    )
    assert [s.prompt for s in read_run(tmp_path / "run").samples[-len(HOSTILE) :]] == list(HOSTILE)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "config.yaml", "samples.jsonl"])
def test_another_run_is_refused_and_untouched(tmp_path, name):
    (tmp_path / name).write_text("precious")
    assert holds_run(tmp_path)
    with pytest.raises(RunError, match="already holds a run"):
        begin(tmp_path)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [(name, "precious")]


def test_of_two_runs_that_begin_at_once_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("kleash.storage.run_directory.holds_run", lambda path: False)
    begin(tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run"):
        begin(tmp_path / "run")
    assert read_run(tmp_path / "run").status == "running"


def test_other_files_may_be_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    begin(tmp_path)
    assert read_run(tmp_path).status == "running"


@pytest.mark.parametrize(
    ("stop", "status", "message"),
    [
        (KeyboardInterrupt(), "interrupted", "stopped by Ctrl-C"),
        (RunError("the moon is full"), "failed", "the moon is full"),
        (ZeroDivisionError(), "failed", "ZeroDivisionError"),
    ],
)
def test_how_a_run_ended(tmp_path, stop, status, message):
    with pytest.raises(type(stop)), begin(tmp_path / "run") as run:
        run.append_metrics({"step": 1})
        raise stop
    read = read_run(tmp_path / "run")
    assert (read.status, read.meta["message"], len(read.metrics)) == (status, message, 1)


class Full:
    """A disk that takes `room` more bytes."""

    def __init__(self, room):
        self.room = room

    def write(self, descriptor, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = bytes(data)[: self.room]
        self.room -= len(taken)
        return REAL_WRITE(descriptor, taken)


REAL_WRITE = os.write


@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch, room):
    run = begin(tmp_path / "run")
    run.append_metrics({"step": 1, "a": 1.0})
    monkeypatch.setattr(atomic_files.os, "write", Full(room).write)
    with pytest.raises(RunError, match=r"disk is full.*metrics\.jsonl"):
        run.append_metrics({"step": 2, "objective/kl_ref": 0.123456789})
    with pytest.raises(RunError, match=r"disk is full.*samples\.jsonl"):
        run.append_samples([synthetic_sample("x")])
    with pytest.raises(RunError, match=r"disk is full.*run\.json"):
        run.close("finished")
    read = read_run(tmp_path / "run")
    assert (read.status, len(read.metrics), len(read.samples), read.notes) == ("running", 1, 0, ())
    assert not list(tmp_path.glob("run/.*"))
    monkeypatch.undo()
    run.append_metrics({"step": 2, "a": 2.0})
    assert [line["a"] for line in read_run(tmp_path / "run").metrics] == [1.0, 2.0]


@pytest.mark.parametrize("room", [0, 15, 60])
def test_a_full_disk_at_the_beginning_leaves_nothing(tmp_path, monkeypatch, room):
    monkeypatch.setattr(atomic_files.os, "write", Full(room).write)
    with pytest.raises(RunError, match="disk is full"):
        begin(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_hide_the_first_error(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError) as caught, begin(tmp_path / "run"):
        monkeypatch.setattr(atomic_files.os, "write", Full(0).write)
        raise ZeroDivisionError("first")
    assert "could not be marked failed" in caught.value.__notes__[0]


def test_ctrl_c_within_a_line_leaves_no_half_line(tmp_path, monkeypatch):
    def interrupted(descriptor, data):
        REAL_WRITE(descriptor, bytes(data)[:5])
        raise KeyboardInterrupt

    run = begin(tmp_path / "run")
    monkeypatch.setattr(atomic_files.os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.append_metrics({"step": 1, "a": 1.0})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        begin(tmp_path / "file")
    with pytest.raises(RunError, match="cannot write"):
        begin(tmp_path / "file" / "run")


def test_a_config_that_is_not_plain_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="expected plain values"):
        RunWriter.create(tmp_path / "run", settings={"a": object()}, meta={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 2, 10])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_torn_last_line_is_left_out_and_said(tmp_path, name, cut):
    path = write_synthetic_run(tmp_path / "run", steps=3)
    whole = read_run(path)
    file = path / name
    file.write_bytes(file.read_bytes()[: -cut - 1])
    read = read_run(path)
    kept = {"metrics.jsonl": read.metrics, "samples.jsonl": read.samples}[name]
    before = {"metrics.jsonl": whole.metrics, "samples.jsonl": whole.samples}[name]
    assert list(kept) == list(before)[:-1]
    assert len(read.notes) == 1 and name in read.notes[0] and f"line {len(before)}" in read.notes[0]


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path):
    path = write_synthetic_run(tmp_path / "run", steps=3)
    file = path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    assert (len(read_run(path).metrics), read_run(path).notes) == (3, ())


def test_a_broken_line_within_is_named(tmp_path):
    path = write_synthetic_run(tmp_path / "run", steps=3)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[1] = lines[1][:40]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        read_run(path)


BAD_FILES = [
    ("metrics.jsonl", "[1]\n", "expected a JSON object, got list"),
    ("metrics.jsonl", '{"a": 1}\n', "expected an integer 'step'"),
    ("metrics.jsonl", '{"step": true}\n', "expected an integer 'step'"),
    ("metrics.jsonl", '{"step": 1, "a": "high"}\n', "expected a number for 'a'"),
    ("metrics.jsonl", '{"step": 1, "a": true}\n', "expected a number for 'a'"),
    ("metrics.jsonl", '{"step": 1, "a": 1%s}\n' % ("0" * 400), "expected a number for 'a'"),
    ("metrics.jsonl", '{"step": 1, "a": 1%s}\n' % ("0" * 5000), "not JSON"),
    ("metrics.jsonl", "[" * 100_000 + "\n", "not JSON"),
    ("metrics.jsonl", b"\xff\xfe\n", "cannot read"),
    ("metrics.jsonl", None, "is missing"),
    ("samples.jsonl", '{"step": 1}\n', "not a sample"),
    ("samples.jsonl", '{"tokens": ["a"], "token_kl": [1, 2]}\n', "not a sample"),
    ("samples.jsonl", '{"tokens": "a"}\n', "'tokens' is not what a sample holds"),
    ("samples.jsonl", '{"tokens": [1]}\n', "'tokens' is not what a sample holds"),
    ("samples.jsonl", '{"logprobs": [null]}\n', "'logprobs' is not what a sample holds"),
    ("samples.jsonl", '{"policy_top": [["a", 1.0]]}\n', "expected words and probabilities"),
    ("samples.jsonl", '{"policy_top": [{"words": ["a"]}]}\n', "expected words and probabilities"),
    ("samples.jsonl", '{"reference_top": [{"words": [1], "probabilities": [1]}]}\n', "words and"),
    ("samples.jsonl", '{"policy_top": 1}\n', "'policy_top' is not what a sample holds"),
    ("samples.jsonl", '{"tokens": ["a"], "policy_top": [null, null]}\n', "not a sample"),
    ("samples.jsonl", '{"kind": "best"}\n', "'kind' is not what a sample holds"),
    ("samples.jsonl", '{"prompt": 3}\n', "'prompt' is not what a sample holds"),
    ("run.json", "{", "not JSON"),
    ("run.json", '{"status": "happy"}', "must give a status"),
    ("run.json", None, "holds no run.json"),
    ("config.yaml", "a: [", "is not YAML"),
    ("config.yaml", "!!python/object/apply:os.system ['true']", "is not YAML"),
    ("config.yaml", "- 1", "must hold a mapping"),
    ("config.yaml", None, "is missing"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_what_is_no_run_is_said(tmp_path, name, content, message):
    path = write_synthetic_run(tmp_path / "run", steps=1)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match=message):
        read_run(path)


def test_what_is_no_directory_is_said(tmp_path):
    with pytest.raises(RunError, match="not a directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"holds no run\.json"):
        read_run(tmp_path)


def test_bare_nan_of_other_writers_is_understood(tmp_path):
    path = write_synthetic_run(tmp_path / "run", steps=1)
    (path / "metrics.jsonl").write_text('{"step": 1, "a": NaN, "b": -Infinity}\n')
    line = read_run(path).metrics[0]
    assert math.isnan(line["a"]) and line["b"] == -math.inf


@pytest.mark.parametrize(
    "metrics",
    [{}, {"step": 1.5}, {"step": 4}, {"step": 9, "a": "1"}, {"step": 9, "a": True}],
)
def test_metrics_that_are_none(tmp_path, metrics):
    run = begin(tmp_path / "run")
    run.append_metrics({"step": 5})
    with pytest.raises(ValueError, match="metric"):
        run.append_metrics(metrics)
    assert len(read_run(tmp_path / "run").metrics) == 1


def test_samples_are_bounded(tmp_path):
    run = begin(tmp_path / "run")
    with pytest.raises(ValueError, match="at most"):
        run.append_samples([synthetic_sample()] * (MAX_SAMPLES_PER_STEP + 1))
    run.append_samples([synthetic_sample(tokens=MAX_TOKENS_PER_SAMPLE + 7)])
    (sample,) = read_run(tmp_path / "run").samples
    assert len(sample.tokens) == len(sample.token_kl) == MAX_TOKENS_PER_SAMPLE
    assert sample.tokens_cut == 7


def test_samples_belong_to_their_tokens():
    with pytest.raises(ValueError, match="logprobs must be empty or have one entry per token"):
        Sample(1, "worst", "policy", "p", "r", 0.0, 0.0, ["a"], [0.0, 0.0])


def test_reopening_drops_what_came_after(tmp_path):
    path = write_synthetic_run(tmp_path / "run", steps=12)
    whole = read_run(path)
    file = path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    with RunWriter.reopen(path, through_step=6) as run:
        assert read_run(path).status == "running"
        with pytest.raises(ValueError, match="above 6"):
            run.append_metrics({"step": 6})
        run.append_metrics({"step": 7, "a": 1.0})
    read = read_run(path)
    assert list(read.metrics) == [*list(whole.metrics)[:6], {"step": 7, "a": 1.0}]
    assert list(read.samples) == [sample for sample in whole.samples if sample.step <= 6]
    assert (read.status, read.meta["seed"], read.notes) == ("finished", 0, ())


@given(kl=st.lists(st.floats(), max_size=12), worst=st.integers(0, 5), at_random=st.integers(0, 5))
def test_rows_to_keep(kl, worst, at_random):
    rows = rows_to_keep(kl, worst=worst, at_random=at_random, seed=1)
    chosen = [row for row, _ in rows]
    assert len(set(chosen)) == len(chosen) == min(len(kl), worst + at_random)
    far = [kl[row] for row, kind in rows if kind == "worst"]
    rest = [value for row, value in enumerate(kl) if (row, "worst") not in rows]
    order = [math.inf if math.isnan(value) else value for value in far]
    assert order == sorted(order, reverse=True)
    if far and rest and not math.isnan(far[-1]):
        assert all(value <= far[-1] for value in rest)


def test_plain_refuses_what_is_not_plain():
    with pytest.raises(TypeError, match="got set"):
        atomic_files.plain({"a": {1}})
    assert (
        atomic_files.plain_json({"path": atomic_files.Path("a"), "t": (1, 2.5)})
        == '{"path":"a","t":[1,2.5]}'
    )
    assert all(c in string.printable for c in atomic_files.plain_json("\u202e\ud800é"))
