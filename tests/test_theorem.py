"""KL and DKL have the same gradients, for student and teacher, at all logits and temperatures.

The package computes both gradients by one formula, so the theorem is tested on the definitions first.
"""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import gklx
import oracle
from cases import Case, call, on
from closeness import assert_close, assert_near

pytestmark = pytest.mark.version_dependent_jax

LOGITS = arrays("float64", (2, 3, 5), elements=st.floats(-30, 30))
TEMPERATURES = st.floats(0.25, 8)


@settings(max_examples=60)
@given(logits=LOGITS, temperature=TEMPERATURES)
def test_definitions_of_kl_and_dkl_have_equal_gradients(logits, temperature):
    s, t = logits
    _, kl_s, kl_t = oracle.evaluate("kl", s, t, temperature=temperature)
    _, dkl_s, dkl_t = oracle.evaluate("dkl", s, t, temperature=temperature)
    np.testing.assert_allclose(dkl_s, kl_s, rtol=0, atol=1e-13 * np.abs(kl_s).max() + 1e-15)
    np.testing.assert_allclose(dkl_t, kl_t, rtol=0, atol=1e-12 * np.abs(kl_t).max() + 1e-13)


@settings(max_examples=60)
@given(logits=LOGITS, temperature=TEMPERATURES)
def test_dkl_gradient_of_the_package_is_that_of_kls_definition(logits, temperature):
    s, t = logits
    _, kl_s, kl_t = oracle.evaluate("kl", s, t, temperature=temperature)
    to_s, to_t = gklx.grad(gklx.dkl, (0, 1))(s, t, temperature=temperature)
    np.testing.assert_allclose(to_s, np.asarray(kl_s, dtype="float64"), rtol=0, atol=1e-14)
    np.testing.assert_allclose(to_t, np.asarray(kl_t, dtype="float64"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("mask", ["none", "elements", "samples", "absent"])
def test_kl_and_dkl_gradients_are_equal_on_every_backend(backend, mask, temperature):
    s, t, masks = call(Case("", "kl", {}), mask)
    s, t, given_ = on(backend, "float64", s, t, masks)
    of_kl, of_dkl = (
        backend.wrap(gklx.grad(partial(loss, temperature=temperature), (0, 1)))(s, t, **given_)
        for loss in (gklx.kl, gklx.dkl)
    )
    for one, other in zip(of_kl, of_dkl, strict=True):
        assert_close(other, backend.numpy(one), backend, "float64", ulps=16)


def test_values_of_kl_and_dkl_differ():
    s, t, _ = call(Case("", "kl", {}), "none")
    p = np.exp(t) / np.exp(t).sum(axis=-1, keepdims=True)
    d = t - s
    variance = (p * d**2).sum(axis=-1) - (p * d).sum(axis=-1) ** 2
    ce = gklx.kl(s, t, reduction="none") - (p * np.log(p)).sum(axis=-1)
    assert_near(gklx.dkl(s, t, reduction="none"), variance / 2 + ce, "float64", ulps=64)
    assert abs(gklx.dkl(s, t) - gklx.kl(s, t)) > 1.0
