"""The mathematics: values and gradients of KL, DKL, IKL and GKL, from one sweep over the rows.

Notation, as in the papers (arXiv 2305.13948 and 2503.08038): s, t are the student's and the teacher's logits,
p = softmax(t/T), q = softmax(s/T), w the class weights of a sample, W = sum_j w_j, d = t - s and
mu = sum_j w_j d_j / W. A sample's losses are

    KL   = sum_j p_j (log p_j - log q_j)
    wMSE = 1/4 sum_jk w_j w_k (d_j - d_k)^2 = 1/2 W sum_j w_j (d_j - mu)^2
    CE   = -sum_j p_j log q_j

and their gradients, with w and the p of CE held constant,

    d KL/ds  = (q - p) / T          d KL/dt   = p_j (d_j - mu) / T^2       (w = p)
    d CE/ds  = (q - p) / T          d CE/dt   = 0
    d wMSE/dt = W w_j (d_j - mu)    d wMSE/ds = -d wMSE/dt, or 0

The second form of wMSE needs no pair of classes: O(C) work a sample. KL's gradient to the teacher is written in the
same centred form, since log p_j - log q_j - KL = (d_j - mu) / T: that is the theorem KL = DKL in gradients.

Array-API calls only. Where a difference of logits is infinite it is kept out of the sums and put back afterwards:
a result that is mathematically infinite is then infinite and never inf - inf. Rows that may be looked at and hold
nothing but moderate numbers, all of which count, are spared the masks that this takes; the formulas are the same.
"""

import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from ._batch import (
    Samples,
    Totals,
    mass_matters,
    mse_weight_of,
    rates_of,
    share_of,
    shares,
    totals_of,
    value_of,
)
from ._problem import Array, Number, Problem
from ._rows import (
    Softmax,
    as_column,
    below,
    chosen,
    counting,
    divided,
    effective_weight,
    exactly,
    in_dtype,
    log_normalizer,
    masked,
    maxima,
    maxima_of_moderate,
    minus,
    named_class,
    normalizer,
    softmax,
    softmaxes_together,
    summed_exponentials,
    sums,
    times,
)


class Scored(NamedTuple):
    """What is known of each sample, all [...], whatever it weighs."""

    losses: tuple[Samples, ...]
    """Of each problem asked for, in its order."""
    student: Array
    """The largest probability of softmax(s/T)."""
    teacher: Array
    counts: Array
    """Boolean: some class is in the softmax."""
    undefined: Array
    """Boolean: a logit that counts is NaN, or a softmax has no finite logit."""


class Sweep(NamedTuple):
    """What was asked for; the rest is None. Gradients are in the dtype computed in."""

    value: Array | None
    student: Array | None
    teacher: Array | None
    of_batch: Totals | None
    """As from `totals`."""
    ordinary: Array | bool
    """Whether the rows were looked at, and are such as `totals_if_ordinary` takes them for.

    Of rows presumed ordinary, where the value was asked for, whether they are; a 0-d array in a compiler's hands.
    """


class _Counted(NamedTuple):
    logits: tuple[Array, ...]  # [..., C], of student and teacher; -inf where a class does not count
    top: tuple[Array, ...]  # [..., 1], their rows' maxima; 0 where nothing counts
    counts: Array | None  # [..., C], boolean; None in ordinary rows: a class that does not count does no harm
    any_counts: Array | None  # [...], boolean; None where it is so in every row
    sample_weight: Array | float  # [...], 0 where nothing counts; 1.0 in ordinary rows without weights


class _Rows(NamedTuple):
    counted: _Counted
    teacher: Softmax
    student: Softmax
    d: Array  # [..., C], teacher.z - student.z
    undefined: Array | None  # [...], boolean: a logit that counts is NaN, or a softmax has no finite logit; None: none


