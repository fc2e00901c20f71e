"""Calls a function of arrays at a place: copies arguments to it, and results and gradients back."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._core.libraries import dtype_name
from .places import Place


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


def call(place: Place, dtype: str, f: Callable[..., Any], arguments: Arguments) -> Results:
    """The results of a function, which returns an array or a tuple of them, of the place's library and device."""
    with place.working():
        here = arguments.mapped(lambda x: place.array(x, dtype))
        return _brought_back(place, f(*here.positional, **here.named))


def autodiff(place: Place, dtype: str, f: Callable[..., Any], arguments: Arguments, argnums: Sequence[int]) -> Results:
    """The gradients of a function that returns one number, by the library's autodiff."""
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
    """Copies what was returned at a place to the host; TypeError where it is no array of the place's library."""
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
