"""Dask's chunks: of any size, filtered to nothing or to an unknown size; each is a call of its own library."""

import re
import weakref

import numpy as np
import pytest

import gklx
from backends import needs
from gklx._run import blocks, cpu_library

N, C = 8, 3
KEEP = np.asarray([True, True, False, False, True, False, True, True])  # of the chunks of 2 rows one loses all
RNG = np.random.default_rng(7)
S, T = 3 * RNG.standard_normal((2, N, C))
S[4, 1] = T[4, 1] = -np.inf
LABELS, WEIGHTS = np.asarray([0, 2, 1, 0, 2, 1, 1, 0]), RNG.random(N)
TABLE = RNG.dirichlet(np.ones(C), C)
WHERE = RNG.random((N, C)) < 0.8
WHERE[:, 0] = True

LOSSES = {
    "kl": (gklx.kl, {}),
    "dkl": (gklx.dkl, {"temperature": 2.0}),
    "ikl": (gklx.ikl, {}),
    "ikl, table": (gklx.ikl, {"prior": TABLE, "labels": LABELS}),
    "gkl": (gklx.gkl, {"gamma": 0.5}),
    "gkl, table": (gklx.gkl, {"gamma": 0.5, "prior": TABLE, "labels": LABELS}),
    "gkl, rows": (gklx.gkl, {"prior": np.abs(T[:, ::-1])}),
}


def setup_module():
    needs("dask")


def filtered(x, known):
    import dask.array

    chunks = (2, *x.shape[1:])
    kept = dask.array.from_array(x, chunks)[dask.array.from_array(KEEP, 2)]
    if known:
        kept.compute_chunk_sizes()
    assert np.isnan(kept.shape[0]) == (not known)
    return kept


def compute(x):
    return np.asarray(x.compute(scheduler="synchronous"))


