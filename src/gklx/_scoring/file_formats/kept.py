"""Caches of what readers have unpacked, with room for all inputs of a block; here or on a worker of a cluster."""

import collections
import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_in_turn: list[int] = []
"""For each block in progress the number of its inputs."""


@contextlib.contextmanager
def in_turn(inputs: int) -> Iterator[None]:
    """Within it a task reads a block, once of each of so many inputs: the caches keep what all of them need."""
    _in_turn.append(inputs)
    try:
        yield
    finally:
        _in_turn.remove(inputs)


class Kept(Generic[T]):
    """A cache that drops the least recently used; `most` says how many it keeps for how many inputs of a block.

    `make` is called for one key at a time.
    """

    def __init__(self, make: Callable[..., T], most: Callable[[int], int]) -> None:
        self._make, self._most = make, most
        self._held: collections.OrderedDict[Hashable, T] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *key: Hashable) -> T:
        """What was made for this key, now or before."""
        with self._lock:
            if key not in self._held:
                most = self._most(max(tuple(_in_turn), default=2))
                while len(self._held) >= most:
                    self._held.popitem(last=False)
                self._held[key] = self._make(*key)
            self._held.move_to_end(key)
            return self._held[key]

    def forget(self) -> None:
        """Frees all of it."""
        with self._lock:
            self._held.clear()
