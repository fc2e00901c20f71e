"""Rows of logits: which classes count, logits below their maximum, softmax.

Array-API calls only. A class that does not count holds -inf from here on, whatever it held before (NaN, infinities):
its probability is 0.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from ._problem import Array, Number


class Softmax(NamedTuple):
    """One softmax a row."""

    z: Array
    """[..., C], logits less their row's maximum; -inf where a class does not count."""
    probabilities: Array
    """[..., C]; 0 where a class does not count."""
    relative: Array
    """[..., C], the probabilities but for a factor: what sums are best made of."""
    total: Array | float
    """[...], the sum of the above; 1.0 where they are the probabilities themselves."""
    summed: Array | None
    """[...], the sum of exp(z / temperature); None where nothing but the largest probability tells it."""


def normalizer(xp: ModuleType, of: Softmax, power: Number) -> Array:
    """[...], the sum of exp(z / temperature), where z is 0 at the largest probability, to a power."""
    return xp.max(of.probabilities, axis=-1) ** -power if of.summed is None else of.summed**power


def log_normalizer(xp: ModuleType, of: Softmax) -> Array:
    """[...], the logarithm of that sum; log p = z / temperature - this."""
    return -xp.log(xp.max(of.probabilities, axis=-1)) if of.summed is None else xp.log(of.summed)


def as_column(x: Array) -> Array:
    """[...] to [..., 1]."""
    return x[..., None]


def in_dtype(xp: ModuleType, x: Array, dtype: Any) -> Array:
    """`x` in a dtype, as it is where it has it: a call spared, which in a small batch is a good part of the work."""
    return x if x.dtype == dtype else xp.astype(x, dtype)


def chosen(xp: ModuleType, which: Array | None, x: Array, otherwise: float = 0.0) -> Array:
    """`x` where `which`, None being everywhere."""
    return x if which is None else xp.where(which, x, otherwise)


def counting(xp: ModuleType, logits: tuple[Array, ...], where: Array | None, sample_weight: Array | None) -> Array:
    """Which classes count, boolean [..., C].

    A class is out where every one of `logits` is -inf, where `where` is False, and in a sample of weight 0.
    """
    absent = logits[0] == -xp.inf
    for other in logits[1:]:
        absent = absent & (other == -xp.inf)
    counts = ~absent
    if where is not None:
        counts = counts & where
    if sample_weight is not None:
        counts = counts & as_column(sample_weight != 0)
    return counts


def maxima_of_moderate(xp: ModuleType, logits: tuple[Array, ...], limit: float) -> tuple[Array, ...] | None:
    """The rows' maxima [..., 1], None if any logit is NaN or beyond `limit` in size; reads values."""
    top = tuple(xp.max(x, axis=-1, keepdims=True) for x in logits)
    for x, highest in zip(logits, top, strict=True):
        if not (-limit < float(xp.min(x)) and float(xp.max(highest)) < limit):
            return None
    return top


def masked(xp: ModuleType, x: Array, where: Array | None, sample_weight: Array | None) -> Array:
    """Logits that are -inf where `where` is False, and in a sample of weight 0."""
    x = chosen(xp, where, x, -xp.inf)
    return x if sample_weight is None else xp.where(as_column(sample_weight != 0), x, -xp.inf)