class _Weights(NamedTuple):
    relative: Array  # [..., C], w but for a factor
    total: Array | float  # [...], its sums; 1.0 where that is known
    scale: Array | float  # [...], the factor: w = scale * relative
    mass: Array | float  # [...], W; 1.0 in ordinary rows that the teacher's own probabilities weigh


class _Spread(NamedTuple):
    mass: Array | float  # [...], W
    factor: Array | float  # [...], of the next: W w (d - mu) = factor * weighted
    centred: Array  # [..., C], d - mu
    weighted: Array  # [..., C], w (d - mu) but for a factor
    infinite: Array | None  # [...], boolean: some d of weight is; None: none
    squares: tuple[Array, Array] | None = None  # [...], if made at once: sum w (d - m)^2 / W, m near mu, and (mu - m)^2


def totals(problem: Problem) -> Totals | None:
    """What the rows of the batch share; None where the reduction asks for nothing.

    Over the ranks' samples too, unless a part of a batch says otherwise.
    """
    if not shares(problem):
        return None
    counted = _counted(problem, at_teacher_alone=True)
    return totals_of(problem, counted.sample_weight, _mass(problem, counted) if mass_matters(problem) else None)


def totals_if_ordinary(problem: Problem) -> Totals | None:
    """As `totals`, in a batch of ordinary rows alone, where that takes no look at the logits; None otherwise.

    Every sample and class then counts: the teacher's own probabilities, where they are the weights, have W = 1, and a
    prior's W are sums that no logit has a part in.
    """
    if not shares(problem) or problem.ranks is not None or (problem.top is None and not looks_below(problem)):
        return None
    v = _given_weight(problem)
    if not mass_matters(problem):
        return totals_of(problem, v, None)
    prior, samples = problem.arrays.prior, math.prod(problem.arrays.student.shape[:-1])
    if prior is None:
        return totals_of(problem, v, 1.0) if exactly(problem.numbers.gamma, 1.0) else None
    if problem.arrays.labels is not None and prior.shape[0] > samples:  # of so long a table the samples' rows are less
        return None
    return totals_of(problem, v, _prior_mass(problem, v))


def sweep_rows(
    problem: Problem,
    of_batch: Totals | None = None,
    *,
    value: bool = False,
    student: bool = False,
    teacher: bool = False,
    upstream: Array | None = None,
) -> Sweep:
    """Value and gradients of a problem, as asked for.

    `of_batch` is what `totals` gives for the batch, where it is known. The gradients, in the dtype computed in, are
    those of each sample's own entry under the reduction "none"; they are multiplied by `upstream`, of the value's
    shape.
    """
    rows, eager = _row_statistics(problem), problem.eager
    spread = ce = None
    product = _ce_product(problem, rows) if value and problem.formula.decomposed else None
    if needs_spread(problem, value=value, student=student, teacher=teacher):
        spread, ce = _spread(problem, rows, product)
    elif product is not None:
        ce = problem.xp.sum(product, axis=-1)
    if of_batch is None and shares(problem):
        mass = None
        if mass_matters(problem):
            mass = _class_weights(problem, rows.counted, rows.teacher).mass if spread is None else spread.mass
        of_batch = totals_of(problem, rows.counted.sample_weight, mass)
    share = share_of(problem, rows.counted.sample_weight, of_batch)
    mse_weight = mse_weight_of(problem, of_batch)
    ordinary: Array | bool = rows.counted.counts is None and rows.counted.any_counts is None
    loss = None
    if value:
        of_samples = _samples(problem, rows, spread, None if ce is None else _ce(problem, rows, ce))
        loss = value_of(problem, of_samples, mse_weight, share)
        if problem.fused:
            ordinary = _all_fine(problem, of_samples, spread)
        elif problem.presumed:
            ordinary = _are_finite(problem, of_samples, loss)
    rates = rates_of(problem, share, mse_weight, None if spread is None else spread.factor, upstream)
    to_teacher = to_student = None
    if teacher and spread is not None:
        to_teacher = times(spread.weighted, _column(rates.teacher), eager)
    if student and rates.student is not None:
        to_student = times(_probability_gap(problem, rows), _column(rates.student), eager)
    if student and rates.teacher is not None and spread is not None and problem.formula.symmetric:
        if problem.fused:
            # PyTorch's compiler has a loop of its own for what reads a result that may yet be mended, or equals one.
            opposite = spread.weighted * _column(-rates.teacher)
            to_student = opposite if to_student is None else to_student + opposite
        else:
            opposite = times(spread.weighted, _column(rates.teacher), eager) if to_teacher is None else to_teacher
            to_student = -opposite if to_student is None else minus(to_student, opposite, eager)
    return Sweep(
        loss,
        _exact_zero_outside(problem, rows, to_student) if student else None,
        _exact_zero_outside(problem, rows, to_teacher) if teacher else None,
        of_batch,
        ordinary,
    )


