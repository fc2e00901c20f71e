"""A call on the CUDA kernels, `_kernels/cuda.cu`, for CuPy's arrays and PyTorch's on an NVIDIA GPU.

An execution of the formulas in `_core/formulas.py`, held to them by the tests.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from .._core import batch as batches
from .._core.call import Array, Asked, Batch, Call, Result, are_static
from .._core.libraries import dtype_name
from . import cpu, cpu_library, cuda_launch
from .cuda_launch import THREADS, Device, Options

_TYPES = {"float16": "Half", "bfloat16": "Brain", "float32": "float", "float64": "double"}
_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_REALS: dict[str, Any] = {"float": np.float32, "double": np.float64}
_ROW = 25  # numbers of `RowStatistics` in cuda.cu, and where some of them are
_MASS, _BASE, _STUDENT_PEAK, _TEACHER_PEAK, _HAS_VALID, _UNDEFINED = 1, 2, 6, 7, 8, 9

_LOADS = 32
"""How many vector loads of a row a thread makes before the row is given to more threads: merging what several threads
found costs more than a few loads. It does not depend on the batch, so that a row's results do not."""

_LOG2_E = Fraction("1.44269504088896340735992468100189213742664595415298593413544940693")

_Weights = Literal["PROBABILITIES", "TEACHER_POWER", "PRIOR_POWER"]


def serves(call: Call) -> bool:
    """Whether the logits are eager arrays on an NVIDIA GPU, and a launcher is there that compiles the kernels."""
    s, backend = call.arrays.student, call.library.backend
    if backend not in ("cupy", "torch") or not cpu_library.kernel_allowed():
        return False
    if backend == "torch" and not (_on_nvidia(s) and cpu.are_plain_tensors(call, "cuda")):
        return False
    if math.prod(s.shape) == 0 or not are_static(call.numbers):
        return False
    return cuda_launch.available(s)


def evaluate(
    call: Call,
    asked: Asked,
    shared: Batch | None = None,
    *,
    upstream: Array | None = None,
    statistics: Array | None = None,
    device: Device | None = None,
) -> Result:
    """As `dispatch.evaluate`. `statistics` are those of the same call, where an earlier evaluation found them."""
    arrays = call.arrays
    device = cuda_launch.device_of(arrays.student) if device is None else device
    run = _Run(call, device)
    if statistics is None:
        statistics = run.statistics()
    if shared is None and batches.uses_batch(call):
        shared = batches.over_ranks(call, run.batch(statistics))
    loss = device.empty(arrays.student.shape[:-1], call.dtype) if asked.value else None
    to_student = device.empty(arrays.student.shape, arrays.student.dtype) if asked.student else None
    to_teacher = device.empty(arrays.teacher.shape, arrays.teacher.dtype) if asked.teacher else None
    run.results(statistics, shared, upstream, loss=loss, to_student=to_student, to_teacher=to_teacher)
    if loss is not None and call.reduction != "none":
        loss = call.xp.sum(loss)
    return Result(loss, to_student, to_teacher, shared, statistics)


def batch(call: Call) -> Batch:
    """What the samples share, on this rank alone."""
    run = _Run(call, cuda_launch.device_of(call.arrays.student))
    return run.batch(run.statistics())


def samples(call: Call, names: Sequence[str], device: Device | None = None) -> dict[str, Array]:
    """As `cpu.samples`, whichever names are asked for."""
    xp, temperature = call.xp, call.numbers.temperature
    device = cuda_launch.device_of(call.arrays.student) if device is None else device
    shape = call.arrays.student.shape[:-1]
    run = _Run(call, device)
    found = run.statistics()
    kl, ce, energy = (device.empty(shape, call.dtype) for _ in range(3))
    decomposed = {"ce": ce, "energy": energy} if call.formula.decomposed else {}
    run.results(found, None, None, kl=kl, **decomposed)

    def column(number: int) -> Array:
        return xp.reshape(found[:, number], shape)

    made = {
        "kl": kl,
        "student_peak": column(_STUDENT_PEAK),
        "teacher_peak": column(_TEACHER_PEAK),
        "student_class": xp.argmax(call.arrays.student, axis=-1),
        "teacher_class": xp.argmax(call.arrays.teacher, axis=-1),
        "has_valid": column(_HAS_VALID) != 0,
        "undefined": column(_UNDEFINED) != 0,
    }
    if call.formula.decomposed:
        mass = column(_MASS) * column(_BASE) ** call.numbers.gamma
        energy = energy / temperature / temperature if call.formula.tempered else energy
        made |= {"ce": ce, "mse": mass * mass * energy, "mass": mass}
    return made


# --- the plan: no GPU is needed to make it ----------------------------------------------------------------------------


class Plan(NamedTuple):
    """What the kernels are compiled for, and how many blocks they need."""

    real: str
    """The C type computed in."""
    student: str
    teacher: str
    weights: _Weights
    """Where the class weights come from."""
    decomposed: bool
    """Whether the losses are wMSE and CE, else KL."""
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
            ("DECOMPOSED", str(int(self.decomposed))),
            ("VECTOR", str(self.vector)),
            ("GROUP", str(self.group)),
            ("BLOCK", str(THREADS)),
        )


