"""A look at the rows within a program that JAX compiles for one CPU.

Where they turn out ordinary the program takes a branch without masks; and since XLA reads its input anew for every sum,
that branch has several sums made in one reading. The other branch is the sweep as it is everywhere else.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .._problem import Array, Problem
from .._sweep import Sweep, moderate
from . import _jax_loop

_LONGEST_CHAIN = 20
_SHORTEST_CHAIN = 4


def takes(problem: Problem) -> bool:
    """Whether JAX traces the logits, of known shape, for the one CPU it has."""
    logits = problem.arrays[:2]
    if not any(isinstance(x, jax.core.Tracer) for x in logits) or not all(isinstance(n, int) for n in logits[0].shape):
        return False
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def sweep(problem: Problem, *, value: bool = False, student: bool = False, teacher: bool = False) -> Sweep:
    """As `_sweep.sweep_rows`, but for what the rows of the batch share."""
    if not _worth_it(problem):
        return _jax_loop.sweep(problem, value=value, student=student, teacher=teacher)

    def run(problem: Problem) -> tuple[Array | None, ...]:
        found = _jax_loop.sweep(problem, value=value, student=student, teacher=teacher)
        return found.value, found.student, found.teacher

    top, ordinary = _seen(problem)
    spared = problem._replace(top=top, together=_together)
    loss, to_student, to_teacher = lax.cond(_of_all(ordinary), lambda: run(spared), lambda: run(problem))
    return Sweep(loss, to_student, to_teacher, None, ordinary=False)


def _worth_it(problem: Problem) -> bool:
    """Whether rows may be ordinary, at a look that is short beside the work. Ranks must not take different branches."""
    arrays = problem.arrays
    long_prior = arrays.prior is not None and math.prod(arrays.prior.shape) > math.prod(arrays.student.shape)
    return arrays.where is None and moderate(problem) > 0.0 and problem.ranks is None and not long_prior


def _seen(problem: Problem) -> tuple[tuple[Array, Array], Array]:
    """The rows' maxima, and whether every logit is a moderate number, and every prior weight a weight."""
    limit, prior = moderate(problem), problem.arrays.prior
    s, t = (x.astype(problem.dtype) for x in problem.arrays[:2])
    extremes = (lax.max, lax.max, lax.min, lax.min)
    *top, low_s, low_t = _in_one_reading(
        (s, t, s, t), extremes, (-jnp.inf, -jnp.inf, jnp.inf, jnp.inf), axis=s.ndim - 1
    )
    ordinary = jnp.all((jnp.minimum(low_s, low_t) > -limit) & (jnp.maximum(*top) < limit))
    if prior is not None:
        ordinary = ordinary & jnp.all((prior >= 0) & (prior < jnp.inf))
    return (top[0], top[1]), ordinary


@jax.custom_batching.custom_vmap
def _of_all(ordinary: Array) -> Array:
    """The same; of what `vmap` maps over, whether all are. With a predicate each, both branches would be computed."""
    return ordinary


@_of_all.def_vmap
def _(_: int, mapped: list[bool], ordinary: Array) -> tuple[Array, bool]:
    return (jnp.all(ordinary, axis=0) if mapped[0] else ordinary), False


def _together(xs: Sequence[Array]) -> Sequence[Array]:
    """The sums along the last axis, in two steps: XLA adds the numbers of one reading one after the other.

    Short chains keep the digits that one long chain would lose; where the classes do not divide into any, each array is
    read by itself.
    """
    classes = xs[0].shape[-1]
    chain = next((n for n in range(_LONGEST_CHAIN, _SHORTEST_CHAIN - 1, -1) if classes % n == 0), None)
    if chain is None:
        return [x.sum(axis=-1) for x in xs]
    chains = [x.reshape((*x.shape[:-1], chain, classes // chain)) for x in xs]
    sums = _in_one_reading(chains, [lax.add] * len(xs), [0.0] * len(xs), axis=chains[0].ndim - 2)
    return [x.sum(axis=-1) for x in sums]


def _in_one_reading(
    xs: Sequence[Array], operations: Sequence[Callable[[Array, Array], Array]], start: Sequence[float], *, axis: int
) -> Sequence[Array]:
    """Reductions of several arrays, each by its own operation."""

    def further(found: Sequence[Array], more: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(f(a, b) for f, a, b in zip(operations, found, more, strict=True))

    first = tuple(jnp.asarray(number, x.dtype) for number, x in zip(start, xs, strict=True))
    found: Sequence[Array] = lax.reduce(tuple(xs), first, further, (axis,))
    return found
