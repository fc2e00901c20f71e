"""The peak of resident memory of one call, as the system counts it."""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak(call: Callable[[], Any]) -> int | None:
    """Measure the bytes beyond those that were there before; None where the system cannot tell (Linux only).

    The inputs were there before, the results were not. Pages are rounded up; small arrays hide in memory that imports
    have freed.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where it is not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what is used anew would be missing from the peak
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        before = _status("VmRSS")
        result = call()
        after = _status("VmHWM")
    except OSError:
        return None
    del result
    return after - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key}")
