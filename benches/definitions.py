"""The losses and gradients written plainly, without gklx: on whole arrays, and over the authors' pairs of classes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Numbers(NamedTuple):
    """GKL's hyper-parameters."""

    gamma: float = 1.0
    mse_weight: float = 1.0
    ce_weight: float = 1.0
    temperature: float = 1.0


Result = tuple[Any, ...]
"""Value, gradient to the student, gradient to the teacher."""

# --- whole arrays; NumPy and PyTorch take the same words --------------------------------------------------------------


def kl(xp: Any, student: Any, teacher: Any) -> Result:
    """KL, the mean over the batch."""
    batch = student.shape[0]
    log_p, log_q = _log_softmax(xp, teacher), _log_softmax(xp, student)
    p, q = xp.exp(log_p), xp.exp(log_q)
    gap = log_p - log_q
    value = xp.sum(p * gap, axis=-1, keepdims=True)
    return xp.sum(value) / batch, (q - p) / batch, p * (gap - value) / batch


def gkl(xp: Any, student: Any, teacher: Any, numbers: Numbers, prior: Any = None) -> Result:
    """GKL in O(C); `prior` holds the weights before the power, one row a sample, else they are the teacher's own."""
    batch, tau = student.shape[0], numbers.temperature
    log_p, log_q = _log_softmax(xp, teacher / tau), _log_softmax(xp, student / tau)
    p, q = xp.exp(log_p), xp.exp(log_q)
    w = (xp.exp(_log_softmax(xp, teacher)) if prior is None else prior) ** numbers.gamma
    mass = xp.sum(w, axis=-1, keepdims=True)
    d = teacher - student
    d = d - xp.sum(w * d, axis=-1, keepdims=True) / mass
    normalizer = xp.sum(mass * mass)
    mse = 0.5 * xp.sum(mass * xp.sum(w * d * d, axis=-1, keepdims=True)) / normalizer
    ce = -xp.sum(p * log_q) / batch
    to_teacher = (numbers.mse_weight / normalizer * mass) * w * d
    to_student = numbers.ce_weight / (batch * tau) * (q - p) - to_teacher
    return numbers.mse_weight * mse + numbers.ce_weight * ce, to_student, to_teacher


def _log_softmax(xp: Any, x: Any) -> Any:
    below = x - xp.amax(x, axis=-1, keepdims=True)
    return below - xp.log(xp.sum(xp.exp(below), axis=-1, keepdims=True))


# --- pairs: GKL as the papers write it, with the teacher's own weights ------------------------------------------------


def torch_pairs(student: Any, teacher: Any, numbers: Numbers) -> Result:
    """Go the authors' way in PyTorch: pair tensors, and autograd back through them."""
    import torch

    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    classes = student.shape[-1]
    p = torch.softmax(teacher, dim=-1).detach()
    w = p**numbers.gamma
    ww = w.view(-1, classes, 1) * w.view(-1, 1, classes)
    of_teacher = teacher.view(-1, classes, 1) - teacher.view(-1, 1, classes)
    of_student = student.view(-1, classes, 1) - student.view(-1, 1, classes)
    mse = 0.25 * (torch.pow(of_teacher - of_student, 2) * ww).sum() / ww.sum()
    ce = -(p * torch.log_softmax(student, dim=-1)).sum(-1).mean()
    loss = numbers.mse_weight * mse + numbers.ce_weight * ce
    loss.backward()
    return loss.detach(), student.grad, teacher.grad


# --- how far results are from each other ------------------------------------------------------------------------------

_ROWS = 64


def kept(result: Sequence[Any]) -> list[np.ndarray]:
    """Value and gradients on the host as float64, of large batches evenly spaced rows."""
    return [_to_numpy(x[:: max(1, x.shape[0] // _ROWS)] if x.ndim else x) for x in result]


def _to_numpy(x: Any) -> np.ndarray:
    if hasattr(x, "detach"):  # PyTorch
        x = x.detach().double().cpu().numpy()
    elif hasattr(x, "get"):  # CuPy
        x = x.get()
    return np.asarray(x).astype(np.float64)


def difference(reference: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """The worst difference: of values by the value, of gradients by the row's largest entry."""
    worst = 0.0
    for expected, x in zip(reference, found, strict=True):
        assert expected.shape == x.shape, (expected.shape, x.shape)
        scale = np.max(np.abs(expected), axis=-1, keepdims=True) if expected.ndim else np.abs(expected)
        worst = float(np.maximum(worst, np.max(np.abs(x - expected) / scale)))  # NaN stays
    return worst
