"""Compiles and starts the kernels, by CuPy for both libraries, on the stream and the device of the arrays."""

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from .._libraries import library_of
from .._problem import Array
from .plan import THREADS, Plan


class Device(NamedTuple):
    """What is done with the arrays of one library on one device."""

    contiguous: Callable[[Array], Array]
    address: Callable[[Array], int]
    empty: Callable[[tuple[int, ...], Any], Array]
    """Of a shape and a dtype."""
    start: Callable[[Plan, str, tuple[Any, ...]], None]
    """Runs a kernel on arrays and numbers; None is a null pointer."""


@cache
def available() -> bool:
    """Whether CuPy is installed, finds a GPU and compiles the kernels for it; a warning where only the last fails."""
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return False
    except cupy.cuda.runtime.CUDARuntimeError:
        return False
    try:
        _kernel(Plan("float", "float", "float", 4, 256, 1).options, "statistics", cupy.cuda.Device().id)
    except Exception as error:  # a compiler or a driver that is not there comes in many kinds
        message = f"gklx's kernels do not compile here, array operations take their place: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True


def device_of(x: Array) -> Device:
    """The device of an array on a GPU, CuPy's or PyTorch's."""
    library = library_of(x)
    assert library is not None
    return _of_cupy(x) if library.backend == "cupy" else _of_torch(x)


def source() -> str:
    """The text of `rows.cu`."""
    return resources.files(__package__).joinpath("rows.cu").read_text(encoding="utf-8")


@cache
def _kernel(plan_options: tuple[str, ...], name: str, device: int) -> Any:
    """Compiled for the current device; CuPy keeps the result on disk as well."""
    import cupy

    # Contracted products and sums would round otherwise than the tests on a CPU saw.
    options = ("--std=c++14", "--fmad=false", *plan_options)
    return cupy.RawModule(code=source(), options=options).get_function(name)


def _start(device: int, address: Callable[[Array], int], plan: Plan, name: str, arguments: tuple[Any, ...]) -> None:
    kinds = {int: np.int64, float: np.float64}
    given = [kinds[type(x)](x) if type(x) in kinds else np.uint64(0 if x is None else address(x)) for x in arguments]
    _kernel(plan.options, name, device)((plan.blocks,), (THREADS,), tuple(given))


def _of_cupy(x: Array) -> Device:
    import cupy

    def address(y: Array) -> int:
        return int(y.data.ptr)

    def start(plan: Plan, name: str, arguments: tuple[Any, ...]) -> None:
        with x.device:
            _start(x.device.id, address, plan, name, arguments)

    def empty(shape: tuple[int, ...], dtype: Any) -> Array:
        with x.device:
            return cupy.empty(shape, dtype=dtype)

    return Device(cupy.ascontiguousarray, address, empty, start)


def _of_torch(x: Array) -> Device:
    import cupy

    torch = sys.modules["torch"]

    def address(y: Array) -> int:
        return int(y.data_ptr())

    def start(plan: Plan, name: str, arguments: tuple[Any, ...]) -> None:
        stream = torch.cuda.current_stream(x.device)
        with contextlib.ExitStack() as current:
            current.enter_context(cupy.cuda.Device(x.device.index))
            current.enter_context(cupy.cuda.ExternalStream(stream.cuda_stream, x.device.index))
            _start(x.device.index, address, plan, name, arguments)

    def empty(shape: tuple[int, ...], dtype: Any) -> Array:
        return torch.empty(tuple(shape), dtype=dtype, device=x.device)

    return Device(lambda y: y.detach().contiguous(), address, empty, start)