@pytest.mark.parametrize("known", [True, False], ids=["an empty chunk", "unknown sizes"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_agree_with_numpy(name, known, execution):
    loss, settings = LOSSES[name]
    here = {key: x[KEEP] if np.shape(x)[:1] == (N,) else x for key, x in settings.items()}
    there = {key: filtered(x, known) if np.shape(x)[:1] == (N,) else as_dask(x) for key, x in settings.items()}
    for masks in ({}, {"sample_weight": WEIGHTS}, {"where": WHERE}):
        own = {**here, **{key: x[KEEP] for key, x in masks.items()}}
        lazy = {**there, **{key: filtered(x, known) for key, x in masks.items()}}
        s, t = filtered(S, known), filtered(T, known)
        for reduction in ("mean", "sum", "none"):
            found = compute(loss(s, t, **lazy, reduction=reduction))
            np.testing.assert_allclose(found, loss(S[KEEP], T[KEEP], **own, reduction=reduction), rtol=1e-13)
        found = gklx.grad(loss, (0, 1))(s, t, **lazy)
        expected = gklx.grad(loss, (0, 1))(S[KEEP], T[KEEP], **own)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(compute(one), other, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("known", [True, False], ids=["an empty chunk", "unknown sizes"])
def test_class_prior_agrees_with_numpy(known):
    logits, labels, weights = (filtered(x, known) for x in (T, LABELS, WEIGHTS))
    for own, lazy in ((None, None), (WEIGHTS[KEEP], weights)):
        found = gklx.class_sums(logits, labels, C, sample_weight=lazy)
        expected = gklx.class_sums(T[KEEP], LABELS[KEEP], C, sample_weight=own)
        np.testing.assert_allclose(compute(found), expected, rtol=1e-14)
    prior, same = gklx.ClassPrior(C), gklx.ClassPrior(C)
    prior.update(logits, labels)
    same.update(T[KEEP], LABELS[KEEP])
    prior.advance()
    same.advance()
    np.testing.assert_allclose(compute(prior.table), same.table, rtol=1e-14)


def test_batch_axes_with_an_empty_chunk():
    import dask.array

    keep = dask.array.from_array(np.asarray([True, True, False, False]), 2)
    x = np.stack([S, T])[:, None].repeat(2, 1).reshape(4, N, C)
    logits = dask.array.from_array(x, (2, 4, C))[keep]
    labels = dask.array.from_array(np.stack([LABELS] * 4), (2, 4))[keep]
    logits.compute_chunk_sizes()
    labels.compute_chunk_sizes()
    np.testing.assert_allclose(compute(gklx.kl(logits, logits[:, ::-1])), gklx.kl(x[:2], x[:2, ::-1]), rtol=1e-13)
    found, expected = gklx.class_sums(logits, labels, C), gklx.class_sums(x[:2], np.stack([LABELS] * 2), C)
    np.testing.assert_allclose(compute(found), expected, rtol=1e-14)


def test_loss_of_a_batch_filtered_to_nothing_is_zero():
    import dask.array

    none = dask.array.from_array(S, (2, C))[dask.array.from_array(KEEP & ~KEEP, 2)]
    for loss in (gklx.kl, gklx.dkl, gklx.ikl, gklx.gkl):
        value, gradient = gklx.value_and_grad(loss)(none, none)
        assert compute(value) == 0
        assert compute(gradient).shape == (0, C)


@pytest.mark.parametrize("where_axes", [(0, 1, 2), (1, 2), (2,), (0,), (1,), ()], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_arrays_may_have_chunks_of_their_own(name, where_axes):
    """On all axes, the classes' too; a gradient has those of its logits."""
    import dask.array as da

    rng = np.random.default_rng(3)
    s, t = 3 * rng.standard_normal((2, 4, N, C))
    loss, settings = LOSSES[name]
    settings = dict(settings)
    if "labels" in settings:
        settings["labels"] = rng.integers(C, size=(4, N))
    elif "prior" in settings:
        settings["prior"] = rng.random((4, N, C))
    shape = [size if axis in where_axes else 1 for axis, size in enumerate((4, N, C))]
    where = rng.random(shape[min(where_axes, default=3) :]) < 0.8
    arrays = {key: x for key, x in settings.items() if np.ndim(x)}
    arrays |= {"sample_weight": rng.random((4, N)), "where": where}
    plain = {key: x for key, x in settings.items() if not np.ndim(x)}
    lazy = {key: da.from_array(x, chunks=tuple(max(1, size // 2) for size in x.shape)) for key, x in arrays.items()}
    own, other = da.from_array(s, chunks=(3, 5, 2)), da.from_array(t, chunks=(2, (2, 6), 1))
    expected, exact = gklx.value_and_grad(loss, (0, 1))(s, t, **plain, **arrays)
    value, gradients = gklx.value_and_grad(loss, (0, 1))(own, other, **plain, **lazy)
    np.testing.assert_allclose(compute(value), expected, rtol=1e-13)
    for logits, gradient, correct in zip((own, other), gradients, exact, strict=True):
        assert (gradient.chunks, gradient.dtype) == (logits.chunks, logits.dtype)
        np.testing.assert_allclose(compute(gradient), correct, rtol=1e-13, atol=1e-15)
    each = loss(own, other, **plain, **lazy, reduction="none")
    np.testing.assert_allclose(compute(each), loss(s, t, **plain, **arrays, reduction="none"), rtol=1e-13)


def test_logits_of_one_sample():
    s, t = as_dask(S[0]), as_dask(T[0])
    value, gradient = gklx.value_and_grad(gklx.gkl)(s, t, prior=as_dask(TABLE), labels=as_dask(np.asarray(1)))
    expected = gklx.value_and_grad(gklx.gkl)(S[0], T[0], prior=TABLE, labels=np.asarray(1))
    np.testing.assert_allclose(compute(value), expected[0], rtol=1e-14)
    np.testing.assert_allclose(compute(gradient), expected[1], rtol=1e-14)


def test_a_chunk_is_two_runs_of_the_execution_on_one_thread(execution, monkeypatch):
    """Formulas stay formulas, though kernels be allowed later. Samples that share nothing need one run."""
    import dask

    threads, formulas, run, evaluate = [], [], cpu_library.run, blocks.evaluate
    monkeypatch.setattr(cpu_library, "run", lambda request: threads.append(request.threads) or run(request))
    monkeypatch.setattr(blocks, "evaluate", lambda *a, **asked: formulas.append(1) or evaluate(*a, **asked))
    s, t = np.random.default_rng(0).standard_normal((2, 4 * 2**9, 2**9))
    for loss, runs in ((gklx.value_and_grad(gklx.gkl, (0, 1)), 2), (lambda s, t: gklx.kl(s, t, reduction="none"), 1)):
        found = loss(as_dask(s, 2**9), as_dask(t, 2**9))
        with monkeypatch.context() as later:
            later.setenv("GKLX_KERNEL", "1")
            dask.compute(found, scheduler="synchronous")
        assert threads == ([1] * 4 * runs if execution == "kernel" else [])
        assert len(formulas) == (0 if execution == "kernel" else 4)
        threads.clear()
        formulas.clear()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["kl", "gkl"])
def test_a_value_does_not_keep_the_logits(name, reduction):
    """Of chunks that are made when a task needs them, as those that are read from files."""
    import dask.array as da

    alive, most = set(), []

    def chunk(block_info=None):
        x = np.random.default_rng(len(most)).standard_normal((2, C))
        alive.add(id(x))
        weakref.finalize(x, alive.discard, id(x))
        most.append(len(alive))
        return x

    chunks = ((2,) * 20, (C,))
    s, t = (da.map_blocks(chunk, chunks=chunks, dtype=float, meta=np.empty((0, 0)), name=name) for name in "st")
    assert compute(LOSSES[name][0](s, t, reduction=reduction)).shape == ((40,) if reduction == "none" else ())
    assert len(most) == 40
    assert max(most) <= 4


def test_scales_of_chunks_that_differ(execution):
    """What is known of a chunk is kept relative to its own largest weights."""
    tiny, huge = 1e-300, 1e300
    weights, prior = np.asarray([tiny, tiny, 1, 1, 0, 0, huge, huge]), RNG.random((N, C)) + 0.1
    prior *= np.asarray([huge, huge, tiny, tiny, 1, 1, 1, 1])[:, None] ** 0.4
    given = {"sample_weight": weights, "prior": prior}
    for reduction in ("mean", "none"):
        found = gklx.gkl(
            as_dask(S, 2), as_dask(T, 2), **{key: as_dask(x, 2) for key, x in given.items()}, reduction=reduction
        )
        np.testing.assert_allclose(compute(found), gklx.gkl(S, T, **given, reduction=reduction), rtol=1e-13)


def test_number_of_tasks():
    """Every task costs Dask a millisecond or so: before optimisation a chunk has seven, two of them to read it."""
    s, t = (as_dask(x, 1) for x in (S, T))
    value, gradients = gklx.value_and_grad(gklx.gkl, (0, 1))(s, t)
    graphs = [dict(x.__dask_graph__()) for x in (value, *gradients)]
    assert len({key for graph in graphs for key in graph}) < 9 * N


def test_tasks_run_in_other_processes():
    s, t = as_dask(S, 3), as_dask(T, 3)
    value, gradient = gklx.value_and_grad(gklx.gkl)(s, t, gamma=0.5)
    expected = gklx.value_and_grad(gklx.gkl)(S, T, gamma=0.5)
    np.testing.assert_allclose(value.compute(scheduler="processes", num_workers=1), expected[0], rtol=1e-14)
    np.testing.assert_allclose(gradient.compute(scheduler="processes", num_workers=1), expected[1], rtol=1e-14)


def test_known_and_unknown_sizes_must_not_be_mixed():
    with pytest.raises(
        ValueError, match=re.escape("teacher_logits must have the shape of student_logits, [nan, 3], got [5, 3]")
    ):
        gklx.kl(filtered(S, known=False), filtered(T, known=True))


def test_number_of_classes_must_be_known():
    s = filtered(np.ascontiguousarray(np.tile(S, (1, 2)).T.repeat(2, 0)[:N]), known=False).T
    with pytest.raises(ValueError, match=r"^student_logits must have at least 1 class on the last axis, got .*nan\]$"):
        gklx.kl(s, s)


def as_dask(x, rows=None):
    """An array of one chunk, or of chunks of so many rows; a number as it is."""
    import dask.array

    if not isinstance(x, np.ndarray):
        return x
    return dask.array.from_array(x, (rows or x.shape[0], *x.shape[1:]) if x.ndim else ())
