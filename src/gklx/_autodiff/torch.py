"""The analytic gradient as a `torch.autograd.Function`, which PyTorch's transforms take as well."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from .._core.call import Arrays, Asked, Batch, Call, Result, without_arrays
from .._run.dispatch import evaluate, kernel_of

_NOT_ARRAYS = 1  # arguments of the functions before the arrays: the call


def tracks(call: Call) -> bool:
    """Whether autograd, forward-mode AD, a transform of `torch.func` or the compiler may be following the logits."""
    if torch.compiler.is_compiling() or _records(call.arrays.student) or _records(call.arrays.teacher):
        return True
    return _in_transform()


def attach(call: Call) -> torch.Tensor:
    """The loss; its derivatives are the analytic ones."""
    if torch.compiler.is_compiling():
        from . import torch_operator  # imports PyTorch's compiler, which takes seconds

        if torch_operator.serves(call):
            return torch_operator.attach(call)
        # Inductor confuses layouts that differ between inputs of one sum (pytorch/pytorch#185702).
        arrays = call.arrays._replace(
            student=call.arrays.student.contiguous(), teacher=call.arrays.teacher.contiguous()
        )
        found = _Loss.apply(_Plan(without_arrays(call)), *arrays)[0]  # type: ignore[no-untyped-call]
    elif _in_transform():
        found = _TransformableLoss.apply(_Plan(without_arrays(call)), *call.arrays)[0]  # type: ignore[no-untyped-call]
    else:
        found = _EagerLoss.apply(call, *call.arrays)  # type: ignore[no-untyped-call]
    value: torch.Tensor = found
    return value


def with_gradients(call: Call, asked: Asked) -> Result:
    """As `evaluate`, the value as from `attach`."""
    if torch.compiler.is_compiling():
        from . import torch_operator

        if torch_operator.serves(call):
            return torch_operator.with_gradients(call, asked)
    if not (torch.compiler.is_compiling() or _in_transform()):
        return Result(*_EagerResults.apply((call, asked), *call.arrays))  # type: ignore[no-untyped-call]
    found = evaluate(call, asked._replace(value=False))
    return found._replace(value=attach(call)) if asked.value else found


@dataclass(frozen=True)
class _Plan:
    """A call without arrays. No tuple, which PyTorch's transforms would take apart as a tree of tensors."""

    call: Call


def _on(call: Call, arrays: Sequence[Any]) -> Call:
    """The call at the tensors that autograd handed over, which need not be the caller's own."""
    return call._replace(arrays=Arrays(*arrays))


class _Loss(torch.autograd.Function):
    """Keeps its inputs, and what the samples of the batch share."""

    # By name: PyTorch's compiler tells by their number whether the forward pass takes a context.
    @staticmethod
    def forward(plan: _Plan, student: Any, teacher: Any, prior: Any, labels: Any, weight: Any, where: Any) -> Any:
        found = evaluate(_on(plan.call, (student, teacher, prior, labels, weight, where)), Asked(value=True))
        return found.value, *(found.batch or ())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        plan, *arrays = inputs
        _, *batch = output
        ctx.call = plan.call
        ctx.mark_non_differentiable(*batch)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, *batch)
        ctx.save_for_forward(*arrays, *batch)

    @staticmethod
    def backward(ctx: Any, upstream: Any, *_: Any) -> Any:
        if upstream is None:
            return (None,) * (_NOT_ARRAYS + len(Arrays._fields))
        arrays, batch = ctx.saved_tensors[: len(Arrays._fields)], ctx.saved_tensors[len(Arrays._fields) :]
        return _backward(ctx, arrays, Batch(*batch) if batch else None, (None, None), upstream)


