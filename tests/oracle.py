"""The losses from their definitions, all pairs of classes, in NumPy; differentiated by complex steps.

The inputs are float64 values; the arithmetic is NumPy's widest, so that the oracle's own rounding does not count
against a float64 result. Shares nothing with the package. Each sample is first cut down to the classes that count, so
no mask reaches a formula. A stopped gradient is an argument of its own, held real.
"""

import numpy as np

STEP = 1e-30  # a complex step has no cancellation, so it may be arbitrarily small


def log_softmax(x):
    x = x - x.real.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl_of(s, t, temperature):
    some = np.isfinite(t.real).all(axis=tuple(range(t.ndim - 1)))
    log_p, log_q = log_softmax(t[..., some] / temperature), log_softmax(s / temperature)[..., some]
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def ce_of(s, frozen_t, temperature):
    p = np.exp(log_softmax(frozen_t / temperature)).real
    log_q = log_softmax(s / temperature)
    some = p > 0
    return -(p[some] * log_q[..., some]).sum(axis=-1)


def mse_of(s, t, w, scale):
    some = w > 0
    s, t, w = s[..., some] / scale, t[..., some] / scale, w[some]
    of_teacher = t[..., :, None] - t[..., None, :]
    of_student = s[..., :, None] - s[..., None, :]
    return 0.25 * (w[:, None] * w[None, :] * (of_teacher - of_student) ** 2).sum(axis=(-2, -1))


def weights_of(t, row, gamma, weight_temperature):
    """w of one sample; `row` is its row of the prior, None for the teacher's own softmax."""
    w = np.exp(log_softmax(t / weight_temperature)) if row is None else row
    return w**gamma


def evaluate(
    name,
    s,
    t,
    *,
    prior=None,
    labels=None,
    mse_weight=1.0,
    ce_weight=1.0,
    gamma=1.0,
    temperature=1.0,
    weight_temperature=1.0,
    symmetric=True,
    normalize="batch",
    sample_weight=None,
    where=None,
    reduction="mean",
):
    """Value, gradient to the student, gradient to the teacher; under "none" the gradients of the sum of entries."""
    shape, classes = s.shape, s.shape[-1]
    if where is not None:
        where = np.broadcast_to(where, shape).reshape(-1, classes)
    s, t = (x.reshape(-1, classes).astype(np.longdouble) for x in (s, t))
    n = len(s)
    v = np.ones(n) if sample_weight is None else np.asarray(sample_weight, dtype=np.longdouble).reshape(-1)
    labels = None if labels is None else np.asarray(labels).reshape(-1)
    if prior is not None and labels is None:
        prior = np.asarray(prior).reshape(-1, classes)
    prior = None if prior is None else np.asarray(prior, dtype=np.longdouble)
    if name in ("kl", "dkl"):
        gamma, weight_temperature, symmetric = 1.0, temperature, False
    if name != "gkl":
        normalize = "samples"
    scale = temperature if name == "dkl" else 1.0

    counted = np.zeros(n, dtype=bool)
    mass, mse, ce = np.zeros((3, n), dtype=np.longdouble)
    gradients = {key: np.zeros((n, classes), dtype=np.longdouble) for key in ("mse/s", "mse/t", "ce/s", "ce/t")}
    for i in range(n):
        keep = ~((s[i] == -np.inf) & (t[i] == -np.inf))
        if where is not None:
            keep &= where[i]
        if v[i] == 0 or not keep.any():
            continue
        counted[i] = True
        a, b = s[i][keep], t[i][keep]
        steps = 1j * STEP * np.eye(keep.sum())
        if name == "kl":  # KL takes the place of CE, and there is no wMSE
            ce[i] = kl_of(a, b, temperature)
            gradients["ce/s"][i, keep] = kl_of(a + steps, b + 0 * steps, temperature).imag / STEP
            gradients["ce/t"][i, keep] = kl_of(a + 0 * steps, b + steps, temperature).imag / STEP
            continue
        row = None if prior is None else prior[i] if labels is None else prior[labels[i]]
        w = weights_of(b, None if row is None else row[keep], gamma, weight_temperature)
        mass[i] = w.sum()
        mse[i] = mse_of(a, b, w, scale)
        ce[i] = ce_of(a, b, temperature)
        gradients["ce/s"][i, keep] = ce_of(a + steps, b, temperature).imag / STEP
        gradients["mse/t"][i, keep] = mse_of(a + 0 * steps, b + steps, w, scale).imag / STEP
        if symmetric:
            gradients["mse/s"][i, keep] = mse_of(a + steps, b + 0 * steps, w, scale).imag / STEP

    v = np.where(counted, v, 0.0)
    total = v.sum()
    pairs = (v * mass**2).sum() if normalize == "batch" else total
    mse_factor = mse_weight * (total / pairs if pairs else 0.0)
    ce_factor = 1.0 if name == "kl" else ce_weight
    entries = np.where(counted, mse_factor * mse + ce_factor * ce, 0.0)
    share = v / total if reduction == "mean" and total else v  # total weight 0: the mean is 0
    value = (share * entries).reshape(shape[:-1]) if reduction == "none" else (share * entries).sum()
    to = {
        key: share[:, None] * (mse_factor * gradients[f"mse/{key}"] + ce_factor * gradients[f"ce/{key}"])
        for key in ("s", "t")
    }
    return value, to["s"].reshape(shape), to["t"].reshape(shape)