def needs_spread(problem: Problem, *, value: bool, student: bool, teacher: bool) -> bool:
    """Whether the wMSE has a part in what is asked for."""
    if exactly(problem.numbers.mse_weight, 0.0):
        return False
    return teacher or (student and problem.formula.symmetric) or (value and problem.formula.decomposed)


def samples(problems: Sequence[Problem]) -> Scored:
    """Each sample's own KL, or wMSE and CE, unweighted and not yet normalised.

    Of problems that differ in formula, gamma or prior alone: their softmaxes are taken once.
    """
    xp, rows = problems[0].xp, _row_statistics(problems[0])
    ce = None
    if any(each.formula.decomposed for each in problems):
        ce = _ce(problems[0], rows, xp.sum(_ce_product(problems[0], rows), axis=-1))
    losses = (
        _samples(each, rows, _spread(each, rows)[0] if each.formula.decomposed else None, ce) for each in problems
    )
    of_student, of_teacher = log_normalizer(xp, rows.student), log_normalizer(xp, rows.teacher)
    finite = xp.isfinite(of_student)
    return Scored(
        tuple(losses),
        xp.exp(-of_student),  # the largest logit is 0 by now
        xp.exp(-of_teacher),
        finite if rows.counted.any_counts is None else rows.counted.any_counts,
        ~finite if rows.undefined is None else rows.undefined,
    )


def prior_raised(problem: Problem, *, passes: int = 1) -> Problem:
    """The same problem with gamma already in the prior, where that spares work.

    In one pass over the rows it does where labels choose more rows of the table than it has. In several it does in any
    case: of a table with fewer samples than rows, those samples' rows become a table of their own.
    """
    xp, arrays = problem.xp, problem.arrays
    prior, labels = arrays.prior, arrays.labels
    if prior is None or exactly(problem.numbers.gamma, 1.0):
        return problem
    samples = math.prod(arrays.student.shape[:-1])
    if not isinstance(samples, int):  # left open for export
        return problem
    if labels is None or samples <= prior.shape[0]:
        if passes == 1:
            return problem
        if labels is not None:
            known, index = _rows_of_table(problem, prior)
            prior = xp.take(prior, index, axis=0)
            own = xp.reshape(xp.cumulative_sum(xp.ones_like(index)) - 1, labels.shape)
            labels = xp.where(known, own, xp.full_like(own, -1))
    prior = _prior_weights(problem, in_dtype(xp, prior, problem.dtype))
    return problem._replace(
        arrays=arrays._replace(prior=prior, labels=labels), numbers=problem.numbers._replace(gamma=1.0)
    )


# --- row statistics ---------------------------------------------------------------------------------------------------


