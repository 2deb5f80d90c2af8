"""The run directory: everything a training run says about itself, written and read.

    config.yaml      the resolved configuration
    run.json         status, argv, versions, seed, reference identity, times, message
    metrics.jsonl    one object a step; keys are defined in `docs/metrics.md`
    samples.jsonl    one object a kept response, with its per-token numbers and likeliest words
    events.jsonl     refusals, rollbacks and the like; there as soon as there is one
    refused/         batches of refused steps
    checkpoints/     belongs to the checkpoints' own module

Two promises. A reader can open the directory at any moment, also after a crash: whole files are
replaced atomically, and a line that could not be written completely is taken back. And nothing
read is ever executed or guessed at: JSON and safe YAML only.

JSON has no NaN and no infinity, and both are findings that must survive. They are written as the
strings "NaN", "Infinity" and "-Infinity", and read back as floats. All files are plain ASCII, so
that lone surrogates, NUL and control characters from a model cannot break a line.
"""

import json
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

import yaml

from kleash.errors import RunError
from kleash.storage.atomic_files import append_whole, cannot_write, plain, plain_json, replace_file
from kleash.storage.events import FILE as _EVENTS
from kleash.storage.events import Event, append_event, event_line, read_event
from kleash.storage.samples import Sample, read_number, read_sample, sample_line

Status = Literal["running", "finished", "interrupted", "failed"]
Metrics = dict[str, float | int | None]

FORMAT = 2
"""Of the directory, as `format` in run.json; runs from before there was a number are of format 1,
which differs in nothing that is read. A new one where an older version would misread a run."""
MAX_SAMPLES_PER_STEP = 64
"""More than this many responses kept at one step is a mistake of the caller."""
_CONFIG, _META, _METRICS, _SAMPLES = "config.yaml", "run.json", "metrics.jsonl", "samples.jsonl"
_STATUSES = ("running", "finished", "interrupted", "failed")


@dataclass(frozen=True)
class Run:
    """A run directory as read."""

    path: Path
    config: Mapping[str, Any]
    meta: Mapping[str, Any]
    metrics: Sequence[Metrics]
    samples: Sequence[Sample]
    events: Sequence[Event] = ()
    notes: Sequence[str] = ()
    """What was not quite right while reading, in sentences."""

    @property
    def status(self) -> Status:
        """How the run ended, or "running" if no end was ever recorded."""
        return cast(Status, self.meta["status"])

    @property
    def name(self) -> str:
        """The directory's own name: what the run is called in a report."""
        return self.path.resolve().name


