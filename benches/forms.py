"""The same losses and gradients in other ways: the authors' pairs of classes, and plain operations on whole arrays."""

from typing import Any

import numpy as np

# gamma and the teacher's own weights, as in distillation without a class prior: the longest path through the sweep, and
# one that needs no [C, C] prior, which at C = 250,000 would be 250 GB.
SETTINGS = {"gamma": 0.5, "mse_weight": 4.0, "ce_weight": 1.0}

Result = tuple[Any, Any, Any]
"""Value, gradient to the student, gradient to the teacher; None for what was not asked for."""


# --- pairs: GKL as the papers write it --------------------------------------------------------------------------------


def numpy_pairs(student: np.ndarray, teacher: np.ndarray) -> Result:
    """Compute the definition, with the gradients written out from the pairs."""
    batch = student.shape[0]
    log_p, log_q = _log_softmax(np, teacher), _log_softmax(np, student)
    p, q = np.exp(log_p), np.exp(log_q)
    w = p ** SETTINGS["gamma"]
    ww = w[:, :, None] * w[:, None, :]
    delta_teacher = teacher[:, :, None] - teacher[:, None, :]
    delta_student = student[:, :, None] - student[:, None, :]
    difference = delta_teacher - delta_student
    normalizer = np.sum(ww)
    mse = 0.25 * np.sum(ww * difference**2) / normalizer
    ce = -np.sum(p * log_q) / batch
    to_teacher = SETTINGS["mse_weight"] * np.sum(ww * difference, axis=-1) / normalizer
    to_student = SETTINGS["ce_weight"] * (q - p) / batch - to_teacher
    return SETTINGS["mse_weight"] * mse + SETTINGS["ce_weight"] * ce, to_student, to_teacher


def torch_pairs(student: Any, teacher: Any) -> Result:
    """Go the authors' way: pair tensors, and autograd back through them."""
    import torch

    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    classes = student.shape[-1]
    p = torch.softmax(teacher, dim=-1).detach()
    w = p ** SETTINGS["gamma"]
    ww = w.view(-1, classes, 1) * w.view(-1, 1, classes)
    delta_teacher = teacher.view(-1, classes, 1) - teacher.view(-1, 1, classes)
    delta_student = student.view(-1, classes, 1) - student.view(-1, 1, classes)
    mse = 0.25 * (torch.pow(delta_teacher - delta_student, 2) * ww).sum() / ww.sum()
    ce = -(p * torch.log_softmax(student, dim=-1)).sum(-1).mean()
    loss = SETTINGS["mse_weight"] * mse + SETTINGS["ce_weight"] * ce
    loss.backward()
    return loss.detach(), student.grad, teacher.grad


# --- whole arrays: what one writes down without a library; NumPy, CuPy and PyTorch take the same words ----------------


def whole_kl(xp: Any, student: Any, teacher: Any, to_teacher: bool) -> Result:
    """Compute KL and its gradients."""
    batch = student.shape[0]
    log_p, log_q = _log_softmax(xp, teacher), _log_softmax(xp, student)
    p, q = xp.exp(log_p), xp.exp(log_q)
    gap = log_p - log_q
    kl = xp.sum(p * gap, axis=-1, keepdims=True)
    return xp.sum(kl) / batch, (q - p) / batch, p * (gap - kl) / batch if to_teacher else None


def whole_gkl(xp: Any, student: Any, teacher: Any, to_teacher: bool) -> Result:
    """Compute GKL and its gradients in O(C), no check made and nothing masked."""
    batch = student.shape[0]
    log_p, log_q = _log_softmax(xp, teacher), _log_softmax(xp, student)
    p, q = xp.exp(log_p), xp.exp(log_q)
    w = xp.exp(SETTINGS["gamma"] * log_p)
    total = xp.sum(w, axis=-1, keepdims=True)
    d = teacher - student
    d = d - xp.sum(w * d, axis=-1, keepdims=True) / total
    pulled = w * d
    normalizer = xp.sum(total * total)
    mse = 0.5 * xp.sum(total * xp.sum(pulled * d, axis=-1, keepdims=True)) / normalizer
    ce = -xp.sum(p * log_q) / batch
    mse_to_teacher = (SETTINGS["mse_weight"] / normalizer * total) * pulled
    to_student = SETTINGS["ce_weight"] / batch * (q - p) - mse_to_teacher
    value = SETTINGS["mse_weight"] * mse + SETTINGS["ce_weight"] * ce
    return value, to_student, mse_to_teacher if to_teacher else None


def _log_softmax(xp: Any, x: Any) -> Any:
    below = x - xp.amax(x, axis=-1, keepdims=True)
    return below - xp.log(xp.sum(xp.exp(below), axis=-1, keepdims=True))


def scipy_kl(student: np.ndarray, teacher: np.ndarray, to_teacher: bool) -> Result:
    """Compute KL with SciPy's functions, and the gradients from what they give."""
    from scipy import special

    batch = student.shape[0]
    p, q = special.softmax(teacher, axis=-1), special.softmax(student, axis=-1)
    kl = np.sum(special.rel_entr(p, q), axis=-1, keepdims=True)
    gradient = None
    if to_teacher:
        gap = special.log_softmax(teacher, axis=-1) - special.log_softmax(student, axis=-1)
        gradient = p * (gap - kl) / batch
    return np.sum(kl) / batch, (q - p) / batch, gradient
