"""The analytic gradient as a `jax.custom_jvp`, which serves forward and reverse mode, to any order."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .._problem import Array, Arrays, Numbers, Problem
from .._sweep import prior_raised, sweep


def tracks(problem: Problem) -> bool:
    """Whether JAX traces any part of the problem."""
    return any(isinstance(x, jax.core.Tracer) for x in (*problem.arrays, *problem.numbers))


def attach(problem: Problem) -> Array:
    """The loss; JAX sees the sweep's gradients as its derivative."""
    static, traced = [], []
    for x in problem.numbers:
        static.append(x if isinstance(x, float) else None)
        traced.append(None if isinstance(x, float) else x)
    plan = (problem.dtype, problem.formula, problem.reduction, Numbers(*static), problem.ranks)
    arrays = problem.arrays
    rest = (arrays._replace(student=None, teacher=None), Numbers(*traced))
    return _loss(plan, arrays.student, arrays.teacher, rest)


def _problem(plan: tuple[Any, ...], student: Array, teacher: Array, rest: tuple[Arrays, Numbers]) -> Problem:
    dtype, formula, reduction, static, ranks = plan
    arrays, traced = rest
    numbers = Numbers(*(b if a is None else a for a, b in zip(static, traced, strict=True)))
    arrays = arrays._replace(student=student, teacher=teacher)
    return prior_raised(Problem(jnp, dtype, formula, reduction, numbers, arrays, ranks))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loss(plan: tuple[Any, ...], student: Array, teacher: Array, rest: tuple[Arrays, Numbers]) -> Array:
    return sweep(_problem(plan, student, teacher, rest), value=True).value


@partial(_loss.defjvp, symbolic_zeros=True)
def _loss_jvp(plan: tuple[Any, ...], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    student, teacher, rest = primals
    d_student, d_teacher, d_rest = tangents
    if any(not isinstance(x, SymbolicZero) for x in jax.tree.leaves(d_rest[1])):
        names = ", ".join(n for n, x in zip(Numbers._fields, d_rest[1], strict=True) if x is not None)
        raise TypeError(
            f"{names} must be held constant (jax.lax.stop_gradient), since only the logits are differentiable, "
            "got a tangent"
        )
    wanted = [not isinstance(x, SymbolicZero) for x in (d_student, d_teacher)]
    # The value through `_loss` again, so that a further derivative of it meets this rule and not the formulas.
    value = _loss(plan, student, teacher, rest)
    gradients = sweep(_problem(plan, student, teacher, rest), student=wanted[0], teacher=wanted[1])
    tangent = jnp.zeros_like(value)
    for gradient, direction in ((gradients.student, d_student), (gradients.teacher, d_teacher)):
        if gradient is not None:
            product = gradient * direction.astype(gradient.dtype)
            tangent = tangent + jnp.sum(product, axis=-1 if plan[2] == "none" else None)
    return value, tangent
