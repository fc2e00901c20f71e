"""The sweep by `rows.cu`: what the kernels are given, and what is made of what they find."""

import math
import sys
from typing import Any

from .._batch import Samples, Totals, mass_matters, mse_weight_of, rates_of, share_of, shares, totals_of, value_of
from .._libraries import library_of
from .._problem import Array, Problem
from .._sweep import Sweep, needs_spread, prior_raised
from . import launch
from .plan import plan_of

_ROW_BYTES = 80
"""Of `Row` in rows.cu: nine doubles and three flags."""


def takes(problem: Problem) -> bool:
    """Whether the logits are eager arrays on a GPU, and CuPy is there to compile and start kernels."""
    s = problem.arrays.student
    library = library_of(s)
    if library is None or library.backend not in ("cupy", "torch") or math.prod(s.shape) == 0:
        return False
    if library.backend == "torch" and (not _on_nvidia(s) or library.block(s) == 0 or not _plain(problem)):
        return False
    return launch.available()


def sweep(
    problem: Problem,
    of_batch: Totals | None = None,
    *,
    value: bool = False,
    student: bool = False,
    teacher: bool = False,
    upstream: Array | None = None,
    device: launch.Device | None = None,
) -> Sweep:
    """As `_sweep.sweep_rows`, with the gradients in their logits' dtypes."""
    problem = prior_raised(problem, passes=2)
    xp, arrays, formula = problem.xp, problem.arrays, problem.formula
    device = launch.device_of(arrays.student) if device is None else device
    batch, classes = arrays.student.shape[:-1], arrays.student.shape[-1]
    rows = math.prod(batch)
    logits = device.contiguous(arrays.student), device.contiguous(arrays.teacher)
    plan = plan_of(problem, tuple(device.address(x) for x in logits))
    given = (
        *logits,
        None if arrays.prior is None else device.contiguous(xp.astype(arrays.prior, problem.dtype, copy=False)),
        None if arrays.labels is None else device.contiguous(xp.astype(arrays.labels, xp.int64, copy=False)),
        None if arrays.sample_weight is None else device.contiguous(arrays.sample_weight),
        None
        if arrays.where is None
        else device.contiguous(xp.astype(xp.broadcast_to(arrays.where, arrays.student.shape), xp.uint8)),
        rows,
        classes,
        problem.numbers.temperature,
        problem.numbers.weight_temperature,
        problem.numbers.gamma,
    )
    weight, mass = device.empty(batch, problem.dtype), device.empty(batch, problem.dtype)
    found = device.empty((rows, _ROW_BYTES), xp.uint8)
    device.start(plan, "statistics", (*given, found, weight, mass))

    spread = needs_spread(problem, value=value, student=student, teacher=teacher)
    if of_batch is None and shares(problem):
        of_batch = totals_of(problem, weight, mass if mass_matters(problem) else None)
    share, mse_weight = share_of(problem, weight, of_batch), mse_weight_of(problem, of_batch)
    rates = rates_of(problem, share, mse_weight, mass if spread else None, upstream)

    to_student = device.empty(arrays.student.shape, arrays.student.dtype) if student else None
    to_teacher = device.empty(arrays.teacher.shape, arrays.teacher.dtype) if teacher else None
    kl, mse, ce = (
        device.empty(batch, problem.dtype) if value and there else None
        for there in (not formula.decomposed, spread and formula.decomposed, formula.decomposed)
    )
    wanted = rates.teacher if spread and (student or teacher) else None, rates.student if student else None
    asked = (
        *(None if x is None else device.contiguous(xp.astype(x, problem.dtype, copy=False)) for x in wanted),
        to_student,
        to_teacher,
        kl,
        mse,
        ce,
        int(formula.symmetric),
        int(formula.tempered),
    )
    device.start(plan, "gradients", (*given, found, *asked))
    loss = None
    if value:
        loss = value_of(problem, Samples(kl, mse, ce, mass if spread else None), mse_weight, share)
    return Sweep(loss, to_student, to_teacher, of_batch, ordinary=False)


def _on_nvidia(x: Any) -> bool:
    return x.device.type == "cuda" and sys.modules["torch"].version.cuda is not None


def _plain(problem: Problem) -> bool:
    """Whether every tensor is one with memory of its own, and no subclass."""
    torch = sys.modules["torch"]
    return all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in problem.arrays if x is not None)
