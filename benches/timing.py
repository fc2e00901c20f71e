"""Time calls in turns within one process.

The clock is that of `timeit`. pyperf, asv and pytest-benchmark finish one benchmark before they start the next, so that
a machine that slows down meanwhile slows one peer and not the other. Here all calls of a size take turns, and a ratio
is computed from the times of the same turn.
"""

import random
import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """The median and the quartiles of the turns."""

    median: float
    low: float
    high: float


def spread(x: Sequence[float]) -> Spread:
    """Take the median and the quartiles."""
    low, median, high = statistics.quantiles(x, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(x: Sequence[float], y: Sequence[float]) -> Spread:
    """The spread of the ratios within a turn: a load on the machine slows both calls of a turn."""
    return spread([a / b for a, b in zip(x, y, strict=True)])


def take_turns(
    calls: Mapping[str, Callable[[], Any]], turns: int, seconds: float, warm: bool = True
) -> dict[str, list[float]]:
    """The seconds per call in each turn, in which a call is repeated for about `seconds`, at least once.

    The order within a turn is random, so that the caches and spinning threads of one call do not always affect the same
    other one. The random order is the same in every run. `warm=False` skips the warm-up calls, for calls that start a
    process.
    """
    timers = {}
    for name, call in calls.items():
        timer, number = timeit.Timer(call), 1
        if warm:
            timer.timeit(1)  # lazy imports, compilation, first allocations
            number = max(1, round(seconds / timer.timeit(1)))
        timers[name] = timer, number
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(20261122)
    for _ in range(turns):
        draw.shuffle(order)
        for name in order:
            timer, number = timers[name]
            if warm:
                timer.timeit(1)  # brings its arrays into the caches, and lets another library's threads stop spinning
            taken[name].append(timer.timeit(number) / number)
    return taken
