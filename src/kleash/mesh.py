"""The processes of a run: every one runs the same loop, and here they exchange what they found.

    torchrun --nproc-per-node 4 -m kleash train stories

Heavy passes are divided by rows. Their results (a few numbers a token) go to every process, so that
whatever decides is the same function of the same numbers everywhere.
Processes exchange tensors and JSON, never pickles; with one process nothing is exchanged at all.

An error that belongs to the run (`KleashError`) is exchanged by `Mesh.agree` and raised everywhere.
Any other one ends its process, which first leaves the reason in the launcher's store; the others
lose the connection, or wait for `timeout_s`, and then read it there.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

import kleash.errors
from kleash.errors import (
    ConfigError,
    KleashError,
    LostProcessError,
    RefusedError,
    RunError,
    TripwireError,
)

T = TypeVar("T")
BUCKET_BYTES = 1 << 26
"""What is summed at once, at most; a larger tensor is summed where it lies."""
_SECONDS_FOR_REASONS = 8.0
"""Seconds in which a process that lost another waits to read why."""
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ERRORS = {
    name: kind
    for name, kind in vars(kleash.errors).items()
    if isinstance(kind, type) and issubclass(kind, KleashError)
}


@dataclass(frozen=True)
class Mesh:
    """This process among those of the run; by default it is alone."""

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, repr=False, compare=False)
    """Of the launcher; the reason why a process ends is left there."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and the terminal."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of their ranks.

        Args:
            value: plain JSON; NaN and infinities are kept.
        """
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.long)
        lengths[self.rank] = len(text)
        dist.all_reduce(lengths)
        sent = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        sent[: len(text)] = text
        texts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(texts, sent)
        return [
            json.loads(got[:length].numpy().tobytes())
            for got, length in zip(texts, lengths.tolist(), strict=True)
        ]

    def agree(self, work: Callable[[], T], *, rows: Sequence[int] | None = None) -> T:
        """Do something in every process; where it fails in one, it fails in all alike.

        Args:
            work: not to wait for other processes after it failed.
            rows: which responses of the batch this process has, for errors that name one.

        Raises:
            KleashError: that of the first process which failed.
        """
        if self.size == 1:
            try:
                return work()
            except RefusedError as error:
                if rows is not None:
                    error.among(rows)
                raise
        failure: KleashError | None = None
        result: T | None = None
        try:
            result = work()
        except KleashError as error:
            failure = error
            if isinstance(error, RefusedError) and rows is not None:
                error.among(rows)
        said = self.gather(None if failure is None else _described(failure))
        first = next((rank for rank, words in enumerate(said) if words is not None), None)
        if first is None:
            return cast(T, result)
        raise _error_of(said[first]) from failure

    def first(self, work: Callable[[], T]) -> T:
        """Do something in the first process, and when it is done in the others too.

        Raises:
            KleashError: the first process failed.
        """
        result = self.agree(lambda: work() if self.is_first else None)
        return cast(T, result) if self.is_first else work()

    def broadcast(self, work: Callable[[], Any]) -> Any:
        """The result, plain JSON, of what the first process alone does; in every process.

        Raises:
            KleashError: it failed.
        """
        return self.gather(self.agree(lambda: work() if self.is_first else None))[0]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in buckets of one kind."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            full = sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES
            if bucket and (full or bucket[0].dtype != tensor.dtype):
                _add_together(bucket)
                bucket = []
            bucket.append(tensor)
        if bucket:
            _add_together(bucket)

    def require_same(self, what: dict[str, str]) -> None:
        """Compare what must be equal everywhere, such as versions and hashes.

        Raises:
            RunError: naming the first thing that differs, and the process.
        """
        said = self.gather(what)
        for key in said[0]:
            ours = [words.get(key) for words in said]
            # Where most are alike, it is the others that differ.
            usual = max(ours, key=ours.count)
            for rank, words in enumerate(ours):
                if words != usual:
                    raise RunError(
                        f"expected the same {key} in every process, got {str(usual)[:60]} in most "
                        f"of {self.size} and {str(words)[:60]} in process {rank}: give all of them "
                        "one code, one configuration and the same files"
                    )


ALONE = Mesh()
"""One process."""


def is_distributed() -> bool:
    """Whether a launcher started more than this process.

    Raises:
        ConfigError: its variables are half set.
    """
    given = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK") if os.environ.get(name)}
    if not given:
        return False
    try:
        several = int(given.get("WORLD_SIZE", "2")) > 1
        missing = [name for name in _VARIABLES if not os.environ.get(name)] if several else []
        if several and not missing and not 0 <= int(given["RANK"]) < int(given["WORLD_SIZE"]):
            raise ValueError("RANK is not below WORLD_SIZE")
    except ValueError as error:
        raise ConfigError(
            f"expected numbers in a launcher's WORLD_SIZE and RANK, got {given} ({error}): start "
            "with torchrun, or unset them"
        ) from None
    if missing:
        raise ConfigError(
            f"expected the variables {', '.join(_VARIABLES)} of a launcher, got none for "
            f"{', '.join(missing)}: start with torchrun, or unset the others"
        )
    return several


def own_gpu() -> int:
    """Which of the machine's GPUs is this process's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_process() -> bool:
    """Whether this process is the one that prints for all: the first, or alone."""
    return not is_distributed() or int(os.environ["RANK"]) == 0


