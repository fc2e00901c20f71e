"""The analytic gradient as a `jax.custom_jvp`, which serves forward and reverse mode, to any order."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .._problem import Array, Arrays, Formula, Numbers, Problem, Ranks, Reduction, joined, parted
from .._sweep import Sweep, prior_raised, sweep_rows
from . import _jax_look, _jax_loop


class _Plan(NamedTuple):
    """What JAX need not see: all of a problem but its arrays and traced numbers."""

    dtype: Any
    formula: Formula
    reduction: Reduction
    numbers: Numbers  # None where traced
    ranks: Ranks | None


class _Asked(NamedTuple):
    """Which results."""

    value: bool
    student: bool
    teacher: bool


_Rest = tuple[Arrays, Numbers]
"""The arrays without the logits, and the traced numbers, None where not traced."""


def tracks(problem: Problem) -> bool:
    """Whether JAX traces any part of the problem."""
    return any(isinstance(x, jax.core.Tracer) for x in (*problem.arrays, *problem.numbers))


def attach(problem: Problem) -> Array:
    """The loss; JAX sees the sweep's gradients as its derivative."""
    plan, rest = _taken_apart(problem)
    return _loss(plan, problem.arrays.student, problem.arrays.teacher, rest)


def with_gradients(problem: Problem, *, value: bool, student: bool, teacher: bool) -> Sweep:
    """As `sweep`, all of it differentiable again."""
    plan, rest = _taken_apart(problem)
    s, t = problem.arrays.student, problem.arrays.teacher
    found, to_student, to_teacher = _with_gradients(plan, _Asked(value, student, teacher), s, t, rest)
    to_student = None if to_student is None else to_student.astype(s.dtype)
    to_teacher = None if to_teacher is None else to_teacher.astype(t.dtype)
    return Sweep(found, to_student, to_teacher, None, ordinary=False)


def _taken_apart(problem: Problem) -> tuple[_Plan, _Rest]:
    static, traced = parted(problem.numbers)
    plan = _Plan(problem.dtype, problem.formula, problem.reduction, static, problem.ranks)
    return plan, (problem.arrays._replace(student=None, teacher=None), traced)


def _problem(plan: _Plan, student: Array, teacher: Array, rest: _Rest) -> Problem:
    dtype, formula, reduction, static, ranks = plan
    arrays, traced = rest
    arrays = arrays._replace(student=student, teacher=teacher)
    return prior_raised(Problem(jnp, dtype, formula, reduction, joined(static, traced), arrays, ranks))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loss(plan: _Plan, student: Array, teacher: Array, rest: _Rest) -> Any:
    return _swept(_problem(plan, student, teacher, rest), _Asked(value=True, student=False, teacher=False)).value


@partial(_loss.defjvp, symbolic_zeros=True)
def _loss_jvp(plan: _Plan, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    d_logits = _logits_alone(tangents)
    student, teacher = (not isinstance(x, SymbolicZero) for x in d_logits)
    value, *gradients = _with_gradients(plan, _Asked(True, student, teacher), *primals)
    tangent: Array = jnp.zeros(value.shape, value.dtype)
    for gradient, direction in zip(gradients, d_logits, strict=True):
        if gradient is not None:
            product = gradient * direction.astype(gradient.dtype)
            tangent = tangent + jnp.sum(product, axis=-1 if plan.reduction == "none" else None)
    return value, tangent


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_gradients(plan: _Plan, asked: _Asked, student: Array, teacher: Array, rest: _Rest) -> tuple[Any, ...]:
    """The value, and the gradients of each sample's own entry, from one sweep; None where not asked for."""
    found = _swept(_problem(plan, student, teacher, rest), asked)
    return found.value, found.student, found.teacher


@partial(_with_gradients.defjvp, symbolic_zeros=True)
def _with_gradients_jvp(plan: _Plan, asked: _Asked, primals: Any, tangents: Any) -> Any:
    """Further derivatives: of the value by the rule above, of the gradients by JAX's own of the formulas."""
    d_logits, rest = _logits_alone(tangents), primals[2]

    def apart(student: Array, teacher: Array) -> tuple[Any, ...]:
        found = _swept(_problem(plan, student, teacher, rest), asked._replace(value=False), look=False)
        return _loss(plan, student, teacher, rest) if asked.value else None, found.student, found.teacher

    directions = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in d_logits)
    return jax.jvp(apart, primals[:2], tuple(directions))


def _swept(problem: Problem, asked: _Asked, *, look: bool = True) -> Sweep:
    """The sweep; without a look for JAX to differentiate, which is to see the formulas alone."""
    if not _jax_look.takes(problem):
        return sweep_rows(problem, **asked._asdict())
    sweep = _jax_look.sweep if look else _jax_loop.sweep
    return sweep(problem, **asked._asdict())


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
