"""How many rows a block may have under a bound on the memory of the process."""

from typing import NamedTuple

import psutil

_ARRAYS_A_BLOCK = 24
"""How many arrays of a block's size exist at the same time, with those of the reader; `tests/test_memory.py`."""

_BYTES_A_SAMPLE = 600
"""What a block needs for each sample beside its logits: results and records."""

_OVERHEAD = 4_000_000
"""What a run needs in addition to its blocks: libraries that are loaded later, and statistics of some records."""


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
    limit = here + psutil.virtual_memory().available // 2 if bound is None else bound
    logits, room = classes * itemsize, limit - here - _OVERHEAD - needs.bytes
    row = logits * _ARRAYS_A_BLOCK + _BYTES_A_SAMPLE
    smallest = row + needs.a_thread
    if room < smallest:
        least = here + _OVERHEAD + needs.bytes + smallest
        got = f"got {_text(limit)}" if bound is not None else f"half of the free memory leaves {_text(limit)}"
        of_which = f", {_text(needs.bytes + needs.a_thread)} of it for {needs.what}" if needs.what else ""
        raise ValueError(f"memory must be at least {_text(least)} for {classes:,} classes here{of_which}; {got}")
    threads = max(1, min(threads, room // smallest))
    rows = min(block_bytes // logits, (room // threads - needs.a_thread) // row)
    return max(1, rows), threads


def _text(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size < 1e11 else f"{size / 1e9:,.0f} GB"
