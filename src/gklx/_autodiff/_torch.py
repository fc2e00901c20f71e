"""The analytic gradient as a `torch.autograd.Function`, which PyTorch's transforms and compiler take as well."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import _blocks
from .._batch import Totals
from .._problem import Arrays, Problem
from .._sweep import Sweep
from ._torch_totals import kept


def tracks(problem: Problem) -> bool:
    """Whether autograd, forward-mode AD or a transform of `torch.func` may be looking at the logits."""
    if _records(problem.arrays.student) or _records(problem.arrays.teacher):
        return True
    return not torch.compiler.is_compiling() and (_transformed() or forward_ad._current_level >= 0)


def attach(problem: Problem) -> torch.Tensor:
    """The loss; its derivatives are those of the sweep."""
    if torch.compiler.is_compiling():
        from . import _torch_compiled  # with it comes PyTorch's compiler, which takes seconds to import

        if _torch_compiled.takes(problem):
            return _torch_compiled.attach(problem)
    arrays = problem.arrays
    bare = problem._replace(arrays=Arrays(*[None] * len(arrays)))
    logits = arrays.student, arrays.teacher
    plan = _Plan(
        bare,
        # Made beforehand only where the backward pass need but multiply them: half precisions would be rounded
        # twice (and underflow before a loss scale reaches them), and a compiler or a transform decides for itself.
        *(_records(x) and x.dtype == problem.dtype and not _left_to_others() for x in logits),
    )
    if torch.compiler.is_compiling():
        return _applied(_Loss, plan, arrays)
    if _transformed() or forward_ad._current_level >= 0:
        return _applied(_TransformableLoss, plan, arrays)
    value: torch.Tensor = _EagerLoss.apply(plan, *arrays)  # type: ignore[no-untyped-call]
    return value


def with_gradients(problem: Problem, *, value: bool, student: bool, teacher: bool) -> Sweep:
    """As `sweep`, the value as from `attach`."""
    found = _blocks.sweep(problem, student=student, teacher=teacher)
    return found._replace(value=attach(problem)) if value else found


def _applied(function: Any, plan: Any, arrays: Arrays) -> torch.Tensor:
    value: torch.Tensor = function.apply(plan, *arrays)[0]
    return value


@dataclass(frozen=True)
class _Plan:
    """What is no tensor: a problem without arrays, and which gradients the forward pass makes.

    No tuple, which PyTorch would take apart as a tree of tensors.
    """

    problem: Problem
    student_ahead: bool
    teacher_ahead: bool

    def on(self, arrays: tuple[Any, ...]) -> Problem:
        """The problem at the tensors that autograd handed over, which need not be the caller's own."""
        return self.problem._replace(arrays=Arrays(*arrays))


class _Loss(torch.autograd.Function):
    """Keeps its inputs and, for each differentiated input of the dtype computed in, its gradient.

    Where nothing was summed to know what the rows of the batch share, it is cheaper known again than kept.
    """

    @staticmethod
    def forward(plan: _Plan, *arrays: Any) -> Any:
        problem = plan.on(arrays)
        found = _blocks.sweep(problem, value=True, student=plan.student_ahead, teacher=plan.teacher_ahead)
        return found.value, *kept(found.of_batch), found.student, found.teacher

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan, *arrays = inputs
        _, *rest = output
        ctx.mark_non_differentiable(*(x for x in rest if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, *rest)
        ctx.save_for_forward(*arrays, *rest)

    @staticmethod
    def backward(ctx: Any, upstream: Any, *_: Any) -> Any:
        if upstream is None:
            return None, None, None, None, None, None, None
        # Saved tensors once: a checkpoint recomputes them when asked.
        *arrays, weight, squared_mass, student, teacher = ctx.saved_tensors
        of_batch = None if weight is None else Totals(weight, squared_mass)
        return _passed_down(ctx, tuple(arrays), of_batch, (student, teacher), upstream)


class _EagerLoss(torch.autograd.Function):
    """The same in the older form, which need not return what it keeps: PyTorch makes less of a call."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *arrays: Any) -> Any:
        problem = plan.on(arrays)
        found = _blocks.sweep(problem, value=True, student=plan.student_ahead, teacher=plan.teacher_ahead)
        ctx.plan, ctx.of_batch = plan, found.of_batch
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, found.student, found.teacher)
        return found.value

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        if upstream is None:
            return None, None, None, None, None, None, None
        *arrays, student, teacher = ctx.saved_tensors
        return _passed_down(ctx, tuple(arrays), ctx.of_batch, (student, teacher), upstream)


class _TransformableLoss(_Loss):
    """With forward mode and `vmap`, which the compiler does not take (and has no use for)."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, _: Any, student: Any, teacher: Any, *__: Any) -> Any:
        plan = ctx.plan
        with forward_ad._set_fwd_grad_enabled(True):
            # PyTorch turns forward mode off in here; without it a second forward derivative would silently be 0.
            arrays = [x if x is None else _primal(x) for x in ctx.saved_tensors[: len(Arrays._fields)]]
            wanted = student is not None, teacher is not None
            gradients = _gradients(plan.on(arrays), None, wanted, None)
            axes = -1 if plan.problem.reduction == "none" else None
            tangent = None
            for gradient, direction in zip(gradients, (student, teacher), strict=True):
                if direction is not None:
                    product = (gradient * direction).sum(axes)
                    tangent = product if tangent is None else tangent + product
        return tangent, None, None, None, None


def _passed_down(
    ctx: Any, arrays: tuple[Any, ...], of_batch: Totals | None, ahead: tuple[Any, ...], upstream: torch.Tensor
) -> tuple[Any, ...]:
    """What a backward pass returns: the gradients made ahead, or else made now, times the upstream one."""
    plan, wanted = ctx.plan, ctx.needs_input_grad[1:3]
    given: list[Any]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Someone may differentiate this again: redo the sweep where autograd sees it. What it then finds is
        # the derivative of the gradient field, which for DKL is KL's Hessian.
        given = _gradients(plan.on(arrays), None, wanted, upstream)
    elif all(x is not None for x, asked in zip(ahead, wanted, strict=True) if asked):
        given = _scaled(ahead, upstream.unsqueeze(-1) if plan.problem.reduction == "none" else upstream)
    else:
        given = _gradients(plan.on(arrays), of_batch, wanted, upstream)
    return None, *given, None, None, None, None


def _primal(x: torch.Tensor) -> torch.Tensor:
    primal: torch.Tensor = forward_ad.unpack_dual(x).primal  # type: ignore[no-untyped-call]
    return primal


def _scaled(gradients: tuple[Any, ...], upstream: torch.Tensor) -> list[Any]:
    """The gradients times the upstream gradient; as they are, where that may be seen to be 1 and this is their end."""
    if (
        type(upstream) is torch.Tensor  # a subclass may stand for numbers that there are not
        and upstream.ndim == 0
        and upstream.device.type == "cpu"
        and not _left_to_others()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and float(upstream) == 1.0
    ):
        return list(gradients)
    return [None if x is None else x * upstream for x in gradients]


def _gradients(
    problem: Problem, of_batch: Totals | None, wanted: tuple[bool, bool], upstream: torch.Tensor | None
) -> list[Any]:
    """The gradients that are asked for, in their logits' dtypes."""
    found = _blocks.sweep(problem, of_batch, student=wanted[0], teacher=wanted[1], upstream=upstream)
    return [found.student, found.teacher]


def _records(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _left_to_others() -> bool:
    return torch.compiler.is_compiling() or _transformed()


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None
