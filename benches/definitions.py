"""The losses and gradients without gklx: by their formulas on whole arrays, and by the authors' pairs of classes."""

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

# --- whole arrays, for NumPy and PyTorch alike ------------------------------------------------------------------------


def kl(xp: Any, student: Any, teacher: Any) -> Result:
    """KL, averaged over the batch."""
    batch = student.shape[0]
    log_p, log_q = _log_softmax(xp, teacher), _log_softmax(xp, student)
    p, q = xp.exp(log_p), xp.exp(log_q)
    gap = log_p - log_q
    value = xp.sum(p * gap, axis=-1, keepdims=True)
    return xp.sum(value) / batch, (q - p) / batch, p * (gap - value) / batch


def gkl(xp: Any, student: Any, teacher: Any, numbers: Numbers, prior: Any = None) -> Result:
    """GKL in O(C); `prior` has the weights before the power γ, a row for each sample. None: the teacher's softmax."""
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
    shifted = x - xp.amax(x, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


# --- pairs: GKL as the papers write it, with the teacher's own weights ------------------------------------------------


def torch_pairs(student: Any, teacher: Any, numbers: Numbers) -> Result:
    """GKL as in the authors' PyTorch code: pair tensors, differentiated by autograd."""
    import torch

    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    classes = student.shape[-1]
    p = torch.softmax(teacher, dim=-1).detach()
    w = p**numbers.gamma
    ww = w.view(-1, classes, 1) * w.view(-1, 1, classes)
    teacher_pairs = teacher.view(-1, classes, 1) - teacher.view(-1, 1, classes)
    student_pairs = student.view(-1, classes, 1) - student.view(-1, 1, classes)
    mse = 0.25 * (torch.pow(teacher_pairs - student_pairs, 2) * ww).sum() / ww.sum()
    ce = -(p * torch.log_softmax(student, dim=-1)).sum(-1).mean()
    loss = numbers.mse_weight * mse + numbers.ce_weight * ce
    loss.backward()
    return loss.detach(), student.grad, teacher.grad


# --- distances between results ----------------------------------------------------------------------------------------

_ROWS = 64


def some_rows_on_host(result: Sequence[Any]) -> list[np.ndarray]:
    """Value and gradients as NumPy's float64; of a large batch, evenly spaced rows."""
    return [_to_numpy(x[:: max(1, x.shape[0] // _ROWS)] if x.ndim else x) for x in result]


def _to_numpy(x: Any) -> np.ndarray:
    if hasattr(x, "detach"):  # PyTorch
        x = x.detach().double().cpu().numpy()
    elif hasattr(x, "get"):  # CuPy
        x = x.get()
    return np.asarray(x).astype(np.float64)


def difference(reference: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> float:
    """The largest relative difference: of the value, and of gradients relative to the row's largest entry."""
    worst = 0.0
    for expected, x in zip(reference, results, strict=True):
        assert expected.shape == x.shape, (expected.shape, x.shape)
        scale = np.max(np.abs(expected), axis=-1, keepdims=True) if expected.ndim else np.abs(expected)
        worst = float(np.maximum(worst, np.max(np.abs(x - expected) / scale)))  # `maximum` propagates NaN
    return worst
