"""What glibc does with memory that arrays have left."""

from functools import cache

import numpy as np


@cache
def keep() -> None:
    """Lets glibc keep what one operation has freed for the next, in place of returning it and faulting it in again.

    It returns freed memory beyond a threshold that grows to twice the largest array freed so far, 64 MiB at most; this
    array is never touched, so it costs nothing.
    """
    np.empty(31 * 2**20, dtype=np.uint8)
