"""The analytic gradient as a `jax.custom_jvp`, which serves forward and reverse mode, to any order."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .. import _loop
from .._problem import Array, Arrays, Formula, Numbers, Problem, Ranks, Reduction
from .._sweep import Sweep, prior_raised, sweep_rows


def tracks(problem: Problem) -> bool:
    """Whether JAX traces any part of the problem."""
    return any(isinstance(x, jax.core.Tracer) for x in (*problem.arrays, *problem.numbers))


def attach(problem: Problem) -> Array:
    """The loss; JAX sees the sweep's gradients as its derivative."""
    static, traced = [], []
    for x in problem.numbers:
        static.append(x if isinstance(x, float) else None)
        traced.append(None if isinstance(x, float) else x)
    plan = _Plan(problem.dtype, problem.formula, problem.reduction, Numbers(*static), problem.ranks)
    arrays = problem.arrays
    rest = (arrays._replace(student=None, teacher=None), Numbers(*traced))
    return _loss(plan, arrays.student, arrays.teacher, rest)


class _Plan(NamedTuple):
    """What JAX need not see: all of a problem but its arrays and traced numbers."""

    dtype: Any
    formula: Formula
    reduction: Reduction
    numbers: Numbers  # None where traced
    ranks: Ranks | None


_Rest = tuple[Arrays, Numbers]
"""The arrays without the logits, and the traced numbers, None where not traced."""


def _problem(plan: _Plan, student: Array, teacher: Array, rest: _Rest) -> Problem:
    dtype, formula, reduction, static, ranks = plan
    arrays, traced = rest
    numbers = Numbers(*(b if a is None else a for a, b in zip(static, traced, strict=True)))
    arrays = arrays._replace(student=student, teacher=teacher)
    return prior_raised(Problem(jnp, dtype, formula, reduction, numbers, arrays, ranks))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loss(plan: _Plan, student: Array, teacher: Array, rest: _Rest) -> Any:
    return _swept(_problem(plan, student, teacher, rest), value=True).value


@partial(_loss.defjvp, symbolic_zeros=True)
def _loss_jvp(plan: _Plan, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    d_logits = _logits_alone(tangents)
    wanted = tuple(not isinstance(x, SymbolicZero) for x in d_logits)
    value, *gradients = _with_gradients(plan, wanted, *primals)
    tangent: Array = jnp.zeros(value.shape, value.dtype)
    for gradient, direction in zip(gradients, d_logits, strict=True):
        if gradient is not None:
            product = gradient * direction.astype(gradient.dtype)
            tangent = tangent + jnp.sum(product, axis=-1 if plan.reduction == "none" else None)
    return value, tangent


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_gradients(
    plan: _Plan, wanted: tuple[bool, bool], student: Array, teacher: Array, rest: _Rest
) -> tuple[Any, ...]:
    """The value, and the gradients of each sample's own entry, from one sweep."""
    problem = _problem(plan, student, teacher, rest)
    found = _swept(problem, value=True, student=wanted[0], teacher=wanted[1])
    return found.value, found.student, found.teacher


@partial(_with_gradients.defjvp, symbolic_zeros=True)
def _with_gradients_jvp(plan: _Plan, wanted: tuple[bool, bool], primals: Any, tangents: Any) -> Any:
    """Further derivatives: of the value by the rule above, of the gradients by JAX's own of the formulas."""
    d_logits, rest = _logits_alone(tangents), primals[2]

    def apart(student: Array, teacher: Array) -> tuple[Any, ...]:
        found = _swept(_problem(plan, student, teacher, rest), student=wanted[0], teacher=wanted[1])
        return _loss(plan, student, teacher, rest), found.student, found.teacher

    directions = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in d_logits)
    return jax.jvp(apart, primals[:2], tuple(directions))


def _swept(problem: Problem, *, value: bool = False, student: bool = False, teacher: bool = False) -> Sweep:
    sweep = _loop.sweep if _loop.takes(problem) else sweep_rows
    return sweep(problem, value=value, student=student, teacher=teacher)


def _logits_alone(tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """The tangents of the logits; a TypeError where another argument has one."""
    student, teacher, rest = tangents
    if any(not isinstance(x, SymbolicZero) for x in jax.tree.leaves(rest[1])):
        names = ", ".join(n for n, x in zip(Numbers._fields, rest[1], strict=True) if x is not None)
        raise TypeError(
            f"{names} must be held constant (jax.lax.stop_gradient), since only the logits are differentiable, "
            "got a tangent"
        )
    return student, teacher
