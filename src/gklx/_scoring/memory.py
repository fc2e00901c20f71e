"""How many rows a block may have under a bound on the memory of the process."""

import re
from typing import NamedTuple

import psutil

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_ARRAYS_A_BLOCK = 24
"""How many arrays of a block's size exist at the same time, with those of the reader; `tests/test_memory.py`."""


def parse_size(text: str) -> int:
    """The bytes of "2GB", "500 MiB", "1.5G" or a plain number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"memory must be a size such as 2GB or 500MiB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


class Needs(NamedTuple):
    """The memory of a run that does not depend on the size of its blocks."""

    bytes: int = 0
    a_thread: int = 0
    """Bytes for each block in progress."""
    what: str = ""
    """What needs the memory, for the error message."""


def rows_and_threads(
    classes: int, itemsize: int, block_bytes: int, threads: int, bound: int | None, needs: Needs
) -> tuple[int, int]:
    """The number of rows in a block, and of blocks in progress.

    The bound is on the memory of the whole process, with its libraries. Without a bound half of the free memory may be
    used. Blocks for GPUs have the same size.

    Raises
    ------
    ValueError
        The bound leaves no room for a single row.
    """
    here = psutil.Process().memory_info().rss
    limit = bound or here + psutil.virtual_memory().available // 2
    row, room = classes * itemsize * _ARRAYS_A_BLOCK, limit - here - needs.bytes
    smallest = row + needs.a_thread
    if room < smallest:
        least = here + needs.bytes + smallest
        got = f"got {_text(limit)}" if bound else f"half of the free memory leaves {_text(limit)}"
        of_which = f", {_text(needs.bytes + needs.a_thread)} of it for {needs.what}" if needs.what else ""
        raise ValueError(f"memory must be at least {_text(least)} for {classes:,} classes here{of_which}; {got}")
    threads = max(1, min(threads, room // smallest))
    rows = min(block_bytes * _ARRAYS_A_BLOCK, room // threads - needs.a_thread) // row
    return max(1, rows), threads


def _text(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size < 1e11 else f"{size / 1e9:,.0f} GB"
