"""The mathematics: values and gradients of KL, DKL, IKL and GKL, row by row.

Notation, as in the papers (arXiv 2305.13948 and 2503.08038): s, t are the student's and the teacher's logits,
p = softmax(t/T), q = softmax(s/T), w the class weights of a sample, W = sum_j w_j, u = w / W, d = t - s and
mu = sum_j u_j d_j. A sample's losses are

    KL   = sum_j p_j (log p_j - log q_j)
    wMSE = 1/4 sum_jk w_j w_k (d_j - d_k)^2 = W^2 E,  E = 1/2 sum_j u_j (d_j - mu)^2
    CE   = -sum_j p_j log q_j

and their gradients, with w and the p of CE held constant,

    d KL/ds = (q - p) / T         d KL/dt = p_j (d_j - mu) / T^2       (w = p)
    d CE/ds = (q - p) / T         d CE/dt = 0
    d E/dt  = u_j (d_j - mu)      d E/ds  = -d E/dt, or 0

The second form of wMSE needs no pair of classes: O(C) work a sample. KL's gradient to the teacher is written in the
same centred form, since log p_j - log q_j - KL = (d_j - mu) / T: that is the theorem KL = DKL in gradients.

Array-API calls only, one path. A class that is not valid (see `valid_mask`) is left out of every sum and maximum. Where
a difference of logits is infinite it is left out of the sums and put back afterwards, so that a result that is
mathematically infinite is infinite and never inf - inf.
"""

from types import ModuleType
from typing import Any, NamedTuple

from .call import Array, Asked, Call, Number, is_static


class Softmax(NamedTuple):
    """A softmax of each row."""

    logits: Array
    """[..., C]; -inf where a class is not valid."""
    top: Array
    """[..., 1], the row's maximum; 0 where no class is valid."""
    z: Array
    """[..., C], logits less that maximum; -inf where a class is not valid."""
    probabilities: Array
    """[..., C]; 0 where a class is not valid."""
    total: Array
    """[...], the sum of exp(z / temperature); NaN where a valid logit is NaN or +inf, or where none is finite."""


class Difference(NamedTuple):
    """A quarter of t - s, as the sum of two numbers: see `difference`."""

    rounded: Array
    error: Array


class Rows(NamedTuple):
    """What the losses of a row have in common."""

    valid: Array  # [..., C], boolean
    has_valid: Array  # [...], boolean
    student: Softmax
    teacher: Softmax
    d: Difference  # [..., C]; NaN where undefined
    top: Difference  # [..., 1], of the two maxima
    undefined: Array  # [...], boolean: one of the two softmaxes is NaN
    unreachable: Array  # [...], boolean: the student rules out a class that the teacher does not


class ClassWeights(NamedTuple):
    """The weights w of a row, w = base^gamma * relative: neither large nor small weights leave the dtype's range."""

    relative: Array  # [..., C], at most 1
    total: Array  # [...], their sum; NaN where the label names no class
    base: Array  # [...], the row's largest weight before gamma
    heaviest: Array  # [..., C], boolean: the classes of the largest weight


class Deviations(NamedTuple):
    """The differences d about their weighted mean."""

    weights: Array  # [..., C], u = w / W
    centred: Array  # [..., C], a quarter of d - mu; 0 where u is 0
    infinite: Array  # [...], boolean: d is infinite in a class of weight


# --- rows -------------------------------------------------------------------------------------------------------------


def valid_mask(xp: ModuleType, logits: tuple[Array, ...], where: Array | None, sample_weight: Array | None) -> Array:
    """Which classes take part, boolean [..., C].

    Not those where every one of `logits` is -inf or `where` is False, and none in a sample of weight 0.
    """
    valid = logits[0] != -xp.inf
    for x in logits[1:]:
        valid = valid | (x != -xp.inf)
    if where is not None:
        valid = valid & where
    return valid if sample_weight is None else valid & (sample_weight != 0)[..., None]