def maxima(xp: ModuleType, logits: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
    """The maxima [..., 1] of rows that went through `masked`, 0 where no class counts; and whether any does, [...]."""
    top = tuple(xp.max(x, axis=-1, keepdims=True) for x in logits)
    any_counts = top[0] != -xp.inf
    for other in top[1:]:
        any_counts = any_counts | (other != -xp.inf)
    return tuple(xp.where(any_counts, x, 0.0) for x in top), any_counts[..., 0]


def below(x: Array, top: Array) -> Array:
    """Logits less their row's maximum: at most 0, so that later differences and exponentials are exact and safe."""
    return x - top


def exactly(x: Number, value: float) -> bool:
    """Whether a number is known to be just this; of one that is traced nothing is."""
    return isinstance(x, float) and x == value


def divided(x: Array, by: Number) -> Array:
    """`x / by`, without a pass over the array where `by` is exactly 1."""
    return x if exactly(by, 1.0) else x / by


def product(x: Number, y: Number) -> Number:
    """`x * y`, without one over an array where the other is exactly 1."""
    return x if exactly(y, 1.0) else y if exactly(x, 1.0) else x * y


def minus(x: Array, y: Array, over: bool) -> Array:
    """`x - y`, written over x if `over`: half the traffic of a new array, and a place that is in the cache."""
    if not over:
        return x - y
    x -= y
    return x


def times(x: Array, y: Array | float, over: bool) -> Array:
    """`x * y`, likewise."""
    if not over:
        return x * y
    x *= y
    return x


def sums(xp: ModuleType, together: Callable[[Sequence[Array]], Sequence[Array]] | None, *xs: Array) -> Sequence[Array]:
    """The sums [..., 1] of several arrays along the last axis, in one reading where there is a function for that."""
    if together is None:
        return [xp.sum(x, axis=-1, keepdims=True) for x in xs]
    return [as_column(x) for x in together(xs)]


def exponentials(xp: ModuleType, z: Array, temperature: Number, any_counts: Array | None = None) -> tuple[Array, Array]:
    """exp(z / temperature), z from `below`, and its sums [...]: 1 where no class counts, None being no such row."""
    e = xp.exp(divided(z, temperature))
    return e, chosen(xp, any_counts, xp.sum(e, axis=-1), 1.0)


def summed_exponentials(
    xp: ModuleType,
    z: Array,
    temperature: Number,
    power: Number,
    any_counts: Array | None = None,
    own: Callable[[Array], Array] | None = None,
) -> Array:
    """[...], the sums alone, to a power; of ordinary rows by the library's `own` softmax, if there is one."""
    if own is None or any_counts is not None:
        return exponentials(xp, z, temperature, any_counts)[1] ** power
    return normalizer(xp, softmax(xp, z, temperature, own=own), power)


def softmax(
    xp: ModuleType,
    z: Array,
    temperature: Number,
    any_counts: Array | None = None,
    *,
    eager: bool = False,
    own: Callable[[Array], Array] | None = None,
) -> Softmax:
    """Softmax of z / temperature, z from `below`; 0 in a row where no class counts, None being no such row.

    By the library's `own` function, if there is one.
    """
    if own is not None:
        p = own(divided(z, temperature))
        if any_counts is None:
            return Softmax(z, p, p, 1.0, None)
        total = xp.where(any_counts, 1.0 / xp.max(p, axis=-1), 1.0)
        p = xp.where(as_column(any_counts), p, 0.0)
        return Softmax(z, p, p, 1.0, total)
    e, total = exponentials(xp, z, temperature, any_counts)
    if eager:
        e /= as_column(total)
    else:
        e = e / as_column(total)
    return Softmax(z, e, e, 1.0, total)


def softmaxes_together(
    xp: ModuleType,
    zs: tuple[Array, ...],
    temperature: Number,
    together: Callable[[Sequence[Array]], Sequence[Array]],
) -> tuple[Softmax, ...]:
    """As `softmax` where every class counts, of several arrays; their sums are of exponentials not yet divided."""
    es = [xp.exp(divided(z, temperature)) for z in zs]
    return tuple(
        Softmax(z, e / as_column(total), e, total, total) for z, e, total in zip(zs, es, together(es), strict=True)
    )


def effective_weight(xp: ModuleType, sample_weight: Array | None, any_counts: Array, dtype: Any) -> Array:
    """The sample weights v, [...]: 0 in a sample that does not count.

    NaN where negative, which only an array nobody read can still be.
    """
    if sample_weight is None:
        return xp.astype(any_counts, dtype)
    return xp.where(any_counts, xp.where(sample_weight >= 0, sample_weight, xp.nan), 0.0)


def named_class(labels: Array, classes: int) -> Array:
    """Where a label names a class, boolean."""
    return (labels >= 0) & (labels < classes)
