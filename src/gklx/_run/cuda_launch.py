"""Compiles and starts the CUDA kernels on the stream and the device of the arrays: by CuPy, or by NVIDIA's cuda-core.

PyTorch's arrays take whichever of the two is installed.
"""

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from .._core.call import Array
from .._core.libraries import library_of

# From every GPU that NVRTC 13 compiles for (sm_75) on, blocks of this size find the shared memory they need.
THREADS = 256
"""Of a block."""

Options = tuple[tuple[str, str], ...]
"""The definitions that cuda.cu asks for, by name."""

_LANGUAGE = "c++17"


class Device(NamedTuple):
    """What is done with the arrays of one library on one device."""

    contiguous: Callable[[Array, Any], Array]
    """The array with its rows one after the other, and in a dtype where one is given."""
    address: Callable[[Array], int]
    empty: Callable[[tuple[int, ...], Any], Array]
    """Of a shape and a dtype."""
    start: Callable[[Options, int, str, tuple[np.generic, ...]], None]
    """Runs a kernel, compiled with some options, on so many blocks and with these arguments, addresses as uint64."""


def device_of(x: Array) -> Device:
    """The device of an array on a GPU, CuPy's or PyTorch's."""
    library = library_of(x)
    assert library is not None
    return _of_cupy(x) if library.backend == "cupy" else _of_torch(x)


def available(x: Array) -> bool:
    """Whether the kernels compile for the device of an array; a warning where a compiler is there and fails."""
    library = library_of(x)
    assert library is not None
    if library.backend == "cupy":
        return _launcher(x.device.id, (_CUPY,)) is not None
    return _launcher(x.device.index, _LAUNCHERS) is not None


def installed(backend: str) -> bool:
    """Whether a launcher is there for the arrays of CuPy or PyTorch; if it works is known with the first of them."""
    return any(_is_installed(each.module) for each in ((_CUPY,) if backend == "cupy" else _LAUNCHERS))


class _Launcher(NamedTuple):
    module: str
    kernel_of: Callable[[Options, str, int], Any]
    """A kernel, by the options, its name and the device."""
    start: Callable[[Any, int, int, int, tuple[Any, ...]], None]
    """Starts a kernel on a device and a stream of it, on so many blocks, with the arguments."""


@cache
def _launcher(device: int, candidates: tuple[_Launcher, ...]) -> _Launcher | None:
    """The first that is installed and compiles for a device."""
    options = (
        ("REAL", "float"),
        ("STUDENT", "float"),
        ("TEACHER", "float"),
        ("WEIGHTS", "PROBABILITIES"),
        ("DECOMPOSED", "0"),
        ("VECTOR", "4"),
        ("GROUP", str(THREADS)),
        ("BLOCK", str(THREADS)),
    )
    for candidate in candidates:
        if not _is_installed(candidate.module):
            continue
        try:
            candidate.kernel_of(options, "statistics", device)
        except Exception as error:  # a compiler or a driver that is not there comes in many kinds
            message = f"gklx's kernels do not compile here by {candidate.module}: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        else:
            return candidate
    return None


@cache
def source() -> str:
    """The text of cuda.cu with row.h in its place: CuPy's cache on disk knows a kernel by its text."""
    folder = resources.files("gklx") / "_kernels"
    text, shared = ((folder / name).read_text(encoding="utf-8") for name in ("cuda.cu", "row.h"))
    return text.replace('#include "row.h"', shared.replace("#pragma once", ""))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package around it
        return False


# --- CuPy -------------------------------------------------------------------------------------------------------------


@cache
def _cupy_kernel(options: Options, name: str, device: int) -> Any:
    """Compiled for a device; CuPy keeps the result on disk as well."""
    import cupy

    with cupy.cuda.Device(device):
        return _cupy_module(options, device).get_function(name)


@cache
def _cupy_module(options: Options, device: int) -> Any:
    import cupy

    definitions = (f"-D{key}={value}" for key, value in options)
    return cupy.RawModule(code=source(), options=(f"--std={_LANGUAGE}", *definitions))