def _counted(problem: Problem, *, at_teacher_alone: bool = False) -> _Counted:
    """What counts, and the logits in the dtype computed in.

    Where the teacher's logits are moderate every class counts and weighs, whatever the student's are: who asks for no
    more need look no further.
    """
    xp, arrays, dtype = problem.xp, problem.arrays, problem.dtype
    logits = tuple(in_dtype(xp, x, dtype) for x in (arrays.student, arrays.teacher))
    if problem.presumed or problem.top is not None:
        if problem.top is None:
            top = tuple(xp.max(x, axis=-1, keepdims=True) for x in logits)
        else:
            top = tuple(as_column(x) for x in problem.top)
        return _Counted(logits, top, None, None, _given_weight(problem))
    limit = looks_below(problem)
    if limit:
        seen = maxima_of_moderate(xp, logits[1:] if at_teacher_alone else logits, limit)
        if seen is not None:
            return _Counted(logits, (seen[0], seen[-1]), None, None, _given_weight(problem))
    found = _spared_masks(problem, logits, at_teacher_alone)
    if found is not None:
        return found
    s, t = logits = tuple(masked(xp, x, arrays.where, arrays.sample_weight) for x in logits)
    top, any_counts = maxima(xp, logits)
    weight = effective_weight(xp, arrays.sample_weight, any_counts, dtype)
    return _Counted(logits, top, (s != -xp.inf) | (t != -xp.inf), any_counts, weight)


def _spared_masks(problem: Problem, logits: tuple[Array, ...], at_teacher_alone: bool) -> _Counted | None:
    """Ordinary rows, once what does not count has the same low logit twice: no probability and no difference.

    None where that is not enough, or not so: a class that a prior weighs would still weigh, as would all at gamma = 0.
    """
    xp, arrays, numbers = problem.xp, problem.arrays, problem.numbers
    if not problem.readable or arrays.prior is not None:
        return None
    limit = moderate(problem)
    low = -0.5 * limit
    if -low * min(1.0, numbers.gamma) <= 1e3 * max(numbers.temperature, numbers.weight_temperature):  # exp is not 0
        return None
    counts = counting(xp, logits, arrays.where, arrays.sample_weight)
    logits = tuple(xp.where(counts, x, low) for x in logits)
    seen = maxima_of_moderate(xp, logits[1:] if at_teacher_alone else logits, limit)
    if seen is None:
        return None
    any_counts = xp.any(counts, axis=-1)
    if bool(xp.all(any_counts)):
        return _Counted(logits, (seen[0], seen[-1]), None, None, _given_weight(problem))
    weight = effective_weight(xp, arrays.sample_weight, any_counts, problem.dtype)
    return _Counted(logits, (seen[0], seen[-1]), None, any_counts, weight)


def moderate(problem: Problem) -> float:
    """The bound below which logits are moderate: quotients and squares are finite. 0 where nobody knows one."""
    temperatures = problem.numbers.temperature, problem.numbers.weight_temperature
    if not all(isinstance(x, float) for x in temperatures):
        return 0.0
    return 0.1 * _square_root_of_largest(problem.xp, problem.dtype) * float(min(1.0, *temperatures))


@cache
def _square_root_of_largest(xp: ModuleType, dtype: Any) -> float:
    return math.sqrt(float(xp.finfo(dtype).max))


def looks_below(problem: Problem) -> float:
    """That bound for a look at the rows; 0 where none may be taken or rows have masks in any case."""
    return moderate(problem) if problem.arrays.where is None and _prior_is_sound(problem) else 0.0


def _given_weight(problem: Problem) -> Array | float:
    """The sample weights as given, NaN where negative if nobody read them."""
    v = problem.arrays.sample_weight
    if v is None:
        return 1.0
    return v if problem.readable else problem.xp.where(v >= 0, v, problem.xp.nan)


def _softmax(problem: Problem, counted: _Counted, which: int) -> Softmax:
    """The student's (0) or the teacher's (1), at the temperature."""
    z = below(counted.logits[which], counted.top[which])
    return _softmax_of(problem, z, problem.numbers.temperature, counted.any_counts)


