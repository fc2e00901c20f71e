"""Rows worked off in blocks: the same numbers as all at once, and a peak of memory of a few blocks."""

import math
import sys
import tracemalloc
import weakref
from functools import partial

import numpy as np
import pytest

import backends
import gklx
from backends import BY_NAME
from cases import CASES, MASKS, call, loss_of, on
from closeness import assert_close
from gklx import _blocks, _libraries, _sweep

# In blocks of 2 rows of 7 classes: parts of one axis, whole slices of the first, parts of the second.
KINDS = ("kl", "dkl-T", "gkl-tau", "gkl-prior", "gkl-rows", "gkl-asymmetric")
SHAPES = ((5,), (3, 2), (3, 3), (3, 1, 2))


@pytest.fixture
def torch():
    backends.needs("torch")
    import torch

    return torch


@pytest.fixture
def blocks_of(monkeypatch):
    torch = sys.modules.get("torch")
    if torch is not None:  # its blocks grow with its threads
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def set_bytes(size):
        monkeypatch.setattr(_libraries, "_BLOCK_ON_CPU", size)

    return set_bytes


def outcomes(case, s, t, given):
    values = [loss_of(case, reduction=how)(s, t, **given) for how in ("mean", "sum", "none")]
    gradients = [g for how in ("mean", "sum") for g in gklx.grad(loss_of(case, reduction=how), (0, 1))(s, t, **given)]
    return values, gradients


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", [case for case in CASES if case.id in KINDS], ids=lambda case: case.id)
def test_blocks_are_the_whole(backend, case, mask, blocks_of):
    if backend.library.block(backend.array([0.0])) == 0:
        pytest.skip(f"{backend.name} is given all rows at once")
    for shape in SHAPES:
        s, t, given = on(backend, "float64", *call(case, mask, batch=shape))
        blocks_of(2**40)
        whole = outcomes(case, s, t, given)
        blocks_of(2 * 7 * 8)
        parts = outcomes(case, s, t, given)
        for one, other in zip(parts[0], whole[0], strict=True):
            assert_close(backend.xp.asarray(one), backend.numpy(other), backend, "float64", ulps=4, by="entry")
        for one, other in zip(parts[1], whole[1], strict=True):
            # PyTorch's exponential rounds by an entry's place in a vector register, which blocks change.
            assert_close(one, backend.numpy(other), backend, "float64", ulps=16)


@pytest.mark.parametrize("shape", [(2, 3, 7), (3, 7), (7,), (1, 3, 7), (2, 1, 7), (2, 3, 1), (1, 1, 1)])
def test_where_of_fewer_axes_follows_its_block(backend, shape, blocks_of):
    if backend.library.block(backend.array([0.0])) == 0:
        pytest.skip(f"{backend.name} is given all rows at once")
    s, t, _ = call(CASES[0], "none", batch=(2, 3))
    where = np.random.default_rng(0).random(shape) < 0.7
    blocks_of(7 * 8)
    found = gklx.grad(gklx.gkl)(backend.array(s), backend.array(t), where=backend.array(where))
    expected = gklx.grad(gklx.gkl)(s, t, where=np.broadcast_to(where, s.shape).copy())
    assert_close(found, expected, backend, "float64", ulps=16)


def test_one_row_may_be_larger_than_a_block(blocks_of):
    s, t, _ = call(CASES[0], "none")
    expected = gklx.grad(gklx.gkl)(s, t)
    blocks_of(1)
    assert_close(gklx.grad(gklx.gkl)(s, t), expected, BY_NAME["numpy"], "float64", ulps=4)
    assert gklx.grad(gklx.gkl)(s[0], t[0]).shape == (7,)


# --- rows that are looked at ------------------------------------------------------------------------------------------


@pytest.fixture
def nobody_looks(monkeypatch):
    """Call it, and all rows take the way of those of which nobody knows anything."""
    return lambda: monkeypatch.setattr(_sweep, "moderate", lambda problem: 0.0)


