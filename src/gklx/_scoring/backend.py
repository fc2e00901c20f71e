"""Where the command computes: a library and a device by their names, and the way there and back."""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .._libraries import LIBRARIES, Library, library_of
from .._problem import Array


class Backend(NamedTuple):
    """A library and one of its devices."""

    library: Library
    xp: ModuleType
    device: Any
    """As the library has it; None for its default."""
    device_name: str

    def put(self, x: Any) -> Array:
        """A host array on the device."""
        return self.xp.asarray(x, device=self.device)

    def get(self, x: Array) -> Any:
        """An array of the library, as float64 on the host."""
        return np.asarray(self.library.to_numpy(x), dtype=np.float64)


@contextlib.contextmanager
def backend(name: str, device: str | None) -> Iterator[Backend]:
    """The backend of a name as in `LIBRARIES` and a device as the library spells it, for one `with` block.

    Raises
    ------
    ValueError
        The library cannot be imported, or has no such device.
    """
    library = next(each for each in LIBRARIES if each.backend == name)
    try:
        xp = library.namespace()
    except Exception as error:  # a broken installation may raise anything
        raise ValueError(f"--backend {name}: {library.name} cannot be imported here ({error})") from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_double_precision(library))
        try:
            place = None if device is None else _device(library, device)
            if library.backend == "cupy" and place is not None:
                stack.enter_context(place)  # CuPy allocates on its current device
            found = Backend(library, xp, place, "")
            probe = found.put(np.zeros(1))
            found.get(probe + 0)
        except Exception as error:  # each library has its own for a device it has not
            which = "the default device" if device is None else f"--device {device}"
            raise ValueError(f"{which}: {library.name} cannot compute there ({error})") from None
        yield found._replace(device_name=_name(probe))


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
