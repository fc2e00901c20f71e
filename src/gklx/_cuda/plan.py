"""How a batch is laid over threads, and for which types the kernels are compiled: no GPU needed to decide."""

import math
from typing import NamedTuple

from .._libraries import dtype_name
from .._problem import Problem

_TYPES = {"float16": "Half", "bfloat16": "Brain", "float32": "float", "float64": "double"}
_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

THREADS = 256
"""Of a block; their partial results fit in shared memory that every GPU has."""


class Plan(NamedTuple):
    """What the kernels are compiled for, and how many blocks they need."""

    real: str
    """The C type computed in."""
    student: str
    teacher: str
    vector: int
    """Logits a load: 16 bytes of the wider type, where rows and arrays begin at multiples of that."""
    group: int
    """Threads a row."""
    blocks: int

    @property
    def options(self) -> tuple[str, ...]:
        """The definitions that `rows.cu` asks for."""
        named = {"REAL": self.real, "STUDENT": self.student, "TEACHER": self.teacher, "VECTOR": self.vector}
        return tuple(f"-D{name}={value}" for name, value in (named | {"GROUP": self.group, "BLOCK": THREADS}).items())


def plan_of(problem: Problem, addresses: tuple[int, ...]) -> Plan:
    """The plan of a problem whose logits, contiguous, begin at the addresses given."""
    arrays = problem.arrays
    student, teacher = dtype_name(arrays.student.dtype), dtype_name(arrays.teacher.dtype)
    *batch, classes = arrays.student.shape
    vector = 16 // max(_SIZES[student], _SIZES[teacher])
    if classes % vector or any(address % 16 for address in addresses):
        vector = 1
    group = 32
    while group < THREADS and group * vector < classes:
        group *= 2
    real = "double" if "float64" in (student, teacher) else "float"
    blocks = -(-math.prod(batch) // (THREADS // group))
    return Plan(real, _TYPES[student], _TYPES[teacher], vector, group, max(1, blocks))
