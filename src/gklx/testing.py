"""Checks that a function of arrays, written against the Python array API, is the same on every array library.

For the tests of any project: `assert_backends_agree` runs a function on each library and device that is here,
`assert_gradients_match` holds the libraries' own derivatives of it to an analytic gradient and to differences.

Distances are in units in the last place (ulp) of a result's dtype. The unit is that of each expected entry itself
(``per="entry"``), of the largest entry of its row, the last axis (``"row"``), or of the whole array (``"array"``);
numbers below the smallest normal one count as 0, since libraries may flush them. Infinities and NaN must be the same.
"""

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, get_args

import numpy as np

from ._core.checks import type_name, whole_number
from ._core.libraries import library_of
from ._verify.agreement import Agreement
from ._verify.differences import differences
from ._verify.places import Arguments, Results, call, places
from ._verify.ulps import DTYPES, Expected, Per, compared, units
from .losses import call_builder

__all__ = ["assert_backends_agree", "assert_gradients_match"]

_FLOAT32_AND_64 = ("float32", "float64")
_HINT = (
    "if fn holds something constant on purpose, differences of it say nothing: pass grad= and stops_gradients=True; "
    "at a kink of fn move the arrays"
)


def assert_backends_agree(
    fn: Callable[..., Any],
    *arrays: Any,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] = _FLOAT32_AND_64,
    ulps: float = 32.0,
    per: Per = "entry",
    **kwargs: Any,
) -> None:
    """Asserts that a function gives the same on every array library, in every dtype.

    The reference is the function itself on NumPy in float64, at inputs rounded to the dtype; each backend is held to
    it, and so any two to each other within twice the bound. Shapes must be the same, and so must the results' dtypes
    from library to library; each result must be an array of its own library, on its own device.

    Parameters
    ----------
    fn : callable
        Takes arrays of any library and returns an array or a tuple of them.
    *arrays : numpy.ndarray
        The arguments. Each backend is given copies as its own arrays, floating ones in the dtype that is tried. What
        is no NumPy array is passed on as it is.
    backends : sequence of str, optional
        "numpy", "torch", "jax", "cupy", "dask", "array_api_strict", or one device of them, as "torch cuda:0"; they must
        be there. By default all that are, with each GPU.
    dtypes : sequence of str
        Among "float16", "bfloat16", "float32" and "float64"; a backend without one of them is left out there.
    ulps : float
        The largest distance that is allowed, in units in the last place of the result's dtype.
    per : {"entry", "row", "array"}
        The numbers whose unit is taken, as described at the top of `gklx.testing`.
    **kwargs
        Named arguments of `fn`; NumPy arrays are handled as in `arrays`.

    Raises
    ------
    AssertionError
        A result is too far off. The message names backend, dtype and element, the number found and the one expected,
        and their distance; then the distances of all other backends, and the two that are farthest apart.
    TypeError, ValueError
        Arguments that cannot be used; a named backend that is not here; nothing to check.

    See Also
    --------
    assert_gradients_match : Compares a gradient with finite differences.

    Examples
    --------
    >>> import array_api_compat
    >>> import numpy as np
    >>> from gklx.testing import assert_backends_agree
    >>> def huber(x, y):
    ...     xp = array_api_compat.array_namespace(x, y)
    ...     d = abs(x - y)
    ...     return xp.mean(xp.where(d < 1, 0.5 * d * d, d - 0.5))
    >>> assert_backends_agree(huber, *np.random.default_rng(0).normal(size=(2, 5, 3)), ulps=8)
    """
    arguments = _arguments(arrays, kwargs)
    _check_options(dtypes, ulps, per)
    agreement = Agreement("NumPy in float64", ulps=ulps, per=per)
    tried = 0
    with places(backends) as (here, _):
        for dtype in dtypes:
            given = arguments.rounded(dtype)
            expected = _on_numpy("fn", fn, given)
            own: Sequence[str] = ()
            for place in here:
                if dtype in place.library.dtypes:
                    tried += 1
                    own = agreement.compare(
                        place, dtype, "the result", partial(call, place, dtype, fn, given), expected, own
                    )
    if not tried:
        raise ValueError(f"dtypes must be some that the backends support, got {', '.join(dtypes)}")
    agreement.raise_problems()


