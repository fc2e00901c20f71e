"""Each backend runs on the execution that it names: the row kernel or the formulas."""

import numpy as np
import pytest

import backends
import gklx
from backends import BACKENDS, BY_NAME
from cases import CASES, call, loss_of, on
from closeness import assert_close
from gklx._run import blocks, cpu_library

EAGER = [each.name for each in BACKENDS if each.execution and each.library.backend not in ("jax", "dask")]
COMPILED = [each.name for each in BACKENDS if each.execution and each.traced]


@pytest.fixture
def named_backend(request, monkeypatch):
    each = BY_NAME[request.param]
    backends.needs(each.library.backend)
    backends.run_on(each.execution, each.library.backend, monkeypatch)
    return each


@pytest.fixture
def runs(monkeypatch):
    """The executions in the order in which they ran."""
    seen, kernel, formulas = [], cpu_library.run, blocks.evaluate
    monkeypatch.setattr(cpu_library, "run", lambda request: seen.append("kernel") or kernel(request))
    monkeypatch.setattr(blocks, "evaluate", lambda *args, **asked: seen.append("formulas") or formulas(*args, **asked))
    return seen


@pytest.mark.parametrize("named_backend", EAGER, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values_and_gradients_run_on_the_named_execution(named_backend, case, runs):
    s, t, given = on(named_backend, "float32", *call(case, "elements"))
    loss_of(case)(s, t, **given)
    gklx.value_and_grad(loss_of(case), (0, 1))(s, t, **given)
    assert runs == [named_backend.execution] * 2


@pytest.mark.parametrize("named_backend", [name for name in EAGER if name.startswith("torch")], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backward_passes_run_on_the_named_execution(named_backend, dtype, runs):
    """In half precision the backward pass computes the gradient; otherwise it scales that of the forward pass."""
    s, t, _ = on(named_backend, dtype, *call(CASES[0], "none"))
    gklx.gkl(s.requires_grad_(), t).backward()
    assert runs == [named_backend.execution] * (2 if dtype == "bfloat16" else 1)


@pytest.mark.parametrize("named_backend", [name for name in EAGER if name.startswith("torch")], indirect=True)
def test_value_and_gradients_of_tracked_tensors_are_one_evaluation(named_backend, runs):
    """The backward pass makes another, and adds what comes by the value and by a gradient."""
    import torch

    s, t, _ = on(named_backend, "float64", *call(CASES[0], "none"))
    value, gradient = gklx.value_and_grad(gklx.kl)(s.requires_grad_(), t)
    assert runs == [named_backend.execution]
    (2 * value).backward(retain_graph=True)
    assert runs == [named_backend.execution] * 2
    assert_close(s.grad, 2 * named_backend.numpy(gradient), named_backend, "float64", ulps=32)
    weights = torch.linspace(-1, 1, s.numel(), dtype=s.dtype).reshape(s.shape)
    (by_gradient,) = torch.autograd.grad((weights * gradient).sum(), s, retain_graph=True)
    (by_both,) = torch.autograd.grad(3 * value + (weights * gradient).sum(), s)
    expected = 3 * named_backend.numpy(gradient) + named_backend.numpy(by_gradient)
    assert_close(by_both, expected, named_backend, "float64", ulps=32)


@pytest.mark.parametrize("named_backend", [name for name in EAGER if name.startswith("torch")], indirect=True)
def test_compiled_pytorch_runs_on_the_named_execution(named_backend, runs):
    import torch

    if "cuda" in named_backend.name:
        pytest.skip("the compiler follows the formulas, and refuses the list that the test keeps")
    torch.compiler.reset()
    s, t, _ = on(named_backend, "float32", *call(CASES[0], "none"))
    torch.compile(gklx.gkl, backend="aot_eager", fullgraph=True)(s.requires_grad_(), t).backward()
    torch.compiler.reset()
    assert set(runs) == {named_backend.execution}


@pytest.mark.parametrize("named_backend", COMPILED, indirect=True)
@pytest.mark.parametrize("function", [gklx.kl, gklx.value_and_grad(gklx.gkl, (0, 1))], ids=["value", "gradients"])
def test_compiled_jax_runs_on_the_named_execution(named_backend, function):
    s, t, _ = on(named_backend, "float32", *call(CASES[0], "none"))
    program = named_backend.wrap(function).lower(s, t).as_text()
    assert ("@gklx_rows" in program) == (named_backend.execution == "kernel")


@pytest.mark.parametrize("named_backend", ["jax", "jax-formulas"], indirect=True)
def test_eager_jax_compiles_once_per_shape(named_backend):
    from gklx._run import xla

    s, t, _ = on(named_backend, "float32", *np.random.default_rng(0).standard_normal((2, 3, 11)), {})
    before = xla._compiled._cache_size()
    found = {float(gklx.gkl(s, t, mse_weight=weight, gamma=weight)) for weight in (0.25, 0.5, 0.75)}
    assert xla._compiled._cache_size() == before + 1
    assert len(found) == 3


def test_missing_kernel_skips_or_fails_its_tests(monkeypatch):
    monkeypatch.setattr(cpu_library, "library", lambda: None)
    for required, outcome in ((False, pytest.skip.Exception), (True, pytest.fail.Exception)):
        monkeypatch.setattr(backends, "KERNEL_REQUIRED", required)
        with pytest.raises(outcome, match="the row kernel is not built"):
            backends.run_on("kernel", "numpy", monkeypatch)


def test_both_executions_agree_in_one_process(monkeypatch):
    backends.needs_kernel()
    s, t, given = call(CASES[-2], "elements")
    found = []
    for name in ("numpy", "numpy-formulas", "numpy"):
        backends.run_on(BY_NAME[name].execution, "numpy", monkeypatch)
        found.append(gklx.value_and_grad(loss_of(CASES[-2]), (0, 1))(s, t, **given))
    assert found[0][0] == found[2][0]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-14)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)
