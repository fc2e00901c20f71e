"""Where to compute: a library and a device by their names, and the way there and back."""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from .._core.call import Array
from .._core.libraries import LIBRARIES, Library, library_of
from .._run.cpu_library import instruction_set
from .._run.cpu_library import threads as threads

_BLOCK_ON_CPU, _BLOCK_OF_COMPILED, _BLOCK_ON_GPU = 2**20, 2**23, 2**27


@dataclass(frozen=True)
class Backend:
    """A library and one of its devices."""

    library: Library
    xp: ModuleType
    device: Any
    """As the library has it; None for its default."""
    device_name: str
    on_gpu: bool
    kernel_threads: int = 1
    """How many threads the row kernel may use for a block."""

    @property
    def runs_kernel(self) -> bool:
        """Whether NumPy's arrays go to the row kernel, halves as they are."""
        return self.library.backend == "numpy" and instruction_set() is not None

    @property
    def block_bytes(self) -> int:
        """How many bytes of one logits array a block should hold.

        Where each step goes over all of it, what stays in the cache; where compiled code goes row by row, more, so that
        calls cost little; on a GPU what keeps it busy.
        """
        if self.on_gpu:
            return _BLOCK_ON_GPU
        compiled = self.runs_kernel or self.library.backend in ("jax", "torch")
        return _BLOCK_OF_COMPILED if compiled else _BLOCK_ON_CPU

    @property
    def threads(self) -> int:
        """How many blocks to work on at once: NumPy uses one core each; elsewhere one is read while one is computed."""
        if self.on_gpu:
            return 2
        return threads() if self.library.backend == "numpy" else min(2, threads())

    def put(self, x: Any) -> Array:
        """An array on the device: the library's own as it is where no device was asked for, another by the host."""
        own = library_of(x)
        if own is self.library and self.device is None:
            return x
        if own is not None and own is not self.library and own.backend != "numpy":
            x = own.to_numpy(x)
        if self.on_gpu and own is not self.library:
            return self._put_pinned(x)
        return self.xp.asarray(x, device=self.device)

    def get(self, x: Array) -> Any:
        """An array of the library on the host, in its own dtype."""
        return np.asarray(self.library.to_numpy(x))

    def compiled(self, f: Callable[..., Array], *fixed: Any) -> Callable[..., Array]:
        """The function with its first arguments fixed, compiled where the library would else be slow."""
        return _jitted(f, fixed) if self.library.backend == "jax" else functools.partial(f, *fixed)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """What a thread enters around each block: its own stream on a GPU, and silence about infinities."""
        with contextlib.ExitStack() as stack:
            # NumPy warns of every inf - inf on the way to an infinity or NaN that is counted and shown.
            stack.enter_context(np.errstate(all="ignore"))
            if self.library.backend == "torch":
                torch = sys.modules["torch"]
                stack.enter_context(torch.no_grad())
                if self.on_gpu:
                    stack.enter_context(torch.cuda.stream(_own(lambda: torch.cuda.Stream(self.device))))
            elif self.library.backend == "cupy":
                cupy = sys.modules["cupy"]
                if self.device is not None:
                    stack.enter_context(self.device)  # CuPy allocates on its current device
                stack.enter_context(_own(lambda: cupy.cuda.Stream(non_blocking=True)))
            yield

    def _put_pinned(self, x: Any) -> Array:
        """By page-locked memory, from which the GPU reads on its own while this thread goes on."""
        if self.library.backend == "torch":
            return self.xp.asarray(x).pin_memory().to(self.device or "cuda", non_blocking=True)
        if self.library.backend == "cupy":
            pinned = sys.modules["cupyx"].empty_pinned(x.shape, dtype=x.dtype)
            pinned[...] = x
            on_device = self.xp.empty(x.shape, dtype=x.dtype)
            on_device.set(pinned)
            return on_device
        return self.xp.asarray(x, device=self.device)


@contextlib.contextmanager
def backend(name: str, device: str | None, like: Array = None) -> Iterator[Backend]:
    """The backend of a name as in `LIBRARIES` and a device as the library spells it, for one `with` block.

    Without a device it is that of `like`, where that is an array of this library.

    Raises
    ------
    ValueError
        The library is not known or cannot be imported, or has no such device.
    """
    library = next((each for each in LIBRARIES if each.backend == name), None)
    if library is None:
        raise ValueError(f"backend must be one of {', '.join(each.backend for each in LIBRARIES)}, got {name!r}")
    try:
        xp = library.namespace()
    except Exception as error:  # a broken installation may raise anything
        raise ValueError(f"backend {name}: {library.name} cannot be imported here ({error})") from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_double_precision(library))
        try:
            place = None if device is None else _device(library, device)
            if place is None and library_of(like) is library:
                place = library.device(like)
            found = Backend(library, xp, place, "", False)
            with found.working():
                probe = found.put(np.zeros(1))
                found.get(probe + 0)
        except Exception as error:  # each library has its own for a device it has not
            which = "the default device" if device is None else f"device {device}"
            raise ValueError(f"{which}: {library.name} cannot compute there ({error})") from None
        where = _name(probe)
        yield replace(found, device_name=where, on_gpu=where.startswith(("cuda", "gpu", "rocm")))


_threads = threading.local()


def _own(stream: Callable[[], Any]) -> Any:
    """The thread's stream: one for all its blocks, since each stream has a pool of memory of its own."""
    if not hasattr(_threads, "stream"):
        _threads.stream = stream()
    return _threads.stream


@functools.lru_cache(maxsize=8)
def _jitted(f: Callable[..., Array], fixed: tuple[Any, ...]) -> Callable[..., Array]:
    compiled: Callable[..., Array] = sys.modules["jax"].jit(functools.partial(f, *fixed))
    return compiled


@contextlib.contextmanager
def _double_precision(library: Library) -> Iterator[None]:
    """Lets JAX keep float64 arrays as they are; float32 ones stay float32."""
    if library.backend != "jax":
        yield
        return
    config = sys.modules["jax"].config
    before = config.jax_enable_x64
    config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        config.update("jax_enable_x64", before)


def _device(library: Library, text: str) -> Any:
    """The device that a text names; strings are left to the libraries that take them."""
    if library.backend == "array_api_strict":
        return sys.modules["array_api_strict"].Device(text)
    if library.backend not in ("jax", "cupy"):
        return text
    platform, _, number = text.partition(":")
    if not platform:
        raise ValueError("no platform is named")
    if library.backend == "jax":
        devices = sys.modules["jax"].devices(platform)
        at = int(number or 0)
        if not 0 <= at < len(devices):
            raise ValueError(f"there are {len(devices)} of {platform}")
        return devices[at]
    if platform != "cuda":
        raise ValueError("devices are spelled cuda or cuda:0")
    return sys.modules["cupy"].cuda.Device(int(number or 0))


def _name(x: Array) -> str:
    library = library_of(x)
    assert library is not None
    device = library.device(x)
    if hasattr(device, "platform"):
        return f"{device.platform}:{device.id}"
    if type(device).__module__.startswith("cupy"):
        return f"cuda:{device.id}"
    return str(getattr(device, "_device", device))
