"""The divergences of the experiments by name, all computed by gklx, for logits of any array library."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gklx

VARIANTS = ("none", "kl", "dkl", "ikl", "gkl")
ABLATION = tuple(
    f"{sides}-{weights}-{gamma}"
    for sides in ("symmetric", "onesided")
    for weights in ("prior", "teacher")
    for gamma in ("0", "0.2", "0.5", "1")
)
"""Symmetric or one-sided, class prior or the teacher's own weights, and γ."""

Divergence = Callable[..., Any]
"""``(student_logits, teacher_logits, labels=None, prior=None, **rest)``; `rest` is `where` and `sample_weight`."""


@dataclass(frozen=True)
class Weights:
    """The weights and other hyper-parameters of the divergences, with gklx's names.

    DKL takes `kl_weight` for both of its parts, so that it has the gradients of the weighted KL.
    """

    kl_weight: float = 1.0
    mse_weight: float = 1.0
    ce_weight: float = 1.0
    gamma: float = 1.0
    temperature: float = 1.0
    weight_temperature: float = 1.0


def divergence(name: str, weights: Weights) -> Divergence:
    """The divergence with a name.

    Divergences with a class prior use `labels` and `prior`; without a prior their class weights are the teacher's.

    Raises
    ------
    ValueError
        No divergence has the name.
    """
    if name == "none":
        return _none
    if name == "kl":
        return functools.partial(_kl, weights)
    parts = {"temperature": weights.temperature}
    if name == "dkl":
        loss = functools.partial(gklx.dkl, mse_weight=weights.kl_weight, ce_weight=weights.kl_weight, **parts)
        return functools.partial(_unlabelled, loss)
    parts |= {
        "mse_weight": weights.mse_weight,
        "ce_weight": weights.ce_weight,
        "weight_temperature": weights.weight_temperature,
    }
    if name == "ikl":
        return functools.partial(_class_weighted, functools.partial(gklx.ikl, **parts))
    if name == "gkl":
        return functools.partial(_class_weighted, functools.partial(gklx.gkl, gamma=weights.gamma, **parts))
    if name in ABLATION:
        sides, by, gamma = name.split("-")
        loss = functools.partial(gklx.gkl, gamma=float(gamma), symmetric=sides == "symmetric", **parts)
        return functools.partial(_class_weighted if by == "prior" else _unlabelled, loss)
    raise ValueError(f"unknown divergence {name!r}; there are {', '.join(VARIANTS + ABLATION)}")


def _none(student_logits: Any, teacher_logits: Any, labels: Any = None, prior: Any = None, **rest: Any) -> float:
    return 0.0


def _kl(
    weights: Weights, student_logits: Any, teacher_logits: Any, labels: Any = None, prior: Any = None, **rest: Any
) -> Any:
    return weights.kl_weight * gklx.kl(student_logits, teacher_logits, temperature=weights.temperature, **rest)


def _unlabelled(
    loss: Divergence, student_logits: Any, teacher_logits: Any, labels: Any = None, prior: Any = None, **rest: Any
) -> Any:
    return loss(student_logits, teacher_logits, **rest)


def _class_weighted(
    loss: Divergence, student_logits: Any, teacher_logits: Any, labels: Any = None, prior: Any = None, **rest: Any
) -> Any:
    labels = None if prior is None else labels
    return loss(student_logits, teacher_logits, prior=prior, labels=labels, **rest)
