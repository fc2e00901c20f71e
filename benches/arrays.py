"""The logits that the benchmarks use: the same numbers in every library."""

import functools
from typing import Any

import numpy as np


@functools.lru_cache(maxsize=1)
def logits(batch: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the student's and the teacher's logits."""
    rng = np.random.default_rng(20261122)
    # Drawn in float32: at C = 250,000 the memory peak of a float64 draw would exceed the peak that is measured.
    teacher = rng.standard_normal((batch, classes), dtype=np.float32)
    student = rng.standard_normal((batch, classes), dtype=np.float32)
    teacher *= 2.0
    student += teacher
    return student, teacher


def into(library: str, x: np.ndarray, dtype: str = "float32", device: str = "cpu") -> Any:
    """Convert a NumPy array to a library's array; `library` is the name of its module."""
    if library == "numpy":
        return x.astype(dtype, copy=False)
    if library == "torch":
        import torch

        return torch.from_numpy(x).to(device=device, dtype=getattr(torch, dtype))
    if library == "jax":
        import jax

        return jax.numpy.asarray(x, dtype=dtype, device=jax.devices(device)[0])
    import cupy

    return cupy.asarray(x).astype(dtype, copy=False)
