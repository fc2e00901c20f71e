"""The losses from their definitions in decimal arithmetic of 60 digits, with bounds on the rounding errors of a result.

It shares no code with the package. A bound is the first-order effect of one rounding of each intermediate result of
the formulas: a larger error means that digits were lost which the dtype can hold. The exponents of Python's decimals
have no limits that matter here.
"""

import decimal
import math
from decimal import Decimal

import numpy as np

EXACT = decimal.Context(prec=2000, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])  # for differences of floats
CONTEXT = decimal.Context(prec=60, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])
INF, NAN = math.inf, math.nan
DECIMAL_ERROR = Decimal("1e-55")  # of the decimals' own rounding
ZERO, ONE, DECIMAL_NAN = Decimal(0), Decimal(1), Decimal("NaN")


def evaluate(name, s, t, *, prior=None, labels=None, mse_weight=1.0, ce_weight=1.0, gamma=1.0, temperature=1.0,
             weight_temperature=1.0, symmetric=True, normalize="batch", sample_weight=None, where=None,
             reduction="mean", dtype="float64"):  # fmt: skip
    """Value, gradient to the student, gradient to the teacher, and the three bounds of their errors in `dtype`.

    Arrays are NumPy's float64, of values that the dtype holds. An infinite bound: a factor or a summand is beyond the
    dtype, so that the entry may be anything but NaN. A bound of NaN allows NaN too, since underflow decides whether an
    infinite difference has a weight.
    """
    with decimal.localcontext(CONTEXT):
        kind = np.dtype(dtype).type
        number = [Decimal(float(kind(x))) for x in (temperature, weight_temperature, gamma, mse_weight, ce_weight)]
        info = np.finfo(kind)
        unit = Decimal(float(info.eps)) * (16 + 2 * math.isqrt(s.shape[-1]))
        return _Evaluation(name, number, symmetric, normalize, reduction, unit, Decimal(float(info.smallest_normal)),
                           Decimal(float(info.max))).run(s, t, prior, labels, sample_weight, where)  # fmt: skip


LARGEST = {"float16": 65504.0, "bfloat16": (2 - 2.0**-7) * 2.0**127, "float32": float(np.finfo("float32").max)}
LARGEST["float64"] = float(np.finfo("float64").max)
LAST = {"float16": (2.0**-10, 2.0**-24), "bfloat16": (2.0**-7, 2.0**-133), "float32": (2.0**-23, 2.0**-149)}
LAST["float64"] = (2.0**-52, 2.0**-1074)


def fault(found, wanted, bound, dtype):
    """A description of the first wrong entry of an array of `dtype`; "" if there is none."""
    with np.errstate(all="ignore"):
        largest, (unit, smallest) = LARGEST[dtype], LAST[dtype]
        allowed = bound + unit * abs(wanted) + smallest
        right = np.isnan(bound) | (np.isnan(wanted) & np.isnan(found)) | (wanted == found)
        right |= abs(found - wanted) <= allowed
        right |= (allowed >= largest / 4) & ~np.isnan(found)
        beyond = abs(wanted) + allowed >= largest / 2
        right |= beyond & (abs(found) >= largest / 4) & (np.sign(found) == np.sign(wanted))
    if right.all():
        return ""
    at = tuple(int(i) for i in np.argwhere(~right)[0])
    return f"{found[at]!r} for {wanted[at]!r}, allowed {allowed[at]:.2g}, at {at}"


class Row:
    """The quantities of a sample; the bound of the error of `x` is `x_off`."""


def softmax(x, temperature, unit):
    """Log-probabilities, probabilities, the latter's relative errors, the scaled logits and the log of their sum."""
    top = max(x)
    z = [None if v == -INF else (Decimal(v) - Decimal(top)) / temperature for v in x]
    e = [ZERO if v is None else v.exp() for v in z]
    total = sum(e)
    p = [v / total for v in e]
    mean = sum(a * -b for a, b in zip(p, z, strict=True) if a)
    off = [unit * (ONE + mean - (v or ZERO)) for v in z]
    log = total.ln()
    return [None if v is None else v - log for v in z], p, off, z, log