class _TransformableLoss(_Loss):
    """With forward mode and `vmap`, which the compiler does not take (and has no use for)."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, _: Any, student: Any, teacher: Any, *__: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            # PyTorch turns forward mode off in here; without it a second forward derivative would silently be 0.
            arrays = [x if x is None else _primal(x) for x in ctx.saved_tensors[: len(Arrays._fields)]]
            gradients = _gradients(_on(ctx.call, arrays), None, (student is not None, teacher is not None), None)
            axes = -1 if ctx.call.reduction == "none" else None
            tangent = None
            for gradient, direction in zip(gradients, (student, teacher), strict=True):
                if direction is not None:
                    product = (gradient * direction).sum(axes)
                    tangent = product if tangent is None else tangent + product
        batch = ctx.saved_tensors[len(Arrays._fields) :]
        return tangent, *(None for _ in batch)


class _EagerLoss(torch.autograd.Function):
    """The older form, which need not return what it keeps: lower dispatch overhead.

    It keeps its inputs and, for each differentiated input of the dtype computed in, its gradient: the backward pass
    need but multiply it. Half precisions would be rounded twice, and underflow before a loss scale reaches them. On the
    CUDA kernels it keeps what they found of each row instead: making a gradient is then no more work than multiplying
    it.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *arrays: Any) -> Any:
        student, teacher, dtype = call.arrays.student, call.arrays.teacher, call.dtype
        ahead = student.is_cpu or kernel_of(call) != "cuda"  # a CPU need not ask
        asked = Asked(
            value=True,
            student=ahead and ctx.needs_input_grad[1] and student.dtype == dtype,
            teacher=ahead and ctx.needs_input_grad[2] and teacher.dtype == dtype,
        )
        found = evaluate(call, asked)
        ctx.call, ctx.batch, ctx.statistics = without_arrays(call), found.batch, found.statistics
        ctx.set_materialize_grads(False)
        _save(ctx, arrays, found.student, found.teacher)
        return found.value

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        if upstream is None:
            return (None,) * (_NOT_ARRAYS + len(Arrays._fields))
        arrays, ahead = _saved(ctx)
        return _backward(ctx, arrays, ctx.batch, ahead, upstream, ctx.statistics)


class _EagerResults(torch.autograd.Function):
    """Value and gradients, from one evaluation, for a caller who seldom differentiates them.

    The value's derivatives are made in the backward pass. Those of the gradients are autograd's: the formulas make the
    gradients again, and it follows.
    """

    @staticmethod
    def forward(ctx: Any, plan: tuple[Call, Asked], *arrays: Any) -> Any:
        call, asked = plan
        found = evaluate(call, asked)
        ctx.call, ctx.asked = without_arrays(call), asked
        ctx.batch, ctx.statistics = found.batch, found.statistics
        ctx.set_materialize_grads(False)
        _save(ctx, arrays)
        return found.value, found.student, found.teacher

    @staticmethod
    def backward(ctx: Any, of_value: Any, *of_gradients: Any) -> Any:
        arrays, _ = _saved(ctx)
        first: Sequence[Any] = (None,) * (_NOT_ARRAYS + len(Arrays._fields))
        second = first
        if of_value is not None:
            first = _backward(ctx, arrays, ctx.batch, (None, None), of_value, ctx.statistics)
        if any(x is not None for x in of_gradients):
            second = _second_backward(ctx, arrays, of_gradients)
        return tuple(y if x is None else x if y is None else x + y for x, y in zip(first, second, strict=True))


def _save(ctx: Any, arrays: Sequence[Any], *made: Any) -> None:
    """Keeps the arrays that were given for the backward pass, and what was made of them."""
    # Autograd refuses to save a tensor made under inference_mode, which nothing can change or differentiate.
    ctx.inference = [x if x is not None and x.is_inference() else None for x in arrays]
    saved = [x if own is None else None for x, own in zip(arrays, ctx.inference, strict=True)]
    ctx.save_for_backward(*saved, *made)


