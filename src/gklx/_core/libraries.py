"""The array libraries: what each one supports, and how to tell, read and convert its arrays.

`LIBRARIES` is the one declaration: the README's table, the tests' skips and the command's `--backend` come from it.
No library is imported to recognise its arrays.
"""

import contextlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

Array = Any
"""An array of any supported library; its type is known only to the caller."""

_BLOCK_ON_CPU = 2**20
_BLOCK_ON_GPU = 2**28


class Library(NamedTuple):
    """One array library and what gklx promises on it."""

    name: str
    """As people write it."""
    backend: str
    """As `--backend` and the extras spell it."""
    namespace: Callable[[], ModuleType]
    """Imports and returns its array-API namespace, array-api-compat's where it has one."""
    recognises: Callable[[Any], bool]
    """Whether an array is this library's; imports nothing."""
    readable: Callable[..., bool]
    """Whether reading a value of any of these arrays costs neither a device sync nor a compilation."""
    to_numpy: Callable[[Array], Any]
    """A NumPy array on the host, which may share the memory; never called inside a loss or a gradient."""
    device: Callable[[Array], Any] = compat.device
    """The device of an array; None where it has none to tell, as under tracing or over several devices."""
    block: Callable[..., int] = lambda *xs: 0
    """How many bytes of one of these arrays a block of rows may hold; 0 where all rows are to be worked off at once."""
    constant: Callable[[Array], Array] = lambda x: x
    """The array cut from any autodiff graph."""
    differentiates: bool = False
    """Whether the library has autodiff; a module under `gklx._autodiff` then registers the analytic gradient."""
    unsupported: Callable[[Array], str | None] = lambda x: None
    """What an array of the library is where gklx cannot compute with its kind, in words; None where it can."""
    number: Callable[[Any], bool] = lambda x: False
    """Whether a 0-d array of this library may stand for a hyper-parameter."""
    dtypes: tuple[str, ...] = ("float16", "float32", "float64")
    devices: str = "CPU"
    jit: str | None = None
    lazy: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled by its name: what is restored is the one entry of `LIBRARIES` itself."""
        return library_named, (self.backend,)


def library_named(backend: str) -> Library:
    """The library of a name as `--backend` spells it."""
    return next(library for library in LIBRARIES if library.backend == backend)


# Imports by statement: a compiler that follows these functions takes no other.


def _import_numpy() -> ModuleType:
    if hasattr(np, "isdtype"):  # NumPy 2 follows the standard itself; array-api-compat's would load all of NumPy
        return np
    import array_api_compat.numpy as xp

    return xp


def _import_torch() -> ModuleType:
    import array_api_compat.torch as xp

    return xp


def _import_jax() -> ModuleType:
    import jax.numpy as xp

    return xp


def _import_cupy() -> ModuleType:
    import array_api_compat.cupy as xp

    return xp


def _import_dask() -> ModuleType:
    from . import dask_arrays

    return dask_arrays.namespace()


def _import_strict() -> ModuleType:
    import array_api_strict as xp

    return xp


def _numpy(x: Any) -> Any:
    return sys.modules["numpy"].asarray(x)


# These two by the type alone: PyTorch's compiler warns of array-api-compat's.
def _is_plain_numpy(x: Any) -> bool:
    """NumPy arrays but for the subclasses that change what arithmetic means."""
    return type(x) is np.ndarray or (
        isinstance(x, (np.ndarray, np.generic)) and not isinstance(x, (np.ma.MaskedArray, np.matrix))
    )


def _is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, getattr(torch, "Tensor", ()))


def _is_strict(x: Any) -> bool:
    strict = sys.modules.get("array_api_strict")
    return strict is not None and hasattr(x, "__array_namespace__") and x.__array_namespace__() is strict


def _strict_on_cpu(*xs: Array) -> bool:
    cpu = sys.modules["array_api_strict"].Device("CPU_DEVICE")
    return all(x.device == cpu for x in xs)


def _torch_unsupported(x: Array) -> str | None:
    torch = sys.modules["torch"]
    if x.is_nested:
        return "a nested tensor"
    if x.layout is not torch.strided:
        return f"a tensor of layout {x.layout}"
    if type(x) is not torch.Tensor and isinstance(x, torch.masked.MaskedTensor):
        return "a masked tensor"
    return None


def _dask_unsupported(x: Array) -> str | None:
    kind = type(x._meta)
    return None if library_of(x._meta) else f"a Dask array whose chunks are {kind.__module__}.{kind.__qualname__}"


def _torch_readable(*xs: Array) -> bool:
    torch = sys.modules["torch"]
    wrapped, plain = torch._C._functorch.is_functorch_wrapped_tensor, (torch.Tensor, torch.nn.Parameter)
    return not torch.compiler.is_compiling() and all(
        type(x) in plain and x.device.type == "cpu" and not wrapped(x) for x in xs
    )


def _torch_block(*xs: Array) -> int:
    torch = sys.modules["torch"]
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(x.requires_grad for x in xs))
        or any(wrapped(x) for x in xs)
    ):
        return 0
    return _BLOCK_ON_CPU * torch.get_num_threads() if xs[0].device.type == "cpu" else _BLOCK_ON_GPU


def _jax_device(x: Array) -> Any:
    device = compat.device(x)
    return device if hasattr(device, "platform") else None


def _jax_readable(*xs: Array) -> bool:
    jax = sys.modules["jax"]
    if any(isinstance(x, jax.core.Tracer) or any(device.platform != "cpu" for device in x.devices()) for x in xs):
        return False
    # Under tracing what is computed from a concrete array is traced as well.
    return not isinstance(jax.numpy.zeros(()) + 0, jax.core.Tracer)


LIBRARIES: tuple[Library, ...] = (
    Library(
        name="NumPy",
        backend="numpy",
        namespace=_import_numpy,
        recognises=_is_plain_numpy,
        readable=lambda *xs: True,
        to_numpy=_numpy,
        device=lambda x: "cpu",
        block=lambda *xs: _BLOCK_ON_CPU,
    ),
    Library(
        name="PyTorch",
        backend="torch",
        namespace=_import_torch,
        recognises=_is_torch,
        readable=_torch_readable,
        to_numpy=lambda x: x.detach().cpu().numpy(),
        device=lambda x: x.device,
        unsupported=_torch_unsupported,
        block=_torch_block,
        constant=lambda x: x.detach(),
        differentiates=True,
        dtypes=("bfloat16", "float16", "float32", "float64"),
        devices="CPU, CUDA",
        jit="torch.compile",
    ),
    Library(
        name="JAX",
        backend="jax",
        namespace=_import_jax,
        recognises=compat.is_jax_array,
        readable=_jax_readable,
        to_numpy=_numpy,
        device=_jax_device,
        constant=lambda x: sys.modules["jax"].lax.stop_gradient(x),
        differentiates=True,
        number=lambda x: compat.is_jax_array(x) and x.shape == (),
        dtypes=("bfloat16", "float16", "float32", "float64"),
        devices="CPU, CUDA",
        jit="jax.jit",
    ),
    Library(
        name="CuPy",
        backend="cupy",
        namespace=_import_cupy,
        recognises=compat.is_cupy_array,
        readable=lambda *xs: False,
        to_numpy=lambda x: x.get(),
        block=lambda *xs: _BLOCK_ON_GPU,
        devices="CUDA",
    ),
    Library(
        name="Dask",
        backend="dask",
        namespace=_import_dask,
        recognises=compat.is_dask_array,
        readable=lambda *xs: False,
        to_numpy=lambda x: x.compute(),
        unsupported=_dask_unsupported,
        lazy=True,
    ),
    Library(
        name="array-api-strict",
        backend="array_api_strict",
        namespace=_import_strict,
        recognises=_is_strict,
        readable=_strict_on_cpu,
        block=lambda *xs: _BLOCK_ON_CPU,
        to_numpy=lambda x: _numpy(x.to_device(sys.modules["array_api_strict"].Device("CPU_DEVICE"))),
        dtypes=("float32", "float64"),
    ),
)


def library_of(x: Any) -> Library | None:
    """The library of an array, None for anything else."""
    for library in LIBRARIES:
        if library.recognises(x):
            return library
    return None


def device_like(library: Library, x: Array) -> Any:
    """The device to name when an array is made to meet x; None where its library would bind it more than x is bound.

    JAX moves arrays that nobody put anywhere to those that somebody did, and compiles anew where that changes.
    """
    device = None if library.lazy else library.device(x)
    return None if device is None or not getattr(x, "committed", True) else device


# NumPy makes a name anew each time it is asked for it: 2 microseconds.
_NUMPY_NAMES = {np.dtype(name): name for name in ("bool", "float16", "float32", "float64", "int32", "int64")}


def dtype_name(dtype: Any) -> str:
    """'float32' of any library's float32."""
    known = _NUMPY_NAMES.get(dtype) if isinstance(dtype, np.dtype) else None
    return known or str(getattr(dtype, "name", dtype)).rpartition(".")[2]


