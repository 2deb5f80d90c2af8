"""Calls that wait for an answer, such as a judge behind an API: several at once, with limits.

All of them run on one event loop in a thread of its own, for as long as the process lives: clients
that keep connections belong to the loop they were first used on, and a notebook has a loop already.
"""

import asyncio
import functools
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CallLimits:
    """How calls are made."""

    concurrency: int = 8
    """Calls under way at once."""
    timeout_s: float = 60.0
    """Seconds until a call is given up."""
    retries: int = 2
    """How often a call that failed is made again."""
    pause_s: float = 0.5
    """Seconds before the first retry; twice as many before each further one."""


class CallError(Exception):
    """A call failed at its last attempt; the cause is chained.

    Attributes:
        index: which of the calls.
        reason: the exception of the last attempt, or None if it took too long.
    """

    def __init__(self, index: int, attempts: int, reason: Exception | None):
        """Keep which call it was."""
        super().__init__(f"call {index} failed {attempts} times")
        self.index, self.attempts, self.reason = index, attempts, reason


def run_calls(calls: Sequence[Callable[[], Awaitable[Any]]], limits: CallLimits) -> list[Any]:
    """What each call returns, in order; at most `concurrency` of them at a time.

    Raises:
        CallError: one failed at its last attempt; the others are cancelled.
    """
    future = asyncio.run_coroutine_threadsafe(_all(calls, limits), _loop(os.getpid()))
    try:
        return future.result()
    except BaseException:
        future.cancel()  # an interrupt of this thread ends the calls too
        raise


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of a process: one that was forked has no thread of its parent's."""
    loop = asyncio.new_event_loop()
    name = f"kleash-calls-{process}"
    threading.Thread(target=loop.run_forever, name=name, daemon=True).start()
    return loop


async def _all(calls: Sequence[Callable[[], Awaitable[Any]]], limits: CallLimits) -> list[Any]:
    gate = asyncio.Semaphore(limits.concurrency)

    async def within(index: int) -> Any:
        async with gate:
            return await _attempts(index, calls[index], limits)

    tasks = [asyncio.ensure_future(within(index)) for index in range(len(calls))]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _attempts(index: int, call: Callable[[], Awaitable[Any]], limits: CallLimits) -> Any:
    for attempt in range(1, limits.retries + 2):
        limit = asyncio.timeout(limits.timeout_s)
        try:
            async with limit:
                return await call()
        except Exception as error:
            late = limit.expired()
            if attempt > limits.retries:
                raise CallError(index, attempt, None if late else error) from error
            what = "took too long" if late else f"raised {type(error).__name__}: {error}"
            _LOG.warning("reward call %d %s: retry %d", index, what, attempt)
            await asyncio.sleep(limits.pause_s * 2 ** (attempt - 1))
    raise AssertionError("unreachable: the last attempt returns or raises")
