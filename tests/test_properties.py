"""Properties for arbitrary logits: identities of the losses, shifts, permutations, splits, weights of 0."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import gklx
from cases import CASES, LOSSES, call, loss_of
from closeness import assert_close, assert_near

LOGITS = arrays("float64", (2, 4, 6), elements=st.floats(-20, 20))
ANY_CASE = st.sampled_from(CASES)


def value_and_gradients(case, s, t, arrays):
    value, gradients = gklx.value_and_grad(loss_of(case), (0, 1))(s, t, **arrays)
    return value, np.stack(gradients)


def arrays_of(case, mask="none"):
    _, _, arrays = call(case, mask, batch=(4,), classes=6)
    return arrays


@pytest.mark.numpy_alone
@given(case=ANY_CASE, logits=LOGITS, shift=arrays("float64", (2, 4, 1), elements=st.integers(-1000, 1000)))
def test_constant_added_to_a_row_changes_nothing(case, logits, shift):
    logits = np.round(logits * 2**20) / 2**20  # so that the shifted logits are exact
    value, gradients = value_and_gradients(case, *logits, arrays_of(case))
    shifted, shifted_gradients = value_and_gradients(case, *(logits + shift), arrays_of(case))
    assert_near(shifted, value, "float64", ulps=0)
    assert_near(shifted_gradients, gradients, "float64", ulps=0)


@pytest.mark.numpy_alone
@given(case=ANY_CASE, logits=LOGITS)
def test_each_gradient_row_sums_to_zero(case, logits):
    _, gradients = value_and_gradients(case, *logits, arrays_of(case))
    size = np.abs(gradients).sum(axis=-1)
    assert (np.abs(gradients.sum(axis=-1)) <= 1e-13 * size + 1e-16).all()


@pytest.mark.numpy_alone
@given(case=ANY_CASE, logits=LOGITS, order=st.permutations(range(6)))
def test_permuting_the_classes_permutes_the_gradient(case, logits, order):
    given_, order = arrays_of(case), np.asarray(order)
    value, gradients = value_and_gradients(case, *logits, given_)
    if "labels" in given_:
        inverse = np.argsort(order)
        given_ = {"prior": given_["prior"][order][:, order], "labels": inverse[given_["labels"]]}
    elif "prior" in given_:
        given_ = {"prior": given_["prior"][:, order]}
    permuted, permuted_gradients = value_and_gradients(case, *logits[..., order], given_)
    np.testing.assert_allclose(permuted, value, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(
        permuted_gradients, gradients[..., order], rtol=0, atol=1e-13 * np.abs(gradients).max() + 1e-15
    )


@pytest.mark.numpy_alone
@given(case=ANY_CASE, logits=LOGITS, cut=st.integers(0, 4))
def test_loss_of_a_batch_is_the_sum_over_its_parts(case, logits, cut):
    """Samples are independent, except through GKL's batch normaliser, which is off here."""
    s, t = logits
    given_ = arrays_of(case)
    settings = {**case.settings, **({"normalize": "samples"} if case.loss == "gkl" else {})}
    loss = partial(LOSSES[case.loss], **settings, reduction="sum")
    whole, of_whole = gklx.value_and_grad(loss, (0, 1))(s, t, **given_)
    total, pieces = 0.0, []
    for part in (slice(0, cut), slice(cut, None)):
        piece = {name: x if name == "prior" and "labels" in given_ else x[part] for name, x in given_.items()}
        value, gradients = gklx.value_and_grad(loss, (0, 1))(s[part], t[part], **piece)
        total, pieces = total + value, [*pieces, np.stack(gradients)]
    np.testing.assert_allclose(total, whole, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), np.stack(of_whole), rtol=1e-13, atol=1e-15)


