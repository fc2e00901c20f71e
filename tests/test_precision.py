"""Errors in float32 and float64 are those of rounding, at realistic numbers of classes."""

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest

import backends
import gklx
from cases import CASES, Case, loss_of, on, rounded
from closeness import assert_close, assert_near
from gklx._core.formulas import exponential_remainder

pytestmark = pytest.mark.version_independent

NUMPY = backends.BACKENDS[0]
MANY = [case for case in CASES if case.prior == ""]


def logits(rng, kind, rows, classes):
    s, t = 3.0 * rng.standard_normal((2, rows, classes))
    if kind == "offsets":
        s, t = s - 1e4, t + 1e4
    elif kind == "confident":  # both networks are confident of the same class
        s[:, 0] += 20.0
        t[:, 0] += 18.0
    elif kind == "confident-teacher":
        t[:, 1] += 25.0
    elif kind == "opposed":
        s[:, 0] += 60.0
        t[:, 1] += 60.0
    elif kind == "wide":
        s, t = 5.0 * s, 5.0 * t
    return s, t


@cache
def everything_on(name):
    """All losses with their gradients, on a backend; cached, so that JAX compiles once per shape."""
    return backends.BY_NAME[name].wrap(lambda s, t: [gklx.value_and_grad(loss_of(case), (0, 1))(s, t) for case in MANY])


@pytest.mark.parametrize("kind", ["plain", "offsets", "confident", "confident-teacher", "opposed", "wide"])
@pytest.mark.parametrize(("classes", "ulps"), [(10, 32), (1_000, 32), (100_000, 128)])
def test_float32_gradients_are_within_rounding(backend, kind, classes, ulps, monkeypatch):
    if backend.name in ("dask", "numpy-readonly", "strict-device1") and classes == 100_000:
        pytest.skip(f"{backend.name} runs what another backend runs at this size")
    if backend.costly and not backends.EXHAUSTIVE and classes == 1_000 and kind != "plain":
        pytest.skip("another number of classes has this kind")
    if backend.name == "jax-jit":  # for one CPU programs have a branch, and sums, of their own
        monkeypatch.setattr("jax.device_count", lambda: 1)
    s, t = logits(np.random.default_rng(1), kind, 4 if classes > 10 else 64, classes)
    given_s, given_t, _ = on(backend, "float32", s, t, {})
    exact_s, exact_t, _ = rounded(backend, "float32", s, t, {})

    even = kind in ("plain", "offsets")
    for case, (value, found) in zip(MANY, everything_on(backend.name)(given_s, given_t), strict=True):
        exact_value, exact = gklx.value_and_grad(loss_of(case), (0, 1))(exact_s, exact_t)
        # A normaliser 1 + tiny rounds to 1: the value of a confident row is known to a unit of 1.
        assert_close(value, exact_value, backend, "float32", ulps=ulps, scale=0.0 if even else 1.0)
        for gradient, expected in zip(found, exact, strict=True):
            scale = 0.0 if even else scale_of(exact_s, exact_t)
            assert_close(gradient, expected, backend, "float32", ulps=ulps, scale=scale)


def scale_of(s, t):
    """The size of the summands of mu in each row. They may cancel to any smaller number.

    For such rows the float32 result is the exact gradient of logits that differ by a rounding error. No formula in
    float32 can do better: d_j - d_k is known only to a unit of |t_j| + |s_j|, measured from the maxima.
    """
    t, s = t - t.max(axis=-1, keepdims=True), s - s.max(axis=-1, keepdims=True)
    p = np.exp(t) / np.exp(t).sum(axis=-1, keepdims=True)
    spread = (p * (1 - p) * (abs(t) + abs(s))).max(axis=-1, keepdims=True)
    return spread / len(s)