def assert_gradients_match(
    fn: Callable[..., Any],
    *arrays: Any,
    argnums: int | Sequence[int] = 0,
    grad: Callable[..., Any] | None = None,
    stops_gradients: bool = False,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] = _FLOAT32_AND_64,
    ulps: float = 32.0,
    per: Per = "row",
    **kwargs: Any,
) -> None:
    """Asserts that a function's gradients are right: analytic, by each library's autodiff, and by differences.

    With `grad` the reference is `grad` on NumPy in float64, at inputs rounded to the dtype. Held to it are `grad` on
    every backend, the autodiff of each library that has one (PyTorch, JAX), and central differences of `fn` on NumPy in
    float64. Without `grad` the differences are the reference, and the autodiffs are held to each other as well.
    Differences are good for the digits of float32: where float64 is held to them, the unit is that of float32.

    Parameters
    ----------
    fn : callable
        Takes arrays of any library and returns one number, a 0-d array.
    *arrays : numpy.ndarray
        As in `assert_backends_agree`. Differences take some 20 calls for every entry: keep them small.
    argnums : int or sequence of ints
        Which of `arrays` to differentiate by.
    grad : callable, optional
        Takes what `fn` takes and returns its gradient, a tuple of them where `argnums` is a sequence.
    stops_gradients : bool
        `fn` holds something constant on purpose (a stop-gradient, `detach`), so its gradient is not that of its value.
        There are no differences then, and `grad` is needed. `gklx.dkl`, and `gklx.ikl` and `gklx.gkl` by the teacher,
        are such functions, and an error without this.
    backends, dtypes, ulps, per, **kwargs
        As in `assert_backends_agree`.

    Raises
    ------
    AssertionError, TypeError, ValueError
        As in `assert_backends_agree`. It is an AssertionError too where differences do not settle, at a kink of `fn`.

    See Also
    --------
    assert_backends_agree : Compares a function on several libraries.

    Examples
    --------
    >>> import gklx
    >>> import numpy as np
    >>> from gklx.testing import assert_gradients_match
    >>> student, teacher = np.random.default_rng(0).normal(size=(2, 2, 3))
    >>> of_kl, of_dkl = gklx.grad(gklx.kl, (0, 1)), gklx.grad(gklx.dkl, (0, 1))
    >>> assert_gradients_match(gklx.kl, student, teacher, argnums=(0, 1), grad=of_kl)
    >>> assert_gradients_match(gklx.dkl, student, teacher, argnums=(0, 1), grad=of_dkl, stops_gradients=True)
    """
    arguments = _arguments(arrays, kwargs)
    _check_options(dtypes, ulps, per)
    numbers = _argnums(argnums, arrays)
    _check_grad(fn, grad, arguments, numbers, stops_gradients)
    agreement = Agreement("central differences" if grad is None else "grad on NumPy in float64", ulps=ulps, per=per)
    if grad is not None and not stops_gradients:
        given = arguments.rounded("float64")
        slopes = _differences(fn, given, numbers, agreement, ulps, per)
        for at, x, slope in zip(numbers, _gradients(grad, given, numbers), slopes, strict=True):
            name, slope = f"NumPy in float64: grad by argument {at}", np.where(np.isnan(slope), x, slope)
            unit, source = units(x, "float32", per), "central differences of fn"
            _, message = compared(x, Expected(name, slope, "float64", unit, ulps, source=source))
            agreement.problems += [f"{message} of float32"] if message else []
    tried = 0
    with places(backends) as (here, _):
        for dtype in dtypes:
            able = [each for each in here if dtype in each.library.dtypes and (grad or each.library.differentiates)]
            if not able:
                continue
            tried, given = tried + 1, arguments.rounded(dtype)
            expected = (
                _gradients(grad, given, numbers) if grad else _differences(fn, given, numbers, agreement, ulps, per)
            )
            unit_of = "float32" if grad is None and dtype == "float64" else dtype
            for place in able:
                ways = {"grad": partial(call, place, dtype, grad, given)} if grad else {}
                if place.library.differentiates:
                    ways["autodiff"] = partial(call, place, dtype, fn, given, numbers)
                for what, way in ways.items():
                    f = way if grad else partial(_where_known, way, expected)
                    agreement.compare(place, dtype, what, f, expected, [dtype] * len(numbers), unit_of)
    if not tried:
        raise ValueError(
            "grad must be given where no backend differentiates: torch or jax, "
            f"got {'neither' if backends is None else ', '.join(backends)} in {', '.join(dtypes)}"
        )
    if grad is None:
        agreement.compare_pairs()
    agreement.raise_problems("" if stops_gradients else _HINT)


# --- references -------------------------------------------------------------------------------------------------------


def _on_numpy(name: str, f: Callable[..., Any], given: Arguments) -> list[Any]:
    """The results of a function on NumPy; AssertionError where it raises."""
    try:
        with np.errstate(all="ignore"):
            copied = given.mapped(np.copy)
            returned = f(*copied.positional, **copied.named)
    except Exception as error:
        raise AssertionError(
            f"NumPy in float64, the reference: {name} raised {type(error).__name__}: {error}"
        ) from error
    arrays = [np.asarray(x) for x in (returned if isinstance(returned, (tuple, list)) else [returned])]
    if not arrays:
        raise TypeError(f"{name} must return at least one array, got an empty {type(returned).__name__}")
    for x in arrays:
        if x.dtype.kind not in "fiub":
            raise TypeError(f"{name} must return real numbers, integers or booleans, got {x.dtype}")
    return arrays


def _gradients(grad: Callable[..., Any], given: Arguments, numbers: Sequence[int]) -> list[Any]:
    found = _on_numpy("grad", grad, given)
    got, expected = [x.shape for x in found], [given.positional[at].shape for at in numbers]
    if got != expected:
        raise ValueError(f"grad must return gradients of shapes {_text(expected)}, got {_text(got)}")
    return found


