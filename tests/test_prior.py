"""The class prior on every library: sums are additive, and a restored prior continues exactly."""

import numpy as np
import pytest

import gklx
from closeness import assert_close, assert_near

pytestmark = pytest.mark.version_dependent_jax

C = 4


def batch(seed=0, n=12, classes=(0, 1, 3)):
    rng = np.random.default_rng(seed)
    return 2 * rng.standard_normal((n, C)), rng.choice(classes, n)


def definition(logits, labels, temperature=1.0, weights=None):
    sums = np.zeros((C, C))
    for i, label in enumerate(labels):
        p = np.exp(logits[i] / temperature)
        sums[label] += (1.0 if weights is None else weights[i]) * p / p.sum()
    return sums


def test_class_sums_are_those_of_the_definition(backend, dtype):
    logits, labels = batch()
    weights = np.random.default_rng(1).random(12)
    found = backend.wrap(lambda x, y, v: gklx.class_sums(x, y, C, temperature=2.0, sample_weight=v))(
        backend.array(logits, dtype), backend.array(labels), backend.array(weights)
    )
    wide = "float64" if dtype == "float64" else "float32"
    expected = definition(backend.rounded(logits, dtype), labels, 2.0, weights)
    assert_close(found, expected, backend, wide, ulps=32, like=backend.array(logits))


def test_class_sums_accept_any_batch_axes_and_absent_classes(backend):
    logits, labels = batch()
    logits[:, 2] = -np.inf
    found = gklx.class_sums(backend.array(logits.reshape(3, 4, C)), backend.array(labels.reshape(3, 4)), C)
    assert_close(found, definition(logits, labels), backend, "float64", ulps=32)


def test_class_sums_ignore_samples_of_weight_zero(backend):
    logits, labels = batch()
    weights = np.ones(12)
    weights[[2, 5]] = 0
    expected = definition(np.delete(logits, [2, 5], axis=0), np.delete(labels, [2, 5]))
    logits[2], labels[5] = np.nan, -100
    found = gklx.class_sums(backend.array(logits), backend.array(labels), C, sample_weight=backend.array(weights))
    assert_close(found, expected, backend, "float64", ulps=32)


def test_invalid_label_is_an_error_or_gives_nan(backend):
    logits, labels = batch()
    labels[3] = C
    call = backend.wrap(lambda x, y: gklx.class_sums(x, y, C))
    x, y = backend.array(logits), backend.array(labels)
    if backend.library.readable(x) and not backend.traced:
        with pytest.raises(ValueError, match=r"^labels must lie in \[0, 4\), got 4 at index \[3\]$"):
            call(x, y)
    else:
        assert np.isnan(backend.numpy(call(x, y))).any()


def test_table_is_the_mean_softmax_of_the_previous_epoch(backend):
    (x1, y1), (x2, y2) = batch(1), batch(2, classes=(1, 2))
    prior = gklx.ClassPrior(C, temperature=2.0, like=backend.array(x1))
    uniform = np.full((C, C), 1 / C)
    assert_close(prior.table, uniform, backend, "float64", ulps=0)
    for part in (slice(0, 5), slice(5, None)):
        prior.update(backend.array(x1[part]), backend.array(y1[part]))
    assert_close(prior.table, uniform, backend, "float64", ulps=0)
    prior.advance()
    first = definition(x1, y1, 2.0)
    seen = first.sum(axis=-1) > 0
    expected = np.where(seen[:, None], first / np.where(seen, first.sum(axis=-1), 1)[:, None], uniform)
    assert_close(prior.table, expected, backend, "float64", ulps=32)
    prior.update(backend.array(x2), backend.array(y2))
    prior.advance()
    second = definition(x2, y2, 2.0)
    expected[[1, 2]] = (second / np.where(second.sum(axis=-1), second.sum(axis=-1), 1)[:, None])[[1, 2]]
    assert_close(prior.table, expected, backend, "float64", ulps=32)
    prior.advance()  # nothing seen: every row stays
    assert_close(prior.table, expected, backend, "float64", ulps=32)


def test_table_can_be_the_prior_of_a_loss(backend):
    logits, labels = batch()
    prior = gklx.ClassPrior(C)
    x, y = backend.array(logits, "float32"), backend.array(labels)
    prior.update(x, y)
    prior.advance()
    value = gklx.gkl(0.5 * x, x, prior=prior.table, labels=y, gamma=0.5)
    table = definition(backend.rounded(logits, "float32"), labels)
    seen = table.sum(axis=-1) > 0
    expected = np.where(seen[:, None], table / np.where(seen, table.sum(axis=-1), 1)[:, None], 1 / C)
    assert_close(prior.table, expected, backend, "float32", ulps=16)
    assert np.isfinite(backend.numpy(value))


