"""From samples to a batch: the sums that its samples share, and what each sample's terms are multiplied by.

The mean divides by the sum of the sample weights v, and GKL by the sum of v W^2. Both are kept relative to a scale, so
that neither leaves the dtype's range where v or the class weights are very small or large.
"""

import math
from collections.abc import Sequence

from .call import Array, Batch, Call, is_static
from .formulas import ClassWeights, Factors


def uses_batch_mass(call: Call) -> bool:
    """Whether the batch's sum of v W^2 is in the loss."""
    return call.formula.batch_normalized and not is_static(call.numbers.mse_weight, 0.0)


def uses_batch(call: Call) -> bool:
    """Whether the samples of a batch share anything."""
    return call.reduction == "mean" or uses_batch_mass(call)


def batch_of(call: Call, v: Array, weights: ClassWeights | None) -> Batch:
    """What samples of weight v share, on this rank alone; `weights` where the loss is normalised by the batch."""
    xp = call.xp
    weight_scale = _power_of_two(call, _largest(call, v))
    v = _relative(v, weight_scale)
    if weights is None:
        one = xp.ones_like(weight_scale)
        return Batch(weight_scale, one, xp.sum(v), xp.zeros_like(weight_scale))
    base_scale = _held_constant(call, _largest(call, xp.where(v == 0, 0.0, weights.base)))
    mass = xp.where(v == 0, 0.0, _mass(call, weights, base_scale))
    return Batch(weight_scale, base_scale, xp.sum(v), xp.sum(v * mass * mass))


def merged(call: Call, parts: Sequence[Batch]) -> Batch:
    """The batch that consists of several parts, each known by itself."""
    if len(parts) == 1:
        return parts[0]
    stacked = Batch(*(call.xp.stack(column) for column in zip(*parts, strict=True)))
    scales = (call.xp.max(stacked.weight_scale), call.xp.max(stacked.base_scale))
    rescaled = _rescaled(call, stacked, *scales)
    return Batch(*scales, call.xp.sum(rescaled.weight), call.xp.sum(rescaled.squared_mass))


def over_ranks(call: Call, own: Batch) -> Batch:
    """The batch over all ranks, from this rank's part of it."""
    if call.ranks is None:
        return own
    # Of one dtype, whatever made them: a rank may have no kernel.
    own = Batch(*(call.xp.astype(x, call.dtype, copy=False) for x in own))
    scales = call.ranks.largest(call.xp.stack([own.weight_scale, own.base_scale]))
    part = _rescaled(call, own, scales[0], scales[1])
    sums = call.ranks.total(call.xp.stack([part.weight, part.squared_mass]))
    return Batch(scales[0], scales[1], sums[0], sums[1])


def _rescaled(call: Call, batch: Batch, weight_scale: Array, base_scale: Array) -> Batch:
    by_weight = batch.weight_scale / weight_scale
    by_mass = (batch.base_scale / base_scale) ** call.numbers.gamma
    squared_mass = batch.squared_mass * by_weight * by_mass * by_mass
    return Batch(weight_scale, base_scale, batch.weight * by_weight, squared_mass)


def factors_of(
    call: Call, v: Array, weights: ClassWeights | None, batch: Batch | None, upstream: Array | None = None
) -> Factors:
    """The factors of samples of weight v, times the gradient `upstream` of the value, where given.

    Over several ranks the mean of their values, like the mean of their gradients, is that of the whole batch.
    """
    xp, formula, numbers = call.xp, call.formula, call.numbers
    share = v
    if call.reduction == "mean":
        assert batch is not None
        share = _relative(v, batch.weight_scale) / _or_one(call, batch.weight)
        if call.ranks is not None:
            share = call.ranks.size * share
    if upstream is not None:
        share = share * upstream
    of_ce = numbers.ce_weight * share
    of_energy = numbers.mse_weight * share
    if formula.tempered:
        of_energy = of_energy / numbers.temperature / numbers.temperature
    if weights is not None and formula.decomposed:
        if uses_batch_mass(call):
            assert batch is not None
            mass = _mass(call, weights, batch.base_scale)
            of_energy = of_energy * (mass * mass * (batch.weight / _or_one(call, batch.squared_mass)))
        else:
            mass = _mass(call, weights, xp.ones_like(weights.base))
            of_energy = of_energy * mass * mass
        of_energy = xp.where((v == 0) | (numbers.mse_weight == 0), 0.0, of_energy)  # where W is NaN, too
    return Factors(of_ce, of_energy)


def _relative(v: Array, weight_scale: Array) -> Array:
    """The weights in units of the scale, exactly, since it is a power of two.

    By its reciprocal: XLA would turn (v / scale) / sum into v / (scale * sum), where the product overflows.
    """
    return v * (1.0 / weight_scale)


def _mass(call: Call, weights: ClassWeights, base_scale: Array) -> Array:
    """W, of weights relative to a scale."""
    return weights.total * (weights.base / base_scale) ** call.numbers.gamma


def _or_one(call: Call, x: Array) -> Array:
    return call.xp.where(x == 0, 1.0, x)


def _largest(call: Call, x: Array) -> Array:
    """The maximum of numbers >= 0; 0 of none."""
    return call.xp.sum(x) if math.prod(x.shape) == 0 else call.xp.max(x)


def _power_of_two(call: Call, x: Array) -> Array:
    """The largest power of two that is not above x, as far as it and its reciprocal are normal. Its derivative is 0."""
    return 2.0 ** call.xp.floor(call.xp.log2(_invertible(call, x)))


def _held_constant(call: Call, x: Array) -> Array:
    """x, as far as it and its reciprocal are normal, with the derivative 0.

    That is the derivative of `floor`, which changes nothing once x is scaled to an integer of all its digits.
    """
    x, power = _invertible(call, x), _power_of_two(call, x)
    unit = float(call.xp.finfo(call.dtype).eps)
    return call.xp.floor(x / power / unit) * unit * power


def _invertible(call: Call, x: Array) -> Array:
    """The number nearest to x of which neither it nor its reciprocal is subnormal.

    A compiler may turn a division by it into a multiplication by its reciprocal, and take subnormal numbers for 0.
    """
    xp, smallest = call.xp, float(call.xp.finfo(call.dtype).smallest_normal)
    return xp.where(x < smallest, smallest, xp.where(x > 1.0 / smallest, 1.0 / smallest, x))