def rows_of(call: Call) -> Rows:
    """The softmaxes and differences of each row."""
    xp, arrays = call.xp, call.arrays
    s, t = (xp.astype(x, call.dtype, copy=False) for x in (arrays.student, arrays.teacher))
    valid = valid_mask(xp, (s, t), arrays.where, arrays.sample_weight)
    has_valid = xp.any(valid, axis=-1)
    student, teacher = (softmax(xp, x, valid, has_valid, call.numbers.temperature) for x in (s, t))
    undefined = xp.isnan(student.total) | xp.isnan(teacher.total)
    unreachable = xp.any(valid & (s == -xp.inf) & (t > -xp.inf), axis=-1)
    d = difference(xp, xp.where(valid, t, 0.0), xp.where(valid, s, 0.0))
    d = Difference(xp.where(undefined[..., None], xp.nan, d.rounded), d.error)
    top = difference(xp, teacher.top, student.top)
    return Rows(valid, has_valid, student, teacher, d, top, undefined, unreachable & ~undefined)


def softmax(xp: ModuleType, x: Array, valid: Array, has_valid: Array, temperature: Number) -> Softmax:
    """softmax(x / temperature) over the valid classes."""
    x = xp.where(valid, x, -xp.inf)
    top = xp.where(has_valid[..., None], xp.max(x, axis=-1, keepdims=True), 0.0)
    z = x - top
    exponentials = xp.exp(z / temperature)
    total = xp.where(has_valid, xp.sum(exponentials, axis=-1), 1.0)
    return Softmax(x, top, z, exponentials / total[..., None], total)


def difference(xp: ModuleType, t: Array, s: Array) -> Difference:
    """A quarter of t - s, as the sum of the rounded difference and of its rounding error (Knuth's two-sum).

    Offsets of opposite sign leave no digits of the rounded difference alone, and neither do the rows' maxima if they
    are subtracted first while both networks hold the same large fill. In quarters no finite logits overflow.
    `subtract` takes the difference of two of them.
    """
    t, s = 0.25 * t, 0.25 * s
    finite = xp.isfinite(t) & xp.isfinite(s)
    known_t, known_s = xp.where(finite, t, 0.0), xp.where(finite, s, 0.0)
    rounded = known_t - known_s
    subtracted = known_t - rounded
    error = (known_t - (rounded + subtracted)) + (subtracted - known_s)
    return Difference(xp.where(finite, rounded, t - s), error)


def subtract(d: Difference, reference: Difference) -> Array:
    """A quarter of (t - s) less that of a reference. Where one network holds one large fill, the first part is 0."""
    return (d.rounded - reference.rounded) + (d.error - reference.error)


# --- the weighted mean-square error -----------------------------------------------------------------------------------


def class_weights(call: Call, rows: Rows) -> ClassWeights:
    """W = prior^gamma, or softmax(t / weight_temperature)^gamma, held constant; 0^0 = 1."""
    xp, numbers, valid = call.xp, call.numbers, rows.valid
    if call.arrays.prior is None:
        z = rows.teacher.z / numbers.weight_temperature
        total = xp.where(rows.has_valid, xp.sum(xp.exp(z), axis=-1), 1.0)
        lowest = 0.5 * float(xp.finfo(call.dtype).min)
        exponent = numbers.gamma * xp.where(z < lowest, lowest, z)  # gamma * -inf would be NaN at gamma = 0
        relative, base = xp.exp(exponent), 1.0 / total
        known, heaviest = rows.has_valid, rows.teacher.z == 0
    else:
        prior, known = _prior_rows(call, rows)
        prior = xp.where(valid, xp.where(prior >= 0, prior, xp.nan), 0.0)
        base = xp.max(prior, axis=-1)
        heaviest = valid & (prior == base[..., None])
        # A compiler may multiply by a base's reciprocal, and take a subnormal one for 0: the largest are quartered.
        largest = 1.0 / float(xp.finfo(call.dtype).smallest_normal)
        scale = xp.where(base > largest, 0.25 * xp.ones_like(base), 1.0)
        divisor = xp.where(base == 0, 1.0, scale * base)
        relative = (scale[..., None] * prior / divisor[..., None]) ** numbers.gamma
        relative = xp.where(xp.isnan(prior), xp.nan, relative)  # NaN^0 would be 1
    relative = xp.where(valid, relative, 0.0)
    total = xp.sum(relative, axis=-1)
    return ClassWeights(relative, xp.where(known | ~rows.has_valid, total, xp.nan), base, heaviest)


