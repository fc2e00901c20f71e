"""Runs a call: on the row kernel of the CPU or of a GPU where it serves the arrays, else by the formulas."""

from .._core.call import Array, Asked, Batch, Call, Result
from . import blocks, cpu, cpu_library, cuda, dask_chunks


def kernel_of(call: Call) -> str | None:
    """The instruction set of the kernel that runs an eager call, "cuda" on a GPU; None where the formulas do."""
    if call.library.backend == "jax":
        device = call.library.device(call.arrays.student)  # None over several, which the formulas serve
        on_cpu = device is not None and device.platform == "cpu"
        return cpu_library.instruction_set() if on_cpu and cpu_library.serves_jax() else None
    if call.library.backend == "dask":
        return dask_chunks.kernel_of(call)
    if cpu.serves(call):
        return cpu_library.instruction_set()
    return "cuda" if cuda.serves(call) else None


def evaluate(
    call: Call,
    asked: Asked,
    shared: Batch | None = None,
    *,
    upstream: Array | None = None,
    statistics: Array | None = None,
) -> Result:
    """Value and gradients of a call, as asked for.

    `shared` is what the samples of the batch share, and `statistics` what the CUDA kernels found of each row, where an
    earlier evaluation of the same call returned them. Under the reduction "none" row i of a gradient is that of entry i
    of the value. Gradients are multiplied by `upstream`, of the value's shape, where it is given.
    """
    if call.library.backend == "dask":
        return dask_chunks.evaluate(call, asked)
    if cpu.serves(call):
        return cpu.evaluate(call, asked, shared, upstream=upstream)
    if cuda.serves(call):
        return cuda.evaluate(call, asked, shared, upstream=upstream, statistics=statistics)
    return blocks.evaluate(call, asked, shared, upstream=upstream)
