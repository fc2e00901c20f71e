"""Dask's array namespace, with what it lacks for arrays that were filtered: chunks without rows, rows not counted."""

import sys
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np


@cache
def namespace() -> ModuleType:
    """Its namespace, but for two functions that fail on filtered arrays.

    `dask.array` has neither maximum nor reshape where a chunk holds no rows, and no reshape where their number is not
    known.
    """
    import array_api_compat.dask.array as xp

    direct = ModuleType(xp.__name__)
    vars(direct).update(vars(xp), max=_max_over_chunks, reshape=_reshape_if_needed)
    return direct


def _max_over_chunks(x: Any, /, *, axis: int | None = None, keepdims: bool = False) -> Any:
    reduction: Any = sys.modules["dask.array"].reduction
    return reduction(x, _max_of_chunk, _max_of_chunk, axis=axis, keepdims=keepdims, dtype=x.dtype)


def _reshape_if_needed(x: Any, /, shape: tuple[int, ...], *, copy: bool | None = None) -> Any:
    pairs = list(zip(x.shape, shape, strict=False))
    same = all(own == to or to == -1 or (np.isnan(own) and np.isnan(to)) for own, to in pairs)
    if x.ndim == len(shape) and same:
        return x
    if any(0 in sizes for sizes in x.chunks):
        x = x.rechunk(tuple(tuple(filter(None, sizes)) or (0,) for sizes in x.chunks))
    xp: Any = sys.modules["array_api_compat.dask.array"]
    return xp.reshape(x, shape, copy=copy)


def _max_of_chunk(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    return x.max(axis=axis, keepdims=keepdims, initial=-np.inf)
