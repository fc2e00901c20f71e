"""The libraries that are here, on each of their devices, and why the others are not."""

import contextlib
import importlib.util
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .._core.call import Array
from .._core.libraries import LIBRARIES, Library, dtype_name, from_numpy
from .._scoring.backend import backend


@dataclass(frozen=True)
class Place:
    """A library on one of its devices."""

    name: str
    """The library's name, and the device unless it is the CPU: "torch", "torch cuda:0"."""
    library: Library
    xp: ModuleType
    device: Any
    """The library's object for the device; None for its default."""
    device_name: str
    on_gpu: bool
    home: Any
    """The device that arrays made here report; None where they report none."""
    hardware: str
    version: str

    def array(self, x: Any, dtype: str) -> Array:
        """Copies a NumPy array here, in `dtype` if it is floating. A copy of Dask has up to two chunks an axis."""
        half = dtype == "bfloat16"
        floating = x.dtype.kind == "f"
        x = x.astype("float32" if half else dtype) if floating else x.copy()
        if self.library.lazy:
            return self.xp.asarray(x, chunks=tuple(max(1, -(-size // 2)) for size in x.shape))
        made = from_numpy(self.library, x, self.device)
        return self.xp.astype(made, self.xp.bfloat16) if floating and half else made

    def on_host(self, results: Sequence[Array]) -> list[Any]:
        """Copies arrays from this place to NumPy; half precisions are widened to float32."""
        if self.library.lazy:
            results = sys.modules["dask"].compute(*results, scheduler="synchronous")
            return [np.asarray(x) for x in results]
        halves = ("float16", "bfloat16")
        widened = (self.xp.astype(x, self.xp.float32) if dtype_name(x.dtype) in halves else x for x in results)
        return [np.asarray(self.library.to_numpy(x)) for x in widened]

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The context of each call: CuPy's device, and no warnings about infinities, which are compared."""
        with np.errstate(all="ignore"), self.device if self.library.backend == "cupy" else contextlib.nullcontext():
            yield


@contextlib.contextmanager
def places(names: Sequence[str] | None) -> Iterator[tuple[list[Place], dict[str, str]]]:
    """The places that can compute, and for every other library the reason why it cannot; for one `with` block.

    `names` are names of libraries or places; all of them must be here. Within the block JAX allows float64; its setting
    is restored afterwards.

    Raises
    ------
    ValueError
        A name of no library, or of a library that is not here.
    """
    if isinstance(names, str):
        raise TypeError(f"backends must be a sequence of names, got {names!r}")
    known = [library.backend for library in LIBRARIES]
    for name in names or ():
        if name.partition(" ")[0] not in known:
            raise ValueError(f"backends must be among {', '.join(known)}, got {name!r}")
    found: list[Place] = []
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for library in LIBRARIES:
            if names is not None and library.backend not in {name.partition(" ")[0] for name in names}:
                continue
            name = library.backend
            try:
                for device in _devices(library):
                    name = library.backend if device in (None, "cpu") else f"{library.backend} {device}"
                    found.append(stack.enter_context(_place(library, name, device)))
            except Exception as error:  # a broken installation or driver may raise anything
                absent[name] = " ".join(str(error).split()) or type(error).__name__
        for name in names or ():
            reasons = [f"{each}: {why}" for each, why in absent.items() if name in (each, each.partition(" ")[0])]
            if reasons or not any(name in (place.name, place.library.backend) for place in found):
                raise ValueError(
                    f"backend {name} cannot be used, {'; '.join(reasons) or 'there is no such device here'}"
                )
        yield [each for each in found if names is None or {each.name, each.library.backend} & set(names)], absent


@contextlib.contextmanager
def _place(library: Library, name: str, device: str | None) -> Iterator[Place]:
    with backend(library.backend, device) as found:
        home = library.device(from_numpy(library, np.ones(1), found.device))
        hardware = platform.machine() if device in (None, "cpu") else _hardware(library, found.device)
        version = str(sys.modules[library.backend].__version__)
        yield Place(name, library, found.xp, found.device, found.device_name, found.on_gpu, home, hardware, version)


def _devices(library: Library) -> Sequence[str | None]:
    """The devices of a library by its own names, None for its only one; an absent library raises any exception."""
    if importlib.util.find_spec(library.backend) is None:
        raise ValueError("not installed")
    try:
        library.namespace()
    except Exception as error:
        raise ValueError(f"cannot be imported ({error})") from None
    module = sys.modules[library.backend]
    if library.backend == "torch":
        return ["cpu", *(f"cuda:{i}" for i in range(module.cuda.device_count()))]
    if library.backend == "jax":
        default, devices = module.default_backend(), []
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may exclude the CPU
            devices += ["cpu"] if module.devices("cpu") else []
        return devices + [f"{default}:{i}" for i in range(len(module.local_devices())) if default != "cpu"]
    if library.backend == "cupy":
        try:
            count = module.cuda.runtime.getDeviceCount()
        except Exception as error:
            raise ValueError(f"no CUDA GPU that CuPy can use ({error})") from None
        return [f"cuda:{i}" for i in range(count)]
    return [None]


def _hardware(library: Library, device: Any) -> str:
    module = sys.modules[library.backend]
    if library.backend == "torch":
        return str(module.cuda.get_device_name(device))
    if library.backend == "jax":
        return str(device.device_kind)
    return str(module.cuda.runtime.getDeviceProperties(device.id)["name"].decode())