def _softmaxes(problem: Problem, counted: _Counted) -> tuple[Softmax, ...]:
    """The student's and the teacher's, at the temperature."""
    if problem.together is None:
        return _softmax(problem, counted, 0), _softmax(problem, counted, 1)
    zs = tuple(below(x, top) for x, top in zip(counted.logits, counted.top, strict=True))
    return softmaxes_together(problem.xp, zs, problem.numbers.temperature, problem.together)


def _softmax_of(problem: Problem, z: Array, temperature: Number, any_counts: Array | None) -> Softmax:
    return softmax(problem.xp, z, temperature, any_counts, eager=problem.eager, own=problem.softmax)


def _row_statistics(problem: Problem) -> _Rows:
    xp, counted = problem.xp, _counted(problem)
    student, teacher = _softmaxes(problem, counted)
    if counted.counts is None:
        d = minus(teacher.z, student.z, problem.eager and not _weights_need_logits(problem))
        return _Rows(counted, teacher, student, d, None)
    d = chosen(xp, counted.counts, teacher.z) - chosen(xp, counted.counts, student.z)
    return _Rows(counted, teacher, student, d, xp.isnan(log_normalizer(xp, teacher) + log_normalizer(xp, student)))


def _spends(problem: Problem, counted: _Counted) -> bool:
    """Whether the last reader of an array may write over it: of `sweep_rows`, in the order in which it reads."""
    return problem.eager and counted.counts is None


def _spread(problem: Problem, rows: _Rows, beside: Array | None = None) -> tuple[_Spread, Array | None]:
    """The differences d about their weighted mean; and the sums of `beside`, [..., C], which is read with them."""
    xp, d = problem.xp, rows.d
    w, total, scale, mass = _class_weights(problem, rows.counted, rows.teacher)
    factor = mass * scale
    if problem.fused and not isinstance(total, float):
        # Then the mean takes no division a row, at which PyTorch's compiler would end its loop over the rows.
        w, total, factor = w / as_column(total), 1.0, factor * total
    divisor = total
    if not isinstance(total, float):
        if rows.counted.counts is not None or problem.arrays.prior is not None:  # else the weights hold an e^0
            divisor = xp.where(total == 0, 1.0, total)
        divisor = as_column(divisor)
    infinite = None
    if rows.counted.counts is not None:
        weighing = xp.where(w == 0, 0.0, d)
        infinite = abs(weighing) == xp.inf  # PyTorch's compiler makes vectors of this, and of isinf none
        d = xp.where(infinite, 0.0, weighing)
        upwards = xp.max(weighing, axis=-1, keepdims=True) == xp.inf
        downwards = xp.min(weighing, axis=-1, keepdims=True) == -xp.inf
    # The mean in two steps: where nearly all weight is on one class, what the first step rounds off that class's d
    # is as large as the differences that matter.
    first, *others = sums(xp, problem.together, w * d, *(() if beside is None else (beside,)))
    beside_summed = others[0][..., 0] if others else None
    # KL's value reads d once more.
    d = minus(d, divided(first, divisor), _spends(problem, rows.counted) and problem.formula.decomposed)
    rest = divided(xp.sum(w * d, axis=-1, keepdims=True), divisor)
    if problem.fused:
        # A loop over the rows is spared: the squares are summed about the first step's mean, along with the second's.
        squares = xp.sum(w * d * d, axis=-1), (rest * rest)[..., 0]
        centred = d - rest
        return _Spread(mass, factor, centred, w * centred, None, squares), beside_summed
    if infinite is None:
        centred = minus(d, rest, problem.eager)
        return _Spread(mass, factor, centred, w * centred, None), beside_summed
    rest = xp.where(upwards, xp.inf, xp.where(downwards, -xp.inf, rest))
    rest = xp.where(upwards & downwards, xp.nan, rest)  # between opposite infinities there is no mean
    centred = xp.where(w == 0, 0.0, xp.where(infinite, weighing, d - rest))
    return _Spread(mass, factor, centred, w * centred, (upwards | downwards)[..., 0]), beside_summed