@pytest.mark.numpy_alone
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@given(logits=LOGITS, junk=st.sampled_from([np.nan, np.inf, -np.inf, 1e308]))
def test_samples_of_weight_zero_are_as_if_absent(case, logits, junk):
    s, t = logits.copy()
    given_ = arrays_of(case)
    weights = np.asarray([1.0, 0.0, 2.0, 0.0])
    s[1], t[3], s[3, 2] = junk, junk, np.nan
    if "labels" in given_:
        given_["labels"][1] = -100
    some = weights > 0
    left = {name: x if name == "prior" and "labels" in given_ else x[some] for name, x in given_.items()}
    value, gradients = value_and_gradients(case, s[some], t[some], {**left, "sample_weight": weights[some]})
    full, full_gradients = value_and_gradients(case, s, t, {**given_, "sample_weight": weights})
    np.testing.assert_allclose(full, value, rtol=1e-14)
    np.testing.assert_allclose(full_gradients[:, some], gradients, rtol=1e-13, atol=1e-300)
    assert (full_gradients[:, ~some] == 0).all()
    entries = loss_of(case, reduction="none")(s, t, **given_, sample_weight=weights)
    assert (entries[~some] == 0).all()


@pytest.mark.numpy_alone
@given(logits=LOGITS, temperature=st.floats(0.5, 5))
def test_asymmetric_gkl_has_the_gradients_of_dkl(logits, temperature):
    gkl = partial(
        gklx.gkl, symmetric=False, normalize="samples", temperature=temperature, weight_temperature=temperature,
        mse_weight=1 / temperature**2,
    )  # fmt: skip
    dkl = partial(gklx.dkl, temperature=temperature)
    for one, other in zip(gklx.grad(gkl, (0, 1))(*logits), gklx.grad(dkl, (0, 1))(*logits), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.numpy_alone
@given(logits=LOGITS)
def test_gkl_with_gamma_one_is_ikl(logits):
    rng = np.random.default_rng(0)
    prior, labels = rng.dirichlet(np.ones(6), size=6), rng.integers(0, 6, 4)
    for given_ in ({}, {"prior": prior, "labels": labels}):
        ikl = gklx.value_and_grad(gklx.ikl, (0, 1))(*logits, **given_)
        for normalize in ("samples", "batch"):
            gkl = gklx.value_and_grad(partial(gklx.gkl, normalize=normalize), (0, 1))(*logits, **given_)
            np.testing.assert_allclose(gkl[0], ikl[0], rtol=1e-13)
            np.testing.assert_allclose(np.stack(gkl[1]), np.stack(ikl[1]), rtol=1e-12, atol=1e-15)


@pytest.mark.numpy_alone
@given(logits=LOGITS, weights=arrays("float64", 4, elements=st.floats(0.1, 3)))
def test_reductions_agree_with_each_other(logits, weights):
    for case in CASES:
        entries, total, mean = (
            loss_of(case, reduction=each)(*logits, **arrays_of(case), sample_weight=weights)
            for each in ("none", "sum", "mean")
        )
        tiny = np.finfo("float64").tiny  # below it a number has fewer digits
        np.testing.assert_allclose(entries.sum(), total, rtol=1e-13, atol=tiny)
        np.testing.assert_allclose(total / weights.sum(), mean, rtol=1e-13, atol=tiny)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_boolean_and_integer_weights_are_cast(backend, case):
    s, t, given_ = call(case, "none")
    given_ = {name: backend.array(x) for name, x in given_.items()}
    s, t = backend.array(s), backend.array(t)
    weights = np.asarray([1, 0, 1, 1, 0])
    expected = loss_of(case)(s, t, **given_, sample_weight=backend.array(weights.astype("float64")))
    for dtype in ("bool", "int64", "uint8"):
        found = loss_of(case)(s, t, **given_, sample_weight=backend.array(weights.astype(dtype)))
        assert_close(found, backend.numpy(expected), backend, "float64", ulps=0)


@pytest.mark.numpy_alone
def test_prior_rows_raised_before_or_after_selection_are_equal():
    """Large batches raise the whole table to the power gamma, small ones the rows of their labels."""
    rng = np.random.default_rng(5)
    prior, labels = rng.dirichlet(np.ones(6), size=6), rng.integers(0, 6, 40)
    s, t = rng.standard_normal((2, 40, 6))
    loss = partial(gklx.gkl, gamma=0.3, normalize="samples", reduction="none")
    whole = loss(s, t, prior=prior, labels=labels)
    pieces = [loss(s[i : i + 2], t[i : i + 2], prior=prior, labels=labels[i : i + 2]) for i in range(0, 40, 2)]
    assert_near(np.concatenate(pieces), whole, "float64", ulps=0)