def _prior_rows(call: Call, rows: Rows) -> tuple[Array, Array]:
    """Each sample's own row of the prior, [..., C], and whether there is one."""
    xp, (student, _, prior, labels, *_) = call.xp, call.arrays
    prior = xp.astype(prior, call.dtype, copy=False)
    if labels is None:
        return prior, rows.has_valid
    known = is_class(labels, prior.shape[0])
    index = xp.reshape(xp.astype(xp.where(known, labels, xp.zeros_like(labels)), xp.int32), (-1,))
    return xp.reshape(xp.take(prior, index, axis=0), student.shape), known


def is_class(labels: Array, classes: int) -> Array:
    """Where a label names a class, boolean."""
    return (labels >= 0) & (labels < classes)


def deviations(call: Call, rows: Rows, weights: ClassWeights) -> Deviations:
    """The differences d about their weighted mean mu."""
    xp, d = call.xp, rows.d.rounded
    u = weights.relative / xp.where(weights.total == 0, 1.0, weights.total)[..., None]
    weighs = weights.relative != 0
    infinite = weighs & xp.isinf(d)
    upwards = xp.any(infinite & (d > 0), axis=-1, keepdims=True)
    downwards = xp.any(infinite & (d < 0), axis=-1, keepdims=True)
    summed = weighs & ~infinite

    # Nearly all weight may be on one class. What a sum rounds off its d is then as large as the differences that
    # matter, so all are first taken from the d of such a class (of several, from that of their largest logits).
    # A first mean would do instead only if it were the same number wherever it is used: XLA on a GPU computes it anew
    # in several places, and rounds it differently.
    heaviest = summed & weights.heaviest
    of_heaviest = (
        xp.max(xp.where(heaviest, x.logits, -xp.inf), axis=-1, keepdims=True) for x in (rows.teacher, rows.student)
    )
    t, s = (xp.where(x == -xp.inf, xp.zeros_like(x), x) for x in of_heaviest)
    centred = xp.where(summed, subtract(rows.d, difference(xp, t, s)), 0.0)
    centred = xp.where(summed, centred - xp.sum(u * centred, axis=-1, keepdims=True), 0.0)
    shift = xp.where(downwards, xp.inf, xp.zeros_like(upwards, dtype=call.dtype))
    shift = xp.where(upwards, -xp.inf, shift)
    shift = xp.where(upwards & downwards, xp.nan, shift)  # between opposite infinities there is no mean
    centred = xp.where(infinite, d, centred + shift)
    return Deviations(u, xp.where(weighs, centred, 0.0), (upwards | downwards)[..., 0])


def energy(call: Call, rows: Rows, weights: ClassWeights, around: Deviations) -> Array:
    """E = 1/2 sum_j u_j (d_j - mu)^2, [...]; wMSE = W^2 E."""
    found = 8.0 * call.xp.sum((around.weights * around.centred) * around.centred, axis=-1)  # 16 quarters of quarters
    # Opposite infinities: mu is undefined, the sum of squares is not.
    found = call.xp.where(around.infinite & ~call.xp.isnan(weights.total), call.xp.inf, found)
    return call.xp.where(rows.undefined, call.xp.nan, found)


def energy_gradient(around: Deviations) -> Array:
    """dE/dt = u_j (d_j - mu), [..., C]."""
    return 4.0 * (around.weights * around.centred)


# --- cross-entropy and KL ---------------------------------------------------------------------------------------------


def cross_entropy(call: Call, rows: Rows) -> Array:
    """CE = -sum_j p_j log q_j, [...]."""
    xp, p, student = call.xp, rows.teacher.probabilities, rows.student
    halved = 0.5 * student.logits - 0.5 * student.top  # no finite logits overflow
    mean = xp.sum(p * xp.where(halved == -xp.inf, 0.0, halved), axis=-1) / call.numbers.temperature
    return xp.where(rows.unreachable, xp.inf, xp.log(student.total) - 2.0 * mean)


