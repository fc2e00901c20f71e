"""`gklx.testing`: equal results pass; each kind of fault is reported with backend, element and distance."""

import re
import subprocess
import sys
from functools import partial

import array_api_compat
import numpy as np
import pytest

import backends
import gklx
from gklx._core.libraries import LIBRARIES
from gklx._verify.differences import differences
from gklx._verify.places import Arguments, places
from gklx._verify.ulps import farthest, units
from gklx.testing import assert_backends_agree, assert_gradients_match

INF, NAN = np.inf, np.nan
OTHERS = [library.backend for library in LIBRARIES if library.backend != "numpy"]
DIFFERENTIATE = [library.backend for library in LIBRARIES if library.differentiates]
X, Y = np.random.default_rng(0).normal(size=(2, 3, 4))
BOTH = partial(gklx.grad, argnums=(0, 1))


def huber(x, y):
    xp = array_api_compat.array_namespace(x, y)
    d = abs(x - y)
    return xp.mean(xp.where(d < 1, 0.5 * d * d, d - 0.5))


def log_sum_exp(x):
    xp = array_api_compat.array_namespace(x)
    return xp.log(xp.sum(xp.exp(x), axis=-1))


def mean_of_squares(x):
    return array_api_compat.array_namespace(x).mean(x * x)


def message(excinfo):
    return str(excinfo.value).splitlines()


@pytest.fixture(params=OTHERS)
def other(request):
    backends.needs(request.param)
    return request.param


@pytest.fixture(params=DIFFERENTIATE)
def differentiating(request):
    backends.needs(request.param)
    return request.param


def one_place(backend):
    """One place of a library, as messages name it: with the device where that is a GPU, which is preferred."""
    with places([backend]) as (here, _):
        return here[-1].name


def namespace(backend):
    """The one that a function of these arrays finds."""
    one = next(each for each in backends.BACKENDS if each.library.backend == backend).array(0.0)
    return array_api_compat.array_namespace(one)


# --- distances --------------------------------------------------------------------------------------------------------


def ulps(actual, expected, dtype="float32", per="entry"):
    actual, expected = (np.asarray(x, dtype="float64") for x in (actual, expected))
    return farthest(actual, expected, units(expected, dtype, per), dtype).ulps


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_unit_is_the_last_place_of_the_dtype(dtype):
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}[dtype]
    for size in (1.0, 1.999, -1.0):
        assert ulps(size + eps, size, dtype) == 1.0
    assert ulps(2 + 2 * eps, 2.0, dtype) == 1.0


def test_units_of_entry_row_and_array():
    expected = [[1.0, 8.0], [2.0, 64.0]]
    actual = [[1.0 + 2.0**-23, 8.0], [2.0, 64.0]]
    assert ulps(actual, expected) == 1.0
    assert ulps(actual, expected, per="row") == 1 / 8
    assert ulps(actual, expected, per="array") == 1 / 64
    least = units(np.asarray([0.1, 8.0]), "float32", "entry", 1.0)
    assert least.tolist() == [2.0**-23, 2.0**-20]
    assert ulps([0.0], [0.0]) == 0.0
    assert ulps([2.0**-149], [0.0], "float64") > 1e200


def test_infinities_and_nan_must_be_the_same():
    same = [INF, -INF, NAN, 1.0]
    assert ulps(same, same, per="row") == 0.0
    for wrong in ([-INF, -INF, NAN, 1.0], [INF, -INF, 0.0, 1.0], [INF, 1e300, NAN, 1.0], [INF, -INF, NAN, NAN]):
        assert ulps(wrong, same, per="row") == INF
    assert farthest(np.asarray([1, 2]), np.asarray([1, 3]), 1.0, "int64").place == (1,)
    assert farthest(np.zeros((0, 3)), np.zeros((0, 3)), 1.0, "float32").ulps == 0.0


def test_below_the_smallest_normal_number_all_is_0_but_in_float16():
    tiny = 2.0**-126
    assert ulps([0.0, -tiny / 2, tiny], [tiny, tiny / 3, 0.0]) == 0.0
    assert ulps([tiny * 1.5], [tiny]) == 2.0**22
    assert ulps([0.0], [2.0**-16], "float16") == 2.0**8
    assert ulps([1e-310], [0.0], "float64") == 0.0