def looks(backend):
    """Goes on where values may be read."""
    if backend.library.lazy:
        pytest.skip(f"{backend.name} computes later: nobody looks at its rows")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_ordinary_rows_come_out_as_with_the_masks(backend, case, wide, nobody_looks):
    """Nor does a `where` that is True everywhere change anything."""
    looks(backend)
    s, t, given = on(backend, wide, *call(case, "none", batch=(5,)))
    where = {"where": backend.array(np.ones((5, 7), dtype=bool))}
    plain, harmless = outcomes(case, s, t, given), outcomes(case, s, t, given | where)
    nobody_looks()
    masked = outcomes(case, s, t, given | where)
    for found in (plain, harmless):
        for one, other in zip(found[0], masked[0], strict=True):
            assert_close(backend.xp.asarray(one), backend.numpy(other), backend, wide, ulps=8, by="entry")
        for one, other in zip(found[1], masked[1], strict=True):
            assert_close(one, backend.numpy(other), backend, wide, ulps=8)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_does_not_count_does_no_harm_without_masks_either(backend, case, mask, nobody_looks):
    """Not a class alone, nor a whole sample; its gradient is exactly 0."""
    looks(backend)
    s, t, given = call(case, mask, batch=(6,))
    s[1, :], t[1, :] = -np.inf, -np.inf
    s[2, 3], t[2, 3] = -np.inf, -np.inf
    s, t, given = on(backend, "float64", s, t, given)
    found = outcomes(case, s, t, given)
    nobody_looks()
    masked = outcomes(case, s, t, given)
    for one, other in zip(found[0], masked[0], strict=True):
        assert_close(backend.xp.asarray(one), backend.numpy(other), backend, "float64", ulps=16, by="entry")
    for one, other in zip(found[1], masked[1], strict=True):
        assert_close(one, backend.numpy(other), backend, "float64", ulps=16)
        assert ((backend.numpy(one) == 0) >= (backend.numpy(other) == 0)).all()


# From a student's and a teacher's ordinary row to one that is not.
EXTREMES = {
    "absent": lambda s, t: (-np.inf, -np.inf),
    "nan": lambda s, t: (np.nan, t),
    "infinite": lambda s, t: (np.where(np.arange(7) == 2, -np.inf, s), t),
    "opposite": lambda s, t: (s, np.where(np.arange(7) == 2, np.inf, t)),
    "large": lambda s, t: (1e200 * s, t),
}


