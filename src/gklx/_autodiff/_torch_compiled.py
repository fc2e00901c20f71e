"""The loss in a program that PyTorch compiles for the CPU: rows are presumed ordinary, and mended where they are not.

The compiler fuses the sweep into a few loops, in which the masks that NaN and infinite logits take would cost as much
as all else. A compiled program cannot look first and choose; so it computes without masks, finds out on the way whether
every sample's loss is finite and exact, and leaves what to do if not to an operator that it calls and does not look
into. That one does the sweep again, with all care, and writes over what was found.
"""

from collections.abc import Sequence
from typing import Any

import array_api_compat.torch as xp
import torch

from .. import _blocks
from .._batch import Totals
from .._problem import Arrays, Formula, Numbers, Problem, joined, parted
from .._sweep import Sweep
from ._torch_totals import kept


def takes(problem: Problem) -> bool:
    """Whether the compiler at work may be given this form of the loss, and the problem is one for it.

    An exported program is to run where gklx is not. Ranks that share a batch must all do the same.
    """
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # PyTorch 2.6 has no such question
    return (
        not exporting()
        and not _transformed()
        and problem.arrays.student.device.type == "cpu"
        and problem.arrays.where is None
        and problem.ranks is None
        and all(isinstance(x, float) for x in problem.numbers)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _transformed() -> bool:
    # The compiler would follow the question, but not to its right answer.
    return torch._C._functorch.peek_interpreter_stack() is not None


def attach(problem: Problem) -> torch.Tensor:
    """The loss; its derivatives are those of the sweep."""
    value: torch.Tensor = _in_graph(tuple(problem.formula), tuple(problem.numbers), problem.reduction, *problem.arrays)
    return value


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _in_graph(formula: tuple[bool, ...], numbers: tuple[float, ...], reduction: Any, *arrays: Any) -> torch.Tensor:
    """Left to the compiler's second stage, which sees the operations; the first would see all of the sweep's Python.

    At each call of the program it makes sure that no function or class it saw has changed: some 50 µs. A compiler
    without a second stage has this function called as it is.
    """
    value: torch.Tensor = _Loss.apply(formula, numbers, reduction, *arrays)  # type: ignore[no-untyped-call]
    return value


class _Loss(torch.autograd.Function):
    """Keeps its inputs, and makes the gradients in the backward pass; what both need the compiler decides to keep."""

    @staticmethod
    def forward(ctx: Any, formula: Sequence[bool], numbers: Sequence[Any], reduction: Any, *arrays: Any) -> Any:
        ctx.presumed = torch.compiler.is_compiling()
        problem = _of_call(formula, numbers, reduction, arrays, presumed=ctx.presumed)
        found = _blocks.sweep(problem, value=True)
        ordinary = found.ordinary if ctx.presumed else None
        if ordinary is not None:
            _mend(problem, ordinary, found.value, None, None)
        # A number that the compiler has left open would be a constant of the backward pass; as a tensor it is kept.
        known, opened = parted(problem.numbers)
        ctx.plan = formula, known, reduction
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, *kept(found.of_batch), ordinary, *opened)
        return found.value

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        nothing = (None,) * len(ctx.needs_input_grad)
        if upstream is None:
            return nothing
        saved, numbers_from = ctx.saved_tensors, -len(Numbers._fields)
        *arrays, weight, squared_mass, ordinary = saved[:numbers_from]
        formula, known, reduction = ctx.plan
        numbers = joined(known, Numbers(*saved[numbers_from:]))
        problem = _of_call(formula, numbers, reduction, arrays, presumed=ctx.presumed)
        of_batch = None if weight is None else Totals(weight, squared_mass)
        student, teacher = ctx.needs_input_grad[3:5]
        found = _blocks.sweep(problem, of_batch, student=student, teacher=teacher, upstream=upstream)
        if ordinary is not None:
            _mend(problem, ordinary, None, found.student, found.teacher, upstream=upstream)
        return None, None, None, found.student, found.teacher, *nothing[5:]


def _of_call(
    formula: Sequence[bool], numbers: Sequence[Any], reduction: Any, arrays: Sequence[Any], *, presumed: bool
) -> Problem:
    """The problem, with tensors where the compiler has left numbers or sizes open.

    Of samples so many as may be there is no Python number: their weights of 1 are summed.
    """
    given = Arrays(*arrays)
    batch, dtype = given.student.shape[:-1], _dtype(given)
    if given.sample_weight is None and not all(isinstance(n, int) for n in batch):
        given = given._replace(sample_weight=given.student.new_ones(batch, dtype=dtype))
    numbers = [x if isinstance(x, (float, torch.Tensor)) else torch.ones((), dtype=dtype) * x for x in numbers]
    return _problem(formula, numbers, reduction, given)._replace(presumed=presumed)


def _problem(formula: Sequence[bool], numbers: Sequence[float], reduction: Any, arrays: Arrays) -> Problem:
    unread = arrays.prior is not None or arrays.sample_weight is not None  # whose values only an eager call checks
    return Problem(xp, _dtype(arrays), Formula(*formula), reduction, Numbers(*numbers), arrays, None, unread=unread)


def _dtype(arrays: Arrays) -> torch.dtype:
    return torch.promote_types(torch.float32, torch.promote_types(arrays.student.dtype, arrays.teacher.dtype))


def _mend(problem: Problem, ordinary: Any, *outputs: Any, upstream: Any = None) -> None:
    *arrays, _ = problem.arrays
    numbers, opened = list(problem.numbers), None
    if not all(isinstance(x, float) for x in numbers):
        one = torch.ones((), dtype=torch.float64)
        numbers, opened = [], torch.stack([one * x for x in numbers])
    torch.ops.gklx.mend(
        *outputs, ordinary, upstream, *arrays, list(problem.formula), numbers, opened, problem.reduction
    )


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
    numbers: Sequence[float],
    opened: torch.Tensor | None,
    reduction: str,
) -> None:
    """Write what a careful sweep finds over the first three, those that are there, unless the rows are ordinary.

    The numbers are those of `opened` where the compiler has left some open.
    """
    if bool(ordinary):
        return
    arrays = Arrays(student, teacher, prior, labels, sample_weight, None)
    outputs = {"value": value, "student": to_student, "teacher": to_teacher}
    numbers = numbers if opened is None else opened.tolist()
    found = _swept_carefully(arrays, formula, numbers, reduction, upstream, [x is not None for x in outputs.values()])
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
    problem = _problem(formula, numbers, reduction, arrays)
    value, student, teacher = asked
    return _blocks.sweep(problem, value=value, student=student, teacher=teacher, upstream=upstream)


# Not by `torch.library.custom_op`, whose operators cost 50 µs more at each call.
_LIBRARY = torch.library.Library("gklx", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "mend" + torch.library.infer_schema(_mend_where_due, mutates_args=("value", "to_student", "to_teacher"))
)
_LIBRARY.impl("mend", _mend_where_due, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("gklx::mend", lambda *_: None, lib=_LIBRARY)