def test_merged_shards_equal_one_update_with_all(backend):
    logits, labels = batch()
    x, y = backend.array(logits), backend.array(labels)
    whole, one, other, idle = (gklx.ClassPrior(C) for _ in range(4))
    whole.update(x, y)
    one.update(x[:5, :], y[:5])
    other.update(x[5:, :], y[5:])
    one.merge(other)
    one.merge(idle)
    idle.merge(one)
    for prior in (whole, one, idle):
        prior.advance()
    assert_close(one.table, backend.numpy(whole.table), backend, "float64", ulps=8)
    assert_close(idle.table, backend.numpy(whole.table), backend, "float64", ulps=8)


@pytest.mark.parametrize("width", ["float32", "float64"])
def test_restored_prior_continues_exactly(backend, width):
    if width not in backend.library.dtypes:
        pytest.skip(f"{backend.name} has no {width}")
    (x1, y1), (x2, y2) = batch(1), batch(2)
    first = backend.array(x1, width), backend.array(y1)
    then = backend.array(x2, width), backend.array(y2)
    for started in (0, 1, 2):
        kept = gklx.ClassPrior(C)
        if started:
            kept.update(*first)
        if started > 1:
            kept.advance()
            kept.update(*then)
        state = kept.state_dict()
        assert all(isinstance(x, (int, float, np.ndarray)) for x in state.values())
        restored = gklx.ClassPrior(C)
        restored.load_state_dict(state)
        for prior in (kept, restored):
            prior.update(*then)
            prior.advance()
        assert_close(restored.table, backend.numpy(kept.table), backend, width, ulps=0)


def test_loaded_state_is_on_the_library_and_device_of_like(backend):
    logits, labels = batch()
    source = gklx.ClassPrior(C)
    source.update(logits, labels)
    source.advance()
    x = backend.array(logits)
    prior = gklx.ClassPrior(C, like=x)
    prior.load_state_dict(source.state_dict())
    assert_close(prior.table, source.table, backend, "float64", ulps=0, like=x)


def test_state_dict_is_a_copy():
    prior = gklx.ClassPrior(C)
    prior.update(*batch())
    state = prior.state_dict()
    state["table"][:] = 7
    state["sums"][:] = 7
    prior.advance()
    assert prior.table.max() <= 1


def test_table_of_an_unused_prior_is_uniform_in_numpy():
    table = gklx.ClassPrior(3).table
    assert isinstance(table, np.ndarray)
    assert_near(table, np.full((3, 3), 1 / 3), "float64", ulps=0)


def test_class_prior_raises_the_documented_errors():
    prior = gklx.ClassPrior(C, temperature=2.0)
    for wrong, kind in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(kind, match=r"^num_classes must be"):
            gklx.ClassPrior(wrong)
    with pytest.raises(ValueError, match=r"^temperature must be above 0, got 0$"):
        gklx.ClassPrior(C, temperature=0)
    with pytest.raises(TypeError, match=r"^like must be an array of a known library, got list$"):
        gklx.ClassPrior(C, like=[1.0])
    with pytest.raises(TypeError, match=r"^like must be float16, bfloat16, float32 or float64, got int64$"):
        gklx.ClassPrior(C, like=np.zeros(1, dtype="int64"))
    with pytest.raises(TypeError, match=r"^other must be a ClassPrior, got dict$"):
        prior.merge({})
    with pytest.raises(ValueError, match=r"^other must have temperature 2.0, got 1.0$"):
        prior.merge(gklx.ClassPrior(C))
    with pytest.raises(ValueError, match=r"^other must have num_classes 4, got 3$"):
        prior.merge(gklx.ClassPrior(3, temperature=2.0))
    state = prior.state_dict()
    with pytest.raises(ValueError, match=r"^state must have the keys .*, got \['table'\]$"):
        prior.load_state_dict({"table": state["table"]})
    with pytest.raises(ValueError, match=r"^state must have temperature 2.0, got 3.0$"):
        prior.load_state_dict({**state, "temperature": 3.0})
    with pytest.raises(ValueError, match=r"^state must have temperature .*, got \[1. 1.\]$"):
        prior.load_state_dict({**state, "temperature": np.ones(2)})
    for wrong in ("no", 2, np.asarray([1, 0])):
        with pytest.raises(ValueError, match=r"^state must have settled 0 or 1, got "):
            prior.load_state_dict({**state, "settled": wrong})
    with pytest.raises(ValueError, match=r"^state must hold sums without negative numbers, got -0.25$"):
        prior.load_state_dict({**state, "sums": -state["table"]})
    with pytest.raises(TypeError, match=r"^state must be a mapping, got NoneType$"):
        prior.load_state_dict(None)
    with pytest.raises(
        ValueError, match=r"^state must hold table as float32 or float64 \(4, 4\), got float64 \(3, 3\)$"
    ):
        prior.load_state_dict({**state, "table": np.zeros((3, 3))})