def test_where_nothing_may_be_flushed_the_smallest_numbers_count():
    smallest = 2.0**-149
    x, y = np.asarray([3 * smallest]), np.asarray([smallest])
    unit = units(y, "float32", "entry")
    assert farthest(x, y, unit, "float32").ulps == 0.0
    assert farthest(x, y, unit, "float32", may_flush=False).ulps == 2.0


# --- assert_backends_agree --------------------------------------------------------------------------------------------


def test_what_agrees_passes(other):
    here = ["numpy", other]
    assert_backends_agree(huber, X, Y, backends=here, ulps=8)
    assert_backends_agree(log_sum_exp, X, backends=here)
    assert_backends_agree(gklx.kl, X, Y, backends=here, temperature=2.0, where=np.asarray([True, True, False, True]))
    weights = {"prior": np.full((4, 4), 0.25), "labels": np.arange(3)}
    assert_backends_agree(gklx.terms(gklx.gkl), X, Y, backends=here, dtypes=["float32"], **weights)
    assert_backends_agree(lambda x: (x > 0, x), X, backends=here, ulps=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(dtype):
    assert_backends_agree(lambda x: x, X, dtypes=[dtype], ulps=0) if dtype == "float16" else None
    if dtype == "bfloat16":
        backends.needs("torch")
        assert_backends_agree(lambda x: x, np.asarray([*X[0], INF, NAN, -0.0]), dtypes=[dtype], ulps=0)
    assert_backends_agree(gklx.kl, X, Y, dtypes=["float32", dtype], reduction="none")


def test_a_fault_in_one_backend_is_told(other, monkeypatch):
    place, module = one_place(other), namespace(other)
    true_exp = module.exp
    monkeypatch.setattr(module, "exp", lambda x: true_exp(x * (1 + 1e-4)))
    x = np.zeros((3, 4))
    x[1, 2] = 2.0
    exact = np.log(3 + np.exp(2.0))
    with pytest.raises(AssertionError) as excinfo:
        assert_backends_agree(log_sum_exp, x, backends=["numpy", place])
    first, *_ = lines = message(excinfo)
    assert first.startswith(f"{place} in float32: the result element [1] is 2.34")
    assert f", expected {exact:.9g}, " in first
    off = np.log(3 + np.exp(2.0002)) - exact
    told = float(re.search(r", ([\d.]+) ulp off, allowed 32$", first)[1])
    assert told == pytest.approx(off / 2.0**-22, abs=2)
    assert not [line for line in lines if line.startswith("numpy in")]
    assert any(re.search(rf"float32, ulp from NumPy in float64: numpy 0\.\d+, {place} \d+", line) for line in lines)
    assert lines[-1].startswith(f"farthest pair: numpy and {place} in float64, ")


def test_the_bound_is_the_one_that_is_given(monkeypatch):
    backends.needs("array_api_strict")
    import array_api_strict

    true_exp = array_api_strict.exp
    monkeypatch.setattr(array_api_strict, "exp", lambda x: true_exp(x) + 2.0**-23 * 3)
    exp = lambda x: array_api_compat.array_namespace(x).exp(x)  # noqa: E731
    options = {"backends": ["array_api_strict"], "dtypes": ["float32"]}
    assert_backends_agree(exp, np.zeros(3), **options, ulps=3)
    with pytest.raises(AssertionError, match=r"element \[0\] is 1\.00000036, expected 1, 3 ulp off, allowed 2\.9\n"):
        assert_backends_agree(exp, np.zeros(3), **options, ulps=2.9)
    per_entry = np.log(np.asarray([1.0, 8.0]))
    with pytest.raises(AssertionError, match="allowed 2"):
        assert_backends_agree(exp, per_entry, **options, ulps=2)
    assert_backends_agree(exp, per_entry, **options, ulps=2, per="row")


def test_a_backend_that_raises_is_told_and_does_not_hide_the_others(other, monkeypatch):
    def broken(x):
        raise RuntimeError("no exponentials today")

    place = one_place(other)
    monkeypatch.setattr(namespace(other), "exp", broken)
    with pytest.raises(AssertionError) as excinfo:
        assert_backends_agree(log_sum_exp, X, backends=["numpy", place])
    lines = message(excinfo)
    assert lines[0] == f"{place} in float32: the result raised RuntimeError: no exponentials today"
    assert lines[2].startswith("the result in float32, ulp from NumPy in float64: numpy ")
    assert isinstance(excinfo.value.__cause__, RuntimeError)


def test_an_error_of_several_lines_is_told_in_one():
    backends.needs("array_api_strict")

    def broken(x):
        if not isinstance(x, np.ndarray):
            raise RuntimeError("no\n  exponentials\ntoday")
        return x

    with pytest.raises(AssertionError) as excinfo:
        assert_backends_agree(broken, X, backends=["array_api_strict"], dtypes=["float32"])
    assert message(excinfo) == ["array_api_strict in float32: the result raised RuntimeError: no exponentials today"]


def test_results_of_another_library_shape_number_or_dtype(other):
    def into_numpy(x):
        return np.ones(3)

    def only_there(there, here):
        return lambda x: (there if backends.BY_BACKEND[other].recognises(x) else here)(x)

    place, xp = one_place(other), namespace(other)
    for fn, told in (
        (into_numpy, f"raised TypeError: the function must return an array of {backends.BY_BACKEND[other].name}"),
        (only_there(lambda x: x[0, :], lambda x: x), "has shape [4], expected [3, 4]"),
        (only_there(lambda x: (x, x), lambda x: x), "gave 2 arrays, expected 1"),
        (only_there(lambda x: xp.astype(x, xp.float64), lambda x: x), "is of float64, expected float32"),
    ):
        with pytest.raises(AssertionError) as excinfo:
            assert_backends_agree(fn, X, backends=["numpy", place], dtypes=["float32"])
        assert message(excinfo)[0].startswith(f"{place} in float32: the result {told}")


def test_a_reference_that_raises():
    with pytest.raises(AssertionError, match=r"^NumPy in float64, the reference: fn raised ZeroDivisionError: "):
        assert_backends_agree(lambda x: 1 / 0, X, backends=["numpy"])
    with pytest.raises(TypeError, match=r"^fn must return real numbers, integers or booleans, got complex128$"):
        assert_backends_agree(lambda x: x + 1j, X, backends=["numpy"])
    with pytest.raises(TypeError, match=r"^fn must return at least one array, got an empty tuple$"):
        assert_backends_agree(lambda x: (), X, backends=["numpy"])


def test_each_backend_has_copies_of_its_own(other):
    def spoil(x, labels):
        found = x + 0, labels + 0
        if array_api_compat.is_writeable_array(x):
            x[0, 0] = labels[0] = 7
        return found

    x, labels = X.copy(), np.arange(3)
    assert_backends_agree(spoil, x, labels, backends=["numpy", other], ulps=0)
    assert (x == X).all()
    assert labels[0] == 0


def test_settings_are_left_as_they_were():
    backends.needs("jax")
    backends.needs("array_api_strict")
    import array_api_strict
    import jax

    before, flags = jax.config.jax_enable_x64, array_api_strict.get_array_api_strict_flags()
    try:
        jax.config.update("jax_enable_x64", False)
        assert_backends_agree(mean_of_squares, X, backends=["jax", "array_api_strict"])
        with pytest.raises(AssertionError):
            assert_gradients_match(mean_of_squares, X, backends=["jax"], grad=lambda x: x)
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", before)
    assert array_api_strict.get_array_api_strict_flags() == flags


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"backends": ["numpi"]}, ValueError, r"^backends must be among numpy, .*, got 'numpi'$"),
        ({"backends": []}, ValueError, r"^backends must name at least one library, got none$"),
        ({"backends": "numpy"}, TypeError, r"^backends must be a sequence of names, got 'numpy'$"),
        ({"backends": ["numpy gpu:9"]}, ValueError, r"^backend numpy gpu:9 cannot be used, there is no such device"),
        ({"dtypes": ["float8"]}, ValueError, r"^dtypes must be a sequence of names among float16, .*'float8'"),
        ({"dtypes": "float32"}, ValueError, r"^dtypes must be a sequence"),
        ({"dtypes": []}, ValueError, r"^dtypes must be a sequence"),
        (
            {"backends": ["numpy"], "dtypes": ["bfloat16"]},
            ValueError,
            r"^dtypes must be some that the backends support",
        ),
        ({"ulps": "3"}, TypeError, r"^ulps must be a number, got str$"),
        ({"ulps": NAN}, ValueError, r"^ulps must be at least 0, got nan$"),
        ({"per": "column"}, ValueError, r'^per must be "entry", "row" or "array", got \'column\'$'),
    ],
)
def test_bad_options(options, error, told):
    with pytest.raises(error, match=told):
        assert_backends_agree(huber, X, Y, **options)


