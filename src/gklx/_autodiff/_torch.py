"""The analytic gradient as a `torch.autograd.Function`."""

from typing import Any

import torch

from .._problem import Problem
from .._sweep import Sweep, sweep


def tracks(problem: Problem) -> bool:
    """Whether autograd records either logits."""
    return torch.is_grad_enabled() and (problem.arrays.student.requires_grad or problem.arrays.teacher.requires_grad)


def attach(problem: Problem) -> torch.Tensor:
    """The loss; its backward pass multiplies gradients that the forward pass already made."""
    student, teacher = problem.arrays.student, problem.arrays.teacher
    wanted = student.requires_grad, teacher.requires_grad
    value: torch.Tensor = _Loss.apply(student, teacher, problem, wanted)[0]  # type: ignore[no-untyped-call]
    return value


def _swept(problem: Problem, student: Any, teacher: Any, wanted: tuple[bool, bool], value: bool) -> Sweep:
    """The sweep at the tensors autograd handed over, which need not be the problem's own."""
    at = problem._replace(arrays=problem.arrays._replace(student=student, teacher=teacher))
    return sweep(at, value=value, student=wanted[0], teacher=wanted[1])


class _Loss(torch.autograd.Function):
    """Keeps, beyond its inputs, one tensor of the logits' size for each input that is differentiated."""

    @staticmethod
    def forward(student: Any, teacher: Any, problem: Problem, wanted: tuple[bool, bool]) -> Any:
        return tuple(_swept(problem, student, teacher, wanted, value=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        student, teacher, ctx.problem, ctx.wanted = inputs
        gradients = output[1:]
        ctx.mark_non_differentiable(*(g for g in gradients if g is not None))
        ctx.save_for_backward(student, teacher, *gradients)

    @staticmethod
    def backward(ctx: Any, upstream: Any, *_: Any) -> Any:
        student, teacher, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Someone will differentiate this again: redo the sweep where autograd sees it. What it then finds is
            # the derivative of the gradient field, which for DKL is KL's Hessian.
            gradients = list(_swept(ctx.problem, student, teacher, ctx.wanted, value=False)[1:])
        if ctx.problem.reduction == "none":
            upstream = upstream.unsqueeze(-1)
        given = [
            None if g is None else (g * upstream).to(x.dtype)
            for g, x in zip(gradients, (student, teacher), strict=True)
        ]
        return *given, None, None
