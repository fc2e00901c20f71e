"""The loss as one operator that PyTorch's compiler calls and does not look into, with its autograd rule.

On a CPU the operator is what eager PyTorch runs: the row kernel, or the formulas in blocks of rows.
"""

from collections.abc import Sequence
from typing import Any

import array_api_compat.torch as xp
import torch

from .._core.call import Arrays, Asked, Call, Formula, Numbers, Result, are_static
from .._core.libraries import library_named
from .._run.dispatch import evaluate

_PYTORCH = library_named("torch")


def serves(call: Call) -> bool:
    """Whether the compiler may be given the operator.

    An exported program is to run where gklx is not; a batch over several ranks needs collectives, which the compiler
    must see.
    """
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # PyTorch 2.6 has no such question
    return not exporting() and not _transformed() and call.arrays.student.device.type == "cpu" and call.ranks is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _transformed() -> bool:
    # The compiler would follow the question, but not to its right answer.
    return torch._C._functorch.peek_interpreter_stack() is not None


def attach(call: Call) -> torch.Tensor:
    """The loss; its derivatives are the analytic ones."""
    arrays, recorded = call.arrays, [_differentiated(x) for x in call.arrays[:2]]
    ahead = [wanted and x.dtype == call.dtype for x, wanted in zip(arrays[:2], recorded, strict=True)]
    if ahead != recorded:
        # The backward pass then needs the inputs, and autograd refuses to save a tensor made under inference_mode, of
        # which the compiler cannot tell: constants are copied, by an operator that it does not take back.
        arrays = Arrays(*(x if x is None or _differentiated(x) else torch.ops.gklx.copy(x) for x in arrays))
    value: torch.Tensor = _in_graph(tuple(call.formula), tuple(call.numbers), call.reduction, *arrays, True, *ahead)[0]
    return value


def with_gradients(call: Call, asked: Asked) -> Result:
    """As `evaluate`, the value as from `attach`."""
    arrays = call.arrays._replace(student=call.arrays.student.detach(), teacher=call.arrays.teacher.detach())
    _, to_student, to_teacher = _in_graph(
        tuple(call.formula), tuple(call.numbers), call.reduction, *arrays, False, asked.student, asked.teacher
    )
    return Result(
        attach(call) if asked.value else None,
        to_student if asked.student else None,
        to_teacher if asked.teacher else None,
    )


def _differentiated(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _in_graph(formula: tuple[bool, ...], numbers: tuple[Any, ...], reduction: str, *rest: Any) -> Any:
    """One node of the compiler's graph, whose Python the compiler need not guard at each call."""
    *arrays, value, student, teacher = rest
    opened = None
    if not are_static(numbers):  # numbers that the compiler has left open
        opened, numbers = torch.stack([torch.ones((), dtype=torch.float64) * x for x in numbers]), ()
    return _Loss.apply(  # type: ignore[no-untyped-call]
        *arrays, None, list(formula), list(numbers), opened, reduction, [value, student, teacher]
    )


def _loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    prior: torch.Tensor | None,
    labels: torch.Tensor | None,
    sample_weight: torch.Tensor | None,
    where: torch.Tensor | None,
    upstream: torch.Tensor | None,
    formula: Sequence[bool],
    numbers: Sequence[float],
    opened: torch.Tensor | None,
    reduction: str,
    asked: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value and gradients, empty where not asked for; the numbers are those of `opened` where it is given.

    Contiguous, as the compiler was told by `_shapes`: the formulas' results have the strides of the logits.
    """
    arrays = Arrays(student, teacher, prior, labels, sample_weight, where)
    found_numbers = Numbers(*(numbers if opened is None else opened.tolist()))
    call = Call(_PYTORCH, xp, _dtype(student, teacher), Formula(*formula), reduction, found_numbers, arrays, None)  # type: ignore[arg-type]
    found = evaluate(call, Asked(*asked), upstream=upstream)
    return tuple(
        like.new_empty(0) if x is None else x.contiguous()
        for x, like in zip((found.value, found.student, found.teacher), (student, student, teacher), strict=True)
    )  # type: ignore[return-value]


def _shapes(
    student: torch.Tensor, teacher: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *_, reduction, asked = rest
    shape = student.shape[:-1] if reduction == "none" else ()
    value = student.new_empty(shape if asked[0] else 0, dtype=_dtype(student, teacher))
    to_student, to_teacher = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)
        for x, wanted in zip((student, teacher), asked[1:], strict=True)
    )
    return value, to_student, to_teacher


class _Loss(torch.autograd.Function):
    """The operator with its autograd rule.

    The rule is not registered with the operator: the compiler, which has followed it, would meet it again at each call.
    """

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.gklx.loss(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *arrays, _, formula, numbers, opened, reduction, asked = inputs
        ctx.settings = formula, numbers, reduction
        ctx.set_materialize_grads(False)
        # What was made ahead is all that a backward pass needs, unless another gradient is to be made then.
        ahead, wanted = asked[1:], ctx.needs_input_grad[:2]
        ctx.complete = all(made for made, needed in zip(ahead, wanted, strict=True) if needed)
        ctx.save_for_backward(*((output[1], output[2]) if ctx.complete else (*arrays, opened)))

    @staticmethod
    def backward(ctx: Any, upstream: Any, *_: Any) -> Any:
        nothing = (None,) * len(ctx.needs_input_grad)
        if upstream is None:
            return nothing
        formula, numbers, reduction = ctx.settings
        wanted = list(ctx.needs_input_grad[:2])
        if ctx.complete:
            factor = upstream.unsqueeze(-1) if reduction == "none" else upstream
            gradients = [x * factor if needed else None for x, needed in zip(ctx.saved_tensors, wanted, strict=True)]
        else:
            *arrays, opened = ctx.saved_tensors
            _, *found = torch.ops.gklx.loss(*arrays, upstream, formula, numbers, opened, reduction, [False, *wanted])
            gradients = [x if needed else None for x, needed in zip(found, wanted, strict=True)]
        return *gradients, *nothing[2:]


def _dtype(student: torch.Tensor, teacher: torch.Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, torch.promote_types(student.dtype, teacher.dtype))


# Not by `torch.library.custom_op`, whose operators cost 50 µs more at each call.
_LIBRARY = torch.library.Library("gklx", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("loss" + torch.library.infer_schema(_loss, mutates_args=()))  # type: ignore[no-untyped-call]
_LIBRARY.impl("loss", _loss, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("gklx::loss", _shapes, lib=_LIBRARY)
_LIBRARY.define("copy(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("copy", torch.clone, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("gklx::copy", torch.clone, lib=_LIBRARY)
