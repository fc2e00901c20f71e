"""The logits that are measured on, the same numbers in every library."""

from typing import Any

import numpy as np


def logits(batch: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a student's and a teacher's."""
    rng = np.random.default_rng(20261122)
    # Drawn as float32: at C = 250,000 a float64 draw would leave the peak of the memory above what is measured.
    teacher = rng.standard_normal((batch, classes), dtype=np.float32)
    student = rng.standard_normal((batch, classes), dtype=np.float32)
    teacher *= 2.0
    student += teacher
    return student, teacher


def into(library: str, x: np.ndarray, dtype: str = "float32", device: str = "cpu") -> Any:
    """Hand an array to a library, by the name of its module."""
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


def to_numpy(x: Any, every: int = 1) -> np.ndarray:
    """Copy every so many rows of any library's array to the host, as float64."""
    x = x[::every] if x.ndim else x
    if hasattr(x, "detach"):  # PyTorch
        x = x.detach().double().cpu().numpy()
    elif hasattr(x, "get"):  # CuPy
        x = x.get()
    return np.asarray(x).astype(np.float64)
