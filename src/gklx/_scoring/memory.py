"""How many rows a block may have under a bound on the memory of the process."""

import re

import psutil

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_ARRAYS_A_BLOCK = 24
"""Arrays of a block's size that are alive at once, reading and converting included; `tests/test_memory.py`."""


def parse_size(text: str) -> int:
    """The bytes of "2GB", "500 MiB", "1.5G" or a plain number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"memory must be a size such as 2GB or 500MiB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def rows_and_threads(
    classes: int, itemsize: int, block_bytes: int, threads: int, bound: int | None, fixed: int
) -> tuple[int, int]:
    """Rows that a block may have and how many blocks may be under way; `fixed` bytes are needed whatever that is.

    The bound is on the whole process, its libraries included; without one half of the free memory may be used. GPUs
    are given blocks of the same size.

    Raises
    ------
    ValueError
        The bound leaves no room for a single row.
    """
    used = psutil.Process().memory_info().rss + fixed
    limit = bound or used + psutil.virtual_memory().available // 2
    row = classes * itemsize * _ARRAYS_A_BLOCK
    threads = max(1, min(threads, (limit - used) // row))
    rows = min(block_bytes * _ARRAYS_A_BLOCK, (limit - used) // threads) // row
    if limit - used < row:
        raise ValueError(
            f"memory must be at least {(used + row) / 1e6:,.0f} MB for {classes:,} classes here, of which "
            f"{used / 1e6:,.0f} MB are needed in any case, got {limit / 1e6:,.0f} MB"
        )
    return max(1, rows), threads
