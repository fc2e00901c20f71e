"""The sweep as two fused kernels on an NVIDIA GPU, for CuPy's arrays and PyTorch's: `rows.cu`.

An execution of the formulas in `_sweep.py`, tested against them, and only where they cost many passes over the arrays:
what compiles, transforms or records takes the array functions.
"""

from .rows import sweep, takes

__all__ = ["sweep", "takes"]
