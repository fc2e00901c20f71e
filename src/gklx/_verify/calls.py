"""A function of arrays called at a place: its arguments made there, its results and its gradients brought back."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._core.libraries import dtype_name
from .places import Place


class Arguments(NamedTuple):
    """The arguments of a call: NumPy arrays, and anything else, which is passed on as it is."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def mapped(self, change: Callable[[Any], Any]) -> "Arguments":
        """The same with every NumPy array changed."""

        def each(x: Any) -> Any:
            return change(x) if isinstance(x, np.ndarray) else x

        return Arguments(tuple(map(each, self.positional)), {name: each(x) for name, x in self.named.items()})

    def rounded(self, dtype: str) -> "Arguments":
        """Floating arrays in float64, with values that `dtype` holds."""
        return self.mapped(lambda x: _rounded(x, dtype) if x.dtype.kind == "f" else x.copy())


class Results(NamedTuple):
    """What a call returned: host arrays, halves widened, and the names of the dtypes that they had."""

    arrays: list[Any]
    dtypes: list[str]


def call(place: Place, dtype: str, f: Callable[..., Any], arguments: Arguments) -> Results:
    """What a function returns: an array or a tuple of them, of the place's own library and device."""
    with place.working():
        here = arguments.mapped(lambda x: place.array(x, dtype))
        return _brought_back(place, f(*here.positional, **here.named))


def autodiff(place: Place, dtype: str, f: Callable[..., Any], arguments: Arguments, argnums: Sequence[int]) -> Results:
    """The gradients, by the library's own autodiff, of a function that returns one number."""
    with place.working():
        here = arguments.mapped(lambda x: place.array(x, dtype))
        if place.library.backend == "jax":
            found = sys.modules["jax"].grad(f, tuple(argnums))(*here.positional, **here.named)
        else:
            torch = sys.modules["torch"]
            inputs = [here.positional[at].requires_grad_() for at in argnums]
            with torch.enable_grad():
                value = f(*here.positional, **here.named)
            found = torch.autograd.grad(value, inputs, materialize_grads=True)
        return _brought_back(place, found)


def _brought_back(place: Place, returned: Any) -> Results:
    """Host arrays of what was returned at a place; TypeError where it is not an array of the place's library."""
    arrays = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    for x in arrays:
        if not place.library.recognises(x):
            kind = f"{type(x).__module__}.{type(x).__qualname__}"
            raise TypeError(f"the function must return an array of {place.library.name} or a tuple of them, got {kind}")
        device = place.library.device(x)
        if None not in (device, place.home) and device != place.home:
            raise TypeError(f"the function must return an array on {place.home}, got one on {device}")
    return Results(place.on_host(arrays), [dtype_name(x.dtype) for x in arrays])


def _rounded(x: Any, dtype: str) -> Any:
    if dtype != "bfloat16":
        return x.astype(dtype).astype("float64")
    bits = x.astype("float32").view("uint32") + np.uint32(0x8000)
    return (bits & np.uint32(0xFFFF0000)).view("float32").astype("float64")
