"""The peak of resident memory of one call, as the operating system counts it."""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak(call: Callable[[], Any]) -> int | None:
    """The peak beyond the memory before the call, in bytes; None where the system (not Linux) does not report it.

    It includes the results, not the inputs. It counts whole pages, and misses small arrays that fit into memory which
    imports have freed.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)  # reused memory would be missing from the peak
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
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
