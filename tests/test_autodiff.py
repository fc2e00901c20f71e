"""PyTorch's and JAX's autodiff return the analytic gradients, and compute only the requested ones."""

from functools import partial

import numpy as np
import pytest

import backends
import gklx
from backends import BY_NAME
from cases import CASES, call, loss_of, on
from closeness import assert_close, assert_near
from gklx._autodiff import value_and_gradients
from gklx._core.call import Asked

pytestmark = pytest.mark.version_dependent_jax


@pytest.fixture
def torch():
    backends.needs("torch")
    return pytest.importorskip("torch")


@pytest.fixture
def jax():
    backends.needs("jax")
    BY_NAME["jax"].array([0.0])  # enables float64
    return pytest.importorskip("jax")


def arguments(name, case, mask="none", dtype="float64"):
    return on(BY_NAME[name], dtype, *call(case, mask))


@pytest.mark.parametrize("mask", ["none", "elements", "samples", "absent"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_torch_backward_is_the_analytic_gradient(torch, case, mask):
    s, t, given = arguments("torch", case, mask)
    expected = gklx.grad(loss_of(case), (0, 1))(s, t, **given)
    for wanted in ((True, True), (True, False), (False, True)):
        student, teacher = s.clone().requires_grad_(wanted[0]), t.clone().requires_grad_(wanted[1])
        value = loss_of(case)(student, teacher, **given)
        (3 * value).backward()  # not the last layer: the upstream gradient is not 1
        for x, exact, asked in zip((student, teacher), expected, wanted, strict=True):
            if asked:
                assert_close(x.grad, 3 * exact.numpy(), BY_NAME["torch"], "float64", ulps=4)
            else:
                assert x.grad is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_torch_backward_of_unreduced_losses_applies_the_upstream_gradient(torch, case):
    s, t, given = arguments("torch", case)
    upstream = torch.arange(1.0, 6.0, dtype=torch.float64)
    student, teacher = s.requires_grad_(), t.requires_grad_()
    (upstream * loss_of(case, reduction="none")(student, teacher, **given)).sum().backward()
    detached = s.detach(), t.detach()
    for i, x in enumerate((student, teacher)):
        rows = [
            gklx.grad(partial(loss_of(case), reduction="sum"), i)(*detached, **given, sample_weight=weight)
            for weight in torch.eye(5, dtype=torch.float64)
        ]
        if case.loss == "gkl" and case.settings.get("normalize", "batch") == "batch":
            continue  # a weight of one sample changes the batch's normaliser
        exact = sum(u * row for u, row in zip(upstream, rows, strict=True))
        assert_close(x.grad, exact.numpy(), BY_NAME["torch"], "float64", ulps=8)


def test_torch_gradients_of_half_precision_logits_are_in_half_precision(torch):
    for dtype in ("float16", "bfloat16"):
        s, t, _ = arguments("torch", CASES[0], dtype=dtype)
        student, teacher = s.requires_grad_(), t.requires_grad_()
        gklx.gkl(student, teacher).backward()
        exact = gklx.grad(gklx.gkl, (0, 1))(s.detach().double(), t.detach().double())
        assert_close(student.grad, exact[0].numpy(), BY_NAME["torch"], dtype, ulps=1)
        assert_close(teacher.grad, exact[1].numpy(), BY_NAME["torch"], dtype, ulps=1)


@pytest.mark.parametrize("loss", [gklx.kl, gklx.dkl, gklx.ikl, gklx.gkl], ids=["kl", "dkl", "ikl", "gkl"])
def test_torch_double_backward_is_the_derivative_of_the_gradient(torch, loss):
    s, t, _ = arguments("torch", CASES[0])
    student, teacher = s[:2, :4].clone().requires_grad_(), t[:2, :4].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(loss, (student, teacher))
    if loss is gklx.kl:  # where the gradient is the value's own
        assert torch.autograd.gradcheck(loss, (student, teacher))


def test_torch_second_derivative_of_dkl_is_that_of_kl(torch):
    s, t, _ = arguments("torch", CASES[0])

    def hessian_rows(loss):
        student, teacher = s.clone().requires_grad_(), t.clone().requires_grad_()
        first = torch.autograd.grad(loss(student, teacher), (student, teacher), create_graph=True)
        direction = torch.linspace(-1, 1, s.numel(), dtype=s.dtype).reshape(s.shape)
        return torch.autograd.grad(sum((g * direction).sum() for g in first), (student, teacher))

    for of_dkl, of_kl in zip(hessian_rows(gklx.dkl), hessian_rows(gklx.kl), strict=True):
        assert of_kl.abs().max() > 1e-4
        assert_close(of_dkl, of_kl.numpy(), BY_NAME["torch"], "float64", ulps=64)


def test_torch_records_no_graph_without_differentiable_logits(torch):
    s, t, _ = arguments("torch", CASES[0])
    assert not gklx.gkl(s, t).requires_grad
    with torch.no_grad():
        assert not gklx.gkl(s.clone().requires_grad_(), t).requires_grad
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    prior = torch.full(s.shape, 0.2, dtype=torch.float64, requires_grad=True)
    assert not gklx.gkl(s, t, prior=prior, sample_weight=weight).requires_grad
    assert not gklx.class_sums(s.clone().requires_grad_(), torch.zeros(5, dtype=torch.int64), 7).requires_grad


def test_torch_value_from_value_and_grad_has_the_analytic_gradient(torch):
    """Autograd through the formulas would differentiate DKL's class weights, which are constants."""
    s, t, _ = arguments("torch", CASES[0])
    student, teacher = s.clone().requires_grad_(), t.clone().requires_grad_()
    value, gradient = gklx.value_and_grad(gklx.dkl, 1)(student, teacher)
    value.backward()
    # One is eager, the other recorded; each may be about 4 units from the exact gradient, on either side.
    assert_close(teacher.grad, gradient.detach().numpy(), BY_NAME["torch"], "float64", ulps=16)


def test_torch_forward_computes_only_the_requested_gradients(torch, monkeypatch, execution):
    from gklx._autodiff import torch as adapter

    asked = []
    evaluate = adapter.evaluate

    def spy(call, wanted, *batch, **given):
        asked.append(wanted)
        return evaluate(call, wanted, *batch, **given)

    monkeypatch.setattr(adapter, "evaluate", spy)
    s, t, _ = arguments("torch", CASES[0])
    gklx.gkl(s.requires_grad_(), t).backward()
    assert asked == [Asked(value=True, student=True)]


def test_torch_terms_are_differentiable(torch):
    s, t, _ = arguments("torch", CASES[0])
    student = s.clone().requires_grad_()
    parts = gklx.terms(gklx.ikl)(student, t)
    (parts.mse + 2 * parts.ce).backward()
    exact = gklx.grad(partial(gklx.ikl, ce_weight=2.0))(s, t)
    assert_close(student.grad, exact.numpy(), BY_NAME["torch"], "float64", ulps=8)


@pytest.mark.parametrize("mask", ["none", "samples"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_jax_grad_is_the_analytic_gradient(jax, case, mask):
    s, t, given = arguments("jax", case, mask)
    expected = gklx.grad(loss_of(case), (0, 1))(s, t, **given)
    loss = loss_of(case)

    def everything(s, t, given):
        return (
            jax.grad(loss, (0, 1))(s, t, **given),
            (jax.grad(loss, 0)(s, t, **given), jax.grad(loss, 1)(s, t, **given)),
        )

    for found in jax.jit(everything)(s, t, given):
        for gradient, exact in zip(found, expected, strict=True):
            assert_close(gradient, np.asarray(exact), BY_NAME["jax"], "float64", ulps=16)


@pytest.mark.supports("mixed precision", "JAX")
def test_jax_grad_of_eager_bfloat16_logits(jax):
    s, t, _ = arguments("jax", CASES[0], dtype="bfloat16")
    value, (to_s, to_t) = jax.value_and_grad(gklx.gkl, (0, 1))(s, t)
    exact = gklx.grad(gklx.gkl, (0, 1))(s.astype("float64"), t.astype("float64"))
    assert value.dtype == "float32"
    assert_close(to_s, np.asarray(exact[0]), BY_NAME["jax"], "bfloat16", ulps=1)
    assert_close(to_t, np.asarray(exact[1]), BY_NAME["jax"], "bfloat16", ulps=1)


@pytest.mark.supports("forward mode", "JAX")
@pytest.mark.parametrize("loss", [gklx.dkl, gklx.gkl], ids=["dkl", "gkl"])
def test_jax_forward_mode_and_second_derivatives(jax, loss):
    s, t, _ = arguments("jax", CASES[0])
    s, t = s[:2, :4], t[:2, :4]
    gradients = gklx.grad(loss, (0, 1))(s, t)
    direction = jax.numpy.linspace(-1.0, 1.0, s.size).reshape(s.shape)
    _, tangent = jax.jvp(loss, (s, t), (direction, 2 * direction))
    expected = float((gradients[0] * direction).sum() + 2 * (gradients[1] * direction).sum())
    assert_near(tangent, expected, "float64", ulps=16)
    hessian = jax.jit(jax.hessian(loss, (0, 1)))(s, t)
    field = jax.jit(jax.jacfwd(gklx.grad(loss, (0, 1)), (0, 1)))(s, t)
    of_kl = jax.jit(jax.hessian(gklx.kl, (0, 1)))(s, t)
    for i in (0, 1):
        for j in (0, 1):
            np.testing.assert_allclose(hessian[i][j], field[i][j], rtol=1e-10, atol=1e-13)
            if loss is gklx.dkl:
                np.testing.assert_allclose(hessian[i][j], of_kl[i][j], rtol=1e-10, atol=1e-13)


@pytest.mark.supports("hyper-parameters that change without compiling again", "JAX")
def test_jax_hyper_parameters_may_be_traced(jax):
    s, t, _ = arguments("jax", CASES[0])

    def loss(gamma, mse_weight, ce_weight, temperature, tau):
        settings = {"gamma": gamma, "mse_weight": mse_weight, "ce_weight": ce_weight}
        return gklx.value_and_grad(gklx.gkl, (0, 1))(s, t, **settings, temperature=temperature, weight_temperature=tau)

    for numbers in ((0.5, 2.0, 3.0, 1.5, 4.0), (0.0, 1.0, 0.0, 2.0, 2.0), (1.0, 0.0, 1.0, 1.0, 1.0)):
        value, gradients = loss(*numbers)
        traced_value, traced = jax.jit(loss)(*numbers)
        assert_near(traced_value, float(value), "float64", ulps=16)
        for one, other in zip(traced, gradients, strict=True):
            assert_near(np.asarray(one), np.asarray(other), "float64", ulps=64)
    assert loss(*(jax.numpy.asarray(x) for x in (0.5, 2.0, 3.0, 1.5, 4.0)))[0].dtype == "float64"


def test_jax_gradient_of_a_hyper_parameter_is_an_error(jax):
    s, t, _ = arguments("jax", CASES[0])
    with pytest.raises(TypeError, match=r"^gamma must be held constant \(jax.lax.stop_gradient\)"):
        jax.grad(lambda gamma: gklx.gkl(s, t, gamma=gamma))(0.5)


def test_jax_without_x64_computes_in_float32(jax):
    if hasattr(jax, "enable_x64"):
        narrow = jax.enable_x64(False)
    else:
        from jax.experimental import disable_x64

        narrow = disable_x64()
    with narrow:
        s, t = (jax.numpy.asarray(x, dtype="float32") for x in call(CASES[0], "none")[:2])
        labels = jax.numpy.asarray([0, 1, 2, 3, 4])
        prior = gklx.ClassPrior(7)
        prior.update(t, labels)
        prior.advance()
        value, gradient = gklx.value_and_grad(gklx.gkl)(s, t, prior=prior.table, labels=labels, gamma=0.3)
        assert value.dtype == gradient.dtype == prior.table.dtype == "float32"
        with jax.checking_leaks():
            jax.jit(jax.grad(gklx.gkl))(s, t)


def test_numpy_value_and_gradients_come_from_one_pass():
    """NumPy has no autodiff: the entry point returns value and gradient from one pass."""
    from gklx.losses import call_builder

    s, t, _ = call(CASES[0], "none")
    result = value_and_gradients(call_builder(gklx.gkl)(s, t), Asked(value=True, student=True))
    assert result.teacher is None
    assert_near(result.value, gklx.gkl(s, t), "float64", ulps=0)