def test_prior_must_stay_in_one_library_and_on_one_device():
    strict = pytest.importorskip("array_api_strict")
    prior = gklx.ClassPrior(C)
    logits, labels = batch()
    prior.update(logits, labels)
    with pytest.raises(TypeError, match=r"^logits must be of this prior's library, NumPy, got array-api-strict$"):
        prior.update(strict.asarray(logits), strict.asarray(labels))
    state = gklx.ClassPriorState.uniform(C, like=logits)
    with pytest.raises(TypeError, match=r"^logits must be an array of the library of this state, NumPy, got one of a"):
        state.update(strict.asarray(logits), strict.asarray(labels))
    with pytest.raises(TypeError, match=r"^logits must be an array of NumPy, "):
        state.update([[0.0] * C], labels)
    there = gklx.ClassPrior(C, like=strict.asarray(logits, device=strict.Device("device1")))
    with pytest.raises(ValueError, match=r"^logits must be on this prior's device, .*device1.*, got .*CPU.*$"):
        there.update(strict.asarray(logits), strict.asarray(labels))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_logits_affect_only_the_row_of_their_class(backend, dtype, bad):
    """The sums are a matrix product, in which 0 · NaN is NaN."""
    logits, labels = batch()
    logits = backend.rounded(logits, dtype).copy()
    spoiled = np.flatnonzero(labels == 1)[0]
    expected = definition(logits, labels)
    logits[spoiled, 2] = bad
    expected[1] = np.nan
    call = backend.wrap(lambda x, y: gklx.class_sums(x, y, C))
    with np.errstate(invalid="ignore"):  # NumPy's warning of inf - inf
        found = call(backend.array(logits, dtype), backend.array(labels))
    wide = "float64" if dtype == "float64" else "float32"
    assert_close(found, expected, backend, wide, ulps=32)


def test_unchecked_invalid_weight_affects_only_the_row_of_its_class(backend):
    logits, labels = batch()
    x, y = backend.array(logits), backend.array(labels)
    if backend.library.readable(x) and not backend.traced:
        pytest.skip("a bad weight is an error here")
    for bad in (-1.0, np.nan, np.inf):
        weights = np.ones(12)
        weights[np.flatnonzero(labels == 3)[0]] = bad
        expected = definition(logits, labels)
        expected[3] = np.nan
        call = backend.wrap(lambda x, y, v: gklx.class_sums(x, y, C, sample_weight=v))
        assert_close(call(x, y, backend.array(weights)), expected, backend, "float64", ulps=32)


def test_nan_of_one_class_does_not_reach_other_rows_of_the_table(backend):
    logits, labels = batch()
    prior = gklx.ClassPrior(C, like=backend.array(logits))
    logits[np.flatnonzero(labels == 0)[0], 1] = np.nan
    prior.update(backend.array(logits), backend.array(labels))
    prior.advance()
    expected = definition(logits, labels)
    assert np.isnan(expected[0]).all()
    expected[2] = expected[0] = 1.0  # not seen, or not known: it keeps its uniform row
    expected /= expected.sum(axis=1, keepdims=True)
    assert_close(prior.table, expected, backend, "float64", ulps=32)
    logits, labels = batch()
    prior.update(backend.array(logits), backend.array(labels))
    prior.advance()
    assert np.isfinite(backend.numpy(prior.table)).all()


def test_table_is_nan_where_all_sums_are(backend):
    """As after a label that names no class where labels are not read, which must not pass unnoticed."""
    logits, _ = batch()
    prior = gklx.ClassPrior(C, like=backend.array(logits))
    logits[:, 0] = np.nan
    prior.update(backend.array(np.concatenate([logits] * C)), backend.array(np.repeat(np.arange(C), len(logits))))
    prior.advance()
    assert np.isnan(backend.numpy(prior.table)).all()
