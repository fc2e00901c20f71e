"""JAX's transforms around the losses, each against the analytic gradient of `gklx.grad`."""

from functools import partial

import numpy as np
import pytest

import backends
import gklx
from backends import BY_NAME
from cases import CASES, call, loss_of, on
from closeness import assert_close

jax = pytest.importorskip("jax", reason="JAX is not installed")

SMALL = ("kl", "dkl-T", "gkl-tau", "gkl-prior", "gkl-asymmetric")
SOME_CASES = pytest.mark.parametrize("case", [case for case in CASES if case.id in SMALL], ids=lambda case: case.id)


def supports(row):
    return pytest.mark.supports(row, "JAX")


@pytest.fixture(autouse=True)
def _needs_jax():
    backends.needs("jax")
    BY_NAME["jax"].array([0.0])  # enables float64


def same(actual, expected, ulps=32, dtype="float64", **more):
    assert_close(actual, np.asarray(expected, dtype="float64"), BY_NAME["jax"], dtype, ulps=ulps, **more)


def given(case, mask="none", **more):
    s, t, arrays = on(BY_NAME["jax"], "float64", *call(case, mask, **more))
    return partial(loss_of(case), **arrays), s, t


@supports("vmap")
@SOME_CASES
def test_vmap_of_grad_and_grad_of_vmap(case):
    loss, s, t = given(case)
    batches = jax.numpy.stack([s, 2 * s, t[::-1]])
    exact = [gklx.grad(loss, (0, 1))(x, t) for x in batches]
    same(jax.vmap(loss, (0, None))(batches, t), [loss(x, t) for x in batches])
    per_batch = jax.vmap(jax.grad(loss, (0, 1)), (0, None))(batches, t)
    # One row is the same in both networks. Its gradient is 0 on the kernel, and within rounding by the formulas.
    for i in (0, 1):
        same(per_batch[i], [np.asarray(each[i]) for each in exact], scale=0.1)
    around = jax.grad(lambda x: jax.vmap(loss, (0, None))(x, t).sum())(batches)
    same(around, [np.asarray(each[0]) for each in exact], scale=0.1)


@supports("vmap")
def test_vmap_over_hyper_parameters():
    _, s, t = given(CASES[0])
    weights = jax.numpy.asarray([0.0, 0.5, 1.0, 2.0])
    found = jax.vmap(lambda w: gklx.gkl(s, t, gamma=w, mse_weight=w))(weights)
    same(found, [float(gklx.gkl(s, t, gamma=w, mse_weight=w)) for w in weights.tolist()])


@supports("second derivatives")
@SOME_CASES
def test_third_derivative_is_that_of_the_gradient_field(case):
    loss, s, t = given(case, batch=(1,), classes=3)
    field = jax.jit(jax.jacfwd(jax.jacrev(gklx.grad(loss, 1), 1), 1))(s, t)
    found = jax.jit(jax.jacrev(jax.jacfwd(jax.grad(loss, 1), 1), 1))(s, t)
    same(found, field, ulps=256, scale=0.1)


@supports("checkpoint")
@SOME_CASES
def test_checkpoint_keeps_the_gradient(case):
    loss, s, t = given(case, "samples")
    found = jax.jit(jax.grad(jax.checkpoint(lambda s, t: loss(2 * s, t)), (0, 1)))(s, t)
    to_s, to_t = gklx.grad(loss, (0, 1))(2 * s, t)
    same(found[0], 2 * to_s)
    same(found[1], to_t)


@supports("gradients by the library's own autodiff")
@SOME_CASES
def test_vjp_and_linearize_are_the_analytic_gradient(case):
    loss, s, t = given(case)
    to_s, to_t = gklx.grad(loss, (0, 1))(s, t)
    _, pull = jax.vjp(loss, s, t)
    for found, expected in zip(pull(jax.numpy.asarray(3.0)), (to_s, to_t), strict=True):
        same(found, 3 * expected)
    _, push = jax.linearize(loss, s, t)
    same(push(t, s), (to_s * t).sum() + (to_t * s).sum(), scale=float(abs(to_s * t).sum()))


@supports("compiler")
def test_logits_may_be_donated():
    """The gradient may be written into the memory of the logits."""
    _, s, t = given(CASES[0])
    exact = gklx.grad(gklx.gkl)(s, t)
    step = jax.jit(lambda s, t: s - jax.grad(gklx.gkl)(s, t), donate_argnums=0)
    donated = s + 0
    same(step(donated, t), s - exact)
    assert donated.is_deleted()


@supports("compiler")
def test_hyper_parameters_may_be_static():
    _, s, t = given(CASES[0])
    loss = jax.jit(gklx.gkl, static_argnames=("gamma", "mse_weight", "reduction", "normalize", "symmetric"))
    settings = {"gamma": 0.5, "mse_weight": 2.0, "reduction": "sum", "normalize": "samples", "symmetric": False}
    same(loss(s, t, **settings), gklx.gkl(s, t, **settings))


