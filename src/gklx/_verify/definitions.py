"""The expected results: the losses as the papers define them, over all pairs of classes, in NumPy's widest float.

They share no code with the package, so that faults of gklx's formulas are found too. Gradients are by complex steps,
which lose no digits to subtraction; where the gradient stops, a formula takes the logits without steps. Masked classes
are removed from each sample first, so no formula needs a mask.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_WIDE = np.longdouble
_STEP = 1e-30


class Exact(NamedTuple):
    """The expected results of a call: the value under each reduction, and the gradients of the mean."""

    mean: Any
    sum: Any
    none: Any
    to_student: Any
    to_teacher: Any


def exact(loss: str, s: Any, t: Any, settings: Mapping[str, Any], arrays: Mapping[str, Any]) -> Exact:
    """The expected results of the loss of this name for NumPy arrays."""
    shape = s.shape
    s, t = (x.reshape(-1, shape[-1]).astype(_WIDE) for x in (s, t))
    v = np.asarray(arrays.get("sample_weight", np.ones(shape[:-1])), dtype=_WIDE).reshape(-1)
    counts = np.broadcast_to(arrays.get("where", True), shape).reshape(s.shape) & (v[:, None] != 0)
    counts = counts & ~((s == -np.inf) & (t == -np.inf))
    v = np.where(counts.any(axis=-1), v, 0.0)
    # A constant added to a row changes no loss; without one, differences of logits are most exact.
    logits = {i: [x[i, counts[i]] - x[i, counts[i]].max() for x in (s, t)] for i in np.flatnonzero(v)}
    weights = {i: _weights(loss, b, i, counts[i], settings, arrays) for i, (_, b) in logits.items()}
    total, factor = v.sum(), settings.get("mse_weight", 1.0)
    if loss == "gkl" and settings.get("normalize", "batch") == "batch":
        factor *= total / sum(v[i] * w.sum() ** 2 for i, w in weights.items())
    losses, to_student, to_teacher = np.zeros(len(s), dtype=_WIDE), np.zeros_like(s), np.zeros_like(s)
    for i, (a, b) in logits.items():
        steps, fixed = 1j * _STEP * np.eye(len(a)), (a, b, weights[i], factor, settings)
        losses[i] = _of_sample(loss, a, b, *fixed)
        to_student[i, counts[i]] = v[i] / total * _of_sample(loss, a + steps, b, *fixed).imag / _STEP
        to_teacher[i, counts[i]] = v[i] / total * _of_sample(loss, a, b + steps, *fixed).imag / _STEP
    weighted = v * losses
    return Exact(
        weighted.sum() / total,
        weighted.sum(),
        weighted.reshape(shape[:-1]),
        to_student.reshape(shape),
        to_teacher.reshape(shape),
    )


def _weights(loss: str, t: Any, i: Any, keep: Any, settings: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    """The class weights of one sample."""
    if "prior" in arrays:
        row = arrays["labels"].reshape(-1)[i] if "labels" in arrays else i
        w = arrays["prior"].reshape(-1, len(keep))[row][keep].astype(_WIDE)
    else:
        w = np.exp(_log_softmax(t / settings.get("temperature" if loss == "dkl" else "weight_temperature", 1.0)))
    return w ** settings.get("gamma", 1.0)


def _of_sample(loss: str, s: Any, t: Any, s0: Any, t0: Any, w: Any, factor: Any, settings: Mapping[str, Any]) -> Any:
    """The loss of one sample. `s0` and `t0` are its logits without steps; in `s` or `t` each row has a step of its own.

    `factor` is that of the wMSE.
    """
    temperature = settings.get("temperature", 1.0)
    if loss == "kl":
        return _kl(s, t, temperature)
    if loss == "dkl":
        mse = _mse(s0, t, w) / temperature**2
    else:
        mse = _mse(s if settings.get("symmetric", True) else s0, t, w)
    return factor * mse + settings.get("ce_weight", 1.0) * _ce(s, t0, temperature)


def _kl(s: Any, t: Any, temperature: float) -> Any:
    some = t.real.reshape(-1, t.shape[-1])[0] > -np.inf  # the same in each row: steps are imaginary
    log_p, log_q = _log_softmax(t[..., some] / temperature), _log_softmax(s / temperature)[..., some]
    p, ratio = np.exp(log_p), log_p - log_q
    mean = (p * ratio).sum(axis=-1).real
    # Since p sums to 1 a constant makes no difference; without the mean, small slopes are those of smaller summands.
    return mean + (p * (ratio - mean[..., None])).sum(axis=-1)


def _ce(s: Any, t: Any, temperature: float) -> Any:
    p, log_q = np.exp(_log_softmax(t / temperature)), _log_softmax(s / temperature)
    return -(p[p > 0] * log_q[..., p > 0]).sum(axis=-1)


def _mse(s: Any, t: Any, w: Any) -> Any:
    d, w = (t - s)[..., w > 0], w[w > 0]
    return 0.25 * (w[:, None] * w * (d[..., :, None] - d[..., None, :]) ** 2).sum(axis=(-2, -1))


def _log_softmax(x: Any) -> Any:
    """Subtracts the largest entry with its imaginary step: else a slope would be 1 - p with p near 1, and inexact."""
    x = x - np.take_along_axis(x, x.real.argmax(axis=-1, keepdims=True), axis=-1)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
