"""How far results are from each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from arrays import to_numpy

_ROWS = 64


def kept(result: Sequence[Any]) -> list[np.ndarray]:
    """Take value and gradients to the host, of large batches evenly spaced rows."""
    return [to_numpy(x, every=max(1, x.shape[0] // _ROWS) if x.ndim else 1) for x in result if x is not None]


def difference(reference: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Take the worst difference: of values by the value, of gradients by the row's largest entry."""
    worst = 0.0
    for ours, theirs in zip(reference, found, strict=True):
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        scale = np.abs(ours) if ours.ndim == 0 else np.max(np.abs(ours), axis=-1, keepdims=True)
        worst = max(worst, float(np.max(np.abs(theirs - ours) / scale)))
    return worst