class RunWriter:
    """Write a run directory while the run goes on.

    Use as a context manager: leaving normally marks the run finished, Ctrl-C marks it
    interrupted, any other exception marks it failed with its message.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "first"
        >>> with RunWriter.create(path, settings={"beta": 0.1}, meta={"seed": 0}) as run:
        ...     run.append_metrics({"step": 1, "objective/kl_ref": 0.25})
        >>> read_run(path).status, read_run(path).metrics
        ('finished', [{'step': 1, 'objective/kl_ref': 0.25}])
    """

    def __init__(self, path: Path, meta: dict[str, Any]):
        self.path = path
        self._meta = meta
        self._last_step = -1
        self._events: list[Event] = []

    @classmethod
    def create(
        cls, path: Path | str, *, settings: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> "RunWriter":
        """Begin a new run.

        Args:
            path: the run directory; made if missing.
            settings: the resolved configuration, of plain values.
            meta: what identifies the run: argv, versions, seed, reference, ...

        Raises:
            RunError: if the directory already holds a run, or cannot be written.
        """
        path = Path(path)
        if leftovers := half_begun(path):
            for file in leftovers:
                file.unlink(missing_ok=True)
        if holds_run(path):
            raise _another_run(path)
        state = {"status": "running", "started": _now(), "ended": None, "message": None}
        meta = {"format": FORMAT, **state, **meta}
        writer = cls(path, meta)
        existed, made = path.exists(), list[Path]()
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in (_METRICS, _SAMPLES):
                _claim(path / name)
                made.append(path / name)
            text = yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=False)
            replace_file(path / _CONFIG, text)
            made.append(path / _CONFIG)
            writer._write_meta()
        except BaseException as error:
            for file in made:
                file.unlink(missing_ok=True)
            if not existed and path.is_dir():
                path.rmdir()
            if isinstance(error, OSError) and not isinstance(error, RunError):
                raise cannot_write(path, error) from error
            raise
        return writer

    @classmethod
    def reopen(
        cls, path: Path | str, *, through_step: int, event: Event | None = None
    ) -> "RunWriter":
        """Continue a run after `through_step`: later lines are dropped, the status is "running".

        Args:
            path: the run directory.
            through_step: the last step whose lines stay; -1: none.
            event: why lines are dropped, which is written before they are; None: nothing to say.

        Raises:
            RunError: if the directory holds no readable run, or cannot be written.
        """
        run = read_run(path)
        state = {"format": FORMAT, "status": "running", "ended": None, "message": None}
        writer = cls(run.path, {**run.meta, **state})
        writer._events = list(run.events)
        if (run.path / _EVENTS).exists():
            # Without the half line that a killed process may have left.
            replace_file(run.path / _EVENTS, "".join(event_line(event) for event in run.events))
        if event is not None:
            writer.append_event(event)
        writer.rewind(through_step)
        writer._write_meta()
        return writer

    def rewind(self, through_step: int) -> None:
        """Drop the lines of later steps; events stay.

        Raises:
            RunError: if the run cannot be read or written.
        """
        run = read_run(self.path)
        metrics = [line for line in run.metrics if _step_of(line) <= through_step]
        samples = [sample for sample in run.samples if sample.step <= through_step]
        replace_file(run.path / _METRICS, "".join(_json_line(line) for line in metrics))
        replace_file(run.path / _SAMPLES, "".join(sample_line(sample) for sample in samples))
        self._last_step = through_step

    def change_config(
        self,
        settings: Mapping[str, Any],
        changes: Sequence[tuple[str, Any, Any]],
        *,
        after_step: int,
    ) -> None:
        """Go on with another configuration; run.json keeps each key's old and new value.

        Args:
            settings: the resolved configuration from now on.
            changes: dotted key, old value, new value.
            after_step: the last step made with the old values.

        Raises:
            RunError: a file cannot be written.
        """
        made = [
            {"after_step": after_step, "key": key, "old": old, "new": new}
            for key, old, new in changes
        ]
        self.update_meta(changes=[*self._meta.get("changes", []), *made])
        text = yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=False)
        replace_file(self.path / _CONFIG, text)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints belong; not made here."""
        return self.path / "checkpoints"

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append the numbers of one step.

        Args:
            metrics: `step`, an integer that grows, and numbers by key. None is "no such number
                here"; NaN and infinities are kept as what they are.

        Raises:
            ValueError: if `step` is missing or does not grow, or a value is not a number.
            RunError: if the line cannot be written; nothing of it remains then.
        """
        step = metrics.get("step")
        if not isinstance(step, int) or step <= self._last_step:
            raise ValueError(
                f"metrics need an integer step above {self._last_step}, got step {step!r}"
            )
        for key, value in metrics.items():
            if isinstance(value, bool) or not (value is None or isinstance(value, numbers.Real)):
                raise ValueError(f"metric {key!r} must be a number or None, got {value!r}")
        self._append(_METRICS, _json_line(metrics))
        self._last_step = step

    def append_samples(self, samples: Iterable[Sample]) -> None:
        """Append kept responses; long ones keep their first `MAX_TOKENS_PER_SAMPLE` tokens.

        Raises:
            ValueError: if one step keeps more than `MAX_SAMPLES_PER_STEP`.
            RunError: if they cannot be written; none of them remains then.
        """
        samples = list(samples)
        if len(samples) > MAX_SAMPLES_PER_STEP:
            raise ValueError(
                f"at most {MAX_SAMPLES_PER_STEP} responses are kept at a step, got {len(samples)}; "
                "choose some of them"
            )
        self._append(_SAMPLES, "".join(sample_line(sample) for sample in samples))

    def append_event(self, event: Event) -> None:
        """Append an event, unless an interrupted run came to the very same one before.

        Raises:
            RunError: if it cannot be written; nothing of it remains then.
        """
        if event not in self._events:
            append_event(self.path, event)
            self._events.append(event)

    def update_meta(self, **values: Any) -> None:
        """Set entries of run.json, replacing the file atomically.

        Raises:
            RunError: if the file cannot be written; the old one remains then.
        """
        self._meta.update(values)
        self._write_meta()

    def close(self, status: Status, message: str | None = None) -> None:
        """Record how the run ended.

        Raises:
            RunError: if run.json cannot be written; it then still says "running".
        """
        self.update_meta(status=status, message=message, ended=_now())

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close("finished")
            return
        if isinstance(error, KeyboardInterrupt):
            status, message = "interrupted", str(error) or "stopped by Ctrl-C"
        else:
            status, message = "failed", str(error) or type(error).__name__
        # A full disk may refuse this line too; the first error is the one worth reading.
        try:
            self.close(status, message)
        except RunError as second:
            error.add_note(f"and the run could not be marked {status}: {second}")

    def _write_meta(self) -> None:
        replace_file(self.path / _META, plain_json(self._meta, indent=2) + "\n")

    def _append(self, name: str, text: str) -> None:
        append_whole(self.path / name, text)


