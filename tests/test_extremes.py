"""Infinities, NaN, empty batches and weights of 0: the expected results, on every backend."""

from functools import partial

import numpy as np
import pytest

import backends
import gklx
from cases import CASES, LOSSES, call, loss_of
from closeness import assert_close

pytestmark = pytest.mark.version_dependent_jax

INF, NAN = np.inf, np.nan
EYE = np.eye(3) * 0.4 + 0.2


def run(backend, loss, s, t, **given):
    arrays = {name: backend.array(x) for name, x in given.items()}
    return backend.wrap(gklx.value_and_grad(loss, (0, 1)))(backend.array(s), backend.array(t), **arrays)


@pytest.mark.parametrize("name", ["kl", "dkl"])
def test_class_of_teacher_logit_minus_infinity_contributes_nothing(backend, name):
    value, (to_s, to_t) = run(backend, LOSSES[name], [[1.0, 2.0, 0.5]], [[0.0, -INF, 1.0]])
    near, (near_s, near_t) = run(backend, LOSSES[name], [[1.0, 2.0, 0.5]], [[0.0, -800.0, 1.0]])
    assert_close(value, backend.numpy(near), backend, "float64", ulps=4)
    assert_close(to_s, backend.numpy(near_s), backend, "float64", ulps=4)
    assert_close(to_t, backend.numpy(near_t), backend, "float64", ulps=4)
    assert backend.numpy(to_t)[0, 1] == 0.0


@pytest.mark.parametrize("loss", [*LOSSES.values(), partial(gklx.gkl, gamma=0.0)], ids=[*LOSSES, "gkl-0"])
def test_class_of_student_logit_minus_infinity_makes_the_loss_infinite(backend, loss):
    value, (to_s, to_t) = run(backend, loss, [[1.0, -INF, 0.5], [0.0, 1.0, 2.0]], [[0.0, 0.5, 1.0], [0.0, 1.0, 1.0]])
    assert_close(value, INF, backend, "float64", ulps=0)
    to_s, to_t = backend.numpy(to_s), backend.numpy(to_t)
    # The gradient away from that class is infinite, which is right; NaN would be wrong.
    assert to_t[0].tolist() == [-INF, INF, -INF]
    assert not np.isnan(to_s).any()
    assert np.isfinite(to_s[1]).all()
    assert np.isfinite(to_t[1]).all()


def test_kl_is_infinite_even_if_the_teachers_probability_underflows(backend):
    value, _ = run(backend, gklx.kl, [[0.0, -INF]], [[0.0, -2000.0]])
    assert_close(value, INF, backend, "float64", ulps=0)


def test_infinite_difference_with_a_prior_makes_the_wmse_infinite(backend):
    loss = partial(gklx.gkl, ce_weight=0.0)
    s, labels = [[0.0, 1.0, 2.0]], np.asarray([1])
    value, (to_s, to_t) = run(backend, loss, s, [[0.0, -INF, 1.0]], prior=EYE, labels=labels)
    assert_close(value, INF, backend, "float64", ulps=0)
    assert backend.numpy(to_t)[0].tolist() == [INF, -INF, INF]
    assert backend.numpy(to_s)[0].tolist() == [-INF, INF, -INF]
    # A class of weight 0 has no influence.
    weightless = np.asarray([[1.0, 0.0, 1.0]])
    value, _ = run(backend, loss, s, [[0.0, -INF, 1.0]], prior=weightless)
    finite, _ = run(backend, loss, s, [[0.0, 7.0, 1.0]], prior=weightless)
    assert_close(value, backend.numpy(finite), backend, "float64", ulps=4)


