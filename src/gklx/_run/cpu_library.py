"""The CPU row kernel: loading the shared library, how many threads it may use, and what it is handed.

The library is plain C to Python: one structure in, a status out.
"""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

F32, F64, F16, BF16 = range(4)
TYPES = {"float32": F32, "float64": F64, "float16": F16, "bfloat16": BF16}
MEAN, SUM, NONE = range(3)
REDUCTIONS = {"mean": MEAN, "sum": SUM, "none": NONE}

_SUFFIXES = (".so", ".dylib", ".dll")


class RowCall(ctypes.Structure):
    """`gklx_call` of _kernels/cpu.h, field by field; arrays are addresses, 0 where there is none."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "student", "teacher", "prior", "labels", "sample_weight", "where", "upstream", "totals",
        )),
        *((name, ctypes.c_int64) for name in ("rows", "classes", "where_row_stride", "where_class_stride")),
        *((name, ctypes.c_double) for name in (
            "temperature", "weight_temperature", "gamma", "mse_weight", "ce_weight", "ranks",
        )),
        *((name, ctypes.c_int32) for name in (
            "student_type", "teacher_type", "prior_type", "decomposed", "tempered", "symmetric", "batch_normalized",
            "reduction", "upstream_per_row", "threads",
        )),
        *((name, ctypes.c_void_p) for name in (
            "parallel_for", "value", "to_student", "to_teacher", "totals_out", "kl", "mse", "ce", "mass",
            "student_peak", "teacher_peak", "reverse_kl", "has_valid", "undefined", "student_class", "teacher_class",
            "top_k",
        )),
        ("top_ks", ctypes.c_int64),
        ("overlaps", ctypes.c_void_p),
    )  # fmt: skip


def kernel_allowed() -> bool:
    """False under `GKLX_KERNEL=0`: the formulas then run everything."""
    return os.environ.get("GKLX_KERNEL") != "0"


@cache
def library() -> ctypes.CDLL | None:
    """The library, None in an installation without it.

    It lies beside the sources of the kernel, or where `GKLX_KERNEL_LIBRARY` says.
    """
    folder = Path(__file__).parent.parent / "_kernels"
    elsewhere = os.environ.get("GKLX_KERNEL_LIBRARY")
    for path in [Path(elsewhere)] if elsewhere else [folder / f"rows{suffix}" for suffix in _SUFFIXES]:
        if path.exists():
            loaded = ctypes.CDLL(str(path))
            if not hasattr(loaded, "gklx_call_bytes") or loaded.gklx_call_bytes() != ctypes.sizeof(RowCall):
                raise ImportError(f"{path} is the row kernel of another version of gklx: build it again")
            for function in (loaded.gklx_rows, loaded.gklx_check_prior):
                function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
            loaded.gklx_instruction_set.restype = ctypes.c_char_p
            return loaded
    return None


@cache
def _instruction_set() -> str | None:
    loaded = library()
    return None if loaded is None else str(loaded.gklx_instruction_set().decode())


def instruction_set() -> str | None:
    """What the kernel was compiled for that runs here, such as "avx2"; None where no kernel is in use."""
    return _instruction_set() if kernel_allowed() else None


def serves_jax() -> bool:
    """Whether a kernel is in use that was built with a handler for `jax.ffi`."""
    return kernel_allowed() and hasattr(library(), "gklx_jax_rows")


def run(call: RowCall) -> None:
    """Runs the kernel on a call that refers to live, contiguous arrays."""
    _status("gklx_rows", call)


def prior_is_right(call: RowCall) -> bool:
    """Whether all labels name classes, and the prior's rows that a call uses are finite and not negative."""
    return _status("gklx_check_prior", call) == 0


def _status(function: str, call: RowCall) -> int:
    status: int = getattr(library(), function)(ctypes.addressof(call))
    if status == 1:
        raise MemoryError("the row kernel found no memory for a row of logits on each thread")
    return status


def threads() -> int:
    """How many threads a call may use: never more than the cores that this process may run on.

    `GKLX_NUM_THREADS`, else `OMP_NUM_THREADS`, lowers the number, and so does a limit set by threadpoolctl; 1 turns
    threads off.
    """
    found = _cores()
    asked = (os.environ.get("GKLX_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or "").partition(",")[0].strip()
    if asked.isdecimal():  # whatever else stands there was not meant for us
        found = min(found, max(1, int(asked)))
    if found > 1 and "threadpoolctl" in sys.modules:  # nobody limits by it without importing it
        found = min(found, _limited_to())
    return found


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _limited_to() -> int:
    found = [library["num_threads"] for library in _controller().info()]
    return max(1, min(found, default=sys.maxsize))


@cache
def _controller() -> Any:
    """Looks through the process's libraries once: that takes milliseconds, asking them takes microseconds."""
    return sys.modules["threadpoolctl"].ThreadpoolController()
