"""Nothing is imported, moved, read or written without the caller's request."""

import subprocess
import sys

import numpy as np
import pytest

import backends
import gklx
from cases import CASES, call, loss_of, on

OTHERS = ("torch", "jax", "cupy", "dask", "array_api_strict", "rich", "scipy")


def test_import_loads_numpy_and_array_api_compat_only():
    code = (
        "import sys, numpy, gklx; "
        f"found = [name for name in {OTHERS} if name in sys.modules]; "
        "assert not found, found; "
        "gklx.kl(numpy.zeros((1, 2)), numpy.zeros((1, 2))); "
        f"found = [name for name in {OTHERS} if name in sys.modules]; "
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("mask", ["none", "elements", "samples"])
def test_torch_meta_tensors_have_no_values_to_read(case, mask):
    """On the meta device, code that needs a value fails."""
    backends.needs("torch")
    import torch

    s, t, given = call(case, mask)
    s, t = (torch.tensor(x, device="meta", dtype=torch.bfloat16) for x in (s, t))
    given = {name: torch.tensor(x, device="meta") for name, x in given.items()}
    value, gradients = gklx.value_and_grad(loss_of(case), (0, 1))(s, t, **given)
    assert value.device.type == "meta"
    assert value.shape == ()
    assert value.dtype == torch.float32
    for gradient in gradients:
        assert gradient.device.type == "meta"
        assert gradient.shape == s.shape
        assert gradient.dtype == torch.bfloat16
    student = s.requires_grad_()
    loss_of(case)(student, t, **given).backward()
    assert student.grad.device.type == "meta"


def test_class_sums_on_meta_tensors():
    backends.needs("torch")
    import torch

    sums = gklx.class_sums(torch.zeros(5, 7, device="meta"), torch.zeros(5, dtype=torch.int64, device="meta"), 7)
    assert sums.device.type == "meta"
    assert sums.shape == (7, 7)


@pytest.mark.supports("lazy", "Dask")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_dask_computes_nothing(case):
    backends.needs("dask")
    import dask

    s, t, given = on(backends.BY_NAME["dask"], "float64", *call(case, "samples"))

    def refuse(graph, keys, **_):
        raise AssertionError("a Dask array was computed")

    with dask.config.set(scheduler=refuse):
        value, gradients = gklx.value_and_grad(loss_of(case), (0, 1))(s, t, **given)
        gklx.terms(loss_of(case))(s, t, **given) if case.loss != "kl" else None
        if "labels" in given:
            prior = gklx.ClassPrior(7)
            prior.update(t, given["labels"], given["sample_weight"])
            prior.advance()
            assert prior.table.shape == (7, 7)
    assert value.shape == ()
    assert [gradient.shape for gradient in gradients] == [(5, 7)] * 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_jax_moves_nothing(case):
    backends.needs("jax")
    import jax

    s, t, given = on(backends.BY_NAME["jax"], "float64", *call(case, "samples"))
    run = jax.jit(gklx.value_and_grad(loss_of(case), (0, 1)))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(run(s, t, **given))


@pytest.mark.parametrize("mask", ["none", "samples"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_inputs_are_not_changed(backend, case, mask):
    """The kernel reads the memory of the inputs themselves."""
    s, t, given = call(case, mask)
    before = [x.copy() for x in (s, t, *given.values())]
    on = [backend.array(x) for x in (s, t)], {name: backend.array(x) for name, x in given.items()}
    backend.wrap(gklx.value_and_grad(loss_of(case), (0, 1)))(*on[0], **on[1])
    for x, kept in zip((*on[0], *on[1].values()), before, strict=True):
        np.testing.assert_array_equal(backend.numpy(x), kept.astype("float64"))


def test_no_tensor_has_two_class_axes():
    """At C = 100,000 one float32 tensor [B, C, C] would take 80 GB."""
    import tracemalloc

    s, t = np.random.default_rng(0).standard_normal((2, 2, 100_000)).astype("float32")
    tracemalloc.start()
    try:
        gklx.value_and_grad(gklx.gkl, (0, 1))(s, t)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * s.nbytes


def test_eager_pytorch_does_not_import_its_compiler():
    """Its import takes seconds."""
    backends.needs("torch")
    code = (
        "import sys, torch, gklx; "
        "s = torch.zeros(2, 3, requires_grad=True); "
        "gklx.gkl(s, torch.eye(2, 3)).backward(); "
        "gklx.value_and_grad(gklx.gkl)(s.detach(), torch.eye(2, 3)); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