def _class_weights(problem: Problem, counted: _Counted, teacher: Softmax | None) -> _Weights:
    """The weights, with NaN for W where the label names no class; `teacher` may be None where a prior is given."""
    xp, arrays = problem.xp, problem.arrays
    if arrays.prior is None:
        assert teacher is not None
        return _teacher_weights(problem, counted, teacher)
    prior = in_dtype(xp, arrays.prior, problem.dtype)
    if arrays.labels is None:
        w = chosen(xp, counted.counts, _prior_weights(problem, prior))
        mass = xp.sum(w, axis=-1)
        return _Weights(w, mass, 1.0, mass)
    known, index = _rows_of_table(problem, prior)
    w = xp.reshape(xp.take(prior, index, axis=0), arrays.student.shape)
    w = chosen(xp, counted.counts, _prior_weights(problem, w))
    mass = xp.where(known | (counted.sample_weight == 0), xp.sum(w, axis=-1), xp.nan)
    return _Weights(w, mass, 1.0, mass)


def _prior_mass(problem: Problem, v: Array | float) -> Array:
    """W of a prior where every class counts; of a table its rows are summed and not each sample's."""
    xp, labels, dtype = problem.xp, problem.arrays.labels, problem.dtype
    prior = _prior_weights(problem, in_dtype(xp, problem.arrays.prior, dtype))
    sums = xp.sum(prior, axis=-1)
    if labels is None:
        return sums
    known, index = _rows_of_table(problem, prior)
    return xp.where(known | (v == 0), xp.reshape(xp.take(sums, index, axis=0), labels.shape), xp.nan)


def _mass(problem: Problem, counted: _Counted) -> Array | float:
    """W alone, for which the teacher's own weights take its normaliser and not its probabilities."""
    if problem.arrays.prior is not None:
        return _class_weights(problem, counted, None).mass
    if exactly(problem.numbers.gamma, 1.0):
        return _class_weights(problem, counted, _softmax(problem, counted, 1)).mass
    return _raised_weights(problem, counted, below(counted.logits[1], counted.top[1]), None).mass


def _rows_of_table(problem: Problem, table: Array) -> tuple[Array, Array]:
    """Whether each sample's label names a row, [...], and the row's number, 0 where none; flat."""
    xp, labels = problem.xp, problem.arrays.labels
    known = named_class(labels, table.shape[0])
    index = xp.astype(xp.where(known, labels, xp.zeros_like(labels)), xp.int32)
    return known, xp.reshape(index, (-1,))


def _prior_is_sound(problem: Problem) -> bool:
    """Whether the prior is known to hold weights alone: it was read, and no sample of weight 0 brought its own."""
    arrays = problem.arrays
    may_bring_its_own = arrays.prior is not None and arrays.labels is None and arrays.sample_weight is not None
    return problem.readable and not may_bring_its_own


def _prior_weights(problem: Problem, prior: Array) -> Array:
    """prior^gamma, NaN where the prior is negative (which only an array nobody read can still be)."""
    if not _prior_is_sound(problem):
        prior = problem.xp.where(prior >= 0, prior, problem.xp.nan)
    return prior if exactly(problem.numbers.gamma, 1.0) else prior**problem.numbers.gamma


def _weights_need_logits(problem: Problem) -> bool:
    """Whether the weights are made of the teacher's logits, and not of its probabilities or a prior."""
    numbers = problem.numbers
    as_softmax = _same(numbers.weight_temperature, numbers.temperature)
    return problem.arrays.prior is None and not (as_softmax and exactly(numbers.gamma, 1.0))


