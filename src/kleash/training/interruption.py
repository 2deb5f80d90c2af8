"""Ctrl-C and SIGTERM: the step at hand is finished and kept before the run ends.

The first signal only asks; the loop looks between two steps. A second one ends at once, as Python's
own Ctrl-C does: what follows the newest checkpoint is then lost.
"""

import os
import signal as signals
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import current_thread, main_thread
from time import monotonic
from types import FrameType
from typing import Any

_ECHO = 3.0
"""Seconds in which a launcher passes a signal on."""
SIGNALS = (signals.SIGINT, signals.SIGTERM)
NOTICE = "kleash: {name}: finishing this step and saving; once more ends at once"


class RunInterrupted(KeyboardInterrupt):
    """A run that was asked to stop, and stands saved; the message says where and how to go on."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        """As `KeyboardInterrupt`, with the exit code of a process that this signal ended."""
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class StopRequest:
    """Which signal asked the run to stop; None: none so far."""

    signal: signals.Signals | None = None
    at: float = 0.0
    """When it came, on this process's clock in seconds."""


@contextmanager
def catch_signals(*, notice: bool = True, launched: bool = False) -> Generator[StopRequest]:
    """Note the first SIGINT or SIGTERM; a second one raises `KeyboardInterrupt` where it comes.

    Outside the main thread Python cannot handle signals, and nothing is caught.

    Args:
        notice: whether the first one is answered on standard error.
        launched: a launcher started this process. It passes on what it gets, so that one Ctrl-C
            comes twice: what follows within a few seconds is still the first.
    """
    request = StopRequest()
    if current_thread() is not main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            if launched and monotonic() - request.at < _ECHO:
                return
            raise KeyboardInterrupt
        request.signal, request.at = signals.Signals(number), monotonic()
        if notice:
            # A handler may come in the middle of a write to sys.stderr: the descriptor itself.
            os.write(2, f"\n{NOTICE.format(name=request.signal.name)}\n".encode())

    before: dict[signals.Signals, Any] = {number: signals.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            signals.signal(number, handle)
        yield request
    finally:
        for number, handler in before.items():
            # None: it was set by a program that is not Python, and cannot be set again from here.
            signals.signal(number, signals.SIG_DFL if handler is None else handler)