def test_opposite_infinite_differences_make_the_wmse_infinite(backend):
    value, _ = run(backend, partial(gklx.ikl, ce_weight=0.0), [[0.0, -INF, 2.0]], [[-INF, 1.0, 1.0]],
                   prior=EYE, labels=np.asarray([0]))  # fmt: skip
    assert_close(value, INF, backend, "float64", ulps=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("side", [0, 1])
def test_nan_logit_makes_only_its_own_sample_nan(backend, case, side):
    s, t, given = call(case, "none")
    (s, t)[side][1, 2] = NAN
    loss = loss_of(case, reduction="none")
    arrays = {name: backend.array(x) for name, x in given.items()}
    entries = backend.numpy(loss(backend.array(s), backend.array(t), **arrays))
    assert np.isnan(entries[1])
    if case.settings.get("normalize", "samples") == "samples" and case.loss != "gkl":
        assert np.isfinite(np.delete(entries, 1)).all()


def test_masked_nan_does_not_reach_the_gradient(backend):
    where = np.asarray([True, True, False])
    for case in CASES:
        if case.prior:
            continue
        s, t = [[1.0, 2.0, NAN], [NAN, 1.0, 0.0]], [[0.0, 1.0, INF], [1.0, 1.0, -INF]]
        _, gradients = run(backend, loss_of(case), s, t, where=where)
        for gradient in gradients:
            assert (backend.numpy(gradient)[:, 2] == 0.0).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_loss_of_a_batch_without_weight_is_zero(backend, case):
    s, t, given = call(case, "none")
    s[0], t[1] = NAN, INF
    value, gradients = run(backend, loss_of(case), s, t, **given, sample_weight=np.zeros(len(s)))
    assert_close(value, 0.0, backend, "float64", ulps=0)
    for gradient in gradients:
        assert_close(gradient, np.zeros_like(s), backend, "float64", ulps=0)
    value, gradients = run(backend, loss_of(case), s, t, **given, where=np.asarray(False))
    assert_close(value, 0.0, backend, "float64", ulps=0)
    for gradient in gradients:
        assert_close(gradient, np.zeros_like(s), backend, "float64", ulps=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_loss_of_an_empty_batch_is_zero(backend, case):
    if backend.library.lazy:
        pytest.skip("Dask has no maximum over chunks of no rows")
    s, t, given = call(case, "none", batch=(0,))
    value, gradients = run(backend, loss_of(case), s, t, **given)
    assert_close(value, 0.0, backend, "float64", ulps=0)
    for gradient in gradients:
        assert_close(gradient, np.zeros((0, 7)), backend, "float64", ulps=0)


def test_class_of_prior_zero_removes_its_infinite_difference(backend):
    s, t = [[0.0, -INF, 1.0]], [[0.0, 0.0, 1.0]]
    value, _ = run(backend, partial(gklx.ikl, ce_weight=0.0), s, t, prior=np.asarray([[1.0, 0.0, 1.0]]))
    assert np.isfinite(backend.numpy(value))


def test_half_precision_sums_do_not_overflow(backend):
    """Sum of w^2 over 300 samples of 300 classes at gamma = 0 is far beyond float16."""
    if "float16" not in backend.dtypes:
        pytest.skip(f"{backend.name} is not tested in float16")
    s, t = np.random.default_rng(0).standard_normal((2, 300, 300))
    loss = partial(gklx.gkl, gamma=0.0)
    value, (to_s, _) = backend.wrap(gklx.value_and_grad(loss, (0, 1)))(
        backend.array(s, "float16"), backend.array(t, "float16")
    )
    exact = gklx.gkl(backend.rounded(s, "float16"), backend.rounded(t, "float16"), gamma=0.0)
    assert_close(value, exact, backend, "float32", ulps=32)
    assert np.isfinite(backend.numpy(to_s)).all()


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("loss", [gklx.kl, gklx.dkl, gklx.ikl, partial(gklx.gkl, normalize="samples")])
def test_nan_takes_precedence_over_an_infinite_difference(backend, loss, network):
    """A row with a NaN logit is NaN, not infinite, though the student alone has a logit of −inf."""
    s = np.asarray([[0.0, -np.inf, 1.0, 0.5], [0.0, 2.0, 1.0, 0.5]])
    t = np.asarray([[0.0, 1.0, 0.5, 0.2], [1.0, 1.0, 0.5, 0.2]])
    (s if network == "student" else t)[0, 2] = np.nan
    with np.errstate(all="ignore"):
        found = backend.numpy(backend.wrap(partial(loss, reduction="none"))(backend.array(s), backend.array(t)))
    assert np.isnan(found[0])
    assert np.isfinite(found[1])


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_arrays_that_begin_between_two_numbers(library):
    """As a view of bytes may; the kernel gets aligned copies."""
    backends.needs(library)
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 9, 37)).astype("float32")
    prior, labels = rng.dirichlet(np.ones(37), 37).astype("float32"), rng.integers(0, 37, 9)

    def shifted(x):
        memory = np.zeros(x.nbytes + 1, np.uint8)[1:]
        view = memory.view(x.dtype).reshape(x.shape)
        view[...] = x
        assert not view.flags.aligned
        return view

    def results(*arrays):
        if library == "torch":
            import torch

            arrays = [torch.from_numpy(x) for x in arrays]
        s, t, prior, labels, weight = arrays
        given = {"prior": prior, "labels": labels, "sample_weight": weight, "gamma": 0.5}
        value, gradients = gklx.value_and_grad(gklx.gkl, (0, 1))(s, t, **given)
        return [np.asarray(x) for x in (value, *gradients)]

    arrays = s, t, prior, labels, rng.random(9)
    for found, expected in zip(results(*map(shifted, arrays)), results(*arrays), strict=True):
        assert (found == expected).all()


@pytest.mark.parametrize("kernel", ["1", "0"], ids=["kernel", "formulas"])
def test_numpy_does_not_warn(kernel, monkeypatch):
    """Of numbers that overflow or are NaN on the way."""
    backends.needs("numpy")
    monkeypatch.setenv("GKLX_KERNEL", kernel)
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 4, 5)).astype("float32")
    hot = np.where(np.arange(5) == 1, np.float32(INF), s)
    with np.errstate(all="raise"):
        for loss in LOSSES.values():
            for a, b, settings in ((s, t, {"temperature": 1.2e-38}), (hot, t, {}), (s * 1e38, t, {}), (t, -hot, {})):
                gklx.value_and_grad(partial(loss, **settings), (0, 1))(a.astype("float32"), b)
                loss(a, b, **settings)