def _teacher_weights(problem: Problem, counted: _Counted, teacher: Softmax) -> _Weights:
    """softmax(t / weight_temperature)^gamma, but for a factor."""
    xp, numbers = problem.xp, problem.numbers
    tau = numbers.weight_temperature
    as_softmax = _same(tau, numbers.temperature)
    if not exactly(numbers.gamma, 1.0):
        return _raised_weights(problem, counted, teacher.z, teacher if as_softmax else None)
    weighing = teacher if as_softmax else _softmax_of(problem, teacher.z, tau, counted.any_counts)
    if counted.counts is None:
        return _Weights(weighing.relative, weighing.total, 1.0 / weighing.total, 1.0)
    mass = xp.sum(weighing.probabilities, axis=-1)
    return _Weights(weighing.probabilities, mass, 1.0, mass)


def _raised_weights(problem: Problem, counted: _Counted, z: Array, of: Softmax | None) -> _Weights:
    """The same for any gamma: exp(gamma z / weight_temperature) but for a factor; `of` is the softmax, if made."""
    xp, numbers, counts = problem.xp, problem.numbers, counted.counts
    tau, gamma, own = numbers.weight_temperature, numbers.gamma, problem.softmax
    # As an array the exponent may change without PyTorch compiling again.
    power = -gamma if problem.eager else -gamma * xp.ones_like(counted.top[1][..., 0])
    scale = summed_exponentials(xp, z, tau, power, counted.any_counts, own) if of is None else normalizer(xp, of, power)
    z = divided(z, tau)
    if counts is not None:
        # At p = 0 the exponent is gamma times a large negative number, not times -inf, so that 0^0 = 1.
        lowest = 0.5 * float(xp.finfo(problem.dtype).min)  # NumPy 1 would widen float32 for its very lowest number
        z = xp.where(z < lowest, lowest, z)
    z = times(z, gamma, _spends(problem, counted))  # the teacher's, where tau is 1, and their last reader
    if own is not None and counts is None:
        w = softmax(xp, z, 1.0, own=own)
        mass = scale / xp.max(w.probabilities, axis=-1)  # whose z is 0
        return _Weights(w.probabilities, 1.0, mass, mass)
    w = chosen(xp, counts, xp.exp(z))
    total = xp.sum(w, axis=-1)
    return _Weights(w, total, scale, scale * total)


def _probability_gap(problem: Problem, rows: _Rows) -> Array:
    """The difference q - p, which sums to 0 over the classes.

    The sum of the rounded differences is the error that the two normalisers brought in, spread as p is. Taking it out
    keeps the digits where both rows are confident of one class, or close to each other.
    """
    xp, p, spend = problem.xp, rows.teacher.probabilities, _spends(problem, rows.counted)
    gap = minus(rows.student.probabilities, p, spend)
    return minus(gap, times(p, xp.sum(gap, axis=-1, keepdims=True), spend), problem.eager)


# --- values -----------------------------------------------------------------------------------------------------------


def _samples(problem: Problem, rows: _Rows, spread: _Spread | None, ce: Array | None) -> Samples:
    if not problem.formula.decomposed:
        return Samples(_kl(problem, rows), None, None, None)
    if spread is None:
        return Samples(None, None, ce, None)
    return Samples(None, _mse(problem, rows, spread), ce, spread.mass)


def _mse(problem: Problem, rows: _Rows, spread: _Spread) -> Array:
    xp, temperature = problem.xp, problem.numbers.temperature
    if spread.squares is None:
        squares = xp.sum(times(spread.centred, spread.weighted, _spends(problem, rows.counted)), axis=-1)
    else:
        squares = spread.squares[0] - spread.squares[1]
    mse = 0.5 * spread.factor * squares
    if problem.formula.tempered:
        mse = divided(divided(mse, temperature), temperature)
    if spread.infinite is None or rows.undefined is None:
        return mse
    # Opposite infinities: mu is undefined, the sum of squares is not.
    return xp.where(spread.infinite & ~rows.undefined & ~xp.isnan(spread.mass), xp.inf, mse)


