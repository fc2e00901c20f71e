"""The backends that the tests run on: a library, a way to make its arrays, and a way to call the losses.

`GKLX_BACKENDS` (names, separated by commas) names those that are required: where such a library is absent its tests
fail, and the other libraries are left out. By default every library that can be imported takes part.

`GKLX_EXHAUSTIVE=1` crosses cases, masks and settings; otherwise each one meets some of the others (`takes_part`).
`GKLX_SAMPLE=3` keeps about a third of each parametrised test's cases, the same in every run.

With `GKLX_DEVICE=cuda` PyTorch and JAX are tested on a GPU only, as CuPy is; there every synchronisation raises.

Where a library has the row kernel, each execution is a backend of its own: "torch" runs on the kernel, "torch-formulas"
on the formulas. Without the kernel the former skip, or fail where `GKLX_KERNEL_REQUIRED=1` says that it was installed.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest

from cases import CASES, MASKS, Case
from gklx._core.libraries import LIBRARIES, Library
from gklx._run import cpu_library
from gklx._verify.places import converted, devices

BY_BACKEND = {library.backend: library for library in LIBRARIES}
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"  # of JAX, on the CPU, for the tests


@dataclass(frozen=True)
class Backend:
    name: str
    library: Library
    make: Callable[[Any], Any]
    """Makes an array of the library from a NumPy array."""
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f
    """Applied to a function of arrays before it is called: a compiler, for example."""
    only: tuple[str, ...] = ()
    """The only dtypes that are tested, where compiling every case for all would take minutes."""
    execution: Literal["kernel", "formulas"] | None = None
    """None where the library has no kernel to choose."""
    thorough: tuple[str, ...] | None = None
    """The dtypes in which all cases of cases.py are run, None for all. The others run `FEW_CASES` under `FEW_MASKS`, as
    `takes_part` says."""

    @property
    def xp(self) -> ModuleType:
        return self.library.namespace()

    @property
    def dtypes(self) -> tuple[str, ...]:
        return self.only or self.library.dtypes

    def array(self, x: Any, dtype: str | None = None) -> Any:
        """An array of this backend; bfloat16 is made by the library, since NumPy has none."""
        return converted(np.asarray(x), dtype, self.xp, self.make)

    def rounded(self, x: Any, dtype: str) -> np.ndarray:
        """The values of `array(x, dtype)` in float64, as the library reads them."""
        found = self.numpy(self.array(x, dtype))
        if self.library.backend == "jax":  # JAX flushes subnormal numbers to 0 on a CPU
            found = np.where(abs(found) < np.finfo("float64").smallest_normal, 0.0, found)
        return found

    def numpy(self, x: Any) -> np.ndarray:
        """The values of an array of this backend, as NumPy's float64."""
        if self.library.lazy:
            return np.asarray(x.compute(scheduler="synchronous"), dtype="float64")
        if self.library.backend != "numpy" and not self.xp.isdtype(x.dtype, "bool"):
            x = self.xp.astype(x, self.xp.float64)  # by the library, which may read subnormal numbers as 0
        return np.asarray(self.library.to_numpy(x), dtype="float64")

    @property
    def traced(self) -> bool:
        """Whether a wrapped function is traced: it knows shapes and no values."""
        return self.wrap in (_jax_jit, _jax_jit_without_transfers)

    @property
    def costly(self) -> bool:
        """Whether a call takes about a second, since it is first compiled."""
        return self.thorough is not None

    def owns(self, x: Any) -> bool:
        """Whether an array is of this library; NumPy reductions give scalars, which count."""
        return self.library.recognises(x)


def _numpy_read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def _torch(x: np.ndarray) -> Any:
    import torch

    return torch.tensor(x)


def _jax(x: np.ndarray) -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.numpy.asarray(x)