class _Evaluation:
    def __init__(self, name, number, symmetric, normalize, reduction, unit, tiny, largest):
        self.temperature, self.tau, self.gamma, self.mse_weight, self.ce_weight = number
        self.kl = name == "kl"
        if name in ("kl", "dkl"):
            self.tau, self.gamma, symmetric = self.temperature, ONE, False
        if self.kl:
            self.mse_weight = self.ce_weight = ONE
        self.symmetric, self.batch = symmetric, name == "gkl" and normalize == "batch" and self.mse_weight != 0
        self.per_square = ONE / self.temperature**2 if name in ("kl", "dkl") else ONE
        self.reduction, self.unit, self.tiny, self.largest = reduction, unit, tiny, largest

    def row(self, a, b, w):
        """The quantities of a row that is cut to its valid classes; `w` is its prior or None."""
        row, unit, tiny = Row(), self.unit, self.tiny
        row.w_nan = (w is None and (any(map(math.isnan, b)) or math.isinf(max(b)))) or (
            w is not None and not all(x >= 0 for x in w)
        )
        row.undefined = any(map(math.isnan, a + b)) or math.isinf(max(a)) or math.isinf(max(b))
        row.classes, n = len(a), range(len(a))
        if not row.w_nan:
            self.weights(row, b, w)
        if row.undefined:
            return row
        log_q, q, q_off, z_s, log_s = softmax(a, self.temperature, unit)
        log_p, p, p_off, z_t, _ = softmax(b, self.temperature, unit)
        row.unreachable = any(a[j] == -INF and b[j] > -INF for j in n)
        row.gap = [q[j] - p[j] for j in n]
        row.gap_off = [q[j] * q_off[j] + p[j] * p_off[j] + 2 * tiny for j in n]
        both = [j for j in n if z_s[j] is not None and z_t[j] is not None]
        row.ce = log_s - sum(p[j] * z_s[j] for j in both)
        row.ce_off = unit * (1 + log_s) + sum((p[j] * (p_off[j] + unit) + tiny) * -z_s[j] for j in both)
        row.kl = sum(p[j] * (log_p[j] - log_q[j]) for j in both) if self.kl else ZERO
        row.kl_off = DECIMAL_ERROR * (1 + sum(p[j] * (abs(log_p[j]) + abs(log_q[j])) for j in both))
        for j in n if self.kl else ():
            ratio = log_p[j] - log_q[j] if j in both else ZERO
            summand, off = p[j] * ratio + q[j] - p[j], p_off[j] + q_off[j]
            if abs(ratio) < 1:
                row.kl_off += (summand + abs(p[j] - q[j])) * off
            else:  # the errors of p ratio, p and q; a q of 0 has none, however large its relative error
                row.kl_off += p[j] * (abs(ratio) * p_off[j] + off) + q[j] * q_off[j]
            row.kl_off += tiny * (1 + abs(ratio))
        if row.w_nan:
            return row
        # What is rounded of the differences: that of the two maxima is taken off before.
        top = EXACT.subtract(Decimal(max(b)), Decimal(max(a)))
        weighs = [row.u[j] > 0 or self.gamma == 0 for j in n]
        d = [+EXACT.subtract(EXACT.subtract(Decimal(b[j]), Decimal(a[j])), top) if j in both else None for j in n]
        infinite = [j for j in n if d[j] is None and weighs[j]]
        row.vague = any(row.u[j] < 8 * tiny for j in infinite)  # whether it counts depends on underflow
        row.infinite = {j: 1 if b[j] > a[j] else -1 for j in infinite}
        some = [j for j in both if row.u[j]]
        share = sum(row.u[j] for j in some)
        mean = sum(row.u[j] * d[j] for j in some) / share if some else ZERO
        row.c = [d[j] - mean if j in some else ZERO for j in n]
        own_off = max((abs(d[j]) for j in some), default=ZERO) * DECIMAL_ERROR
        d_off = [unit * abs(d[j]) + own_off if j in some else ZERO for j in n]
        mean_off = sum(row.u[j] * (d_off[j] + row.u_off[j] * abs(row.c[j])) + tiny * abs(row.c[j]) for j in some)
        c_off = [x + mean_off for x in d_off]
        row.energy = sum(row.u[j] * row.c[j] ** 2 for j in n) / 2
        row.energy_off = sum(
            (row.u[j] * row.u_off[j] + tiny) * row.c[j] ** 2 + row.u[j] * c_off[j] * (2 * abs(row.c[j]) + c_off[j])
            for j in n
        )
        row.pull = [row.u[j] * row.c[j] for j in n]
        row.pull_off = [row.u[j] * (row.u_off[j] * abs(row.c[j]) + c_off[j]) + tiny * (1 + abs(row.c[j])) for j in n]
        row.size = max(map(abs, row.c)) + 1
        return row

    def weights(self, row, b, w):
        gamma, n = self.gamma, range(len(b))
        if w is None:
            log_w, _, off, *_ = softmax(b, self.tau, self.unit)
        else:
            log_w = [Decimal(x).ln() if x > 0 else None for x in w]
            off = None
        raised = [(ZERO if x is None else (gamma * x).exp()) if gamma else ONE for x in log_w]
        row.W = sum(raised)
        row.u = [x / row.W if row.W else ZERO for x in raised]
        top = max((x for x in log_w if x is not None), default=ZERO)
        fall = [ZERO if x is None else top - x for x in log_w]
        relative = [self.unit * (1 + gamma * (1 + fall[j] + (off[j] / self.unit if off else 0))) for j in n]
        row.W_off = sum(row.u[j] * relative[j] for j in n) + self.unit * (1 + gamma)  # relative
        row.u_off = [x + row.W_off for x in relative]

    def run(self, s, t, prior, labels, sample_weight, where):
        shape, classes = s.shape, s.shape[-1]
        s, t = (x.reshape(-1, classes).astype("float64").tolist() for x in (s, t))
        n = len(s)
        where = np.broadcast_to(True if where is None else where, shape).reshape(-1, classes).tolist()
        v = [1.0] * n if sample_weight is None else np.asarray(sample_weight, "float64").reshape(-1).tolist()
        if prior is not None:
            prior = np.asarray(prior, "float64").reshape(-1, classes).tolist()
            if labels is not None:
                prior = [prior[y] if 0 <= y < classes else [NAN] * classes for y in np.reshape(labels, -1).tolist()]
        rows, keeps = {}, {}
        for i in range(n):
            keep = [j for j in range(classes) if where[i][j] and not s[i][j] == t[i][j] == -INF]
            if v[i] != 0 and keep:
                rows[i] = self.row(*([x[i][j] for j in keep] if x is not None else None for x in (s, t, prior)))
                keeps[i] = keep
        v = {i: Decimal(v[i]) for i in rows}
        total = sum(v.values())
        self.factor, self.factor_off = ONE, ZERO
        self.spoiled = self.batch and any(row.w_nan for row in rows.values())
        if self.batch and not self.spoiled:
            squared = sum(v[i] * row.W**2 for i, row in rows.items())
            self.factor = total / squared if squared else ZERO
            self.factor_off = max((row.W_off for row in rows.values()), default=ZERO) * 2 + 4 * self.unit
        values, offs = [ZERO] * n, [ZERO] * n
        gradients = np.zeros((4, n, classes))
        for i, row in rows.items():
            share = v[i] / total if self.reduction == "mean" else v[i]
            values[i], offs[i] = self.value(row, share)
            if values[i].is_finite():
                offs[i] += self.unit * n * abs(values[i])
            for j, found in zip(keeps[i], self.gradient(row, share), strict=True):
                gradients[:, i, j] = [float(x) for x in found]
        if self.reduction == "none":
            value, value_off = (np.reshape([float(x) for x in y], shape[:-1]) for y in (values, offs))
        else:
            value, value_off = (np.float64(sum(y)) for y in (values, offs))
        return value, *gradients[:2].reshape(2, *shape), value_off, *gradients[2:].reshape(2, *shape)

    def energy_factor(self, row, share):
        """The factor of E."""
        return share * self.mse_weight * self.per_square * (ONE if self.kl else row.W**2 * self.factor)

    def value(self, row, share):
        """The contribution of a row to the value, and its bound."""
        part, off = ZERO, self.tiny
        if row.undefined and (self.kl or self.ce_weight != 0):
            return DECIMAL_NAN, ZERO
        if not self.kl and self.mse_weight != 0:
            if self.spoiled or row.w_nan:
                return DECIMAL_NAN, ZERO
            if row.undefined:
                return self.undefined_energy(row, share)
        if self.kl or self.ce_weight != 0:
            found, found_off = (row.kl, row.kl_off) if self.kl else (row.ce, row.ce_off + self.unit * row.ce)
            by = share * self.ce_weight
            if max(by, found) > self.largest / 64 and not row.unreachable:
                return ZERO, Decimal(INF)
            part, off = (Decimal(INF), off) if row.unreachable else (by * found, off + by * found_off)
        if not self.kl and self.mse_weight != 0:
            by = self.energy_factor(row, share)
            if row.vague:
                return DECIMAL_NAN, DECIMAL_NAN
            if max(by, row.energy) > self.largest / 64 and not (row.infinite and by):
                return ZERO, Decimal(INF)
            part += Decimal(INF) if row.infinite and by else by * row.energy
            off += by * (row.energy_off + row.energy * (2 * row.W_off + self.factor_off + 4 * self.unit))
            off += self.tiny * row.size**2
        return part, off

    def undefined_energy(self, row, share, u=ONE):
        """The contribution of an undefined E, or of its gradient to a class of weight u: NaN; 0 if the factor is 0."""
        by = self.energy_factor(row, share)
        if by * u == 0:
            return ZERO, ZERO
        return DECIMAL_NAN, DECIMAL_NAN if min(by, u) < 8 * self.tiny else ZERO  # which may underflow

    def gradient(self, row, share):
        """For each class, to the student, to the teacher, and their bounds."""
        for j in range(row.classes):
            if row.undefined:
                pull = (ZERO, ZERO)
                if self.mse_weight != 0:
                    nothing = row.w_nan or self.spoiled
                    pull = (
                        (DECIMAL_NAN, ZERO)
                        if nothing
                        else self.undefined_energy(row, share, ONE if not self.gamma else row.u[j])
                    )
                gap = (DECIMAL_NAN, ZERO) if self.ce_weight != 0 else pull if self.symmetric else (ZERO, ZERO)
                yield gap[0], pull[0], gap[1], pull[1]
                continue
            by = share * self.ce_weight / self.temperature
            gap = by * row.gap[j]
            gap_off = by * row.gap_off[j] + abs(gap) * 4 * self.unit + self.tiny
            if by > self.largest / 64:
                gap_off = Decimal(INF)
            pull, pull_off = self.pull(row, share, j) if self.mse_weight != 0 else (ZERO, ZERO)
            if self.symmetric:
                both = gap_off == pull_off == INF  # one infinity less another
                gap, gap_off = gap - pull, DECIMAL_NAN if both else gap_off + pull_off
            yield gap, pull, gap_off, pull_off

    def pull(self, row, share, j):
        """dE/dt of one class, and its bound."""
        if row.w_nan or self.spoiled:
            return DECIMAL_NAN, DECIMAL_NAN
        by = self.energy_factor(row, share)
        if row.vague:
            return DECIMAL_NAN, DECIMAL_NAN
        if by > self.largest / 64:
            opposite = len(set(row.infinite.values())) == 2 and row.u[j]  # there is no mean of d
            return (DECIMAL_NAN, DECIMAL_NAN) if opposite else (ZERO, Decimal(INF))
        if row.infinite and by:
            signs = {row.infinite[j]} if j in row.infinite else {-x for x in row.infinite.values()}
            if not row.u[j]:
                return ZERO, ZERO
            if len(signs) == 2 or row.u[j] < 8 * self.tiny:
                return DECIMAL_NAN, DECIMAL_NAN
            return Decimal(INF) * signs.pop(), ZERO
        found = by * row.pull[j]
        off = by * row.pull_off[j] + abs(found) * (2 * row.W_off + self.factor_off + 4 * self.unit)
        return found, off + self.tiny * row.size
