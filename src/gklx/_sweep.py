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
a result that is mathematically infinite is then infinite and never inf - inf.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ._problem import Array, Number, Problem
from ._rows import Softmax, as_column, below_maximum, counting, divided, effective_weight, named_class, softmax


class Samples(NamedTuple):
    """What each sample comes to before weights and reduction, all [...]."""

    kl: Array | None
    mse: Array | None
    ce: Array | None
    mass: Array | None
    """W; None where there is no wMSE."""


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
    of_batch: Array | None
    """As from `totals`."""


class _Counted(NamedTuple):
    counts: Array  # [..., C], boolean
    any_counts: Array  # [...], boolean
    sample_weight: Array  # [...], 0 where nothing counts


class _Teacher(NamedTuple):
    z: Array  # [..., C], logits less their maximum
    p: Softmax


class _Rows(NamedTuple):
    counted: _Counted
    teacher: _Teacher
    z_student: Array  # [..., C], logits less their maximum
    q: Softmax
    d: Array  # [..., C], teacher.z - z_student
    infinite: Array  # [..., C], boolean: d is
    undefined: Array  # [...], boolean: a logit that counts is NaN, or a softmax has no finite logit


class _Spread(NamedTuple):
    w: Array  # [..., C]
    mass: Array  # [...], W
    centred: Array  # [..., C], d - mu; 0 where w is


def totals(problem: Problem) -> Array | None:
    """The sums of v and of v W^2 over all samples, [2]: all that the rows of a batch share.

    None where the reduction asks for neither. Over the ranks' samples too, unless a part of a batch says otherwise.
    """
    if not _shares(problem):
        return None
    counted = _counted(problem)
    mass = None
    if _mass_matters(problem):
        teacher = _teacher(problem, counted) if problem.arrays.prior is None else None
        _, mass = _class_weights(problem, counted, teacher)
    return _totals(problem, counted, mass)