def holds_run(path: Path | str) -> bool:
    """Whether the directory holds a run, or what is left of one."""
    return any((Path(path) / name).exists() for name in (_META, _METRICS, _CONFIG, _SAMPLES))


def half_begun(path: Path | str) -> list[Path]:
    """The files of a run that was killed while `RunWriter.create` made its directory.

    Returns:
        What can be removed without loss: two files without a line, and the configuration that was
        written after them. Empty where the directory holds anything else of a run, or nothing.
    """
    path = Path(path)
    lines = [file for name in (_METRICS, _SAMPLES) if (file := path / name).exists()]
    if not lines or (path / _META).exists() or any(file.stat().st_size for file in lines):
        return []
    whole = [path / _CONFIG] if (path / _CONFIG).exists() else []
    if whole and len(lines) < 2:
        return []
    unfinished = [file for name in (_CONFIG, _META) for file in path.glob(f".{name}.*.tmp")]
    return [*lines, *whole, *unfinished]


def read_run(path: Path | str) -> Run:
    """Read a run directory, also one that is still being written or that crashed.

    A last line that breaks off is left out and named in `Run.notes`.

    Raises:
        RunError: if the directory is missing or holds no run, or a file of it is not what it
            should be; the message names the file and the line.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"expected a run directory, got {str(path)!r}, which is not a directory")
    if not (path / _META).is_file():
        raise RunError(
            f"expected a run directory, but {str(path)!r} holds no run.json; "
            "give the directory that `kleash train` wrote"
        )
    notes: list[str] = []
    meta = _read_meta(path / _META)
    config = _read_config(path / _CONFIG)
    metrics = [_read_metrics(*line) for line in _read_lines(path / _METRICS, notes)]
    samples = [read_sample(*line) for line in _read_lines(path / _SAMPLES, notes)]
    lines = _read_lines(path / _EVENTS, notes) if (path / _EVENTS).exists() else ()
    events = [read_event(*line) for line in lines]
    return Run(path, config, meta, metrics, samples, events, tuple(notes))


def _claim(file: Path) -> None:
    """Create an empty file, exclusively: of two runs that start at once, one is refused."""
    try:
        file.open("xb").close()
    except FileExistsError as error:
        raise _another_run(file.parent) from error


def _another_run(path: Path) -> RunError:
    return RunError(
        f"{str(path)!r} already holds a run; give another output directory, or move that run away"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _json_line(value: Mapping[str, Any]) -> str:
    return plain_json(value) + "\n"


def _step_of(metrics: Mapping[str, float | int | None]) -> int:
    step = metrics["step"]
    assert isinstance(step, int)
    return step


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(f"the run is incomplete: {str(file)!r} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {str(file)!r}: {error}") from error


def _read_meta(file: Path) -> dict[str, Any]:
    meta = _parse_object(_read_text(file), str(file))
    if meta.get("status") not in _STATUSES:
        raise RunError(
            f"{str(file)!r} must give a status out of {', '.join(_STATUSES)}, "
            f"got {meta.get('status')!r}"
        )
    number = meta.get("format", 1)
    if number not in range(1, FORMAT + 1):
        raise RunError(
            f"{str(file)!r} says format {number!r}, which this version of kleash does not know "
            f"(expected at most {FORMAT}); read it with the version that wrote it, or a newer one"
        )
    return meta


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(_read_text(file))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RunError(f"{str(file)!r} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise RunError(f"{str(file)!r} must hold a mapping, got {type(config).__name__}")
    return {str(key): value for key, value in cast(dict[Any, Any], config).items()}


def _read_lines(file: Path, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line as (where it is, its object); a torn last line is noted and left out."""
    # Only "\n" ends a line; str.splitlines would also break at separators inside strings.
    lines = _read_text(file).split("\n")
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            value = _parse_object(line, where)
        except RunError:
            if number < len(lines):
                raise
            notes.append(
                f"the last line of {file.name} (line {number}) breaks off and was left out"
            )
            return
        yield where, value


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: expected a JSON object, got what is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return cast(dict[str, Any], value)


def _read_metrics(where: str, line: Mapping[str, Any]) -> Metrics:
    step = line.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise RunError(f"{where}: expected an integer 'step', got {step!r}")
    return {key: read_number(where, key, value) for key, value in line.items()}
