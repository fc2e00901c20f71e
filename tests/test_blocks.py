"""Rows worked off in blocks: the same numbers as all at once, and a peak of memory of a few blocks."""

import math
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
from gklx import _libraries

# In blocks of 2 rows of 7 classes: parts of one axis, whole slices of the first, parts of the second.
KINDS = ("kl", "dkl-T", "gkl-tau", "gkl-prior", "gkl-rows", "gkl-asymmetric")
SHAPES = ((5,), (3, 2), (3, 3), (3, 1, 2))


@pytest.fixture
def blocks_of(monkeypatch):
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
            assert_close(one, backend.numpy(other), backend, "float64", ulps=4)


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
def test_torch_vocabulary_size_bfloat16_keeps_to_a_few_row_blocks(wanted):
    """Forward and backward; a block is a row here, since a row of 150,000 classes in float32 is 600 KB."""
    backends.needs("torch")
    torch = pytest.importorskip("torch")
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
def test_numpy_vocabulary_size_half_keeps_to_a_few_row_blocks():
    rng = np.random.default_rng(0)
    s, t = (rng.standard_normal((2, 16, VOCABULARY), dtype=np.float32).astype(np.float16) for _ in range(2))
    weight = np.ones((2, 16), dtype=bool)
    weight[1, 8:] = False
    tracemalloc.start()
    value, to_student = gklx.value_and_grad(gklx.gkl)(s, t, gamma=0.5, sample_weight=weight)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert math.isfinite(value)
    assert to_student.nbytes < most < to_student.nbytes + 24 * VOCABULARY * 4


def test_jax_vocabulary_size_bfloat16_takes_what_the_page_says():
    """XLA plans it, and row blocks in a loop did not change it: bytes beyond inputs and gradient, on the CPU."""
    backends.needs("jax")
    jax = pytest.importorskip("jax")
    logits = jax.ShapeDtypeStruct((8, 16, VOCABULARY), jax.numpy.bfloat16)
    weight = jax.ShapeDtypeStruct((8, 16), jax.numpy.float32)
    compiled = jax.jit(jax.value_and_grad(partial(gklx.gkl, gamma=0.5))).lower(logits, logits, sample_weight=weight)
    taken = compiled.compile().memory_analysis().temp_size_in_bytes
    assert taken < 30 * logits.size