@pytest.mark.numpy_alone
@pytest.mark.parametrize("kind", ["plain", "offsets"])
@pytest.mark.parametrize(("classes", "ulps"), [(10, 32), (1_000, 32), (100_000, 128)])
@pytest.mark.parametrize("case", [case for case in CASES if case.prior], ids=lambda case: case.id)
def test_float32_gradients_under_a_prior_are_within_rounding(case, kind, classes, ulps):
    if case.prior == "labels" and classes == 100_000:
        pytest.skip("a table of 100,000 x 100,000 classes takes 40 GB")
    rng = np.random.default_rng(4)
    s, t = logits(rng, kind, 4 if classes > 10 else 64, classes)
    given = {"prior": rng.dirichlet(np.ones(classes), size=len(s) if case.prior == "rows" else classes)}
    if case.prior == "labels":
        given["labels"] = rng.integers(0, classes, len(s))
    given_s, given_t, arrays = on(NUMPY, "float32", s, t, given)
    exact_s, exact_t, exact = rounded(NUMPY, "float32", s, t, given)
    run = gklx.value_and_grad(loss_of(case), (0, 1))
    value, found = run(given_s, given_t, **arrays)
    exact_value, expected = run(exact_s, exact_t, **exact)
    assert_close(value, exact_value, NUMPY, "float32", ulps=ulps)
    for gradient, row in zip(found, expected, strict=True):
        assert_close(gradient, row, NUMPY, "float32", ulps=ulps)


@pytest.mark.numpy_alone
@pytest.mark.parametrize("kernel", ["1", "0"], ids=["kernel", "formulas"])
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_kl_of_close_rows_keeps_its_digits(size, kernel, monkeypatch):
    """KL is of second order in the difference; the plain sum of p (log p - log q) keeps none of it at 1e-4.

    What is lost is what the logits' own rounding, of 3e-7 at most, is to the difference.
    """
    monkeypatch.setenv("GKLX_KERNEL", kernel)
    rng = np.random.default_rng(2)
    t = (3 * rng.standard_normal((50, 1_000))).astype("float32")
    s = (t + size * rng.standard_normal(t.shape)).astype("float32")
    found = gklx.kl(s, t, reduction="none")
    exact = gklx.kl(s.astype("float64"), t.astype("float64"), reduction="none")
    relative = np.abs(found - exact) / exact
    assert relative.max() < 2e-6 + 3e-9 / size
    assert abs(((found - exact) / exact).mean()) < 2e-7 + 2e-9 / size
    assert (found >= 0).all()
    pairwise = gklx.kl(t, t, reduction="none")
    assert_near(pairwise.astype("float64"), np.zeros(50), "float32", ulps=0)


@pytest.mark.numpy_alone
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponential_remainder(dtype):
    """Against the series in fractions."""
    x = np.concatenate([np.linspace(-1, 1, 401), 10.0 ** np.arange(-18, 0), -(10.0 ** np.arange(-18, 0))]).astype(dtype)
    found = exponential_remainder(np, x)
    for each, y in zip(x, found, strict=True):
        exact = sum(Fraction(-float(each)) ** k / math.factorial(k) for k in range(2, 30))
        assert abs(Fraction(float(y)) - exact) <= 4 * Fraction(float(np.finfo(dtype).eps)) * exact


@pytest.mark.numpy_alone
def test_float64_results_are_within_rounding():
    import oracle

    rng = np.random.default_rng(3)
    for kind in ("plain", "offsets", "confident"):  # opposed rows are beyond the oracle's plain formulas
        s, t = logits(rng, kind, 8, 40)
        for case in MANY:
            value, (to_s, to_t) = gklx.value_and_grad(loss_of(case), (0, 1))(s, t)
            expected, exact_s, exact_t = oracle.evaluate(case.loss, s, t, **case.settings)
            assert_near(value, expected, "float64", ulps=32, scale=1.0)
            assert_near(to_s, exact_s, "float64", ulps=32, scale=scale_of(s, t))
            # Logits some 25 below their maximum: the difference is rounded by up to 8 units of what its exponential is
            # known to, and a gradient takes several of those.
            assert_near(to_t, exact_t, "float64", ulps=40, scale=scale_of(s, t))


@pytest.mark.numpy_alone
def test_power_of_an_underflowing_probability_is_kept():
    """exp(-150) is 0 in float32, but its power 0.1 is not."""
    s, t = np.zeros((1, 3), dtype="float32"), np.asarray([[0.0, -150.0, -1.0]], dtype="float32")
    case = Case("", "gkl", {"gamma": 0.1})
    found = gklx.grad(loss_of(case), 1)(s, t)
    exact = gklx.grad(loss_of(case), 1)(s.astype("float64"), t.astype("float64"))
    assert_close(found, exact, NUMPY, "float32", ulps=8)
    assert abs(exact[0, 1]) > 1e-5