def to_numpy(x: Array) -> Any:
    """A NumPy array of any library's, which may share its memory; never called inside a loss or a gradient."""
    library = library_of(x)
    assert library is not None
    return library.to_numpy(x)


def from_numpy(library: Library, x: Any, device: Any = None) -> Array:
    """An array of a library, on a device of its own kind or its default one."""
    if library.backend == "numpy":
        return x
    return library.namespace().asarray(x, device=device)


def exact_matmul(library: Library, x: Array) -> contextlib.AbstractContextManager[Any]:
    """Products of matrices like x at their own precision: JAX takes less on an accelerator, PyTorch under autocast."""
    manager: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if library.backend == "jax":
        manager = sys.modules["jax"].default_matmul_precision("highest")
    elif library.backend == "torch" and sys.modules["torch"].amp.is_autocast_available(x.device.type):
        manager = sys.modules["torch"].autocast(x.device.type, enabled=False)
    return manager


def support_table() -> str:
    """What each library supports, as a Markdown table."""
    lines = [
        "| library | `backend` | dtypes | devices | differentiates itself | `grad` | jit | lazy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in LIBRARIES:
        lines.append(
            f"| {x.name} | `{x.backend}` | {', '.join(x.dtypes)} | {x.devices} "
            f"| {'yes' if x.differentiates else '–'} | yes "
            f"| {f'`{x.jit}`' if x.jit else '–'} | {'yes' if x.lazy else '–'} |"
        )
    return "\n".join(lines)