def kullback_leibler(call: Call, rows: Rows) -> Array:
    """KL = sum_j p_j L_j + q_j - p_j with L = log p - log q, [...]: the same, since p and q each sum to 1.

    Every summand is p (exp(-L) - 1 + L) >= 0, free of the cancellation that leaves nothing of the KL of two close rows.
    """
    xp, p, q = call.xp, rows.teacher.probabilities, rows.student.probabilities
    d = subtract(rows.d, rows.top)

    def over_t(quarter: Array) -> Array:
        # A compiler may fold 4 and 1 / temperature into one factor, which overflows at the smallest temperature.
        return xp.where(quarter == 0, 0.0, 4.0 * (quarter / call.numbers.temperature))

    ratio = over_t(d) - (xp.log(rows.teacher.total) - xp.log(rows.student.total))[..., None]
    is_near = abs(ratio) < 1
    near = p * exponential_remainder(xp, xp.where(is_near, ratio, 0.0))
    # Where L is too large for the dtype, p L need not be. Where d is infinite, p is 0 or the row unreachable.
    overflows = xp.isinf(ratio)
    product = over_t(p * xp.where(xp.isinf(d), 0.0, d))
    far = xp.where(overflows, product, p * xp.where(overflows, 0.0, ratio)) + (q - p)
    found = xp.sum(xp.where(rows.valid, xp.where(is_near, near, far), 0.0), axis=-1)
    return xp.where(rows.unreachable, xp.inf, found)


def exponential_remainder(xp: ModuleType, x: Array) -> Array:
    """exp(-x) - 1 + x >= 0 for |x| <= 1, by its series: a sum of exp(-x) - 1 and x keeps few of its digits near 0."""
    series = xp.ones_like(x)
    for k in range(19, 2, -1):  # the first summand that is left out is 1e-19 of the sum
        series = 1.0 - x / float(k) * series
    return 0.5 * (x * x) * series


def probability_gap(call: Call, rows: Rows) -> Array:
    """Q - p, which sums to 0 over the classes, [..., C].

    The sum of the rounded differences is the error of the two normalisers, spread as p is. Taking it out keeps the
    digits where both rows are confident of one class, or close to each other.
    """
    p = rows.teacher.probabilities
    gap = rows.student.probabilities - p
    return gap - p * call.xp.sum(gap, axis=-1, keepdims=True)


# --- samples ----------------------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """What a sample's terms are multiplied by, all [...]."""

    ce: Array
    """Of CE, or of KL."""
    energy: Array
    """Of E."""


def sample_weights(xp: ModuleType, v: Array | None, has_valid: Array, dtype: Any) -> Array:
    """v, [...], 1 where not given: 0 in a sample without a valid class, NaN where negative."""
    if v is None:
        return xp.astype(has_valid, dtype)
    return xp.where(has_valid, xp.where(v >= 0, v, xp.nan), 0.0)


def value(call: Call, rows: Rows, weights: ClassWeights | None, around: Deviations | None, factors: Factors) -> Array:
    """The loss, summed over the samples unless the reduction is "none"."""
    xp, decomposed = call.xp, call.formula.decomposed
    loss = scaled(xp, factors.ce, (cross_entropy if decomposed else kullback_leibler)(call, rows))
    if decomposed and weights is not None and around is not None:
        loss = scaled(xp, factors.energy, energy(call, rows, weights, around)) + loss
    return loss if call.reduction == "none" else xp.sum(loss)


def student_gradient(call: Call, rows: Rows, around: Deviations | None, factors: Factors) -> Array:
    """The gradient with respect to s, [..., C]."""
    xp, temperature = call.xp, call.numbers.temperature
    found = scaled(xp, (factors.ce / temperature)[..., None], probability_gap(call, rows))
    if around is not None and call.formula.symmetric:
        found = found - scaled(xp, factors.energy[..., None], energy_gradient(around))
    return xp.where(rows.valid, found, 0.0)


def teacher_gradient(call: Call, rows: Rows, around: Deviations | None, factors: Factors) -> Array:
    """The gradient with respect to t, [..., C]."""
    if around is None:
        return call.xp.zeros_like(rows.teacher.z)
    found = scaled(call.xp, factors.energy[..., None], energy_gradient(around))
    return call.xp.where(rows.valid, found, 0.0)


def scaled(xp: ModuleType, factor: Array, x: Array) -> Array:
    """Factor * x, and 0 where the factor is 0 though x be infinite or NaN, or x is 0 though the factor overflowed."""
    factor = xp.where(xp.isinf(factor) & (x == 0), 0.0, factor)
    return factor * xp.where((factor == 0) & ~xp.isfinite(x), 0.0, x)


def uses_energy(call: Call, asked: Asked) -> bool:
    """Whether the wMSE, or KL's gradient to the teacher, has a part in what is asked for."""
    if is_static(call.numbers.mse_weight, 0.0):
        return False
    formula = call.formula
    return asked.teacher or (asked.student and formula.symmetric) or (asked.value and formula.decomposed)
