"""The bandwidth of memory that a copy reaches, and the bytes that a loss cannot do without."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import arrays
import numpy as np
from timing import spread, take_turns


def least_bytes(batch: int, classes: int, gradient: str, itemsize: int) -> int:
    """Read both logits once, write the gradients once."""
    return (4 if gradient == "both" else 3) * batch * classes * itemsize


def measure(libraries: set[str], device: str, size: int, turns: int) -> dict[str, Any]:
    """Copy so many bytes in every way there is; bytes read and bytes written are counted."""
    source = np.ones(size // 4, np.float32)
    calls: dict[str, Callable[[], Any]] = {}
    if device == "cpu":
        target = np.empty_like(source)
        target[:] = 0  # so that no page is met for the first time
        threads = os.cpu_count() or 1
        calls["np.copyto, 1 thread"] = functools.partial(np.copyto, target, source)
        if threads > 1:
            parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
            pool = ThreadPoolExecutor(threads)
            calls[f"np.copyto, {threads} threads"] = lambda: list(pool.map(lambda part: np.copyto(*part), parts))
    for library in sorted(libraries - {"numpy"}):
        calls.update(_copy(library, source, device))
    taken = take_turns(calls, turns, 0)
    found = {
        name: spread([2 * source.nbytes / each for each in of.turns], "bytes_per_second") for name, of in taken.items()
    }
    best = max(found, key=lambda name: found[name]["bytes_per_second"])
    return {"size": source.nbytes, "copies": found, "best": best, **found[best]}


def _copy(library: str, source: np.ndarray, device: str) -> dict[str, Callable[[], Any]]:
    x = arrays.into(library, source, "float32", device)
    if library == "torch":
        import torch

        y = torch.zeros_like(x)
        if device == "cpu":
            return {f"torch copy_, {torch.get_num_threads()} threads": lambda: y.copy_(x)}
        return {"torch copy_": lambda: (y.copy_(x), torch.cuda.synchronize())}
    if library == "jax":
        import jax

        copy = jax.jit(lambda x: jax.numpy.copy(x))
        return {"jnp.copy": lambda: copy(x).block_until_ready()}
    import cupy

    z = cupy.zeros_like(x)
    return {"cupy.copyto": lambda: (cupy.copyto(z, x), cupy.cuda.Device().synchronize())}
