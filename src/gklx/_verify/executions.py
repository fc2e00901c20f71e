"""The executions of a place: the row kernel, called eagerly or from compiled code, and the formulas."""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._run import cpu_library, dispatch
from ..losses import call_builder, kl
from .places import Arguments, Place, Results, call
from .ulps import DTYPES


@dataclass(frozen=True)
class Execution:
    """One way in which a place runs the losses."""

    name: str
    """As "numpy (kernel: avx2)", "torch.compile (kernel: avx2)" or "numpy (formulas)"."""
    place: Place
    kernel: str | None
    """The kernel's instruction set, "cuda" on a GPU; None for the formulas."""
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f
    """The library's compiler, or nothing: what a function of arrays goes through before it is called."""
    dtypes: tuple[str, ...] = DTYPES
    """The dtypes in which it is tried, if the library has them."""

    def takes(self, dtype: str) -> bool:
        """Whether it is tried in this dtype."""
        return dtype in self.dtypes and dtype in self.place.library.dtypes

    def call(
        self, dtype: str, f: Callable[..., Any], arguments: Arguments, argnums: Sequence[int] | None = None
    ) -> Results:
        """The results of a function, or by autodiff its gradients by the arguments `argnums`."""
        with _formulas_alone() if self.kernel is None else nullcontext():
            return call(self.place, dtype, self.compiled(f), arguments, argnums)


def executions(places: Sequence[Place]) -> list[Execution]:
    """All executions at these places."""
    return [each for place in places for each in _at(place)]


def pairs(found: Sequence[Execution]) -> list[tuple[Execution, Execution]]:
    """The pairs that are compared: kernel and formulas of a place, and the formulas of any two places."""
    return [
        (one, other)
        for one, other in itertools.combinations(found, 2)
        if (one.kernel, other.kernel).count(None) == (1 if one.place is other.place else 2)
    ]


def _at(place: Place) -> Iterator[Execution]:
    logits = place.array(np.zeros((1, 2)), "float32")
    kernel = dispatch.kernel_of(call_builder(kl)(logits, logits))
    on_cpu = None if place.backend.on_gpu else cpu_library.instruction_set()
    if kernel is not None:
        yield Execution(f"{place.name} (kernel: {kernel})", place, kernel)
    if place.library.backend == "torch" and on_cpu is not None:
        # The compiler takes a second for each program, so only one dtype is tried.
        yield Execution(f"torch.compile (kernel: {on_cpu})", place, on_cpu, _torch_compiled, ("float32",))
    if place.library.backend == "jax" and kernel is not None:
        yield Execution(f"jax.jit (kernel: {kernel})", place, kernel, sys.modules["jax"].jit)
    yield Execution(f"{place.name} (formulas)", place, None)


@contextmanager
def _formulas_alone() -> Iterator[None]:
    before = os.environ.get("GKLX_KERNEL")
    os.environ["GKLX_KERNEL"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GKLX_KERNEL"]
        else:
            os.environ["GKLX_KERNEL"] = before


def _torch_compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles without a C++ compiler, by a backend that generates no code: to any backend a loss is one operator."""
    torch = sys.modules["torch"]
    torch.compiler.reset()  # it stops compiling a function that it has recompiled several times
    compiled: Callable[..., Any] = torch.compile(f, backend="aot_eager", fullgraph=True)
    return compiled
