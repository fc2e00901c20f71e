"""The analytic gradient as a `jax.custom_jvp`, which serves forward and reverse mode, to any order."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .._core.call import Array, Arrays, Asked, Call, Numbers, Result, combine, partition, without_arrays
from .._run import blocks, xla

_Rest = tuple[Arrays, Numbers]
"""The arrays without the logits, and the traced numbers, None where not traced."""


def tracks(call: Call) -> bool:
    """True: JAX traces the call, or compiles it as a program of its own."""
    return True


def attach(call: Call) -> Array:
    """The loss; JAX sees the analytic gradients as its derivative."""
    plan, rest = _separated(call)
    return _loss(plan, call.arrays.student, call.arrays.teacher, rest)


def with_gradients(call: Call, asked: Asked) -> Result:
    """As `evaluate`, all of it differentiable again."""
    plan, rest = _separated(call)
    s, t = call.arrays.student, call.arrays.teacher
    found, to_student, to_teacher = _with_gradients(plan, asked, s, t, rest)
    return Result(
        found,
        None if to_student is None else to_student.astype(s.dtype),
        None if to_teacher is None else to_teacher.astype(t.dtype),
    )


def _separated(call: Call) -> tuple[Call, _Rest]:
    static, traced = partition(call.numbers)
    rest = call.arrays._replace(student=None, teacher=None), traced
    return without_arrays(call)._replace(numbers=static), rest


def _call(plan: Call, student: Array, teacher: Array, rest: _Rest) -> Call:
    arrays, traced = rest
    # Gradients are rounded to the logits' dtype last, when they have been multiplied by what follows the loss.
    arrays = arrays._replace(student=student.astype(plan.dtype), teacher=teacher.astype(plan.dtype))
    return plan._replace(numbers=combine(plan.numbers, traced), arrays=arrays)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loss(plan: Call, student: Array, teacher: Array, rest: _Rest) -> Any:
    return _evaluated(plan, Asked(value=True), student, teacher, rest).value


@partial(_loss.defjvp, symbolic_zeros=True)
def _loss_jvp(plan: Call, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    d_logits = _logits_alone(plan, tangents)
    student, teacher = (not isinstance(x, SymbolicZero) for x in d_logits)
    value, *gradients = _with_gradients(plan, Asked(True, student, teacher), *primals)
    tangent: Array = jnp.zeros(value.shape, value.dtype)
    for gradient, direction in zip(gradients, d_logits, strict=True):
        if gradient is not None:
            product = gradient.astype(value.dtype) * direction.astype(value.dtype)
            tangent = tangent + jnp.sum(product, axis=-1 if plan.reduction == "none" else None)
    return value, tangent


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_gradients(plan: Call, asked: Asked, student: Array, teacher: Array, rest: _Rest) -> tuple[Any, ...]:
    """The value, and the gradients of each sample's own entry, in one evaluation; None where not asked for."""
    found = _evaluated(plan, asked, student, teacher, rest)
    return found.value, found.student, found.teacher


def _evaluated(plan: Call, asked: Asked, student: Array, teacher: Array, rest: _Rest) -> Result:
    call = _call(plan, student, teacher, rest)
    return (xla.evaluate if xla.serves(call) else blocks.evaluate)(call, asked)


@partial(_with_gradients.defjvp, symbolic_zeros=True)
def _with_gradients_jvp(plan: Call, asked: Asked, primals: Any, tangents: Any) -> Any:
    """Further derivatives: of the value by the rule above, of the gradients by JAX's own of the formulas."""
    d_logits, rest = _logits_alone(plan, tangents), primals[2]

    def apart(student: Array, teacher: Array) -> tuple[Any, ...]:
        call = _call(plan, student, teacher, rest)
        found = blocks.evaluate(call, asked._replace(value=False))
        return _loss(plan, student, teacher, rest) if asked.value else None, found.student, found.teacher

    directions = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in d_logits)
    return jax.jvp(apart, primals[:2], tuple(directions))


def _logits_alone(plan: Call, tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """The tangents of the logits; a TypeError where another argument has one."""
    student, teacher, (_, numbers) = tangents
    own = Numbers._fields if not plan.formula.tempered else set(Numbers._fields) - {"weight_temperature"}
    moving = [
        name
        for name, x in zip(Numbers._fields, numbers, strict=True)
        if name in own and x is not None and not isinstance(x, SymbolicZero)
    ]
    if moving:
        raise TypeError(
            f"{', '.join(moving)} must be held constant (jax.lax.stop_gradient), since only the logits are "
            "differentiable, got a tangent"
        )
    return student, teacher