def _saved(ctx: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """What `_save` kept."""
    found, n = ctx.saved_tensors, len(ctx.inference)  # once: a checkpoint recomputes them when asked
    return [x if own is None else own for x, own in zip(found[:n], ctx.inference, strict=True)], found[n:]


def _followable(arrays: Sequence[Any]) -> list[Any]:
    """The arrays, those made under inference_mode copied: autograd follows no operation on such a tensor."""
    return [x.clone() if x is not None and x.is_inference() else x for x in arrays]


def _backward(
    ctx: Any,
    arrays: Sequence[Any],
    batch: Batch | None,
    ahead: tuple[Any, ...],
    upstream: torch.Tensor,
    statistics: Any = None,
) -> tuple[Any, ...]:
    """What a backward pass returns: the gradients made ahead, or else made now, times the upstream one."""
    call, wanted = ctx.call, ctx.needs_input_grad[1:3]
    factor = upstream.unsqueeze(-1) if call.reduction == "none" else upstream
    given: list[Any]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Someone may differentiate this again: evaluate the formulas where autograd sees them. What it then finds is
        # the derivative of the gradient field, which for DKL is KL's Hessian.
        given = _gradients(_on(call, _followable(arrays)), None, wanted, upstream)
    elif all(x is not None for x, asked in zip(ahead, wanted, strict=True) if asked):
        given = _scaled(ahead, factor)
    elif not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(upstream):
        # Many upstream gradients as one tensor (`is_grads_batched`), which no kernel takes.
        logits = [x.to(call.dtype) for x in arrays[:2]]
        made = _scaled(_gradients(_on(call, (*logits, *arrays[2:])), batch, wanted, None), factor)
        given = [None if g is None else g.to(x.dtype) for g, x in zip(made, arrays[:2], strict=True)]
    else:
        given = _gradients(_on(call, arrays), batch, wanted, upstream, statistics)
    return None, *given, None, None, None, None


def _second_backward(ctx: Any, arrays: Sequence[Any], upstream: Sequence[Any]) -> tuple[Any, ...]:
    """What a backward pass through the gradients returns: their derivatives times the upstream gradients."""
    student, teacher, *others = _followable(arrays)
    with torch.enable_grad():
        # Views: one network's logits may be computed from the other's, and that is not to be followed here.
        logits = student.view_as(student), teacher.view_as(teacher)
        gradients = _gradients(_on(ctx.call, (*logits, *others)), None, ctx.asked[1:], None)
    needed = ctx.needs_input_grad[1:3]
    inputs = [x for x, asked in zip(logits, needed, strict=True) if asked]
    followed = [
        (x, by)
        for x, by in zip(gradients, upstream, strict=True)
        if by is not None and x.requires_grad  # zeros, of a network without a part in the loss, do not
    ]
    found = iter(
        torch.autograd.grad(
            [x for x, _ in followed],
            inputs,
            [by for _, by in followed],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        if followed
        else [None] * len(inputs)
    )
    return None, *(next(found) if asked else None for asked in needed), None, None, None, None


def _primal(x: torch.Tensor) -> torch.Tensor:
    primal: torch.Tensor = forward_ad.unpack_dual(x).primal  # type: ignore[no-untyped-call]
    return primal


def _scaled(gradients: Sequence[Any], upstream: torch.Tensor) -> list[Any]:
    """The gradients times the upstream gradient.

    As they are, where that is seen to be 1 at no cost and the graph is not kept: they are what `_save` kept.
    """
    if (
        type(upstream) is torch.Tensor  # a subclass may stand for numbers that there are not
        and upstream.ndim == 0
        and upstream.is_cpu
        and not torch.compiler.is_compiling()
        and not _transformed()
        and not torch._C._functorch.is_legacy_batchedtensor(upstream)
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and upstream.item() == 1.0
    ):
        return list(gradients)
    return [None if x is None else x * upstream for x in gradients]


def _gradients(
    call: Call, batch: Batch | None, wanted: tuple[bool, bool], upstream: torch.Tensor | None, statistics: Any = None
) -> list[Any]:
    """The gradients that are asked for, in their logits' dtypes."""
    found = evaluate(call, Asked(False, *wanted), batch, upstream=upstream, statistics=statistics)
    return [found.student, found.teacher]


def _records(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _in_transform() -> bool:
    """Whether a transform of `torch.func`, or forward-mode AD, is at work."""
    return _transformed() or forward_ad._current_level >= 0


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None