def sweep(
    problem: Problem,
    of_batch: Array | None = None,
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
    xp, formula, numbers = problem.xp, problem.formula, problem.numbers
    rows = _row_statistics(problem)
    mse_to_student = student and formula.symmetric
    spread = None
    if not _is_zero(numbers.mse_weight) and (teacher or mse_to_student or (value and formula.decomposed)):
        spread = _spread(problem, rows)
    if of_batch is None and _shares(problem):
        mass = None
        if _mass_matters(problem):
            mass = _class_weights(problem, rows.counted, rows.teacher)[1] if spread is None else spread.mass
        of_batch = _totals(problem, rows.counted, mass)
    share = _share(problem, rows.counted.sample_weight, of_batch)
    mse_weight = numbers.mse_weight
    if spread is not None and formula.batch_normalized:
        mse_weight = mse_weight * _batch_ratio(problem, of_batch)

    loss = _value(problem, _samples(problem, rows, spread), mse_weight, share) if value else None

    if upstream is not None:
        share = share * upstream
    to_teacher = None
    if spread is not None and (teacher or mse_to_student):
        rate = share * (mse_weight * spread.mass)
        if formula.tempered:
            rate = divided(divided(rate, numbers.temperature), numbers.temperature)
        to_teacher = spread.w * spread.centred * as_column(xp, rate)
    to_student = None
    if student:
        if not _is_zero(numbers.ce_weight):
            rate = share * divided(numbers.ce_weight, numbers.temperature)
            to_student = _probability_gap(problem, rows) * as_column(xp, rate)
        if mse_to_student and to_teacher is not None:
            to_student = -to_teacher if to_student is None else to_student - to_teacher
    return Sweep(
        loss,
        _exact_zero_outside(problem, rows, to_student) if student else None,
        _exact_zero_outside(problem, rows, to_teacher) if teacher else None,
        of_batch,
    )


def samples(problems: Sequence[Problem]) -> Scored:
    """Each sample's own KL, or wMSE and CE, unweighted and not yet normalised.

    Of problems that differ in formula, gamma or prior alone: their softmaxes are taken once.
    """
    xp, rows = problems[0].xp, _row_statistics(problems[0])
    ce = _ce(problems[0], rows) if any(each.formula.decomposed for each in problems) else None
    return Scored(
        tuple(_samples(each, rows, _spread(each, rows) if each.formula.decomposed else None, ce) for each in problems),
        xp.exp(-rows.q.log_normalizer),  # the largest logit is 0 by now
        xp.exp(-rows.teacher.p.log_normalizer),
        rows.counted.any_counts,
        rows.undefined,
    )


def prior_raised(problem: Problem) -> Problem:
    """The same problem with gamma already in the prior, where labels choose more rows of the table than it has."""
    arrays = problem.arrays
    if arrays.prior is None or arrays.labels is None:
        return problem
    rows = math.prod(arrays.labels.shape)
    if not isinstance(rows, int) or rows <= arrays.prior.shape[0]:  # a size left open for export is no int
        return problem
    prior = _prior_weights(problem, problem.xp.astype(arrays.prior, problem.dtype, copy=False))
    return problem._replace(arrays=arrays._replace(prior=prior), numbers=problem.numbers._replace(gamma=1.0))


# --- row statistics ---------------------------------------------------------------------------------------------------


def _counted(problem: Problem) -> _Counted:
    xp, arrays = problem.xp, problem.arrays
    counts = counting(xp, (arrays.student, arrays.teacher), arrays.where, arrays.sample_weight)
    any_counts = xp.any(counts, axis=-1)
    return _Counted(counts, any_counts, effective_weight(xp, arrays.sample_weight, any_counts, problem.dtype))


def _teacher(problem: Problem, counted: _Counted) -> _Teacher:
    xp = problem.xp
    t = xp.astype(problem.arrays.teacher, problem.dtype, copy=False)
    z = below_maximum(xp, t, counted.counts, counted.any_counts)
    return _Teacher(z, softmax(xp, z, problem.numbers.temperature, counted.counts, counted.any_counts))


def _row_statistics(problem: Problem) -> _Rows:
    xp = problem.xp
    counted = _counted(problem)
    teacher = _teacher(problem, counted)
    s = xp.astype(problem.arrays.student, problem.dtype, copy=False)
    z_student = below_maximum(xp, s, counted.counts, counted.any_counts)
    q = softmax(xp, z_student, problem.numbers.temperature, counted.counts, counted.any_counts)
    d = teacher.z - z_student
    return _Rows(
        counted=counted,
        teacher=teacher,
        z_student=z_student,
        q=q,
        d=d,
        infinite=xp.isinf(d),
        undefined=xp.isnan(teacher.p.log_normalizer + q.log_normalizer),
    )


def _spread(problem: Problem, rows: _Rows) -> _Spread:
    """The differences d about their weighted mean."""
    xp = problem.xp
    w, mass = _class_weights(problem, rows.counted, rows.teacher)
    weightless = w == 0
    d = xp.where(weightless | rows.infinite, 0.0, rows.d)
    outliers = xp.where(rows.infinite & ~weightless, rows.d, 0.0)
    safe_mass = xp.where(mass == 0, 1.0, mass)
    # The mean in two steps: where nearly all weight is on one class, what the first step rounds off that class's d
    # is as large as the differences that matter.
    d = d - as_column(xp, xp.sum(w * d, axis=-1) / safe_mass)
    rest = xp.sum(w * d, axis=-1) / safe_mass
    above, below = xp.any(outliers == xp.inf, axis=-1), xp.any(outliers == -xp.inf, axis=-1)
    rest = xp.where(above, xp.inf, xp.where(below, -xp.inf, rest))
    rest = xp.where(above & below, xp.nan, rest)  # between opposite infinities there is no mean
    centred = xp.where(weightless, 0.0, d - as_column(xp, rest))
    return _Spread(w, mass, xp.where(outliers == 0, centred, outliers))


def _class_weights(problem: Problem, counted: _Counted, teacher: _Teacher | None) -> tuple[Array, Array]:
    """w, and W with NaN in a sample whose label names no class; `teacher` may be None where a prior is given."""
    xp, arrays = problem.xp, problem.arrays
    if arrays.prior is None:
        assert teacher is not None
        w = _teacher_weights(problem, counted, teacher)
        return w, xp.sum(w, axis=-1)
    prior = xp.astype(arrays.prior, problem.dtype, copy=False)
    if arrays.labels is None:
        w = xp.where(counted.counts, _prior_weights(problem, prior), 0.0)
        return w, xp.sum(w, axis=-1)
    known = named_class(arrays.labels, prior.shape[0])
    index = xp.astype(xp.where(known, arrays.labels, xp.zeros_like(arrays.labels)), xp.int32)
    w = xp.reshape(xp.take(prior, xp.reshape(index, (-1,)), axis=0), counted.counts.shape)
    w = xp.where(counted.counts, _prior_weights(problem, w), 0.0)
    return w, xp.where(known | (counted.sample_weight == 0), xp.sum(w, axis=-1), xp.nan)


def _prior_weights(problem: Problem, prior: Array) -> Array:
    """prior^gamma, NaN where the prior is negative (which only an array nobody read can still be)."""
    prior, gamma = problem.xp.where(prior >= 0, prior, problem.xp.nan), problem.numbers.gamma
    return prior if isinstance(gamma, float) and gamma == 1.0 else prior**gamma


def _teacher_weights(problem: Problem, counted: _Counted, teacher: _Teacher) -> Array:
    """softmax(t / weight_temperature)^gamma."""
    xp, numbers = problem.xp, problem.numbers
    plain = isinstance(numbers.gamma, float) and numbers.gamma == 1.0
    same = _same(numbers.weight_temperature, numbers.temperature)
    if plain and same:
        return teacher.p.probabilities
    tau = numbers.weight_temperature
    at_tau = teacher.p if same else softmax(xp, teacher.z, tau, counted.counts, counted.any_counts)
    if plain:
        return at_tau.probabilities
    # By logarithms: a probability that underflows may still have a gamma-th power. At p = 0 the exponent is
    # gamma times a large negative number, not times -inf, so that 0^0 = 1.
    log_p = divided(teacher.z, tau) - as_column(xp, at_tau.log_normalizer)
    lowest = 0.5 * float(xp.finfo(problem.dtype).min)  # NumPy 1 would widen float32 for its very lowest number
    log_p = xp.where(log_p < lowest, lowest, log_p)
    return xp.where(counted.counts, xp.exp(numbers.gamma * log_p), 0.0)


def _probability_gap(problem: Problem, rows: _Rows) -> Array:
    """The difference q - p, which sums to 0 over the classes.

    The sum of the rounded differences is the error that the two normalisers brought in, spread as p is. Taking it out
    keeps the digits where both rows are confident of one class, or close to each other.
    """
    xp, p = problem.xp, rows.teacher.p.probabilities
    gap = rows.q.probabilities - p
    return gap - p * as_column(xp, xp.sum(gap, axis=-1))


# --- values -----------------------------------------------------------------------------------------------------------


def _samples(problem: Problem, rows: _Rows, spread: _Spread | None, ce: Array | None = None) -> Samples:
    if not problem.formula.decomposed:
        return Samples(_kl(problem, rows), None, None, None)
    mse = None if spread is None else _mse(problem, rows, spread)
    return Samples(None, mse, _ce(problem, rows) if ce is None else ce, None if spread is None else spread.mass)


def _mse(problem: Problem, rows: _Rows, spread: _Spread) -> Array:
    xp, temperature = problem.xp, problem.numbers.temperature
    e = divided(spread.centred, temperature) if problem.formula.tempered else spread.centred
    mse = 0.5 * spread.mass * xp.sum(spread.w * e * e, axis=-1)
    # Opposite infinities: mu is undefined, the sum of squares is not.
    infinite = xp.any(rows.infinite & (spread.w != 0), axis=-1) & ~rows.undefined & ~xp.isnan(spread.mass)
    return xp.where(infinite, xp.inf, mse)


def _ce(problem: Problem, rows: _Rows) -> Array:
    xp = problem.xp
    z = xp.where(rows.z_student == -xp.inf, 0.0, rows.z_student)
    mean = divided(xp.sum(rows.teacher.p.probabilities * z, axis=-1), problem.numbers.temperature)
    return _infinite_if_unreachable(problem, rows, rows.q.log_normalizer - mean)


def _kl(problem: Problem, rows: _Rows) -> Array:
    """KL as sum_j p_j L_j + q_j - p_j with L = log p - log q, which is the same since p and q each sum to 1.

    Every summand is >= 0, and for a small L it is p (L + expm1(-L)), free of the cancellation that leaves
    nothing of the KL of two close rows.
    """
    xp = problem.xp
    p, q = rows.teacher.p.probabilities, rows.q.probabilities
    normalizers = as_column(xp, rows.teacher.p.log_normalizer - rows.q.log_normalizer)
    ratio = divided(xp.where(rows.infinite, 0.0, rows.d), problem.numbers.temperature) - normalizers
    close = (abs(ratio) < 1) & ~rows.infinite
    small = xp.where(close, ratio, 0.0)
    far = xp.where(rows.infinite, 0.0, p * ratio) + (q - p)
    summand = xp.where(close, p * (small + xp.expm1(-small)), far)
    kl = xp.sum(xp.where(rows.counted.counts, summand, 0.0), axis=-1)
    return _infinite_if_unreachable(problem, rows, kl)


def _infinite_if_unreachable(problem: Problem, rows: _Rows, x: Array) -> Array:
    """+inf where the student gives no probability to a class to which the teacher gives some."""
    xp = problem.xp
    return xp.where(xp.any(rows.d == xp.inf, axis=-1) & ~rows.undefined, xp.inf, x)


def _value(problem: Problem, of: Samples, mse_weight: Number, share: Array) -> Array:
    xp, loss = problem.xp, of.kl
    if loss is None:
        loss = _weighted(problem, of.ce, problem.numbers.ce_weight)
    if of.mse is not None:
        loss = _weighted(problem, of.mse, mse_weight) + loss
    loss = _weighted(problem, loss, share)
    return loss if problem.reduction == "none" else xp.sum(loss)


def _weighted(problem: Problem, x: Array, weight: Number) -> Array:
    """The product weight * x, and 0 where the weight is 0 though x be infinite."""
    xp = problem.xp
    if isinstance(weight, float):
        return xp.zeros_like(x) if weight == 0.0 else weight * x
    return weight * xp.where(weight == 0, 0.0, x)


# --- what the rows of a batch share -----------------------------------------------------------------------------------


def _mass_matters(problem: Problem) -> bool:
    """Whether the batch's sum of v W^2 is in the loss."""
    return problem.formula.batch_normalized and not _is_zero(problem.numbers.mse_weight)


def _shares(problem: Problem) -> bool:
    return problem.reduction == "mean" or _mass_matters(problem)


def _totals(problem: Problem, counted: _Counted, mass: Array | None) -> Array:
    xp, v = problem.xp, counted.sample_weight
    weight = xp.sum(v)
    both = xp.stack([weight, xp.zeros_like(weight) if mass is None else xp.sum(v * mass * mass)])
    return both if problem.ranks is None else problem.ranks.total(both)


def _share(problem: Problem, v: Array, of_batch: Array | None) -> Array:
    """What a sample's entry counts for in the reduced value.

    Over several ranks the mean of their values, like the mean of their gradients, is that of the whole batch.
    """
    xp = problem.xp
    if problem.reduction == "sum":
        return v
    if problem.reduction == "none":
        return v / xp.where(v == 0, 1.0, v)
    assert of_batch is not None
    share = v / xp.where(of_batch[0] == 0, 1.0, of_batch[0])
    return share if problem.ranks is None else problem.ranks.size * share


def _batch_ratio(problem: Problem, of_batch: Array | None) -> Array:
    """The ratio sum v / sum v W^2: turns a mean over samples into GKL's mean over the batch's pairs."""
    assert of_batch is not None
    return of_batch[0] / problem.xp.where(of_batch[1] == 0, 1.0, of_batch[1])


def _exact_zero_outside(problem: Problem, rows: _Rows, gradient: Array | None) -> Array:
    if gradient is None:
        return problem.xp.zeros_like(rows.d)
    return problem.xp.where(rows.counted.counts, gradient, 0.0)


def _is_zero(x: Number) -> bool:
    return isinstance(x, float) and x == 0.0


def _same(x: Number, y: Number) -> bool:
    return x is y or (isinstance(x, float) and isinstance(y, float) and x == y)