def plan_of(call: Call, addresses: tuple[int, ...]) -> Plan:
    """The plan of a call whose logits and prior, contiguous, begin at the addresses given."""
    arrays = call.arrays
    student, teacher = dtype_name(arrays.student.dtype), dtype_name(arrays.teacher.dtype)
    *batch, classes = arrays.student.shape
    vector = 16 // max(_SIZES[student], _SIZES[teacher])
    if classes % vector or any(address % 16 for address in addresses):
        vector = 1
    group = 32
    while group < THREADS and group * vector * _LOADS < classes:
        group *= 2
    real = "double" if "float64" in (student, teacher) else "float"
    blocks = -(-math.prod(batch) // (THREADS // group))
    decomposed = call.formula.decomposed
    return Plan(real, _TYPES[student], _TYPES[teacher], _weights_of(call), decomposed, vector, group, blocks)


def _weights_of(call: Call) -> _Weights:
    if not call.formula.decomposed:
        return "PROBABILITIES"
    if call.arrays.prior is not None:
        return "PRIOR_POWER"
    numbers = call.numbers
    own = numbers.gamma == 1.0 and numbers.weight_temperature == numbers.temperature
    return "PROBABILITIES" if own else "TEACHER_POWER"


# --- the kernels ------------------------------------------------------------------------------------------------------


class _Run:
    """The kernels of a call, and what all of them are given."""

    def __init__(self, call: Call, device: Device) -> None:
        arrays, numbers, contiguous = call.arrays, call.numbers, device.contiguous
        shape = arrays.student.shape
        logits = contiguous(arrays.student, None), contiguous(arrays.teacher, None)
        weighs = call.formula.decomposed and arrays.prior is not None
        prior = contiguous(arrays.prior, call.dtype) if weighs else None
        self.call, self.device, self.rows = call, device, math.prod(shape[:-1])
        self.plan = plan = plan_of(call, tuple(device.address(x) for x in (*logits, prior) if x is not None))
        where, where_row, where_class = None, 0, 0
        if arrays.where is not None:
            mask, where_row, where_class = cpu.mask_layout(call)
            where = contiguous(mask, None)
        self.real, self.options = _REALS[plan.real], plan.options
        self.arrays = (  # kept, since the kernels get addresses alone and some of these are copies
            *logits,
            prior,
            contiguous(arrays.labels, call.xp.int64) if weighs and arrays.labels is not None else None,
            None if arrays.sample_weight is None else contiguous(arrays.sample_weight, call.dtype),
            where,
        )
        self.given = (
            *self._addresses(self.arrays),
            *map(np.int64, (self.rows, shape[-1], where_row, where_class)),
            *_rate(plan.real, 1.0, numbers.temperature),
            *_rate(plan.real, 1.0, numbers.weight_temperature),
            *_rate(plan.real, numbers.gamma, numbers.weight_temperature),
            self.real(1.0 / numbers.temperature),
            self.real(numbers.gamma),
            self.real(0.5 ** (shape[-1] - 1).bit_length()),  # the largest power of two up to 1 / classes
        )

    def _addresses(self, arrays: Iterable[Array | None]) -> list[np.uint64]:
        return [np.uint64(0 if x is None else self.device.address(x)) for x in arrays]

    def start(self, name: str, blocks: int, *given: np.generic) -> None:
        """Run a kernel on so many blocks."""
        self.device.start(self.options, blocks, name, given)

    def statistics(self) -> Array:
        """[rows, _ROW], `RowStatistics` of each row."""
        found = self.device.empty((self.rows, _ROW), self.call.dtype)
        self.start("statistics", self.plan.blocks, *self.given, *self._addresses([found]))
        return found

    def batch(self, statistics: Array) -> Batch:
        """What the samples share, on this rank alone."""
        made = self.device.empty((len(Batch._fields),), self.call.dtype)
        found = Batch(*(made[i, ...] for i in range(len(Batch._fields))))
        rows, squares = map(np.int64, (self.rows, batches.uses_batch_mass(self.call)))
        gamma = self.real(self.call.numbers.gamma)
        self.start("batch", 1, *self._addresses([statistics]), rows, squares, gamma, *self._addresses(found))
        return found

    def results(
        self,
        statistics: Array,
        shared: Batch | None,
        upstream: Array | None,
        *,
        loss: Array | None = None,
        kl: Array | None = None,
        ce: Array | None = None,
        energy: Array | None = None,
        to_student: Array | None = None,
        to_teacher: Array | None = None,
    ) -> None:
        """Fill the arrays that are given: losses of the samples and gradients."""
        call = self.call
        formula, numbers = call.formula, call.numbers
        given = None if upstream is None else self.device.contiguous(upstream, call.dtype)
        choices = call.reduction == "mean", formula.tempered, formula.symmetric, batches.uses_batch_mass(call)
        ranks = 1.0 if call.ranks is None else call.ranks.size
        self.start(
            "gradients",
            self.plan.blocks,
            *self.given,
            *self._addresses([statistics, *(shared or [None] * len(Batch._fields))]),
            *map(np.int64, choices),
            *map(self.real, (numbers.mse_weight, numbers.ce_weight, ranks)),
            *self._addresses([given]),
            np.int64(call.reduction == "none"),
            *self._addresses([loss, kl, ce, energy, to_student, to_teacher]),
        )


@lru_cache(maxsize=64)
def _rate(real: str, numerator: float, denominator: float) -> tuple[Any, Any]:
    """The quotient times log2(e) in what is computed in, and what its rounding left."""
    exact = Fraction(numerator) / Fraction(denominator) * _LOG2_E
    largest = np.finfo(_REALS[real]).max
    high = _REALS[real](float(min(Fraction(float(largest)), exact)))
    return high, _REALS[real](0.0 if high == largest else float(exact - Fraction(float(high))))


def _on_nvidia(x: Any) -> bool:
    return x.device.type == "cuda" and sys.modules["torch"].version.cuda is not None
