"""Rows computed in blocks give the same numbers as all at once, with a memory peak of a few blocks."""

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
from gklx._core import libraries

# In blocks of 2 rows of 7 classes: parts of one axis, whole slices of the first, parts of the second.
KINDS = ("kl", "dkl-T", "gkl-tau", "gkl-prior", "gkl-rows", "gkl-asymmetric")
SHAPES = ((5,), (3, 2), (3, 3), (3, 1, 2))


@pytest.fixture
def set_block_bytes(monkeypatch):
    """A function that sets the size of a block in bytes. The kernel is off, since only the formulas have blocks."""
    monkeypatch.setenv("GKLX_KERNEL", "0")
    torch = sys.modules.get("torch")
    if torch is not None:  # its blocks grow with its threads
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def set_size(size):
        for name in ("_BLOCK_ON_CPU", "_BLOCK_ON_GPU"):
            monkeypatch.setattr(libraries, name, size)

    return set_size


def skip_without_blocks(backend):
    """Skip backends that do not run the formulas in blocks; each library is tested once."""
    if backend.execution == "kernel":
        pytest.skip(f"the kernel has no blocks; {backend.name}-formulas has them")
    if backend.library.block(backend.array([0.0])) == 0:
        pytest.skip(f"{backend.name} is given all rows at once")


def values_and_gradients(case, s, t, given):
    values = [loss_of(case, reduction=how)(s, t, **given) for how in ("mean", "sum", "none")]
    gradients = [g for how in ("mean", "sum") for g in gklx.grad(loss_of(case, reduction=how), (0, 1))(s, t, **given)]
    return values, gradients


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", [case for case in CASES if case.id in KINDS], ids=lambda case: case.id)
def test_blocks_give_the_results_of_the_whole_batch(backend, case, mask, set_block_bytes):
    skip_without_blocks(backend)
    for shape in SHAPES:
        s, t, arrays = call(case, mask, batch=shape)
        if "sample_weight" in arrays:  # of another size in each block
            arrays["sample_weight"] *= 8.0 ** np.arange(math.prod(shape)).reshape(shape)
        s, t, given = on(backend, "float64", s, t, arrays)
        set_block_bytes(2**40)
        whole = values_and_gradients(case, s, t, given)
        set_block_bytes(2 * 7 * 8)
        parts = values_and_gradients(case, s, t, given)
        for one, other in zip(parts[0], whole[0], strict=True):
            assert_close(backend.xp.asarray(one), backend.numpy(other), backend, "float64", ulps=4, by="entry")
        for one, other in zip(parts[1], whole[1], strict=True):
            # PyTorch's exponential rounds by an entry's place in a vector register, which blocks change.
            assert_close(one, backend.numpy(other), backend, "float64", ulps=16)


@pytest.mark.parametrize("shape", [(2, 3, 7), (3, 7), (7,), (1, 3, 7), (2, 1, 7), (2, 3, 1), (1, 1, 1)])
def test_broadcast_where_is_cut_with_its_block(backend, shape, set_block_bytes):
    skip_without_blocks(backend)
    s, t, _ = call(CASES[0], "none", batch=(2, 3))
    where = np.random.default_rng(0).random(shape) < 0.7
    set_block_bytes(7 * 8)
    found = gklx.grad(gklx.gkl)(backend.array(s), backend.array(t), where=backend.array(where))
    expected = gklx.grad(gklx.gkl)(s, t, where=np.broadcast_to(where, s.shape).copy())
    assert_close(found, expected, backend, "float64", ulps=16)


def test_row_may_be_larger_than_a_block(set_block_bytes):
    s, t, _ = call(CASES[0], "none")
    expected = gklx.grad(gklx.gkl)(s, t)
    set_block_bytes(1)
    assert_close(gklx.grad(gklx.gkl)(s, t), expected, BY_NAME["numpy"], "float64", ulps=4)
    assert gklx.grad(gklx.gkl)(s[0], t[0]).shape == (7,)


