"""Hands the analytic gradients to the libraries that differentiate: one small module a library.

Each module offers three functions:

    tracks(problem) -> bool     could the library be differentiating through the problem's logits?
    attach(problem) -> value    the loss, with the sweep's gradients registered as its derivative
    with_gradients(problem, value=, student=, teacher=) -> Sweep
                                as `sweep`, the value as from `attach`
"""

from types import ModuleType

from .._blocks import sweep
from .._libraries import Library, library_of
from .._problem import Array, Problem
from .._sweep import Sweep


def value(problem: Problem) -> Array:
    """The loss, differentiable by its analytic gradient where the library differentiates."""
    adapter = _adapter(library_of(problem.arrays.student))
    if adapter is not None and adapter.tracks(problem):
        return adapter.attach(problem)
    return sweep(problem, value=True).value


def value_and_gradients(problem: Problem, *, student: bool, teacher: bool, value: bool) -> Sweep:
    """Value and gradients from one sweep; a value that may be differentiated again is attached as in `value`."""
    adapter = _adapter(library_of(problem.arrays.student))
    compute = adapter.with_gradients if adapter is not None and adapter.tracks(problem) else sweep
    found: Sweep = compute(problem, value=value, student=student, teacher=teacher)
    return found


def _adapter(library: Library | None) -> ModuleType | None:
    if library is None or not library.differentiates:
        return None
    if library.backend == "torch":
        from . import _torch

        return _torch
    from . import _jax

    return _jax