def _of_cupy(x: Array) -> Device:
    import cupy

    def address(y: Array) -> int:
        return int(y.data.ptr)

    def contiguous(y: Array, dtype: Any) -> Array:
        with x.device:
            return cupy.ascontiguousarray(y, dtype)

    def start(options: Options, blocks: int, name: str, arguments: tuple[Any, ...]) -> None:
        with x.device:
            _cupy_kernel(options, name, x.device.id)((blocks,), (THREADS,), arguments)

    def empty(shape: tuple[int, ...], dtype: Any) -> Array:
        with x.device:
            return cupy.empty(shape, dtype=dtype)

    return Device(contiguous, address, empty, start)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def cubin(options: Options, architecture: str) -> Any:
    """The kernels for an architecture such as "sm_90", by cuda-core; no GPU is needed."""
    from cuda.core import Program, ProgramOptions

    program_options = ProgramOptions(std=_LANGUAGE, arch=architecture, define_macro=list(options))
    program = Program(source(), "c++", program_options)
    with contextlib.suppress(OSError):  # the folder is not to be written, or its disk is full
        return program.compile("cubin", cache=_program_cache())
    return program.compile("cubin")


@cache
def _program_cache() -> Any:
    """Cuda-core's cache on disk, in the user's folder for such files: compiling takes seconds."""
    from cuda.core.utils import FileStreamProgramCache

    return FileStreamProgramCache()


@cache
def _core_kernel(options: Options, name: str, device: int) -> Any:
    """Compiled for a device; kept as long as the process."""
    with sys.modules["torch"].cuda.device(device):  # cuda-core leaves the device that it was told to use current
        return _core_module(options, device).get_kernel(name)


@cache
def _core_module(options: Options, device: int) -> Any:
    """All kernels, compiled once."""
    from cuda.core import Device as CudaDevice

    on = CudaDevice(device)
    on.set_current()
    return cubin(options, f"sm_{on.compute_capability.major}{on.compute_capability.minor}")


class _Stream(NamedTuple):
    """A stream of PyTorch by the protocol `__cuda_stream__`. PyTorch destroys none, so that it may be kept."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


@cache
def _cupy_stream(device: int, handle: int) -> Any:
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Stream(handle))
    return cupy.cuda.ExternalStream(handle, device)


def _start_by_cupy(kernel: Any, device: int, stream: int, blocks: int, given: tuple[Any, ...]) -> None:
    with sys.modules["torch"].cuda.device(device), _cupy_stream(device, stream):
        kernel((blocks,), (THREADS,), given)


@cache
def _core_stream(device: int, handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


@lru_cache(maxsize=256)
def _core_config(blocks: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=blocks, block=THREADS)


def _start_by_core(kernel: Any, device: int, stream: int, blocks: int, given: tuple[Any, ...]) -> None:
    from cuda.core import Device as CudaDevice
    from cuda.core import launch

    with sys.modules["torch"].cuda.device(device):
        # A thread of PyTorch's backward pass may have no CUDA context; neither the line above nor `launch` binds one.
        CudaDevice(device).set_current()
        launch(_core_stream(device, stream), _core_config(blocks), kernel, *given)


# In this order: a start by cuda-core takes 30 microseconds, by CuPy 44.
_CUPY = _Launcher("cupy", _cupy_kernel, _start_by_cupy)
_LAUNCHERS = (_Launcher("cuda.core", _core_kernel, _start_by_core), _CUPY)


def _of_torch(x: Array) -> Device:
    torch = sys.modules["torch"]
    on = x.device
    device, stream = on.index, torch.cuda.current_stream(on).cuda_stream
    launcher = _launcher(device, _LAUNCHERS)
    assert launcher is not None

    def address(y: Array) -> int:
        return int(y.data_ptr())

    def contiguous(y: Array, dtype: Any) -> Array:
        return (y if dtype is None else y.to(dtype)).contiguous().resolve_neg()

    def start(options: Options, blocks: int, name: str, arguments: tuple[Any, ...]) -> None:
        kernel = launcher.kernel_of(options, name, device)
        launcher.start(kernel, device, stream, blocks, arguments)

    def empty(shape: tuple[int, ...], dtype: Any) -> Array:
        return torch.empty(tuple(shape), dtype=dtype, device=on)

    return Device(contiguous, address, empty, start)