# From a student's and a teacher's row to one that is not finite, or not small.
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
def test_extreme_row_gives_the_same_results_in_any_block(backend, case, extreme, row, set_block_bytes):
    skip_without_blocks(backend)
    s, t, given = call(case, "none", batch=(5,))
    s[row], t[row] = EXTREMES[extreme](s[row], t[row])
    s, t, given = on(backend, "float64", s, t, given)
    set_block_bytes(2**40)
    with np.errstate(all="ignore"):
        whole = values_and_gradients(case, s, t, given)
        set_block_bytes(2 * 7 * 8)
        parts = values_and_gradients(case, s, t, given)
    for one, other in zip((*parts[0], *parts[1]), (*whole[0], *whole[1]), strict=True):
        np.testing.assert_allclose(backend.numpy(one), backend.numpy(other), rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("samples", [5, 9])
def test_invalid_label_of_weight_zero_is_ignored_in_any_block(backend, samples, set_block_bytes):
    """The prior's table has 7 rows: more than one number of samples, fewer than the other."""
    skip_without_blocks(backend)
    case = next(case for case in CASES if case.id == "gkl-prior")
    s, t, given = call(case, "none", batch=(samples,))
    given["sample_weight"] = np.arange(samples) % 3 / 2.0
    given["labels"][given["sample_weight"] == 0] = -3
    s, t, given = on(backend, "float64", s, t, given)
    set_block_bytes(2**40)
    whole = values_and_gradients(case, s, t, given)
    set_block_bytes(2 * 7 * 8)
    parts = values_and_gradients(case, s, t, given)
    for one, other in zip((*parts[0], *parts[1]), (*whole[0], *whole[1]), strict=True):
        assert np.isfinite(backend.numpy(other)).all()
        np.testing.assert_allclose(backend.numpy(one), backend.numpy(other), rtol=1e-13, atol=1e-15)


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_half_precision_gradients_use_the_upstream_gradient_of_their_block(dtype, reduction, set_block_bytes):
    """They are computed in the backward pass: multiplied by the upstream gradient, then rounded once."""
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    case = next(case for case in CASES if case.id == "gkl-prior")
    s, t, given = on(BY_NAME["torch"], dtype, *call(case, "none", batch=(3, 4)))
    set_block_bytes(2 * 7 * 4)
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
    """The peak of the bytes that PyTorch's operations allocated, beyond those allocated before."""

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


@pytest.mark.long
@pytest.mark.supports("memory of a few row blocks", "PyTorch")
@pytest.mark.parametrize("wanted", [(True, False), (True, True)], ids=["student", "both"])
def test_torch_memory_of_vocabulary_size_bfloat16_is_a_few_row_blocks(monkeypatch, wanted):
    """In forward and backward pass. A float32 row of 150,000 classes has 600 KB; a block has one or two of a thread.

    By the formulas, which run wherever a mode follows the operators, as here.
    """
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
def test_numpy_memory_of_vocabulary_size_float16_is_a_few_row_blocks(monkeypatch, execution):
    """With one thread: each thread has its own blocks."""
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
    # A row at a time: by the formulas each array of theirs that is alive, by the kernel what a thread works on.
    rows = 20 if execution == "formulas" else 16
    assert to_student.nbytes < most < to_student.nbytes + rows * VOCABULARY * 4


def test_jax_temporary_memory_of_vocabulary_size_bfloat16_is_four_float32_arrays(monkeypatch):
    """XLA plans at most four float32 arrays beyond inputs and gradient, among them the widened logits and gradient."""
    backends.needs("jax")
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    logits = jax.ShapeDtypeStruct((8, 16, VOCABULARY), jax.numpy.bfloat16)
    weight = jax.ShapeDtypeStruct((8, 16), jax.numpy.float32)
    compiled = jax.jit(jax.value_and_grad(partial(gklx.gkl, gamma=0.5))).lower(logits, logits, sample_weight=weight)
    taken = compiled.compile().memory_analysis().temp_size_in_bytes
    assert taken < 17 * logits.size
