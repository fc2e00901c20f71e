"""A call as one primitive of a program that JAX compiles, lowered to the CPU's row kernel by `jax.ffi`.

An eager call is a program of its own, compiled for the shapes and not for the hyper-parameters: JAX takes many times as
long for the formulas one operation at a time. The primitive is lowered to the formulas wherever the kernel cannot
serve: on other platforms, over several devices, in a program that is exported to run where gklx is not, and under
`vmap`.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from .._core.call import Array, Arrays, Asked, Call, Numbers, Result, are_static, without_arrays
from . import blocks, cpu_library

_TARGET = "gklx_rows"
_OPTIONAL = Arrays._fields[2:]
_NO_NUMBERS = Numbers(*[None] * len(Numbers._fields))
# The bits that jax_ffi.cpp names.
_PRESENT = {"prior": 1, "labels": 2, "sample_weight": 4, "where": 8}
_ASKED = (1, 2, 4)  # value, student, teacher


class _Plan(NamedTuple):
    """What is fixed when the program is traced."""

    call: Call
    """Without arrays and numbers."""
    present: tuple[str, ...]
    asked: Asked
    threads: int
    """How many the kernel may use; 0 where the formulas run."""


def serves(call: Call) -> bool:
    """Whether the call can be one primitive: an eager one, or one for which there is a kernel with JAX's interface."""
    if call.ranks is not None:
        return False
    shape_known = all(isinstance(n, int) for n in call.arrays.student.shape)
    return not is_traced(call) or (shape_known and _has_kernel())


def is_traced(call: Call) -> bool:
    """Whether JAX traces any part of the call."""
    return any(isinstance(x, jax.core.Tracer) for x in (*call.arrays, *call.numbers))


def evaluate(call: Call, asked: Asked) -> Result:
    """As `dispatch.evaluate`, the gradients in the dtype computed in."""
    if not any(asked):
        return Result(None, None, None)
    given = call.arrays
    present = [name for name in _OPTIONAL if getattr(given, name) is not None]
    threads = cpu_library.threads() if _has_kernel() else 0
    plan = _Plan(without_arrays(call)._replace(numbers=_NO_NUMBERS), tuple(present), asked, threads)
    numbers = np.asarray(call.numbers, call.dtype) if are_static(call.numbers) else _stacked(call)
    run = _run if is_traced(call) else _compiled
    found = iter(run(plan, given.student, given.teacher, numbers, *(getattr(given, name) for name in present)))
    return Result(*(next(found) if wanted else None for wanted in asked))


def _stacked(call: Call) -> Array:
    return jnp.stack([jnp.asarray(x, call.dtype) for x in call.numbers])


def _run(plan: _Plan, student: Array, teacher: Array, numbers: Array, *optional: Array) -> list[Array]:
    """The primitive, on arrays of the dtypes and shapes that jax_ffi.cpp expects."""
    given = dict(zip(plan.present, optional, strict=True))
    labels, where = given.get("labels"), given.get("where")
    if labels is not None:  # 64 bits stay: cut to 32, a number that names no class could become one that does
        given["labels"] = labels.astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)
    if where is not None:
        given["where"] = jnp.broadcast_to(where, student.shape)
    logits = student.astype(numbers.dtype), teacher.astype(numbers.dtype)
    found: list[Array] = _rows.bind(*logits, jnp.asarray(numbers), *given.values(), plan=plan)  # type: ignore[no-untyped-call]
    return found


_compiled = jax.jit(_run, static_argnums=0)


def _by_formulas(student: Array, teacher: Array, numbers: Array, *optional: Array, plan: _Plan) -> list[Array]:
    given = dict.fromkeys(_OPTIONAL) | dict(zip(plan.present, optional, strict=True))
    call = plan.call._replace(numbers=Numbers(*numbers), arrays=Arrays(student, teacher, **given))
    return _wanted(plan, blocks.evaluate(call, plan.asked)[:3])


def _shapes(student: Any, teacher: Any, numbers: Any, *_: Any, plan: _Plan) -> list[Any]:
    shape = student.shape[:-1] if plan.call.reduction == "none" else ()
    shapes = _wanted(plan, (shape, student.shape, teacher.shape))
    return [jax.core.ShapedArray(each, student.dtype) for each in shapes]


def _wanted(plan: _Plan, results: tuple[Any, Any, Any]) -> list[Any]:
    return [x for x, wanted in zip(results, plan.asked, strict=True) if wanted]


def _lowered_for_cpu(ctx: Any, *operands: Any, plan: _Plan) -> Any:
    module = ctx.module_context
    alone = getattr(module.axis_context, "num_devices", None) == 1
    if plan.threads == 0 or not alone or module.lowering_parameters.for_export:
        return _lowered(ctx, *operands, plan=plan)
    attributes = {
        **plan.call.formula._asdict(),
        "present": sum(_PRESENT[name] for name in plan.present),
        "asked": sum(_wanted(plan, _ASKED)),
        "reduction": cpu_library.REDUCTIONS[plan.call.reduction],
        "threads": plan.threads,
    }
    lowering = jax.ffi.ffi_lowering(_TARGET)
    return lowering(ctx, *operands, **{name: np.int32(x) for name, x in attributes.items()})


def _batched(operands: Any, axes: Any, *, plan: _Plan) -> Any:
    found = jax.vmap(partial(_by_formulas, plan=plan), in_axes=axes)(*operands)
    return found, [0] * len(found)


def _has_kernel() -> bool:
    """Whether a kernel with JAX's interface is in use; JAX knows its handler from then on."""
    if not cpu_library.serves_jax():
        return False
    _register()
    return True


@cache
def _register() -> None:
    library = cpu_library.library()
    assert library is not None
    handler = jax.ffi.pycapsule(library.gklx_jax_rows)  # type: ignore[no-untyped-call]
    jax.ffi.register_ffi_target(_TARGET, handler, platform="cpu")


_lowered = mlir.lower_fun(_by_formulas, multiple_results=True)
_rows = Primitive("gklx_rows")
_rows.multiple_results = True
_rows.def_impl(_by_formulas)  # type: ignore[no-untyped-call]
_rows.def_abstract_eval(_shapes)  # type: ignore[no-untyped-call]
mlir.register_lowering(_rows, _lowered)
mlir.register_lowering(_rows, _lowered_for_cpu, platform="cpu")
batching.primitive_batchers[_rows] = _batched