def _ce_product(problem: Problem, rows: _Rows) -> Array:
    """What the mean of the student's z by the teacher's probabilities is the sum of, but for the teacher's total."""
    xp, z = problem.xp, rows.student.z
    if rows.counted.counts is not None:
        z = xp.where(z == -xp.inf, 0.0, z)
    return times(z, rows.teacher.relative, _spends(problem, rows.counted))


def _ce(problem: Problem, rows: _Rows, product_summed: Array) -> Array:
    mean = divided(divided(product_summed, rows.teacher.total), problem.numbers.temperature)
    return _infinite_if_unreachable(problem, rows, log_normalizer(problem.xp, rows.student) - mean)


def _kl(problem: Problem, rows: _Rows) -> Array:
    """KL as sum_j p_j L_j + q_j - p_j with L = log p - log q, which is the same since p and q each sum to 1.

    Every summand is >= 0. With p - q = max(p, q) (1 - exp(-|L|)), of L's sign, it is free of the cancellation that
    leaves nothing of the KL of two close rows.
    """
    xp, counts, spend = problem.xp, rows.counted.counts, _spends(problem, rows.counted)
    p, q = rows.teacher.probabilities, rows.student.probabilities
    normalizers = as_column(log_normalizer(xp, rows.teacher) - log_normalizer(xp, rows.student))
    ratio = minus(divided(rows.d, problem.numbers.temperature), normalizers, spend)
    fallen = xp.copysign(xp.expm1(times(abs(ratio), -1.0, spend)), ratio)
    fallen = times(fallen, xp.maximum(p, q), spend)  # p - q
    if counts is not None:
        ratio = xp.where(abs(ratio) == xp.inf, 0.0, ratio)  # where the teacher's p is 0; else KL is infinite
    summand = minus(times(ratio, p, spend), fallen, spend)
    return _infinite_if_unreachable(problem, rows, xp.sum(chosen(xp, counts, summand), axis=-1))


def _all_fine(problem: Problem, of: Samples, spread: _Spread | None) -> Array:
    """Whether every sample's loss is a finite number, whatever it weighs, which no row gives that needs masks.

    A difference d that is infinite or NaN is so in the product with its weight as well, a weight of 0 included. Nor may
    the squares, if made at once, have lost digits where one was taken from the other.
    """
    xp, parts = problem.xp, [x for x in (of.kl, of.mse, of.ce) if x is not None]
    fine = xp.isfinite(parts[0])
    for x in parts[1:]:
        fine = fine & xp.isfinite(x)
    if of.mse is not None and spread is not None and spread.squares is not None:
        fine = fine & (8.0 * spread.squares[1] <= spread.squares[0])
    return xp.all(fine)


def _are_finite(problem: Problem, of: Samples, loss: Array) -> bool:
    """Likewise, by the sum of them all, which is read; the loss tells of samples that all weigh something."""
    xp = problem.xp
    if problem.arrays.sample_weight is not None:
        first, *others = (x for x in (of.kl, of.mse, of.ce) if x is not None)
        loss = sum(others, start=first)
    return math.isfinite(float(xp.sum(loss) if loss.ndim else loss))


def _infinite_if_unreachable(problem: Problem, rows: _Rows, x: Array) -> Array:
    """+inf where the student gives no probability to a class to which the teacher gives some."""
    if rows.undefined is None:
        return x
    xp = problem.xp
    return xp.where((xp.max(rows.d, axis=-1) == xp.inf) & ~rows.undefined, xp.inf, x)


def _column(x: Array | float) -> Array | float:
    return x if isinstance(x, float) else as_column(x)


def _exact_zero_outside(problem: Problem, rows: _Rows, gradient: Array | None) -> Array:
    if gradient is None:
        return problem.xp.zeros_like(rows.d)
    return chosen(problem.xp, rows.counted.counts, gradient)


def _same(x: Number, y: Number) -> bool:
    return x is y or (isinstance(x, float) and isinstance(y, float) and x == y)
