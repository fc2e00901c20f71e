"""Versions, libraries, and the executions that gklx uses in this installation."""

import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Literal, overload

from ._core.libraries import LIBRARIES
from ._run import cpu_library, cuda_launch

_FORMULAS = "formulas"


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Show versions, the libraries that are found, and what each of them computes the losses by.

    That is the CPU row kernel or the formulas, which give the same to rounding: the kernel is faster. No library is
    imported to find out.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Whether to print it or to return it.

    Returns
    -------
    dict or None
        Under "dicts": the versions ``"gklx"``, ``"python"``, ``"numpy"`` and ``"array_api_compat"``; ``"kernel"``, the
        instruction set that the kernel uses here, as "avx2", or None under ``GKLX_KERNEL=0`` and in an installation
        without the kernel; ``"threads"``, how many it may use, though PyTorch has a setting of its own; and
        ``"libraries"``, for each library that is found its ``"version"`` and what runs the losses: ``"eager"``, called
        outside of a compiler, by the name of the library's compiler, and on a ``"gpu"``.

    See Also
    --------
    gklx.testing.assert_backends_agree : Compares what the libraries compute.

    Examples
    --------
    >>> import gklx
    >>> config = gklx.show_config(mode="dicts")
    >>> list(config)
    ['gklx', 'python', 'numpy', 'array_api_compat', 'kernel', 'threads', 'libraries']
    >>> print(*config["libraries"]["numpy"])
    version eager
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f'mode must be "stdout" or "dicts", got {mode!r}')
    found = _found()
    if mode == "dicts":
        return found
    print("\n".join(_lines(found)))
    return None


def _found() -> dict[str, Any]:
    libraries = {}
    for library in LIBRARIES:
        version = _version(library.backend)
        if version is not None:
            libraries[library.backend] = {"version": version, **_executions(library.backend)}
    return {
        "gklx": _version("gklx"),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "array_api_compat": _version("array_api_compat"),
        "kernel": cpu_library.instruction_set(),
        "threads": cpu_library.threads(),
        "libraries": libraries,
    }


def _executions(backend: str) -> dict[str, str]:
    """The execution of the losses of a library, for each way of calling them."""
    eager = _FORMULAS if cpu_library.instruction_set() is None else f"kernel ({cpu_library.instruction_set()})"
    compiled = eager if cpu_library.serves_jax() else _FORMULAS
    on_gpu = "kernels (cuda)" if cpu_library.kernel_allowed() and cuda_launch.installed(backend) else _FORMULAS
    return {
        "numpy": {"eager": eager},
        "torch": {"eager": eager, "torch.compile": eager, "gpu": on_gpu},
        "jax": {"eager": compiled, "jax.jit": compiled, "gpu": _FORMULAS},
        "cupy": {"gpu": on_gpu},
        "dask": {"eager": eager},
    }.get(backend, {"eager": _FORMULAS})


def _version(module: str) -> str | None:
    """The version of a module; None where it is not installed."""
    loaded = sys.modules.get(module)
    if loaded is not None:
        return str(getattr(loaded, "__version__", "unknown"))
    if find_spec(module) is None:
        return None
    from importlib import metadata  # slow to load, and seldom needed

    with suppress(metadata.PackageNotFoundError):
        return metadata.version(module)
    # CuPy's distributions are named after a version of CUDA.
    names = metadata.packages_distributions().get(module)
    return metadata.version(names[0]) if names else "unknown"


def _lines(found: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, x in found.items():
        if isinstance(x, Mapping):
            yield f"{indent}{name}:"
            yield from _lines(x, indent + "  ")
        else:
            yield f"{indent}{name}: {x}"