def test_bad_arrays(other, monkeypatch):
    theirs = namespace(other).asarray(X)
    for arrays, named in (((theirs, Y), {}), ((X,), {"y": theirs})):
        with pytest.raises(TypeError, match=r"must be a NumPy array, of which each backend gets a copy, got one of "):
            assert_backends_agree(huber, *arrays, **named)
    with pytest.raises(TypeError, match=r"^arrays must be NumPy arrays, got float$"):
        assert_backends_agree(huber, 1.0)
    monkeypatch.setitem(sys.modules, other, None)
    with pytest.raises(ValueError, match=rf"^backend {other} cannot be used, {other}: not installed$"):
        assert_backends_agree(huber, X, Y, backends=["numpy", other])


# --- differences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_differences_are_good_for_more_than_float32(scale):
    x = scale * np.linspace(-2, 3, 12).reshape(3, 4) + 0.1
    for f, slope in ((np.sin, np.cos), (np.arctan, lambda x: 1 / (1 + x * x)), (np.square, lambda x: 2 * x)):
        found, error = differences(lambda given, f=f: f(given.positional[0]).sum(), Arguments((x,), {}), 0)
        actual = np.abs(found - slope(x))
        assert (actual <= 1e-9 * np.abs(slope(x)).max()).all()
        assert (error <= 1e-9 * np.abs(slope(x)).max()).all()


