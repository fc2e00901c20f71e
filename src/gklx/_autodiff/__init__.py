"""Hands the analytic gradients to the libraries that differentiate: one small module a library.

Each module offers three functions:

    tracks(call) -> bool     could the library be differentiating through the call's logits?
    attach(call) -> value    the loss, with the analytic gradients registered as its derivative
    with_gradients(call, asked) -> Result
                             as `evaluate`, the value as from `attach`
"""

from types import ModuleType

from .._core.call import Array, Asked, Call, Result
from .._core.libraries import Library
from .._run.dispatch import evaluate


def value(call: Call) -> Array:
    """The loss, differentiable by its analytic gradient where the library differentiates."""
    adapter = _adapter(call.library)
    if adapter is not None and adapter.tracks(call):
        return adapter.attach(call)
    return evaluate(call, Asked(value=True)).value


def value_and_gradients(call: Call, asked: Asked) -> Result:
    """Value and gradients in one evaluation; a value that may be differentiated again is attached as in `value`."""
    adapter = _adapter(call.library)
    compute = adapter.with_gradients if adapter is not None and adapter.tracks(call) else evaluate
    found: Result = compute(call, asked)
    return found


def _adapter(library: Library) -> ModuleType | None:
    if not library.differentiates:
        return None
    if library.backend == "torch":
        from . import torch

        return torch
    from . import jax

    return jax
