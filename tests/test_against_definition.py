"""Every loss and its gradients, on every backend and dtype, against the definition over all pairs of classes."""

import pytest

import gklx
import oracle
from cases import CASES, MASKS, call, loss_of, on, rounded
from closeness import assert_close, ulps_of


@pytest.mark.supports("analytic gradients", "PyTorch", "JAX", "NumPy", "Dask")
@pytest.mark.supports("mixed precision", "NumPy", "Dask")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_value_and_gradients_are_those_of_the_definition(backend, dtype, case, mask):
    s, t, arrays = call(case, mask)
    given_s, given_t, given = on(backend, dtype, s, t, arrays)
    exact_s, exact_t, exact = rounded(backend, dtype, s, t, arrays)
    wide = "float64" if dtype == "float64" else "float32"

    def everything(s, t, arrays):  # in one function, which a compiler compiles once
        both = [gklx.value_and_grad(loss_of(case, reduction=each), (0, 1))(s, t, **arrays) for each in ("mean", "sum")]
        return both, loss_of(case)(s, t, **arrays), loss_of(case, reduction="none")(s, t, **arrays)

    (mean, total), alone, entries = backend.wrap(everything)(given_s, given_t, given)
    for reduction, (got, (got_s, got_t)) in (("mean", mean), ("sum", total)):
        value, to_s, to_t = oracle.evaluate(case.loss, exact_s, exact_t, **case.settings, **exact, reduction=reduction)
        assert_close(got, value, backend, wide, ulps=32, like=given_s)
        assert_close(got_s, to_s, backend, dtype, ulps=ulps_of(dtype), like=given_s)
        assert_close(got_t, to_t, backend, dtype, ulps=ulps_of(dtype), like=given_s)
        if reduction == "mean":
            assert_close(alone, value, backend, wide, ulps=32, like=given_s)
    value, _, _ = oracle.evaluate(case.loss, exact_s, exact_t, **case.settings, **exact, reduction="none")
    assert_close(entries, value, backend, wide, ulps=32, like=given_s, by="entry")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)], ids=str)
def test_any_batch_axes_are_accepted(backend, case, batch):
    s, t, arrays = call(case, "none", batch=batch)
    value, to_s, to_t = oracle.evaluate(case.loss, s, t, **case.settings, **arrays)
    given_s, given_t, given = on(backend, "float64", s, t, arrays)
    got, (got_s, got_t) = backend.wrap(gklx.value_and_grad(loss_of(case), (0, 1)))(given_s, given_t, **given)
    assert_close(got, value, backend, "float64", ulps=32)
    assert_close(got_s, to_s, backend, "float64", ulps=32)
    assert_close(got_t, to_t, backend, "float64", ulps=32)


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", ["int", "uint"])
def test_labels_of_any_integer_dtype(backend, kind, bits):
    """Also where it has no number for the last of the classes."""
    case = next(case for case in CASES if case.id == "gkl-prior")
    s, t, arrays = call(case, "none", classes=300)
    labels = arrays.pop("labels") % 100
    given_s, given_t, given = on(backend, "float32", s, t, arrays)
    loss = backend.wrap(loss_of(case))
    expected = loss(given_s, given_t, labels=backend.array(labels), **given)
    found = loss(given_s, given_t, labels=backend.array(labels.astype(f"{kind}{bits}")), **given)
    assert backend.numpy(found) == backend.numpy(expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.loss != "kl"], ids=lambda case: case.id)
def test_terms_are_wmse_and_ce_and_sum_to_the_loss(backend, case):
    s, t, arrays = call(case, "samples")
    given_s, given_t, given = on(backend, "float64", s, t, arrays)
    parts = backend.wrap(gklx.terms(loss_of(case)))(given_s, given_t, **given)
    for part, off in (("mse", "ce_weight"), ("ce", "mse_weight")):
        value, _, _ = oracle.evaluate(case.loss, s, t, **{**case.settings, off: 0.0}, **arrays)
        assert_close(getattr(parts, part), value, backend, "float64", ulps=32)
    whole = backend.wrap(loss_of(case))(given_s, given_t, **given)
    assert_close(parts.mse + parts.ce, backend.numpy(whole), backend, "float64", ulps=4)


def test_loss_of_one_class_is_zero(backend):
    one = backend.array([[3.0], [-2.0]])
    other = backend.array([[1.0], [5.0]])
    for loss in (gklx.kl, gklx.dkl, gklx.ikl, gklx.gkl):
        value, gradients = backend.wrap(gklx.value_and_grad(loss, (0, 1)))(one, other)
        assert_close(value, 0.0, backend, "float64", ulps=0)
        for gradient in gradients:
            assert_close(gradient, [[0.0], [0.0]], backend, "float64", ulps=0)


def test_student_and_teacher_may_differ_in_dtype(backend):
    s, t, _ = call(CASES[0], "none")
    student, teacher = backend.array(s, "float32"), backend.array(t, "float64")
    value, to_s, to_t = oracle.evaluate("gkl", backend.rounded(s, "float32"), t)
    got, (got_s, got_t) = gklx.value_and_grad(gklx.gkl, (0, 1))(student, teacher)
    assert_close(got, value, backend, "float64", ulps=32)
    assert_close(got_s, to_s, backend, "float32", ulps=1)
    assert_close(got_t, to_t, backend, "float64", ulps=32)


def test_argnums_choose_gradients_as_in_jax(backend):
    # The kernel has a loop for one gradient and one for both; a compiler need not contract them alike.
    ulps = 4 if backend.execution == "kernel" else 0
    s, t, _ = call(CASES[0], "none")
    s, t = backend.array(s), backend.array(t)
    both = gklx.grad(gklx.ikl, argnums=(1, 0))(s, t)
    assert isinstance(both, tuple)
    assert_close(gklx.grad(gklx.ikl)(s, t), backend.numpy(both[1]), backend, "float64", ulps=ulps)
    assert_close(gklx.grad(gklx.ikl, argnums=1)(s, t), backend.numpy(both[0]), backend, "float64", ulps=ulps)
    (alone,) = gklx.grad(gklx.ikl, argnums=[1])(s, t)
    assert_close(alone, backend.numpy(both[0]), backend, "float64", ulps=ulps)