def _jax_jit(f: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    # A new function: for the same one JAX would reuse the trace of the other execution.
    return jax.jit(lambda *args, **kwargs: f(*args, **kwargs))


def _dask_persist(f: Callable[..., Any]) -> Callable[..., Any]:
    """Computes all results of a function together; they remain Dask arrays."""

    def persisted(*args: Any, **kwargs: Any) -> Any:
        import dask

        return dask.persist(f(*args, **kwargs), scheduler="synchronous")[0]

    return persisted


def _dask(x: np.ndarray) -> Any:
    import dask.array

    # Every axis in two chunks, the classes' too.
    return dask.array.from_array(x, chunks=tuple(max(1, -(-size // 2)) for size in x.shape))


def _strict(x: np.ndarray, device: str = "CPU_DEVICE") -> Any:
    import array_api_strict

    # With its strictest flags: no shapes that depend on values, no extensions.
    array_api_strict.set_array_api_strict_flags(
        boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    )
    return array_api_strict.asarray(x, device=array_api_strict.Device(device))


def _cupy(x: np.ndarray) -> Any:
    import cupy

    return cupy.asarray(x)


SAMPLE = int(os.environ.get("GKLX_SAMPLE", "1"))
EXHAUSTIVE = os.environ.get("GKLX_EXHAUSTIVE") == "1"
FEW_CASES = ("kl-T", "ikl-tau", "gkl-prior", "gkl-asymmetric")
FEW_MASKS = ("none", "elements", "samples")

BACKENDS = (
    Backend("numpy", BY_BACKEND["numpy"], _numpy_read_only, execution="kernel"),
    Backend("numpy-formulas", BY_BACKEND["numpy"], _numpy_read_only, execution="formulas"),
    Backend("torch", BY_BACKEND["torch"], _torch, execution="kernel"),
    Backend("torch-formulas", BY_BACKEND["torch"], _torch, execution="formulas"),
    Backend("jax", BY_BACKEND["jax"], _jax, execution="kernel"),
    # Each program takes two seconds.
    Backend("jax-formulas", BY_BACKEND["jax"], _jax, only=("float32", "float64"), execution="formulas", thorough=()),
    Backend("jax-jit", BY_BACKEND["jax"], _jax, _jax_jit, execution="kernel", thorough=()),
    Backend(
        "jax-jit-formulas",
        BY_BACKEND["jax"],
        _jax,
        _jax_jit,
        only=("float32",),
        execution="formulas",
        thorough=(),
    ),
    Backend("dask", BY_BACKEND["dask"], _dask, _dask_persist, execution="kernel"),
    Backend(
        "dask-formulas",
        BY_BACKEND["dask"],
        _dask,
        _dask_persist,
        only=("float32",),
        execution="formulas",
        thorough=(),
    ),
    Backend("strict", BY_BACKEND["array_api_strict"], _strict),
    # The numbers are those of "strict"; what may differ is where a new array is made.
    Backend(
        "strict-device1",
        BY_BACKEND["array_api_strict"],
        lambda x: _strict(x, "device1"),
        thorough=None if EXHAUSTIVE else (),
    ),
    Backend("cupy", BY_BACKEND["cupy"], _cupy),
)

ON_GPU = os.environ.get("GKLX_DEVICE") == "cuda"


def _torch_on_gpu(x: np.ndarray) -> Any:
    import torch

    return torch.tensor(x, device="cuda")


def _torch_without_waiting(f: Callable[..., Any]) -> Callable[..., Any]:
    """A context in which every synchronisation with the GPU raises."""

    def never_waiting(*args: Any, **kwargs: Any) -> Any:
        import torch

        try:
            with warnings.catch_warnings():  # PyTorch says once a process that the mode is a prototype
                warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
                torch.cuda.set_sync_debug_mode("error")
            return f(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return never_waiting


def _jax_jit_without_transfers(f: Callable[..., Any]) -> Callable[..., Any]:
    jitted = _jax_jit(f)

    def moving_nothing(*args: Any, **kwargs: Any) -> Any:
        import jax

        with jax.transfer_guard("disallow"):
            return jitted(*args, **kwargs)

    return moving_nothing


# Compiling takes JAX seconds a case, on a GPU as on a CPU.
_FEW = {"only": ("float32", "bfloat16"), "thorough": ()}
_BY_NAME = {each.name: each for each in BACKENDS}
if ON_GPU:
    BACKENDS = (
        Backend("cupy", BY_BACKEND["cupy"], _cupy),
        Backend("torch-cuda", BY_BACKEND["torch"], _torch_on_gpu, _torch_without_waiting),
        Backend(
            "torch-cuda-formulas", BY_BACKEND["torch"], _torch_on_gpu, _torch_without_waiting, execution="formulas"
        ),
        Backend("jax-gpu", BY_BACKEND["jax"], _jax, **_FEW),
        Backend("jax-jit-gpu", BY_BACKEND["jax"], _jax, _jax_jit_without_transfers, **_FEW),
    )

BY_NAME = _BY_NAME | {each.name: each for each in BACKENDS}

REQUIRED = tuple(filter(None, os.environ.get("GKLX_BACKENDS", "").split(",")))
KERNEL_REQUIRED = os.environ.get("GKLX_KERNEL_REQUIRED") == "1"


def absent(backend: str) -> str | None:
    """Why a library cannot be tested here, None if it can."""
    library = BY_BACKEND[backend]
    try:
        found = devices(library)
    except ValueError as error:
        return f"{library.name}: {error}"
    if ON_GPU and backend in ("torch", "jax") and set(found) <= {"cpu"}:
        return f"{library.name} sees no GPU"
    return None


def takes_part(backend: Backend, dtype: str | None, case: Case | None, mask: str | None) -> bool:
    """Whether a test of a costly backend is run; another dtype, case or mask stands for those that are not."""
    few = (case is None or case.id in FEW_CASES) and (mask is None or mask in FEW_MASKS)
    if backend.thorough is None or few:
        return True
    if dtype not in backend.thorough:
        return False
    # Each case meets one mask, and each mask three cases.
    crossed = case in CASES and mask in MASKS
    return EXHAUSTIVE or not crossed or mask == MASKS[CASES.index(case) % len(MASKS)]


def needs(backend: str) -> None:
    """Skips a test where its library is absent or not asked for; fails where it was required."""
    if REQUIRED and backend not in REQUIRED:
        pytest.skip(f"{BY_BACKEND[backend].name} is not among GKLX_BACKENDS={','.join(REQUIRED)}")
    reason = absent(backend)
    if reason is not None:
        if REQUIRED:
            pytest.fail(reason)
        pytest.skip(reason)


def kernel_absent(backend: str) -> str | None:
    """Why the row kernel cannot run a library's calls here, None if it can."""
    library = cpu_library.library()
    if library is None:
        return "the row kernel is not built: see CMakeLists.txt"
    if backend == "jax" and not hasattr(library, "gklx_jax_rows"):
        return "the row kernel was built without the headers of jaxlib (GKLX_XLA_HEADERS)"
    return None


def needs_kernel(backend: str = "numpy") -> None:
    """Skips a test where the row kernel is absent; fails where it was required."""
    reason = kernel_absent(backend)
    if reason is not None:
        if KERNEL_REQUIRED:
            pytest.fail(f"{reason}, and GKLX_KERNEL_REQUIRED=1")
        pytest.skip(reason)


def run_on(execution: str | None, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on all calls, backward passes and processes of the test use this execution."""
    if execution == "kernel":
        needs_kernel(backend)
        monkeypatch.delenv("GKLX_KERNEL", raising=False)
    elif execution == "formulas":
        monkeypatch.setenv("GKLX_KERNEL", "0")


def needs_imported(modules: set[str]) -> None:
    """Skips or fails likewise for the libraries that a block imports; for NumPy only if it is the only one."""
    libraries = modules & BY_BACKEND.keys()
    for backend in sorted(libraries - {"numpy"} or libraries):
        needs(backend)