@contextlib.contextmanager
def joined(timeout_s: float = 600.0) -> Generator[Mesh]:
    """Meet the other processes that a launcher started, and leave them in the end.

    Joined already, the same mesh; and without a launcher this process alone.

    Args:
        timeout_s: how long to wait for another process before the run is given up.

    Raises:
        ConfigError: they cannot be reached.
        LostProcessError: one ended, or did not answer in time.
    """
    if not is_distributed():
        yield Mesh()
        return
    if _JOINED:
        yield _JOINED[0]
        return
    mesh = _join(timeout_s)
    _JOINED.append(mesh)
    try:
        yield mesh
    except BaseException as error:
        explained = _exchange_reasons(mesh, error)
        if explained is error:
            raise
        raise explained from error
    finally:
        _JOINED.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def reported_once() -> Generator[None]:
    """What the first process says, the others do not say again: they only end, with its exit code.

    Where the first one was lost, another reports it.
    """
    try:
        yield
    except (KleashError, KeyboardInterrupt) as error:
        lost = error.ranks if isinstance(error, LostProcessError) else ()
        rank = 0 if is_first_process() else int(os.environ["RANK"])
        if all(other in lost for other in range(rank)):
            raise
        raise SystemExit(getattr(error, "exit_code", 130)) from error


_JOINED: list[Mesh] = []


def _join(timeout_s: float) -> Mesh:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    wait = timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(own_gpu() % torch.cuda.device_count())
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        store.set_timeout(wait)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
        dist.barrier() if backend == "gloo" else None
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ConfigError(
            f"expected {os.environ['WORLD_SIZE']} processes to meet at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout_s:g} s, got: "
            f"{str(error).splitlines()[0]}; start all of them with torchrun"
        ) from None
    return Mesh(rank, size, store)


def _add_together(tensors: list[Tensor]) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0])
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def _described(error: KleashError) -> dict[str, Any]:
    place = ("response", "token", "wire")
    return {
        "kind": type(error).__name__,
        "message": str(error.args[0] if error.args else ""),
        **{name: getattr(error, name) for name in place if isinstance(error, RefusedError)},
    }


def _error_of(words: dict[str, Any]) -> KleashError:
    kind: Any = _ERRORS.get(words["kind"], RunError)
    if not issubclass(kind, RefusedError):
        return kind(words["message"])
    place = {name: words[name] for name in ("response", "token")}
    if issubclass(kind, TripwireError):
        place["wire"] = words["wire"]
    return kind(words["message"], **place)


def _lost_connection(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that of a collective operation that broke off."""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        text = str(error)
        # An engine's error is one too, and may name a connection: that to its server.
        if (
            isinstance(error, RuntimeError)
            and not isinstance(error, KleashError)
            and (
                "gloo" in text or "Connection closed by peer" in text or "Connection reset" in text
            )
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exchange_reasons(mesh: Mesh, error: BaseException) -> BaseException:
    """Leave the reason why this process ends, or read why another did.

    Returns:
        What this process raises: the error, or which process was lost and why.
    """
    lost = _lost_connection(error)
    try:
        sentence = f"{type(error).__name__}: {error}".strip()
        mesh.store.set(f"kleash/{mesh.rank}", json.dumps(None if lost else sentence))
        # Whoever still waits for this process, waits no more.
        dist.destroy_process_group()
        said = _read_reasons(mesh, until_cause=lost)
    except Exception:
        if not lost:
            return error
        return LostProcessError(_NO_REASON.format(rank=0, size=mesh.size), ranks=(0,))
    if not lost:
        return error
    for rank, words in said.items():
        if words is not None:
            return LostProcessError(f"process {rank} of {mesh.size} failed: {words}", ranks=())
    silent = tuple(rank for rank in range(mesh.size) if rank not in said)
    if not silent:
        return LostProcessError(
            f"the {mesh.size} processes lost the connection, or waited for each other in different "
            f"places until distributed.timeout_s: {error}; the run can be resumed from its newest "
            "checkpoint"
        )
    return LostProcessError(_NO_REASON.format(rank=silent[0], size=mesh.size), ranks=silent)


_NO_REASON = (
    "process {rank} of {size} ended without a word or did not answer in time: it was killed, ran "
    "out of memory or hangs; the run can be resumed from its newest checkpoint (a slow judge needs "
    "a longer distributed.timeout_s)"
)


def _read_reasons(mesh: Mesh, *, until_cause: bool) -> dict[int, str | None]:
    """Why each process ended, as far as it is known; None: it only lost another."""
    said: dict[int, str | None] = {}
    end = time.monotonic() + _SECONDS_FOR_REASONS
    while time.monotonic() < end and len(said) < mesh.size:
        for rank in range(mesh.size):
            key = f"kleash/{rank}"
            if rank not in said and mesh.store.check([key]):
                said[rank] = json.loads(mesh.store.get(key))
        if until_cause and any(words is not None for words in said.values()):
            break
        if not until_cause and not mesh.is_first:
            break
        time.sleep(0.05)
    return said