def test_differences_tell_where_they_fail():
    x = np.asarray([1.0, 1e-9, -1.0, NAN, -INF])

    def f(given):
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.log(given.positional[0][1]) + np.abs(given.positional[0][[0, 2]]).sum()

    found, error = differences(f, Arguments((x,), {}), 0)
    assert found[[0, 2]] == pytest.approx([1.0, -1.0])
    assert error[1] == INF
    assert np.isnan(found[3:]).all()


# --- assert_gradients_match -------------------------------------------------------------------------------------------


def test_gradients_that_match_pass(differentiating):
    here = ["numpy", differentiating]
    assert_gradients_match(huber, X, Y, argnums=(0, 1), backends=here)
    assert_gradients_match(mean_of_squares, X, grad=lambda x: x / 6, backends=here)
    assert_gradients_match(gklx.kl, X, Y, argnums=(0, 1), grad=BOTH(gklx.kl), backends=here, temperature=2.0)
    options = {"argnums": (0, 1), "stops_gradients": True, "backends": here}
    assert_gradients_match(gklx.dkl, X, Y, grad=BOTH(gklx.dkl), **options)
    assert_gradients_match(gklx.kl, X, Y, backends=here, dtypes=["float16"], ulps=1)


def test_masked_entries_that_are_not_finite_are_left_to_grad(differentiating):
    x = X.copy()
    x[0, 1] = NAN
    loss, where = gklx.kl, np.arange(4) != 1
    assert_gradients_match(loss, x, Y, grad=gklx.grad(loss), backends=[differentiating], where=where)
    assert_gradients_match(loss, x, Y, backends=[differentiating], where=where)


def test_a_wrong_gradient_of_one_library_is_told(differentiating):
    place = one_place(differentiating)
    constant = backends.BY_BACKEND[differentiating].constant

    def half_frozen(x):
        return mean_of_squares(x) if isinstance(x, np.ndarray) else (x * constant(x)).mean()

    for grad in (None, lambda x: x / 6):
        with pytest.raises(AssertionError) as excinfo:
            assert_gradients_match(half_frozen, X, grad=grad, backends=["numpy", place])
        first = message(excinfo)[0]
        at, found, exact = re.match(
            rf"{place} in float32: autodiff element (\[\d, \d\]) is (\S+), expected (\S+), \S+ ulp off", first
        ).groups()
        at = tuple(map(int, re.findall(r"\d", at)))
        assert float(exact) == pytest.approx(X[at] / 6, rel=1e-6)
        assert float(found) == pytest.approx(X[at] / 12, rel=1e-6)
        assert "pass grad= and stops_gradients=True" in message(excinfo)[-1]


def test_a_planted_sign_in_a_librarys_own_gradient(monkeypatch):
    backends.needs("torch")
    from gklx._autodiff import torch as adapter

    true = adapter._EagerLoss.backward
    wrong = staticmethod(lambda ctx, *upstream: true(ctx, *(None if x is None else -x for x in upstream)))
    monkeypatch.setattr(adapter._EagerLoss, "backward", wrong, raising=False)
    with pytest.raises(AssertionError, match=r"^torch in float32: autodiff element"):
        assert_gradients_match(gklx.kl, X, Y, grad=gklx.grad(gklx.kl), backends=["numpy", "torch"])


