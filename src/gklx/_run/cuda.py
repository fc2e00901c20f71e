"""A call on the CUDA kernels, `_kernels/cuda.cu`, for CuPy's arrays and PyTorch's on an NVIDIA GPU.

An execution of the formulas in `_core/formulas.py`, held to them by the tests. The kernels do what takes a pass over
the logits; what the samples of a batch share is left to `_core/batch.py`.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from .._core import batch as batches
from .._core import formulas
from .._core.batch import Batch
from .._core.call import Array, Call, Result, are_static
from .._core.libraries import dtype_name, library_of
from . import cpu, cuda_launch, rows
from .cuda_launch import THREADS, Device, Options

_TYPES = {"float16": "Half", "bfloat16": "Brain", "float32": "float", "float64": "double"}
_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_REALS: dict[str, Any] = {"float": np.float32, "double": np.float64}
_ROW = 17  # numbers of `RowStatistics` in cuda.cu
_PER_STUDENT_TOTAL, _PER_TEACHER_TOTAL, _HAS_VALID, _UNDEFINED = 2, 3, 13, 14  # of them

_LOADS = 4
"""How many vector loads of a row a thread makes before the row is given to more threads."""

_Weights = Literal["UNWEIGHTED", "PROBABILITIES", "TEACHER_POWER", "PRIOR_POWER"]


def serves(call: Call) -> bool:
    """Whether the logits are eager arrays on an NVIDIA GPU, and a launcher is there that compiles the kernels."""
    s = call.arrays.student
    library = library_of(s)
    if library is None or library.backend not in ("cupy", "torch") or not cpu.kernel_allowed():
        return False
    if library.backend == "torch" and not (_on_nvidia(s) and rows.are_plain_tensors(call, "cuda")):
        return False
    if math.prod(s.shape) == 0 or not are_static(call.numbers):
        return False
    return cuda_launch.available(s)


def evaluate(
    call: Call,
    shared: Batch | None = None,
    *,
    value: bool = False,
    student: bool = False,
    teacher: bool = False,
    upstream: Array | None = None,
    device: Device | None = None,
) -> Result:
    """As `dispatch.evaluate`."""
    arrays, formula = call.arrays, call.formula
    device = cuda_launch.device_of(arrays.student) if device is None else device
    uses_energy = formulas.uses_energy(call, value=value, student=student, teacher=teacher)
    makes_batch = shared is None and batches.uses_batch(call)
    weighs = uses_energy or (makes_batch and batches.uses_batch_mass(call))
    run = _statistics(call, device, weighs)
    if makes_batch:
        mass = run.weights if batches.uses_batch_mass(call) else None
        shared = batches.over_ranks(call, batches.batch_of(call, run.v, mass))

    of_energy = run.weights if uses_energy else None
    to_student = device.empty(arrays.student.shape, arrays.student.dtype) if student else None
    to_teacher = device.empty(arrays.teacher.shape, arrays.teacher.dtype) if teacher else None
    factors = batches.factors_of(call, run.v, of_energy, shared, upstream) if student or teacher else None
    kl, ce, energy = (
        device.empty(arrays.student.shape[:-1], call.dtype) if value and there else None
        for there in (not formula.decomposed, formula.decomposed, formula.decomposed and uses_energy)
    )
    run.gradients(
        ce_factor=None if factors is None or not student else device.contiguous(factors.ce, call.dtype),
        energy_factor=None if factors is None or not uses_energy else device.contiguous(factors.energy, call.dtype),
        to_student=to_student,
        to_teacher=to_teacher,
        kl=kl,
        ce=ce,
        energy=energy,
        symmetric=int(formula.symmetric),
    )
    loss = None
    if value:
        if factors is None or upstream is not None:
            factors = batches.factors_of(call, run.v, of_energy, shared)
        loss = formulas.value_of(call, formulas.Samples(kl, ce, energy), factors)
    return Result(loss, to_student, to_teacher, shared)


def samples(call: Call, names: Sequence[str], device: Device | None = None) -> dict[str, Array]:
    """As `rows.samples`, whichever names are asked for."""
    xp, temperature = call.xp, call.numbers.temperature
    device = cuda_launch.device_of(call.arrays.student) if device is None else device
    batch = call.arrays.student.shape[:-1]
    run = _statistics(call, device, weighs=True)
    kl, ce, energy = (device.empty(batch, call.dtype) for _ in range(3))
    run.gradients(
        ce_factor=None, energy_factor=None, to_student=None, to_teacher=None, kl=kl, ce=ce, energy=energy, symmetric=0
    )
    if call.formula.tempered:
        energy = energy / temperature / temperature
    mass = run.weights.total * run.weights.base**call.numbers.gamma

    def column(number: int) -> Array:
        return xp.reshape(run.found[:, number], batch)

    return {
        "kl": kl,
        "ce": ce,
        "mse": mass * mass * energy,
        "mass": mass,
        "student_peak": column(_PER_STUDENT_TOTAL),  # the largest logit is 0 by now
        "teacher_peak": column(_PER_TEACHER_TOTAL),
        "student_class": xp.argmax(call.arrays.student, axis=-1),
        "teacher_class": xp.argmax(call.arrays.teacher, axis=-1),
        "has_valid": column(_HAS_VALID) != 0,
        "undefined": column(_UNDEFINED) != 0,
    }


# --- the plan: no GPU is needed to make it ----------------------------------------------------------------------------


class Plan(NamedTuple):
    """What the kernels are compiled for, and how many blocks they need."""

    real: str
    """The C type computed in."""
    student: str
    teacher: str
    weights: _Weights
    """Where the class weights come from."""
    vector: int
    """Logits a load: 16 bytes of the wider type, where rows and arrays begin at multiples of that."""
    group: int
    """Threads a row."""
    blocks: int

    @property
    def options(self) -> Options:
        """The definitions that cuda.cu asks for."""
        return (
            ("REAL", self.real),
            ("STUDENT", self.student),
            ("TEACHER", self.teacher),
            ("WEIGHTS", self.weights),
            ("VECTOR", str(self.vector)),
            ("GROUP", str(self.group)),
            ("BLOCK", str(THREADS)),
        )


def plan_of(call: Call, addresses: tuple[int, ...], weighs: bool) -> Plan:
    """The plan of a call whose logits, contiguous, begin at the addresses given."""
    arrays = call.arrays
    student, teacher = dtype_name(arrays.student.dtype), dtype_name(arrays.teacher.dtype)
    *batch, classes = arrays.student.shape
    vector = 16 // max(_SIZES[student], _SIZES[teacher])
    if classes % vector or any(address % 16 for address in addresses):
        vector = 1
    # Where a thread takes fewer loads than this, merging the threads costs more than the loads do.
    group = 32
    while group < THREADS and group * vector * _LOADS < classes:
        group *= 2
    real = "double" if "float64" in (student, teacher) else "float"
    blocks = -(-math.prod(batch) // (THREADS // group))
    weights = _weights_of(call) if weighs else "UNWEIGHTED"
    return Plan(real, _TYPES[student], _TYPES[teacher], weights, vector, group, blocks)


def _weights_of(call: Call) -> _Weights:
    if call.arrays.prior is not None:
        return "PRIOR_POWER"
    numbers = call.numbers
    own = numbers.gamma == 1.0 and numbers.weight_temperature == numbers.temperature
    return "PROBABILITIES" if own else "TEACHER_POWER"


# --- the two kernels --------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """What the first kernel found, and what the second is given beside that."""

    device: Device
    plan: Plan
    given: tuple[Any, ...]
    found: Array
    """[rows, _ROW], `RowStatistics` of each row."""
    v: Array
    """The sample weights, [...]."""
    weights: formulas.ClassWeights
    """Without the weights of single classes."""

    def gradients(self, **asked: Any) -> None:
        """Starts the second kernel; `asked` in the order of its arguments."""
        self.device.start(self.plan.options, self.plan.blocks, "gradients", (*self.given, self.found, *asked.values()))


def _statistics(call: Call, device: Device, weighs: bool) -> _Run:
    xp, arrays, numbers, contiguous = call.xp, call.arrays, call.numbers, device.contiguous
    shape = arrays.student.shape
    logits = contiguous(arrays.student, None), contiguous(arrays.teacher, None)
    plan = plan_of(call, tuple(device.address(x) for x in logits), weighs)
    where, where_row, where_class = None, 0, 0
    if arrays.where is not None:
        mask, where_row, where_class = rows.mask_layout(call)
        where = contiguous(mask, None)
    given = (
        *logits,
        None if arrays.prior is None else contiguous(arrays.prior, call.dtype),
        None if arrays.labels is None else contiguous(arrays.labels, xp.int64),
        None if arrays.sample_weight is None else contiguous(arrays.sample_weight, call.dtype),
        where,
        math.prod(shape[:-1]),
        shape[-1],
        where_row,
        where_class,
        *_split(plan, 1.0 / numbers.temperature),
        *_split(plan, 1.0 / numbers.weight_temperature),
        *_split(plan, numbers.gamma / numbers.weight_temperature),
        _REALS[plan.real](numbers.gamma),
    )
    v, mass, base = (device.empty(shape[:-1], call.dtype) for _ in range(3))
    found = device.empty((math.prod(shape[:-1]), _ROW), call.dtype)
    device.start(plan.options, plan.blocks, "statistics", (*given, found, v, mass, base))
    return _Run(device, plan, given, found, v, formulas.ClassWeights(None, mass, base))


def _split(plan: Plan, x: float) -> tuple[Any, Any]:
    """A number in what is computed in, and what its rounding left."""
    real = _REALS[plan.real]
    return real(x), real(x - float(real(x)))


def _on_nvidia(x: Any) -> bool:
    return x.device.type == "cuda" and sys.modules["torch"].version.cuda is not None