@pytest.mark.parametrize("row", [0, 4])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("case", [case for case in CASES if case.id in KINDS], ids=lambda case: case.id)
def test_a_row_that_is_not_ordinary_is_found_in_whichever_block(backend, case, extreme, row, blocks_of):
    """The sums of an ordinary batch are taken for granted only until then."""
    if backend.library.block(backend.array([0.0])) == 0:
        pytest.skip(f"{backend.name} is given all rows at once")
    s, t, given = call(case, "none", batch=(5,))
    s[row], t[row] = EXTREMES[extreme](s[row], t[row])
    s, t, given = on(backend, "float64", s, t, given)
    blocks_of(2**40)
    with np.errstate(all="ignore"):
        whole = outcomes(case, s, t, given)
        blocks_of(2 * 7 * 8)
        parts = outcomes(case, s, t, given)
    for one, other in zip((*parts[0], *parts[1]), (*whole[0], *whole[1]), strict=True):
        np.testing.assert_allclose(backend.numpy(one), backend.numpy(other), rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("weight", [None, 0.0, 2.0])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("case", [case for case in CASES if case.id in KINDS], ids=lambda case: case.id)
def test_rows_presumed_ordinary_come_out_as_with_the_masks(torch, case, extreme, weight, blocks_of, monkeypatch):
    """PyTorch does not look beforehand."""
    s, t, given = call(case, "none", batch=(5,))
    s[3], t[3] = EXTREMES[extreme](s[3], t[3])
    if weight is not None:
        given["sample_weight"] = np.asarray([1.0, 2.0, 0.5, weight, 1.0])
    s, t, given = on(BY_NAME["torch"], "float64", s, t, given)
    for how in ("mean", "sum"):
        run = gklx.value_and_grad(loss_of(case, reduction=how), (0, 1))
        with monkeypatch.context() as masks:
            masks.setattr(_sweep, "moderate", lambda problem: 0.0)
            value, gradients = run(s, t, **given)
        for size in (2**40, 2 * 7 * 8):
            blocks_of(size)
            found, (to_student, to_teacher) = run(s, t, **given)
            assert_close(found, value.numpy(), BY_NAME["torch"], "float64", ulps=16)
            assert_close(to_student, gradients[0].numpy(), BY_NAME["torch"], "float64", ulps=16)
            assert_close(to_teacher, gradients[1].numpy(), BY_NAME["torch"], "float64", ulps=16)


def test_after_a_block_that_is_not_ordinary_none_is_presumed_so(torch, monkeypatch, blocks_of):
    presumed = []

    def sweep(problem, *args, **asked):
        presumed.append(problem.presumed)
        return _sweep.sweep_rows(problem, *args, **asked)

    monkeypatch.setattr(_blocks, "sweep_rows", sweep)
    s, t, _ = call(CASES[0], "none", batch=(8,))
    s[2, 0] = t[2, 0] = -np.inf
    blocks_of(2 * 7 * 8)
    gklx.value_and_grad(gklx.gkl)(torch.tensor(s), torch.tensor(t))
    assert presumed == [True, True, False, False, False]


def test_the_sums_of_an_ordinary_batch_are_made_once(monkeypatch, blocks_of):
    """KL's mean and GKL's normaliser are known where the teacher's own probabilities weigh; a power of them is not.

    A prior's is a sum that takes no look at a logit, unless its table is longer than the batch.
    """
    runs = []
    monkeypatch.setattr(_blocks, "totals", lambda problem: runs.append(1) or _sweep.totals(problem))
    s, t, given = call(next(case for case in CASES if case.id == "gkl-prior"), "none", batch=(8,))
    rows = {"prior": given["prior"][given["labels"]]}
    blocks_of(2 * 7 * 8)
    half = partial(gklx.gkl, gamma=0.5)
    for loss, more, expected in (
        (gklx.kl, {}, 0),
        (gklx.gkl, {}, 0),
        (half, {}, 4),
        (half, given, 0),
        (half, rows, 0),
        (gklx.gkl, given, 0),
        (gklx.gkl, {"prior": given["prior"], "labels": given["labels"][:6]}, 3),
    ):
        runs.clear()
        samples = len(more.get("labels", s))
        gklx.grad(loss)(s[:samples], t[:samples], **more)
        assert len(runs) == expected


@pytest.mark.parametrize("samples", [5, 9])
def test_a_label_of_no_weight_may_name_no_class_in_any_block(backend, samples, blocks_of):
    """Of a table of 7 rows, of which the samples may be fewer or more."""
    if backend.library.block(backend.array([0.0])) == 0:
        pytest.skip(f"{backend.name} is given all rows at once")
    case = next(case for case in CASES if case.id == "gkl-prior")
    s, t, given = call(case, "none", batch=(samples,))
    given["sample_weight"] = np.arange(samples) % 3 / 2.0
    given["labels"][given["sample_weight"] == 0] = -3
    s, t, given = on(backend, "float64", s, t, given)
    blocks_of(2**40)
    whole = outcomes(case, s, t, given)
    blocks_of(2 * 7 * 8)
    parts = outcomes(case, s, t, given)
    for one, other in zip((*parts[0], *parts[1]), (*whole[0], *whole[1]), strict=True):
        assert np.isfinite(backend.numpy(other)).all()
        np.testing.assert_allclose(backend.numpy(one), backend.numpy(other), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", ["table", "rows", "few samples"])
def test_a_prior_is_raised_once_on_its_smaller_side(monkeypatch, blocks_of, kind):
    raised = []
    original = _sweep._prior_weights

    def counted(problem, prior):
        if problem.numbers.gamma != 1.0:
            raised.append(prior.shape)
        return original(problem, prior)

    monkeypatch.setattr(_sweep, "_prior_weights", counted)
    samples = 4 if kind == "few samples" else 40
    s, t, given = call(next(case for case in CASES if case.id == "gkl-prior"), "none", batch=(samples,))
    if kind == "rows":
        given = {"prior": given["prior"][given["labels"]]}
    blocks_of(2**40)
    whole = gklx.value_and_grad(gklx.gkl, (0, 1))(s, t, gamma=0.3, **given)
    assert raised == [(min(samples, 7) if kind != "rows" else samples, 7)]
    raised.clear()
    blocks_of(2 * 7 * 8)
    value, gradients = gklx.value_and_grad(gklx.gkl, (0, 1))(s, t, gamma=0.3, **given)
    assert raised == [(min(samples, 7) if kind != "rows" else samples, 7)]
    assert_close(np.asarray(value), whole[0], BY_NAME["numpy"], "float64", ulps=4)
    for one, other in zip(gradients, whole[1], strict=True):
        assert_close(one, other, BY_NAME["numpy"], "float64", ulps=4)


# --- programs that JAX compiles ---------------------------------------------------------------------------------------


@pytest.fixture
def one_cpu(monkeypatch):
    """JAX with the one device that its looks and loops are for."""
    backends.needs("jax")
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    return jax


@pytest.fixture
def loops(one_cpu, monkeypatch):
    """And blocks of 2 rows of 7 classes."""
    monkeypatch.setattr("gklx._autodiff._jax_loop._FROM_BYTES", 0)
    monkeypatch.setattr("gklx._autodiff._jax_loop._BLOCK_BYTES", 2 * 7 * 8)
    return one_cpu


def unusual(s, t, given):
    """The same call where a row is not ordinary, in each way in which it may not be."""
    for name, extreme in EXTREMES.items():
        a, b = s.copy(), t.copy()
        a[3], b[3] = extreme(s[3], t[3])
        yield name, a, b, given
        yield f"{name}, of no weight", a, b, given | {"sample_weight": np.asarray([1.0, 0.5, 2.0, 0.0, 1.0])}
    if "prior" in given:
        for name, weight in {"negative": -0.5, "unbounded": np.inf, "nan": np.nan}.items():
            prior = given["prior"].copy()
            prior[3, 4] = weight
            yield f"{name} prior", s, t, given | {"prior": prior}


@pytest.mark.parametrize("case", [case for case in CASES if case.id in (*KINDS, "gkl")], ids=lambda case: case.id)
def test_a_program_with_a_look_in_it_computes_what_one_without_does(case, one_cpu, monkeypatch):
    backend = BY_NAME["jax"]
    s, t, given = call(case, "none", batch=(5,))
    given |= {"sample_weight": np.asarray([1.0, 0.5, 2.0, 3.0, 1.0])}

    def both(s, t, given):
        by_jax = one_cpu.grad(partial(loss_of(case), **given), (0, 1))(s, t)
        return [*outcomes(case, s, t, given)[0], *outcomes(case, s, t, given)[1], *by_jax]

    with_a_look = one_cpu.jit(lambda *given: both(*given))
    for name, *these in [("ordinary", s, t, given), *unusual(s, t, given)]:
        these = on(backend, "float64", *these)
        monkeypatch.setattr(one_cpu, "device_count", lambda: 1)
        found = with_a_look(*these)
        monkeypatch.setattr(one_cpu, "device_count", lambda: 2)
        expected = one_cpu.jit(both)(*these)
        for one, other in zip(found, expected, strict=True):
            scale = np.nanmax(np.abs(np.where(np.isfinite(other), other, 0.0)))
            np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-14 * scale, err_msg=name)


def test_the_branch_without_masks_is_that_of_ordinary_rows_alone(one_cpu, monkeypatch):
    """It is spoilt here, so that what takes it gives itself away."""
    monkeypatch.setattr("gklx._autodiff._jax_look._together", lambda xs: [np.nan + x.sum(axis=-1) for x in xs])
    case = next(case for case in CASES if case.id == "gkl-rows")
    s, t, given = call(case, "none", batch=(5,))
    loss = one_cpu.jit(loss_of(case, reduction="sum"))
    assert np.isnan(loss(s, t, **given))
    assert all(np.isnan(x) for x in one_cpu.vmap(loss)(s, t, **given))
    absent = np.full((1, 7), -np.inf)
    s, t = np.concatenate([s, absent]), np.concatenate([t, absent])
    given = {"prior": np.concatenate([given["prior"], np.ones((1, 7))])}
    assert np.isfinite(loss(s, t, **given))
    # The ordinary samples beside the one that is not, too: a branch for each would compute both for all.
    assert all(np.isfinite(x) for x in one_cpu.vmap(loss)(s, t, **given))


@pytest.mark.parametrize("classes", [1, 3, 1_000, 1_009, 50_257, 100_000])
def test_sums_in_one_reading_keep_their_digits(classes, one_cpu):
    from gklx._autodiff import _jax_look

    rng = np.random.default_rng(0)
    xs = [np.exp(rng.standard_normal((8, classes))).astype(np.float32) for _ in range(3)]
    for x, found in zip(xs, one_cpu.jit(_jax_look._together)([one_cpu.numpy.asarray(x) for x in xs]), strict=True):
        exact = x.astype(np.float64).sum(axis=-1)
        assert np.max(np.abs(np.asarray(found) - exact) / np.spacing(exact.astype(np.float32))) <= 4


@pytest.mark.parametrize("mask", ["none", "elements", "samples"])
@pytest.mark.parametrize("case", [case for case in CASES if case.id in KINDS], ids=lambda case: case.id)
def test_a_loop_is_the_whole(case, mask, loops):
    s, t, given = call(case, mask, batch=(3, 4))
    expected = outcomes(case, s, t, given)
    backend = BY_NAME["jax"]
    s, t, given = on(backend, "float64", s, t, given)

    def both(s, t, given):
        loss = partial(loss_of(case, reduction="mean"), **given)
        return outcomes(case, s, t, given), loops.grad(loss, (0, 1))(s, t)

    looped = loops.jit(both)
    assert " while(" in looped.lower(s, t, given).as_text(dialect="hlo")
    (values, gradients), by_jax = looped(s, t, given)
    for one, other in zip(values, expected[0], strict=True):
        assert_close(one, other, backend, "float64", ulps=16, by="entry")
    for one, other in zip((*gradients, *by_jax), (*expected[1], *expected[1][:2]), strict=True):
        assert_close(one, other, backend, "float64", ulps=16)


def test_a_batch_that_does_not_divide_is_not_looped_over(loops, monkeypatch):
    monkeypatch.setattr("gklx._autodiff._jax_loop._BLOCK_BYTES", 8 * 7 * 8)
    s, t, _ = call(CASES[0], "none", batch=(23,))
    text = loops.jit(gklx.kl).lower(*(loops.numpy.asarray(x) for x in (s, t))).as_text(dialect="hlo")
    assert " while(" not in text


@pytest.mark.parametrize("blocks", [True, False])
def test_a_look_and_a_loop_differentiate_again_and_map(blocks, loops, monkeypatch):
    if not blocks:
        monkeypatch.setattr("gklx._autodiff._jax_loop._FROM_BYTES", 2**40)
    backend = BY_NAME["jax"]
    s, t, _ = on(backend, "float64", *call(CASES[0], "none", batch=(2, 6)))

    def all_of(s, t):
        of_one = loops.vmap(loops.value_and_grad(gklx.gkl, (0, 1)))(s, t)
        product = loops.jvp(loops.grad(gklx.gkl), (s, t), (t, s))
        return of_one, product, loops.hessian(gklx.kl)(s[0], t[0]), loops.jacrev(loops.grad(gklx.kl, 1))(s[0], t[0])

    looped = loops.tree.leaves(loops.jit(lambda s, t: all_of(s, t))(s, t))
    monkeypatch.setattr(loops, "device_count", lambda: 2)
    for one, other in zip(looped, loops.tree.leaves(loops.jit(all_of)(s, t)), strict=True):
        assert_close(one, np.asarray(other), backend, "float64", ulps=32)


def test_a_tangent_for_a_hyper_parameter_is_an_error_at_any_order():
    backends.needs("jax")
    jax = pytest.importorskip("jax")
    s, t, _ = on(BY_NAME["jax"], "float64", *call(CASES[0], "none"))
    with pytest.raises(TypeError, match="gamma must be held constant"):
        jax.grad(lambda gamma: jax.grad(lambda s: gklx.gkl(s, t, gamma=gamma))(s).sum())(0.5)


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_half_gradients_take_the_upstream_gradient_of_their_block(dtype, reduction, blocks_of):
    """They are made in the backward pass: times the upstream gradient, then rounded once."""
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    case = next(case for case in CASES if case.id == "gkl-prior")
    s, t, given = on(BY_NAME["torch"], dtype, *call(case, "none", batch=(3, 4)))
    blocks_of(2 * 7 * 4)
    upstream = torch.linspace(0.3, 3.0, 12).reshape(3, 4) if reduction == "none" else torch.tensor(2.9)
    student, teacher = s.clone().requires_grad_(), t.clone().requires_grad_()
    loss_of(case, reduction=reduction)(student, teacher, **given).backward(upstream)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    a, b = s.double().requires_grad_(), t.double().requires_grad_()
    loss_of(case, reduction=reduction)(a, b, **wide).backward(upstream.double())
    assert_close(student.grad, a.grad.numpy(), BY_NAME["torch"], dtype, ulps=1)
    assert_close(teacher.grad, b.grad.numpy(), BY_NAME["torch"], dtype, ulps=1)


# --- vocabulary-size logits -------------------------------------------------------------------------------------------

VOCABULARY = 150_000


class Peak:
    """The largest number of bytes that PyTorch's operations held at a time, beyond what was there before."""

    def __init__(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        outer, self.now, self.most, self.seen = self, 0, 0, set()

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                known = {outer.key(x) for x in args if hasattr(x, "untyped_storage")}
                found = function(*args, **(kwargs or {}))
                for x in found if isinstance(found, (tuple, list)) else (found,):
                    if hasattr(x, "untyped_storage") and outer.key(x) not in known | outer.seen:
                        outer.hold(x.untyped_storage())
                return found

        self.mode = Mode()

    @staticmethod
    def key(x):
        return x.untyped_storage()._cdata

    def hold(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.seen.discard(key)
        self.now -= size


def padded(torch, dtype):
    """[B, T, C] logits of 2 sequences, the second half padding."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 32, VOCABULARY, generator=generator).to(dtype) for _ in range(2))
    weight = torch.ones(2, 32)
    weight[1, 16:] = 0
    s[1, 16:] = torch.nan
    return s, t, weight


@pytest.mark.supports("memory of a few row blocks", "PyTorch")
@pytest.mark.parametrize("wanted", [(True, False), (True, True)], ids=["student", "both"])
def test_torch_vocabulary_size_bfloat16_keeps_to_a_few_row_blocks(monkeypatch, wanted):
    """Forward and backward; a row of 150,000 classes in float32 is 600 KB, and a block holds a row or two a thread."""
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    s, t, weight = padded(torch, torch.bfloat16)
    s.requires_grad_(wanted[0]), t.requires_grad_(wanted[1])
    peak = Peak()
    with peak.mode:
        gklx.gkl(s, t, gamma=0.5, sample_weight=weight).backward()
    gradients = sum(wanted) * s.numel() * 2
    row = VOCABULARY * 4
    assert gradients < peak.most < gradients + 24 * row
    assert 24 * row < s.numel() * 2  # the bound means something
    kept = weight.bool()
    exact = gklx.grad(partial(gklx.gkl, gamma=0.5))(s.detach()[kept].double()[:4], t.detach()[kept].double()[:4])
    assert (s.grad[~kept] == 0).all()
    assert s.grad[kept].isfinite().all()
    # The first rows, to the one rounding: with the whole batch's normaliser in place of their own.
    mine, theirs = s.grad[kept][:4].double(), exact
    ratio = (mine * theirs).sum() / (theirs * theirs).sum()
    assert 0 < ratio < 1


@pytest.mark.supports("memory of a few row blocks", "NumPy")
def test_numpy_vocabulary_size_half_keeps_to_a_few_row_blocks(monkeypatch):
    """A thread; each has its own."""
    monkeypatch.setenv("GKLX_NUM_THREADS", "1")
    rng = np.random.default_rng(0)
    s, t = (rng.standard_normal((2, 16, VOCABULARY), dtype=np.float32).astype(np.float16) for _ in range(2))
    weight = np.ones((2, 16), dtype=bool)
    weight[1, 8:] = False
    gklx.value_and_grad(gklx.gkl)(s[0, :1], t[0, :1])  # imports what it needs
    tracemalloc.start()
    value, to_student = gklx.value_and_grad(gklx.gkl)(s, t, gamma=0.5, sample_weight=weight)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert math.isfinite(value)
    assert to_student.nbytes < most < to_student.nbytes + 16 * VOCABULARY * 4


def test_jax_vocabulary_size_bfloat16_takes_what_the_page_says(monkeypatch):
    """As XLA plans it, beyond inputs and gradient: four arrays in float32, the gradient and the logits among them."""
    backends.needs("jax")
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    logits = jax.ShapeDtypeStruct((8, 16, VOCABULARY), jax.numpy.bfloat16)
    weight = jax.ShapeDtypeStruct((8, 16), jax.numpy.float32)
    compiled = jax.jit(jax.value_and_grad(partial(gklx.gkl, gamma=0.5))).lower(logits, logits, sample_weight=weight)
    taken = compiled.compile().memory_analysis().temp_size_in_bytes
    assert taken < 17 * logits.size


@pytest.mark.parametrize("classes", [1000, 4096, 4097])
def test_torch_softmax_is_taken_where_it_is_as_exact(classes, monkeypatch):
    """Its sum is a plain one, which loses digits where there are many classes."""
    backends.needs("torch")
    import torch

    taken, softmax = [], torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: taken.append(x.shape) or softmax(x, dim=dim))
    s, t = torch.randn((2, 64, classes), generator=torch.Generator().manual_seed(0)) * 3
    found = gklx.grad(gklx.gkl, (0, 1))(s, t)
    assert bool(taken) == (classes <= 4096)
    exact = gklx.grad(gklx.gkl, (0, 1))(s.numpy().astype("float64"), t.numpy().astype("float64"))
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other, BY_NAME["torch"], "float32", ulps=32)