def test_a_wrong_analytic_gradient_is_told_without_autodiff():
    with pytest.raises(AssertionError) as excinfo:
        assert_gradients_match(huber, X, Y, grad=lambda x, y: (x - y) / 12 * 1.0001, backends=["numpy"])
    assert re.match(
        r"NumPy in float64: grad by argument 0 element \[\d, \d\] is \S+, central differences of fn \S+, \S+ ulp off, "
        r"allowed 32 of float32$",
        message(excinfo)[0],
    )


def test_two_libraries_that_differ_in_float64_alone_are_told():
    for name in DIFFERENTIATE:
        backends.needs(name)

    def slightly_off(x):
        torch = sys.modules["torch"]
        return mean_of_squares(x) * (1 + 1e-12 * isinstance(x, torch.Tensor))

    with pytest.raises(
        AssertionError, match=r"^torch and jax in float64: autodiff element .*, that of jax .*, allowed 64"
    ):
        assert_gradients_match(slightly_off, X, backends=DIFFERENTIATE)


def test_where_differences_do_not_settle_is_told():
    def f(x):
        xp = array_api_compat.array_namespace(x)
        return xp.sum(xp.log(x))

    with pytest.raises(AssertionError) as excinfo:
        assert_gradients_match(f, np.asarray([0.5, 1e-8, 2.0]), grad=lambda x: 1 / x, backends=["numpy"])
    assert message(excinfo)[0].endswith("argument 0 do not settle at element [1], where fn has a kink or is not finite")
    assert not any("grad by argument" in line for line in message(excinfo))


@pytest.mark.parametrize(
    ("fn", "argnums", "settings", "stops"),
    [
        (gklx.kl, (0, 1), {}, False),
        (gklx.dkl, 0, {}, True),
        (gklx.dkl, 1, {}, True),
        (partial(partial(gklx.dkl, temperature=2.0), mse_weight=0.0), 0, {}, False),
        (gklx.ikl, 0, {}, False),
        (gklx.ikl, 1, {}, True),
        (gklx.gkl, 0, {"symmetric": False}, True),
        (partial(gklx.gkl, ce_weight=0.0), 1, {"prior": np.full((3, 4), 0.5)}, False),
        (partial(gklx.gkl, ce_weight=0.0), 1, {}, True),
    ],
)
def test_a_loss_that_holds_something_constant_is_not_held_to_differences_by_mistake(fn, argnums, settings, stops):
    options = {"argnums": argnums, "grad": gklx.grad(fn, argnums), "backends": ["numpy"], **settings}
    if not stops:
        assert_gradients_match(fn, X, Y, **options)
        return
    with pytest.raises(ValueError, match=r"^stops_gradients must be True, with grad=gklx.grad\(fn, "):
        assert_gradients_match(fn, X, Y, **options)
    assert_gradients_match(fn, X, Y, **options, stops_gradients=True)
    with pytest.raises(AssertionError, match="stops_gradients=True"):  # one that cannot be seen to be such a loss
        assert_gradients_match(lambda *args, **kwargs: fn(*args, **kwargs), X, Y, **options)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"stops_gradients": True}, ValueError, r"^grad must be given where fn stops gradients"),
        ({"grad": X}, TypeError, r"^grad must be a function, got ndarray$"),
        ({"grad": lambda x: x[0]}, ValueError, r"^grad must return gradients of shapes \[3, 4\], got \[4\]$"),
        ({"argnums": 1}, ValueError, r"^argnums must name floating arrays among the 1 that are given, got 1$"),
        ({"argnums": ()}, ValueError, r"^argnums must name at least one array"),
        (
            {"backends": ["numpy"]},
            ValueError,
            r"^grad must be given where no backend differentiates: torch or jax, got",
        ),
    ],
)
def test_bad_gradient_options(options, error, told):
    with pytest.raises(error, match=told):
        assert_gradients_match(mean_of_squares, X, **options)


def test_fn_must_return_one_number():
    with pytest.raises(ValueError, match=r"^fn must return one number to be differentiated, got \[3\]$"):
        assert_gradients_match(log_sum_exp, X, backends=["numpy"], grad=lambda x: x)


def test_gklx_does_not_import_it():
    code = "import sys, gklx; print([m for m in sys.modules if m.startswith(('gklx.testing', 'gklx._verify'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