def _differences(
    fn: Callable[..., Any], given: Arguments, numbers: Sequence[int], agreement: Agreement, ulps: float, per: Per
) -> list[Any]:
    """Central differences, NaN where an entry has none. Differences that do not converge are recorded as a problem."""
    found = []
    for at in numbers:
        slopes, error = differences(lambda moved: float(_on_numpy("fn", fn, moved)[0]), given, at)
        rough = np.nan_to_num(error / units(slopes, "float32", per), nan=0.0) > ulps
        for index in np.argwhere(rough)[:1]:
            agreement.problems.append(
                f"NumPy in float64: central differences of fn by argument {at} do not settle at element "
                f"{index.tolist()}, where fn has a kink or is not finite"
            )
        found.append(np.where(rough, np.nan, slopes))
    return found


def _where_known(f: Callable[[], Results], expected: Sequence[Any]) -> Results:
    """The results of a call, with NaN where there are no differences to compare with."""
    got = f()
    pairs = zip(got.arrays, expected, strict=True)
    return got._replace(arrays=[np.where(np.isnan(y), np.nan, x).astype(x.dtype) for x, y in pairs])


# --- arguments --------------------------------------------------------------------------------------------------------


def _arguments(arrays: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    for name, x in [*((f"arrays[{at}]", x) for at, x in enumerate(arrays)), *kwargs.items()]:
        library = library_of(x)
        if library is not None and library.backend != "numpy":
            raise TypeError(
                f"{name} must be a NumPy array, of which each backend gets a copy, got one of {library.name}"
            )
    if not any(isinstance(x, np.ndarray) for x in (*arrays, *kwargs.values())):
        raise TypeError(f"arrays must be NumPy arrays, got {', '.join(type(x).__name__ for x in arrays) or 'none'}")
    return Arguments(arrays, kwargs)


def _check_options(dtypes: Sequence[str], ulps: float, per: str) -> None:
    if isinstance(dtypes, str) or not dtypes or not set(dtypes) <= set(DTYPES):
        raise ValueError(f"dtypes must be a sequence of names among {', '.join(DTYPES)}, got {dtypes!r}")
    if not isinstance(ulps, Real) or isinstance(ulps, bool):
        raise TypeError(f"ulps must be a number, got {type_name(ulps)}")
    if not ulps >= 0:
        raise ValueError(f"ulps must be at least 0, got {ulps!r}")
    if per not in get_args(Per):
        raise ValueError(f'per must be "entry", "row" or "array", got {per!r}')


def _argnums(argnums: int | Sequence[int], arrays: tuple[Any, ...]) -> tuple[int, ...]:
    several = isinstance(argnums, Sequence) or (isinstance(argnums, np.ndarray) and argnums.ndim == 1)
    numbers: list[int] = []
    for each in argnums if several else (argnums,):  # type: ignore[union-attr]
        at = whole_number(each)
        if at is None:
            raise TypeError(f"argnums must be an integer or a sequence of integers, got {argnums!r}")
        if not 0 <= at < len(arrays) or not isinstance(arrays[at], np.ndarray) or arrays[at].dtype.kind != "f":
            raise ValueError(
                f"argnums must name floating arrays among the {len(arrays)} that are given, got {argnums!r}"
            )
        numbers.append(at)
    if not numbers:
        raise ValueError("argnums must name at least one array, got none")
    return tuple(numbers)


def _check_grad(
    fn: Callable[..., Any],
    grad: Callable[..., Any] | None,
    arguments: Arguments,
    numbers: tuple[int, ...],
    stops_gradients: bool,
) -> None:
    """Checks `grad`, and that a function with stopped gradients is not compared with differences by mistake."""
    if grad is not None and not callable(grad):
        raise TypeError(f"grad must be a function, got {type(grad).__name__}")
    if stops_gradients and grad is None:
        raise ValueError("grad must be given where fn stops gradients, since differences do not know of that, got None")
    if not stops_gradients and _stops_gradients(fn, arguments, numbers):
        raise ValueError(
            f"stops_gradients must be True, with grad=gklx.grad(fn, {numbers}), for a loss with constant parts, "
            "got False"
        )
    shapes = [x.shape for x in _on_numpy("fn", fn, arguments.rounded("float64"))]
    if shapes != [()]:
        raise ValueError(f"fn must return one number to be differentiated, got {_text(shapes)}")


def _stops_gradients(fn: Any, arguments: Arguments, numbers: tuple[int, ...]) -> bool:
    """Whether fn is a loss of gklx whose gradient is not that of its value; for other functions the caller says so."""
    settings: dict[str, Any] = {}
    positional = arguments.positional
    while isinstance(fn, partial):
        positional, settings, fn = (*fn.args, *positional), {**fn.keywords, **settings}, fn.func
    if not hasattr(fn, "_gklx_call"):
        return False
    call = call_builder(fn)(*positional, **{**settings, **arguments.named})
    formula, weights = call.formula, call.numbers
    to_student = not formula.symmetric and weights.mse_weight != 0
    to_teacher = weights.ce_weight != 0 or (call.arrays.prior is None and weights.mse_weight != 0)
    return formula.decomposed and ((0 in numbers and to_student) or (1 in numbers and to_teacher))


def _text(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)
