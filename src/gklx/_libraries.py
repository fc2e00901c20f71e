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

from ._problem import Array


class Library(NamedTuple):
    """One array library and what gklx promises on it."""

    name: str
    """As people write it."""
    backend: str
    """As `--backend` and the extras spell it."""
    module: str
    """The namespace to import, array-api-compat's where it has one."""
    recognises: Callable[[Any], bool]
    """Whether an array is this library's; imports nothing."""
    readable: Callable[[Array], bool]
    """Whether reading a value of this array costs neither a device sync nor a compilation."""
    to_numpy: Callable[[Array], Any]
    """A NumPy copy on the host; never called inside a loss or a gradient."""
    constant: Callable[[Array], Array] = lambda x: x
    """The array cut from any autodiff graph."""
    autodiff: str | None = None
    """The module under `gklx._autodiff` that registers the analytic gradient."""
    number: Callable[[Any], bool] = lambda x: False
    """Whether a 0-d array of this library may stand for a hyper-parameter."""
    dtypes: tuple[str, ...] = ("float16", "float32", "float64")
    devices: str = "CPU"
    jit: str | None = None
    lazy: bool = False


def _numpy(x: Any) -> Any:
    return sys.modules["numpy"].asarray(x)


def _is_plain_numpy(x: Any) -> bool:
    """NumPy arrays but for the subclasses that change what arithmetic means."""
    if not compat.is_numpy_array(x):
        return False
    np = sys.modules["numpy"]
    return not isinstance(x, (np.ma.MaskedArray, np.matrix))


def _is_strict(x: Any) -> bool:
    strict = sys.modules.get("array_api_strict")
    return strict is not None and hasattr(x, "__array_namespace__") and x.__array_namespace__() is strict


def _strict_on_cpu(x: Array) -> bool:
    return bool(x.device == sys.modules["array_api_strict"].Device("CPU_DEVICE"))


def _torch_readable(x: Array) -> bool:
    torch = sys.modules["torch"]
    return (
        x.device.type == "cpu"
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _jax_readable(x: Array) -> bool:
    jax = sys.modules["jax"]
    if isinstance(x, jax.core.Tracer) or any(device.platform != "cpu" for device in x.devices()):
        return False
    # Under tracing what is computed from a concrete array is traced as well.
    return not isinstance(jax.numpy.zeros(()) + 0, jax.core.Tracer)


LIBRARIES: tuple[Library, ...] = (
    Library(
        name="NumPy",
        backend="numpy",
        module="array_api_compat.numpy",
        recognises=_is_plain_numpy,
        readable=lambda x: True,
        to_numpy=_numpy,
    ),
    Library(
        name="PyTorch",
        backend="torch",
        module="array_api_compat.torch",
        recognises=compat.is_torch_array,
        readable=_torch_readable,
        to_numpy=lambda x: x.detach().cpu().numpy(),
        constant=lambda x: x.detach(),
        autodiff="_torch",
        dtypes=("bfloat16", "float16", "float32", "float64"),
        devices="CPU, CUDA",
    ),
    Library(
        name="JAX",
        backend="jax",
        module="jax.numpy",
        recognises=compat.is_jax_array,
        readable=_jax_readable,
        to_numpy=_numpy,
        constant=lambda x: sys.modules["jax"].lax.stop_gradient(x),
        autodiff="_jax",
        number=lambda x: compat.is_jax_array(x) and x.shape == (),
        dtypes=("bfloat16", "float16", "float32", "float64"),
        devices="CPU, CUDA",
        jit="jax.jit",
    ),
    Library(
        name="CuPy",
        backend="cupy",
        module="array_api_compat.cupy",
        recognises=compat.is_cupy_array,
        readable=lambda x: False,
        to_numpy=lambda x: x.get(),
        devices="CUDA",
    ),
    Library(
        name="Dask",
        backend="dask",
        module="array_api_compat.dask.array",
        recognises=compat.is_dask_array,
        readable=lambda x: False,
        to_numpy=lambda x: x.compute(),
        lazy=True,
    ),
    Library(
        name="array-api-strict",
        backend="array_api_strict",
        module="array_api_strict",
        recognises=_is_strict,
        readable=_strict_on_cpu,
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


def namespace(library: Library) -> ModuleType:
    """The array-API namespace of a library; imports it where nobody has."""
    import importlib

    return importlib.import_module(library.module)


def device_of(x: Array) -> Any:
    """The device of an array; None where it has none to tell, as under tracing or over several devices."""
    device = compat.device(x)
    if compat.is_jax_array(x) and not hasattr(device, "platform"):
        return None
    return device


def dtype_name(dtype: Any) -> str:
    """'float32' of any library's float32."""
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]


def to_numpy(x: Array) -> Any:
    """A host copy of any library's array; never called inside a loss or a gradient."""
    library = library_of(x)
    assert library is not None
    return library.to_numpy(x)


def from_numpy(library: Library, x: Any, device: Any = None) -> Array:
    """An array of a library, on a device of its own kind or its default one."""
    if library.backend == "numpy":
        return x
    return namespace(library).asarray(x, device=device)


def exact_matmul(library: Library) -> contextlib.AbstractContextManager[Any]:
    """Matrix products at the arrays' own precision; JAX would take less on an accelerator."""
    if library.backend == "jax":
        manager: contextlib.AbstractContextManager[Any] = sys.modules["jax"].default_matmul_precision("highest")
        return manager
    return contextlib.nullcontext()


def support_table() -> str:
    """What each library supports, as a Markdown table."""
    lines = [
        "| library | `backend` | dtypes | devices | differentiates itself | `grad` | jit | lazy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in LIBRARIES:
        lines.append(
            f"| {x.name} | `{x.backend}` | {', '.join(x.dtypes)} | {x.devices} | {'yes' if x.autodiff else '–'} | yes "
            f"| {f'`{x.jit}`' if x.jit else '–'} | {'yes' if x.lazy else '–'} |"
        )
    return "\n".join(lines)
