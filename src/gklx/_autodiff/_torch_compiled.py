"""The loss in a program that PyTorch compiles for the CPU: rows are presumed ordinary, and mended where they are not.

The compiler fuses the sweep into a few loops, in which the masks that NaN and infinite logits take would cost as much
as all else. A compiled program cannot look first and choose; so it computes without masks, finds out on the way whether
every sample's loss is finite, and leaves what to do if not to an operator that it calls and does not look into. That
one does the sweep again, with all care, and writes over what was found.
"""

from collections.abc import Sequence
from typing import Any

import array_api_compat.torch as xp
import torch

from .. import _blocks
from .._batch import Totals
from .._problem import Arrays, Formula, Numbers, Problem
from .._sweep import Sweep


def takes(problem: Problem) -> bool:
    """Whether the compiler at work may be given this form of the loss, and the problem is one for it.

    An exported program is to run where gklx is not. Ranks that share a batch must all do the same.
    """
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # PyTorch 2.6 has no such question
    return (
        not exporting()
        and problem.arrays.student.device.type == "cpu"
        and problem.arrays.where is None
        and problem.ranks is None
        and all(isinstance(x, float) for x in problem.numbers)
    )


class CompiledLoss(torch.autograd.Function):
    """Keeps its inputs, and makes the gradients in the backward pass; what both need the compiler decides to keep."""

    @staticmethod
    def forward(problem: Problem, *arrays: Any) -> Any:
        problem = problem._replace(arrays=Arrays(*arrays), presumed=True)
        found = _blocks.sweep(problem, value=True)
        _mend(problem, found.ordinary, found.value, None, None)
        return found.value, *kept(found.of_batch), found.ordinary

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.problem, *arrays = inputs
        _, *rest = output
        ctx.mark_non_differentiable(*(x for x in rest if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, *rest)

    @staticmethod
    def backward(ctx: Any, upstream: Any, *_: Any) -> Any:
        if upstream is None:
            return None, None, None, None, None, None, None
        *arrays, weight, squared_mass, ordinary = ctx.saved_tensors
        problem = ctx.problem._replace(arrays=Arrays(*arrays), presumed=True)
        of_batch = None if weight is None else Totals(weight, squared_mass)
        student, teacher = ctx.needs_input_grad[1:3]
        found = _blocks.sweep(problem, of_batch, student=student, teacher=teacher, upstream=upstream)
        _mend(problem, ordinary, None, found.student, found.teacher, upstream=upstream)
        return None, found.student, found.teacher, None, None, None, None


def kept(of_batch: Totals | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Totals as tensors that autograd can keep; None where nothing was summed, and they are cheaper known again."""
    if of_batch is None or all(isinstance(x, float) for x in of_batch):
        return None, None
    like = next(x for x in of_batch if not isinstance(x, float))
    weight, squared_mass = (like.new_tensor(x) if isinstance(x, float) else x for x in of_batch)
    return weight, squared_mass


def _mend(problem: Problem, ordinary: Any, *outputs: Any, upstream: Any = None) -> None:
    *arrays, _ = problem.arrays
    one = torch.ones((), dtype=torch.float64)
    # As a tensor, for an operator's numbers are constants to the compiler, which would compile again at each new one.
    numbers = torch.stack([one * x for x in problem.numbers])
    torch.ops.gklx.mend(*outputs, ordinary, upstream, *arrays, list(problem.formula), numbers, problem.reduction)


def _mend_where_due(
    value: torch.Tensor | None,
    to_student: torch.Tensor | None,
    to_teacher: torch.Tensor | None,
    ordinary: torch.Tensor,
    upstream: torch.Tensor | None,
    student: torch.Tensor,
    teacher: torch.Tensor,
    prior: torch.Tensor | None,
    labels: torch.Tensor | None,
    sample_weight: torch.Tensor | None,
    formula: Sequence[bool],
    numbers: torch.Tensor,
    reduction: str,
) -> None:
    """Write what a careful sweep finds over the first three, those that are there, unless the rows are ordinary."""
    if bool(ordinary):
        return
    arrays = Arrays(student, teacher, prior, labels, sample_weight, None)
    outputs = {"value": value, "student": to_student, "teacher": to_teacher}
    found = _swept_carefully(
        arrays, formula, numbers.tolist(), reduction, upstream, [x is not None for x in outputs.values()]
    )
    for name, output in outputs.items():
        if output is not None:
            output.copy_(getattr(found, name))


def _swept_carefully(
    arrays: Arrays,
    formula: Sequence[bool],
    numbers: Sequence[float],
    reduction: Any,
    upstream: torch.Tensor | None,
    asked: Sequence[bool],
) -> Sweep:
    dtype = torch.promote_types(torch.float32, torch.promote_types(arrays.student.dtype, arrays.teacher.dtype))
    problem = Problem(xp, dtype, Formula(*formula), reduction, Numbers(*numbers), arrays, None, unread=True)
    value, student, teacher = asked
    return _blocks.sweep(problem, value=value, student=student, teacher=teacher, upstream=upstream)


# Not by `torch.library.custom_op`, whose operators cost 50 µs more at each call.
_LIBRARY = torch.library.Library("gklx", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "mend" + torch.library.infer_schema(_mend_where_due, mutates_args=("value", "to_student", "to_teacher"))
)
_LIBRARY.impl("mend", _mend_where_due, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("gklx::mend", lambda *_: None, lib=_LIBRARY)