def train(prior, s, weights, t, labels):
    """A few steps of gradient descent on the logits themselves, with a schedule and a class prior in the carry."""

    def step(carry, weight):
        prior, s = carry
        settings = {"prior": prior.table, "labels": labels, "mse_weight": weight, "gamma": weight}
        value, gradient = jax.value_and_grad(gklx.gkl)(s, t, **settings)
        return (prior.update(t, labels, temperature=2.0).advance(), s - gradient), value

    return step, (prior, s), weights


@supports("loops")
@supports("class prior inside a compiled step")
@supports("hyper-parameters that change without compiling again")
def test_scan_over_a_schedule_with_a_class_prior():
    _, s, t = given(CASES[0])
    labels = jax.numpy.asarray([0, 3, 3, 6, 1])
    step, carry, weights = train(gklx.ClassPriorState.uniform(7, like=t), s, jax.numpy.linspace(0.0, 1.0, 5), t, labels)
    compiled = 0

    def counted(carry, weights):
        nonlocal compiled
        compiled += 1
        return jax.lax.scan(step, carry, weights)

    run = jax.jit(counted)
    (prior, found), values = run(carry, weights)
    run(carry, 2 * weights)
    assert compiled == 1
    eager = gklx.ClassPrior(7, temperature=2.0)
    for i, weight in enumerate(weights.tolist()):
        table = eager.table if i else carry[0].table
        settings = {"prior": table, "labels": labels, "mse_weight": weight, "gamma": weight}
        value, gradient = gklx.value_and_grad(gklx.gkl)(s, t, **settings)
        same(values[i], value)
        s = s - gradient
        eager.update(t, labels)
        eager.advance()
    same(found, s)
    same(prior.table, eager.table)


@pytest.mark.parametrize("name", ["gamma", "mse_weight", "ce_weight", "temperature", "weight_temperature"])
@pytest.mark.parametrize("transform", ["grad", "jacfwd"])
def test_gradient_of_a_hyper_parameter_is_an_error_and_not_zero(name, transform):
    _, s, t = given(CASES[0])
    derivative = getattr(jax, transform)(lambda x: gklx.gkl(s, t, **{name: x}))
    for function in (derivative, jax.jit(derivative)):
        with pytest.raises(TypeError, match=rf"^{name} must be held constant"):
            function(0.5)
    of_stopped = getattr(jax, transform)(lambda x: x * gklx.gkl(s, t, **{name: jax.lax.stop_gradient(x)}))
    same(of_stopped(0.5), gklx.gkl(s, t, **{name: 0.5}))


def test_second_derivative_to_a_hyper_parameter_is_an_error():
    _, s, t = given(CASES[0])
    with pytest.raises(TypeError, match="gamma must be held constant"):
        jax.grad(lambda gamma: jax.grad(lambda s: gklx.gkl(s, t, gamma=gamma))(s).sum())(0.5)


@supports("export")
@supports("batch size left open")
def test_export_for_any_batch_size():
    from jax import export

    step = jax.jit(jax.value_and_grad(partial(gklx.gkl, gamma=0.5)))
    (batch,) = export.symbolic_shape("batch")
    open_logits = jax.ShapeDtypeStruct((batch, 7), "float64")
    program = export.export(step)(open_logits, open_logits)
    for size in (1, 5, 30):
        s, t = jax.random.normal(jax.random.key(size), (2, size, 7))
        value, gradient = program.call(s, t)
        same(value, gklx.gkl(s, t, gamma=0.5))
        same(gradient, gklx.grad(partial(gklx.gkl, gamma=0.5))(s, t))


@supports("batch size left open")
def test_export_for_any_batch_size_with_a_class_prior():
    def step(s, t, prior, labels):
        return gklx.gkl(s, t, prior=prior, labels=labels, gamma=0.5)

    from jax import export

    (batch,) = export.symbolic_shape("batch")
    logits, table = jax.ShapeDtypeStruct((batch, 7), "float64"), jax.ShapeDtypeStruct((7, 7), "float64")
    program = export.export(jax.jit(step))(logits, logits, table, jax.ShapeDtypeStruct((batch,), "int32"))
    for size in (1, 30):
        s, t = jax.random.normal(jax.random.key(size), (2, size, 7))
        prior, labels = jax.nn.softmax(jax.random.normal(jax.random.key(0), (7, 7))), jax.numpy.arange(size) % 7
        same(program.call(s, t, prior, labels.astype("int32")), step(s, t, prior, labels))


@pytest.mark.parametrize("name", ["temperature", "weight_temperature", "gamma", "mse_weight"])
def test_traced_numbers_out_of_their_range_give_nan(name):
    """Where no error can be raised; NaN is as loud, and a plausible number is not."""
    _, s, t = given(CASES[0])
    of = jax.jit(lambda x: gklx.gkl(s, t, **{name: x}))
    assert np.isfinite(of(0.5))
    for wrong in (-1.0, np.inf, np.nan) if name != "mse_weight" else (np.inf, np.nan):
        assert np.isnan(of(wrong)), wrong


def test_class_prior_under_jit_is_an_error():
    prior = gklx.ClassPrior(3)
    with pytest.raises(
        TypeError, match=r"^logits must not be traced, as under jax.jit, where ClassPriorState keeps the"
    ):
        jax.jit(lambda t, y: prior.update(t, y))(jax.numpy.zeros((4, 3)), jax.numpy.zeros(4, int))
