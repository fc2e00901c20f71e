"""Calls of one process timed in turns.

The clock is `timeit`'s. pyperf, asv and pytest-benchmark time one benchmark to its end before they start the next; a
machine that slows down meanwhile then slows one peer and not the other. Here all calls of a size take turns, and a
ratio is made turn by turn.
"""

import random
import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """The median and the middle half of the turns."""

    median: float
    low: float
    high: float


def spread(x: Sequence[float]) -> Spread:
    """Take the median and the quartiles."""
    low, median, high = statistics.quantiles(x, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(x: Sequence[float], y: Sequence[float]) -> Spread:
    """Divide turn by turn: what else slowed the machine in a turn slowed both."""
    return spread([a / b for a, b in zip(x, y, strict=True)])


def take_turns(
    calls: Mapping[str, Callable[[], Any]], turns: int, seconds: float, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds a call, turn by turn; in a turn each call is repeated for about `seconds`, and runs once at the least.

    The order is drawn anew for every turn: what a call leaves behind, caches or threads that still spin, is then not
    always met by the same one. The draw is the same in every run. `warm=False` leaves out the calls before the first
    turn and within it, for calls that start a process each time.
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
                timer.timeit(1)  # its arrays back into the caches, while another library's threads stop spinning
            taken[name].append(timer.timeit(number) / number)
    return taken
