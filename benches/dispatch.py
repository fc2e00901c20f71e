"""What a call costs beyond the array operations that it makes.

At the smallest input an operation's own work is nothing and its call everything. The operations of one call are
recorded, with their arguments, and repeated without gklx around them; what the call takes longer is gklx's: checks, the
choice of a library, the Python between two operations. Autograd has no part in either.
"""

from collections.abc import Callable
from typing import Any

import forms
import numpy as np
import peers
from timing import spread, take_turns

import gklx

_Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def measure(library: str, backend: str, batch: int, classes: int, turns: int, seconds: float) -> dict[str, Any]:
    """Time gkl, its operations alone, and the same formulas as bare operations without a check, turn by turn."""
    student, teacher = peers.Task(batch, classes).inputs(library)
    function = gklx.value_and_grad(peers.LOSSES["gkl"], argnums=(0, 1))
    namespace = __import__(library)
    made = _RECORDED[library](function, student, teacher)

    def alone() -> None:
        for operation, args, kwargs in made:
            operation(*args, **kwargs)

    with np.errstate(all="ignore"):  # what is written over itself so often does not stay finite
        taken = take_turns(
            {
                "call": lambda: function(student, teacher),
                "alone": alone,
                "bare": lambda: forms.whole_gkl(namespace, student, teacher, True),
            },
            turns,
            seconds,
        )
    beyond = [a - b for a, b in zip(taken["call"].turns, taken["alone"].turns, strict=True)]
    return {
        "backend": backend,
        "batch": batch,
        "classes": classes,
        "operations": len(made),
        **spread(beyond, "seconds"),
        **{f"{name}_seconds": spread(of.turns, "seconds")["seconds"] for name, of in taken.items()},
    }


def _numpy_operations(function: Callable[..., Any], student: np.ndarray, teacher: np.ndarray) -> list[_Operation]:
    made: list[_Operation] = []

    def plain(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(plain(each) for each in x)
        return x.view(np.ndarray) if isinstance(x, Recorder) else x

    def recorded(operation: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        args, given = plain(args), {name: plain(x) for name, x in kwargs.items()}
        result = operation(*args, **given)
        made.append((operation, args, given))
        return kwargs["out"][0] if "out" in kwargs else np.asarray(result).view(Recorder)

    class Recorder(np.ndarray):
        def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
            return recorded(getattr(ufunc, method), args, kwargs)

        def __array_function__(self, function: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
            return recorded(function, args, kwargs)

    function(student.view(Recorder), teacher.view(Recorder))
    return made


def _torch_operations(function: Callable[..., Any], student: Any, teacher: Any) -> list[_Operation]:
    import torch
    from torch.overrides import TorchFunctionMode

    made: list[_Operation] = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = operation(*args, **(kwargs or {}))
            if isinstance(result, (torch.Tensor, float)):  # not a shape or a dtype, which cost nothing
                made.append((operation, args, kwargs or {}))
            return result

    with Recorder():
        function(student, teacher)
    return made


_RECORDED: dict[str, Callable[..., list[_Operation]]] = {"numpy": _numpy_operations, "torch": _torch_operations}
