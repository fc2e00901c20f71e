"""Functions of a loss that return its gradients, its value with gradients, or its parts, without autodiff."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, ParamSpec, TypeVar, overload

import numpy as np

from . import _autodiff
from ._core.call import Array, Asked, Call
from ._core.checks import whole_number
from ._generic import ArrayT, TupleGeneric
from .losses import call_builder, kl

_Signature = ParamSpec("_Signature")
_Array = TypeVar("_Array")


class Terms(NamedTuple, TupleGeneric[ArrayT]):
    """The two weighted parts of a loss; their sum is the loss."""

    mse: ArrayT
    """mse_weight · wMSE."""
    ce: ArrayT
    """ce_weight · CE."""


@overload
def value_and_grad(
    loss: Callable[_Signature, _Array], argnums: int = 0
) -> Callable[_Signature, tuple[_Array, _Array]]: ...


@overload
def value_and_grad(
    loss: Callable[_Signature, _Array], argnums: Sequence[int]
) -> Callable[_Signature, tuple[_Array, tuple[_Array, ...]]]: ...


def value_and_grad(loss: Callable[..., Array], argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """A function that returns a loss and its analytic gradient, from one evaluation.

    Works on every library, NumPy and CuPy included, and follows `jax.value_and_grad`.

    Parameters
    ----------
    loss : kl, dkl, ikl, gkl, or a functools.partial of one
        What to differentiate.
    argnums : int or sequence of ints
        0 is the student, 1 the teacher. Only what is named is computed. Python's integers or NumPy's.

    Returns
    -------
    callable
        Takes the loss's own arguments; returns ``(value, gradient)``. The gradient has the shape and dtype of the
        logits it is for, and is a tuple where `argnums` is a sequence. It can be pickled, as the loss can.

    Raises
    ------
    TypeError
        `loss` is not one of the four; `argnums` is not made of integers.
    ValueError
        `argnums` names something else than 0 and 1; the function is called with ``reduction="none"``.

    See Also
    --------
    grad : The gradient alone.
    terms : The loss as its two parts.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> student, teacher = np.asarray([[0.0, 0.0]]), np.asarray([[0.0, np.log(3.0)]])
    >>> value, gradient = gklx.value_and_grad(gklx.kl)(student, teacher)
    >>> gradient.round(6)
    array([[ 0.25, -0.25]])
    """
    return _Differentiated(loss, *_argnums(argnums), with_value=True)


@overload
def grad(loss: Callable[_Signature, _Array], argnums: int = 0) -> Callable[_Signature, _Array]: ...


@overload
def grad(loss: Callable[_Signature, _Array], argnums: Sequence[int]) -> Callable[_Signature, tuple[_Array, ...]]: ...


def grad(loss: Callable[..., Array], argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """A function that returns the analytic gradient of a loss.

    Parameters, errors and results are those of `value_and_grad`, without the value.

    See Also
    --------
    value_and_grad : The gradient with the value, from one evaluation.

    Examples
    --------
    >>> import functools
    >>> import numpy as np
    >>> import gklx
    >>> student, teacher = np.asarray([[0.0, 0.0]]), np.asarray([[0.0, np.log(3.0)]])
    >>> of_both = gklx.grad(functools.partial(gklx.gkl, gamma=0.0), argnums=(0, 1))
    >>> [g.round(4) for g in of_both(student, teacher)]
    [array([[ 0.5247, -0.5247]]), array([[-0.2747,  0.2747]])]
    """
    return _Differentiated(loss, *_argnums(argnums), with_value=False)


def terms(loss: Callable[_Signature, _Array]) -> Callable[_Signature, Terms[_Array]]:
    """A function that returns a loss as its two weighted parts, wMSE and CE.

    Parameters
    ----------
    loss : dkl, ikl, gkl, or a functools.partial of one
        What to take apart; `kl` has no such parts.

    Returns
    -------
    callable
        Takes the loss's own arguments; returns `Terms`. Each part is reduced as the loss is, and differentiable
        where it is.

    Raises
    ------
    TypeError
        `loss` is `kl`, or not one of the four.

    See Also
    --------
    value_and_grad : The value and the gradient of the sum.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> student, teacher = np.asarray([[0.0, 0.0]]), np.asarray([[0.0, np.log(3.0)]])
    >>> parts = gklx.terms(gklx.dkl)(student, teacher)
    >>> print(f"{parts.mse:.6f} {parts.ce:.6f}")
    0.113151 0.693147
    """
    found = _Terms(loss)
    if _without_partials(loss) is kl:
        raise TypeError("loss must be gklx.dkl, gklx.ikl or gklx.gkl, which have parts, got kl")
    return found


# All return objects of these classes: inner functions could not be pickled.


@dataclass(frozen=True)
class _OfLoss:
    loss: Any

    def __post_init__(self) -> None:
        _unwrapped(self.loss)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return _unwrapped(self.loss)(*args, **kwargs)


@dataclass(frozen=True)
class _Differentiated(_OfLoss):
    argnums: tuple[int, ...]
    as_tuple: bool
    with_value: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        if call.reduction == "none":
            raise ValueError('reduction must be "mean" or "sum" for a gradient, got "none"')
        found = _autodiff.value_and_gradients(call, Asked(self.with_value, 0 in self.argnums, 1 in self.argnums))
        gradients = tuple((found.student, found.teacher)[n] for n in self.argnums)
        gradient = gradients if self.as_tuple else gradients[0]
        return (found.value, gradient) if self.with_value else gradient


@dataclass(frozen=True)
class _Terms(_OfLoss):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        return Terms(
            mse=_autodiff.value(call._replace(numbers=call.numbers._replace(ce_weight=0.0))),
            ce=_autodiff.value(call._replace(numbers=call.numbers._replace(mse_weight=0.0))),
        )


def _unwrapped(loss: Any) -> Callable[..., Call]:
    """The function that checks the arguments of a loss, with a partial's arguments bound."""
    if isinstance(loss, partial):
        return partial(_unwrapped(loss.func), *loss.args, **loss.keywords)
    return call_builder(loss)


def _without_partials(loss: Any) -> Any:
    return _without_partials(loss.func) if isinstance(loss, partial) else loss


def _argnums(argnums: Any) -> tuple[tuple[int, ...], bool]:
    """The argument numbers, and whether they were given as a sequence."""
    as_tuple = isinstance(argnums, Sequence) or (isinstance(argnums, np.ndarray) and argnums.ndim == 1)
    numbers: list[int] = []
    for each in argnums if as_tuple else (argnums,):
        number = whole_number(each)
        if number is None:
            raise TypeError(f"argnums must be an integer or a sequence of integers, got {argnums!r}")
        if number not in (0, 1):
            raise ValueError(f"argnums must be made of 0 (student) and 1 (teacher), got {argnums!r}")
        numbers.append(number)
    if not numbers:
        raise ValueError(f"argnums must name at least one argument, got {argnums!r}")
    return tuple(numbers), as_tuple
