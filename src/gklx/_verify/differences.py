"""Derivatives of a function of NumPy arrays by central differences, extrapolated, with an estimate of their error."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .places import Arguments

_LEVELS = 18
_ENOUGH = 2.0**-36  # relative to the largest derivative


def differences(f: Callable[[Arguments], float], arguments: Arguments, at: int) -> tuple[Any, Any]:
    """The derivatives by each entry of one argument and how far they may be off, NaN where the entry is not finite.

    Ridders' method: the step is halved, each column of the tableau removes one more term of the error, and the estimate
    that changed least is taken. It stops when all are exact enough: about 10 calls an entry for a smooth function.
    """
    x = arguments.positional[at]
    finite = np.isfinite(x)
    step = np.exp2(np.floor(np.log2(np.maximum(np.abs(np.where(finite, x, 0.0)), 1.0))) - 3)
    best, error = np.full(x.shape, np.nan), np.where(finite, np.inf, np.nan)

    def slope(place: tuple[int, ...]) -> float:
        ends = []
        for sign in (1, -1):
            changed = x.copy()
            changed[place] += sign * step[place]
            positional = (*arguments.positional[:at], changed, *arguments.positional[at + 1 :])
            ends.append((changed[place], f(arguments._replace(positional=positional))))
        (above, f_above), (below, f_below) = ends
        return float((f_above - f_below) / (above - below))

    previous: list[Any] = []
    for _ in range(_LEVELS):
        rough = error > _ENOUGH * np.abs(np.nan_to_num(best, posinf=0.0, neginf=0.0)).max(initial=0.0)
        if not rough.any():
            break
        slopes = np.full(x.shape, np.nan)
        for place in map(tuple, np.argwhere(rough)):
            slopes[place] = slope(place)
        row = [slopes]
        for order, before in enumerate(previous, start=1):
            row.append(row[-1] + (row[-1] - before) / (4.0**order - 1))
            change = np.fmax(np.abs(row[-1] - row[-2]), np.abs(row[-1] - before))
            chosen = change < error
            best, error = np.where(chosen, row[-1], best), np.where(chosen, change, error)
        previous, step = row, step / 2
    return best, error
