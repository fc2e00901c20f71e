"""Sizes of memory as people write them; not in `memory`, which needs psutil, since arguments are parsed without it."""

import math
import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """The bytes of "2GB", "500 MiB", "1.5G" or a plain number; ValueError where it is no size of at least a byte."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0
    if not 1 <= size < math.inf:
        raise ValueError(f"memory must be a size such as 2GB or 500MiB, got {text!r}")
    return int(size)
