"""Runs independent pieces of work on a few threads, for a library that has none of its own.

NumPy lets go of the interpreter within each of its operations, so that pieces of some hundred microseconds each run
side by side.
"""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np


def threads() -> int:
    """How many threads a call may use: never more than the cores that this process may run on.

    `GKLX_NUM_THREADS`, else `OMP_NUM_THREADS`, lowers the number, and so does a limit set by threadpoolctl; 1 turns
    threads off.
    """
    found = _cores()
    asked = (os.environ.get("GKLX_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or "").partition(",")[0].strip()
    if asked.isdecimal():  # whatever else stands there was not meant for us
        found = min(found, max(1, int(asked)))
    if found > 1 and "threadpoolctl" in sys.modules:  # nobody limits by it without importing it
        found = min(found, _limited_to())
    return found


def each(work: Callable[[Any], Any], pieces: Sequence[Any], workers: int) -> list[Any]:
    """The results of `work` on each piece, in order; this thread takes its share of them.

    An exception, an interrupt too, leaves the pieces not yet begun undone and comes out here.
    """
    workers = min(workers, len(pieces))
    if workers < 2:
        return [work(piece) for piece in pieces]
    results: list[Any] = [None] * len(pieces)
    left = deque(enumerate(pieces))

    def run() -> None:
        try:
            while True:
                try:
                    at, piece = left.popleft()
                except IndexError:
                    return
                results[at] = work(piece)
        except BaseException:
            left.clear()
            raise

    errors = np.geterr()  # what NumPy does about them is a thread's own

    def run_as_here() -> None:
        with np.errstate(**errors):
            run()

    others = []
    with contextlib.suppress(RuntimeError):  # an interpreter that shuts down starts no work in threads
        for _ in range(workers - 1):
            others.append(_pool(os.getpid()).submit(run_as_here))
    try:
        run()
    finally:
        for other in others:
            other.cancel()
    for other in others:
        if not other.cancelled():
            other.result()
    return results


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _limited_to() -> int:
    found = [library["num_threads"] for library in _controller().info()]
    return max(1, min(found, default=sys.maxsize))


@cache
def _controller() -> Any:
    """Looks through the process's libraries once: that takes milliseconds, asking them takes microseconds."""
    return sys.modules["threadpoolctl"].ThreadpoolController()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """One for all calls, so that many callers do not start more threads than there are cores; a fork has its own."""
    return ThreadPoolExecutor(max(1, _cores() - 1), thread_name_prefix="gklx")
