"""The expected results: the losses as the papers define them, over all pairs of classes, in NumPy's widest float.

They share no code with the package, so that faults of gklx's formulas are found too. Gradients are by complex steps,
which lose no digits to subtraction; where the gradient stops, a separate argument is held real. Masked classes are
removed from each sample first, so no formula needs a mask.
"""

from collections.abc import Callable, Mapping
from functools import partial
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


class _Part(NamedTuple):
    """wMSE, CE or KL of each sample, [B], and its gradients, [B, C]."""

    value: Any
    to_student: Any
    to_teacher: Any


def exact(loss: str, s: Any, t: Any, settings: Mapping[str, float], arrays: Mapping[str, Any]) -> Exact:
    """The expected results of the loss of this name for NumPy arrays."""
    shape = s.shape
    s, t = (x.reshape(-1, shape[-1]).astype(_WIDE) for x in (s, t))
    v = np.asarray(arrays.get("sample_weight", np.ones(shape[:-1])), dtype=_WIDE).reshape(-1)
    counts = np.broadcast_to(arrays.get("where", True), shape).reshape(s.shape) & (v[:, None] != 0)
    counts = counts & ~((s == -np.inf) & (t == -np.inf))
    v = np.where(counts.any(axis=-1), v, 0.0)
    mass, mse, ce = np.zeros(len(v), dtype=_WIDE), _nothing(s), _nothing(s)
    temperature = settings.get("temperature", 1.0)
    for i in np.flatnonzero(v):
        # A constant added to a row changes no loss; without one, differences of logits are most exact.
        a, b = (x[i, counts[i]] - x[i, counts[i]].max() for x in (s, t))
        _set(ce, i, counts[i], partial(_kl if loss == "kl" else _ce, temperature=temperature), a, b)
        if loss != "kl":
            w = _weights(loss, b, i, counts[i], settings, arrays)
            mass[i] = w.sum()
            of = partial(_dkl_mse, w=w, temperature=temperature) if loss == "dkl" else partial(_mse, w=w)
            _set(mse, i, counts[i], of, a, b)
    total = v.sum()
    mse_factor = settings.get("mse_weight", 1.0) * (total / (v * mass**2).sum() if loss == "gkl" else 1.0)
    ce_factor = settings.get("ce_weight", 1.0)
    losses, to_student, to_teacher = (mse_factor * x + ce_factor * y for x, y in zip(mse, ce, strict=True))
    weighted, share = v * losses, (v / total)[:, None]
    return Exact(
        weighted.sum() / total,
        weighted.sum(),
        weighted.reshape(shape[:-1]),
        (share * to_student).reshape(shape),
        (share * to_teacher).reshape(shape),
    )


def _weights(loss: str, t: Any, i: Any, keep: Any, settings: Mapping[str, float], arrays: Mapping[str, Any]) -> Any:
    """The class weights of one sample."""
    if loss == "dkl":
        return np.exp(_log_softmax(t / settings.get("temperature", 1.0)))
    if "prior" in arrays:
        w = arrays["prior"][arrays["labels"].reshape(-1)[i]][keep].astype(_WIDE)
    else:
        w = np.exp(_log_softmax(t / settings.get("weight_temperature", 1.0)))
    return w ** settings.get("gamma", 1.0)


# Arguments: student, teacher, and both again, held constant. Leading axes are steps in different directions.


def _kl(s: Any, t: Any, s0: Any, t0: Any, temperature: float) -> Any:
    some = t0 > -np.inf
    log_p, log_q = _log_softmax(t[..., some] / temperature), _log_softmax(s / temperature)[..., some]
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def _ce(s: Any, t: Any, s0: Any, t0: Any, temperature: float) -> Any:
    p, log_q = np.exp(_log_softmax(t0 / temperature)), _log_softmax(s / temperature)
    return -(p[p > 0] * log_q[..., p > 0]).sum(axis=-1)


def _mse(s: Any, t: Any, s0: Any, t0: Any, w: Any) -> Any:
    d, w = (t - s)[..., w > 0], w[w > 0]
    return 0.25 * (w[:, None] * w * (d[..., :, None] - d[..., None, :]) ** 2).sum(axis=(-2, -1))


def _dkl_mse(s: Any, t: Any, s0: Any, t0: Any, w: Any, temperature: float) -> Any:
    return _mse(s0, t, s0, t0, w) / temperature**2


def _log_softmax(x: Any) -> Any:
    """Subtracts the largest entry with its imaginary step: else a slope would be 1 - p with p near 1, and inexact."""
    x = x - np.take_along_axis(x, x.real.argmax(axis=-1, keepdims=True), axis=-1)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _nothing(s: Any) -> _Part:
    return _Part(np.zeros(len(s), dtype=_WIDE), np.zeros_like(s), np.zeros_like(s))


def _set(part: _Part, i: Any, keep: Any, f: Callable[..., Any], s: Any, t: Any) -> None:
    """Writes the results of one sample into the arrays."""
    steps = 1j * _STEP * np.eye(len(s))
    part.value[i] = f(s, t, s, t)
    part.to_student[i, keep] = f(s + steps, t, s, t).imag / _STEP
    part.to_teacher[i, keep] = f(s, t + steps, s, t).imag / _STEP
