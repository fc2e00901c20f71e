"""The libraries that are here, on each of their devices, why the others are not, and calls of functions there."""

import contextlib
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .._core.call import Array
from .._core.libraries import LIBRARIES, Library, dtype_name, from_numpy
from .._scoring.backend import Backend, backend
from .ulps import HALVES, Expected


@dataclass(frozen=True)
class Place:
    """A library on one of its devices."""

    name: str
    """The library's name, and the device unless it is the CPU: "torch", "torch cuda:0"."""
    backend: Backend
    home: Any
    """The device that arrays made here report; None where they report none."""
    hardware: str
    version: str

    @property
    def library(self) -> Library:
        """The library."""
        return self.backend.library

    def array(self, x: Any, dtype: str) -> Array:
        """Copies a NumPy array here, in `dtype` if it is floating. A copy of Dask has up to two chunks an axis."""
        return converted(x, dtype if x.dtype.kind == "f" else None, self.backend.xp, self._made)

    def _made(self, x: Any) -> Array:
        if self.library.lazy:
            return self.backend.xp.asarray(x, chunks=tuple(max(1, -(-size // 2)) for size in x.shape))
        return from_numpy(self.library, x, self.backend.device)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The context of each call: CuPy's device, and no warnings about infinities, which are compared."""
        device = self.backend.device if self.library.backend == "cupy" else contextlib.nullcontext()
        with np.errstate(all="ignore"), device:
            yield


def converted(x: Any, dtype: str | None, xp: ModuleType, make: Callable[[Any], Array]) -> Array:
    """A copy of a NumPy array as `make` makes it, in a dtype or its own; the library makes bfloat16, NumPy has none."""
    if dtype == "bfloat16":
        return xp.astype(make(x.astype("float32")), xp.bfloat16)
    return make(x.astype(dtype or x.dtype))


def on_host(library: Library, arrays: Sequence[Array]) -> list[Any]:
    """Copies arrays to NumPy; half precisions are widened to float32."""
    if library.lazy:
        return [np.asarray(x) for x in sys.modules["dask"].compute(*arrays, scheduler="synchronous")]
    xp = library.namespace()
    widened = (xp.astype(x, xp.float32) if dtype_name(x.dtype) in HALVES else x for x in arrays)
    return [np.asarray(library.to_numpy(x)) for x in widened]


# --- which are here ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def places(names: Sequence[str] | None) -> Iterator[tuple[list[Place], dict[str, str]]]:
    """The places that can compute, and for every other library the reason why it cannot; for one `with` block.

    `names` are names of libraries or places; all of them must be here. Within the block JAX allows float64; its setting
    is restored afterwards.

    Raises
    ------
    ValueError
        No name, a name of no library, or of a library that is not here.
    """
    if isinstance(names, str):
        raise TypeError(f"backends must be a sequence of names, got {names!r}")
    if names is not None and not names:
        raise ValueError("backends must name at least one library, got none")
    known = [library.backend for library in LIBRARIES]
    for name in names or ():
        if name.partition(" ")[0] not in known:
            raise ValueError(f"backends must be among {', '.join(known)}, got {name!r}")
    asked = known if names is None else [name.partition(" ")[0] for name in names]
    found: list[Place] = []
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for library in (each for each in LIBRARIES if each.backend in asked):
            name = library.backend
            try:
                for device in devices(library):
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
        yield Place(name, found, home, hardware, str(sys.modules[library.backend].__version__))


def devices(library: Library) -> Sequence[str | None]:
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
            return [f"cuda:{i}" for i in range(module.cuda.runtime.getDeviceCount())]
        except Exception as error:
            raise ValueError(f"no CUDA GPU that CuPy can use ({error})") from None
    return [None]


def _hardware(library: Library, device: Any) -> str:
    module = sys.modules[library.backend]
    if library.backend == "torch":
        return str(module.cuda.get_device_name(device))
    if library.backend == "jax":
        return str(device.device_kind)
    return str(module.cuda.runtime.getDeviceProperties(device.id)["name"].decode())


# --- calls ------------------------------------------------------------------------------------------------------------


class Arguments(NamedTuple):
    """The arguments of a call. NumPy arrays are copied to the place; anything else is passed on as it is."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def mapped(self, change: Callable[[Any], Any]) -> "Arguments":
        """The arguments with `change` applied to every NumPy array."""

        def each(x: Any) -> Any:
            return change(x) if isinstance(x, np.ndarray) else x

        return Arguments(tuple(map(each, self.positional)), {name: each(x) for name, x in self.named.items()})

    def rounded(self, dtype: str) -> "Arguments":
        """The arguments with floating arrays rounded to `dtype`, as float64."""
        return self.mapped(lambda x: _rounded(x, dtype) if x.dtype.kind == "f" else x.copy())


class Results(NamedTuple):
    """The results of a call: host arrays, with half precisions widened, and the names of their original dtypes."""

    arrays: list[Any]
    dtypes: list[str]

    def mismatch(self, expected: Sequence[Expected]) -> str:
        """A sentence about the first result that has not the shape of the expected one or its dtype; "" for none."""
        for x, dtype, each in zip(self.arrays, self.dtypes, expected, strict=True):
            if x.shape != each.array.shape:
                return f"{each.name} has shape {list(x.shape)}, expected {list(each.array.shape)}"
            if dtype != each.dtype:
                return f"{each.name} is of {dtype}, expected {each.dtype}"
        return ""


def call(
    place: Place, dtype: str, f: Callable[..., Any], arguments: Arguments, argnums: Sequence[int] | None = None
) -> Results:
    """The results of a function, which returns an array or a tuple of them, of the place's library and device.

    With `argnums`: the gradients by these arguments of a function that returns one number, by the library's autodiff.
    """
    with place.working():
        here = arguments.mapped(lambda x: place.array(x, dtype))
        way = f if argnums is None else _differentiated(place.library, f, argnums)
        returned = way(*here.positional, **here.named)
        arrays = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        for x in arrays:
            if not place.library.recognises(x):
                kind = f"{type(x).__module__}.{type(x).__qualname__}"
                raise TypeError(
                    f"the function must return an array of {place.library.name} or a tuple of them, got {kind}"
                )
            device = place.library.device(x)
            if None not in (device, place.home) and device != place.home:
                raise TypeError(f"the function must return an array on {place.home}, got one on {device}")
        return Results(on_host(place.library, arrays), [dtype_name(x.dtype) for x in arrays])


def raised(error: Exception) -> str:
    """What an error says, in one line."""
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}"


def _differentiated(library: Library, f: Callable[..., Any], argnums: Sequence[int]) -> Callable[..., Any]:
    if library.backend == "jax":
        gradients: Callable[..., Any] = sys.modules["jax"].grad(f, tuple(argnums))
        return gradients
    torch = sys.modules["torch"]

    def backward(*positional: Any, **named: Any) -> Any:
        inputs = [positional[at].requires_grad_() for at in argnums]
        with torch.enable_grad():
            value = f(*positional, **named)
        return torch.autograd.grad(value, inputs, materialize_grads=True)

    return backward


def _rounded(x: Any, dtype: str) -> Any:
    if dtype != "bfloat16":
        return x.astype(dtype).astype("float64")
    bits = x.astype("float32").view("uint32") + np.uint32(0x8000)
    return (bits & np.uint32(0xFFFF0000)).view("float32").astype("float64")
