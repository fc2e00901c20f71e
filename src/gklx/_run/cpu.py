"""A call on the CPU's row kernel: which arrays it serves, and how they are handed over.

An execution of the formulas in `_core/formulas.py`, held to them by the tests.
"""

import contextlib
import ctypes
import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from .._core.batch import over_ranks, uses_batch
from .._core.call import Array, Asked, Batch, Call, Result, are_static
from .._core.libraries import Library, dtype_name
from . import cpu_library

_PROCESS = os.getpid()  # a fork of it has another one
_ONE_THREAD = 2**16  # pairs of logits that are not worth a second thread
_NOT_REAL = {
    "has_valid": "bool",
    "undefined": "bool",
    "student_class": "int64",
    "teacher_class": "int64",
    "overlaps": "int32",
}


class _Host(NamedTuple):
    """What is done with the arrays of one library in the host's memory."""

    contiguous: Callable[[Array, Any], Array]
    """The array in the kernel's layout, and in a dtype where one is given."""
    address: Callable[[Array], int]
    empty: Callable[[tuple[int, ...], Any, Array], Array]
    """Of a shape and dtype, like an array."""
    empty_like: Callable[[Array], Array]
    """Of an array's shape and dtype, in the kernel's layout; in PyTorch in half the time of `empty`."""
    threads: Callable[[], int]
    parallel_for: Callable[[], int]
    """The address of the library's own loop over its threads; 0 where it has none."""
    finished: Callable[[Array], Array]
    """A result as the library would return it."""


def serves(call: Call) -> bool:
    """Whether the kernel is there and takes the call's arrays: eager, in the host's memory, nobody differentiating."""
    backend = call.library.backend
    if backend not in _HOSTS:
        return False
    # First, since PyTorch's compiler follows this function, and can follow neither ctypes nor os.environ.
    if backend == "torch" and not are_plain_tensors(call, "cpu"):
        return False
    if backend == "numpy" and not _are_native(call):
        return False
    return cpu_library.instruction_set() is not None and are_static(call.numbers)


def evaluate(
    call: Call,
    asked: Asked,
    shared: Batch | None = None,
    *,
    upstream: Array | None = None,
    threads: int | None = None,
) -> Result:
    """As `dispatch.evaluate`, on at most so many threads."""
    arrays = call.arrays
    request, host, kept = _request(call, threads)
    if shared is None and call.ranks is not None and uses_batch(call):
        shared = over_ranks(call, _batch(call, request))
    if shared is not None:
        given = np.asarray([float(x) for x in shared])
        kept.append(given)
        request.totals = given.ctypes.data
        request.ranks = 1 if call.ranks is None else call.ranks.size
    found = to_student = to_teacher = None
    if asked.value:
        shape = arrays.student.shape[:-1] if call.reduction == "none" else ()
        found = host.empty(shape, call.dtype, arrays.student)
        request.value = host.address(found)
    if asked.student:
        to_student = host.empty_like(arrays.student)
        request.to_student = host.address(to_student)
    if asked.teacher:
        to_teacher = host.empty_like(arrays.teacher)
        request.to_teacher = host.address(to_teacher)
    if upstream is not None:
        upstream = host.contiguous(upstream, call.dtype)
        kept.append(upstream)
        request.upstream, request.upstream_per_row = host.address(upstream), call.reduction == "none"
    cpu_library.run(request)
    return Result(None if found is None else host.finished(found), to_student, to_teacher, shared)


def batch(call: Call, threads: int | None = None) -> Batch:
    """What the samples share, on this rank alone."""
    request, _, _kept = _request(call, threads)
    return _batch(call, request)


def _batch(call: Call, request: cpu_library.RowCall) -> Batch:
    found = np.empty(len(Batch._fields))
    request.totals_out = found.ctypes.data
    cpu_library.run(request)
    request.totals_out = 0
    xp, like = call.xp, call.arrays.student
    return Batch(*(xp.asarray(float(x), dtype=xp.float64, device=call.library.device(like)) for x in found))


def samples(call: Call, names: Iterable[str], threads: int, top_k: Sequence[int] = ()) -> dict[str, Array]:
    """What is asked for of each sample, [...], from one pass over the logits: fields of `cpu_library.RowCall` by name.

    "overlaps" is [..., len(top_k)]: for each k, in ascending order, how many classes are among the k largest of both
    networks; of equal logits the first counts.
    """
    request, host, _kept = _request(call, threads)
    shape, like, found = call.arrays.student.shape[:-1], call.arrays.student, {}
    ks = np.minimum(np.asarray(top_k, np.int64), request.classes)
    request.top_k, request.top_ks = ks.ctypes.data, len(ks)
    for name in names:
        dtype = getattr(call.xp, _NOT_REAL[name]) if name in _NOT_REAL else call.dtype
        found[name] = host.empty((*shape, len(ks)) if name == "overlaps" else shape, dtype, like)
        setattr(request, name, host.address(found[name]))
    cpu_library.run(request)
    return found


def prior_is_right(library: Library, prior: Array, labels: Array | None) -> bool | None:
    """Whether all labels name classes, and the prior's rows that are used are finite and not negative.

    Of arrays whose values can be read. None where the kernel does not take them.
    """
    host = _HOSTS.get(library.backend)
    if host is None or cpu_library.instruction_set() is None:
        return None
    if library.backend == "numpy" and not prior.dtype.isnative:
        return None
    classes = prior.shape[-1]
    prior = host.contiguous(prior, None)
    request = cpu_library.RowCall(prior=host.address(prior), rows=math.prod(prior.shape[:-1]), classes=classes)
    request.prior_type = cpu_library.TYPES[dtype_name(prior.dtype)]
    if labels is not None:
        labels = host.contiguous(labels, library.namespace().int64)
        request.labels, request.rows = host.address(labels), math.prod(labels.shape)
    _set_threads(request, host)
    return cpu_library.prior_is_right(request)


def _request(call: Call, threads: int | None = None) -> tuple[cpu_library.RowCall, _Host, list[Array]]:
    """The kernel's call without results, and the arrays that must live as long as it."""
    arrays, formula, numbers, dtype = call.arrays, call.formula, call.numbers, call.dtype
    host = _HOSTS[call.library.backend]
    contiguous, address = host.contiguous, host.address
    shape = arrays.student.shape
    rows, classes = math.prod(shape[:-1]), shape[-1]
    student, teacher = contiguous(arrays.student, None), contiguous(arrays.teacher, None)
    kept = [student, teacher]
    prior = labels = sample_weight = where = prior_type = where_row = where_class = 0
    if arrays.prior is not None:
        kept.append(contiguous(arrays.prior, None))
        prior, prior_type = address(kept[-1]), cpu_library.TYPES[dtype_name(arrays.prior.dtype)]
    if arrays.labels is not None:
        kept.append(contiguous(arrays.labels, call.xp.int64))
        labels = address(kept[-1])
    if arrays.sample_weight is not None:
        kept.append(contiguous(arrays.sample_weight, dtype))
        sample_weight = address(kept[-1])
    if arrays.where is not None:
        mask, where_row, where_class = mask_layout(call)
        kept.append(contiguous(mask, None))
        where = address(kept[-1])
    # By position, which is faster: in the order of `RowCall._fields_`, with the orders of `Numbers` and `Formula`.
    request = cpu_library.RowCall(
        address(student),
        address(teacher),
        prior,
        labels,
        sample_weight,
        where,
        0,
        0,
        rows,
        classes,
        where_row,
        where_class,
        *numbers,
        1.0,
        cpu_library.TYPES[dtype_name(student.dtype)],
        cpu_library.TYPES[dtype_name(teacher.dtype)],
        prior_type,
        *formula,
        cpu_library.REDUCTIONS[call.reduction],
    )
    _set_threads(request, host, threads)
    return request, host, kept


def _set_threads(request: cpu_library.RowCall, host: _Host, at_most: int | None = None) -> None:
    count = 1 if request.rows * request.classes < 2 * _ONE_THREAD else host.threads()
    request.threads = count if at_most is None else min(count, at_most)
    if request.threads > 1:
        request.parallel_for = host.parallel_for()


def mask_layout(call: Call) -> tuple[Array, int, int]:
    """`where`, and how far apart it has the next row and the next class: a mask of all rows alike is not repeated."""
    where, shape = call.arrays.where, call.arrays.student.shape
    assert where is not None
    if math.prod(where.shape[:-1]) == 1:
        return where, 0, int(where.ndim > 0 and where.shape[-1] > 1)
    if where.shape[:-1] == shape[:-1] and where.shape[-1] == 1:
        return where, 1, 0
    return call.xp.broadcast_to(where, shape), shape[-1], 1


def _numpy_address(x: Any) -> int:
    """As `x.ctypes.data`, in a third of its time where the array can be written to."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(x))
    except (TypeError, ValueError):  # read-only, empty, or of a dtype that Python's buffers do not know
        return int(x.ctypes.data)


def _numpy_contiguous(x: Any, dtype: Any) -> Any:
    x = np.ascontiguousarray(x, dtype)
    return x if x.flags.aligned else x.copy()  # one made of bytes may begin anywhere


def _torch_contiguous(x: Any, dtype: Any) -> Any:
    x = (x if dtype is None else x.to(dtype)).contiguous().resolve_neg()
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


@functools.cache
def _torch_parallel_for() -> int:
    """PyTorch's `at::parallel_for`, whose stable name came with PyTorch 2.10."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(sys.modules["torch"]._C.__file__)
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value or 0
    return 0


def _are_native(call: Call) -> bool:
    """Whether the arrays that go to the kernel as they are have the machine's byte order."""
    student, teacher, prior, *_ = call.arrays
    return student.dtype.isnative and teacher.dtype.isnative and (prior is None or prior.dtype.isnative)


def are_plain_tensors(call: Call, device: Literal["cpu", "cuda"]) -> bool:
    """Whether the tensors lie there in memory of their own, and nobody records, transforms or compiles what is done."""
    torch = sys.modules["torch"]
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch.jit.is_tracing()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    recording, plain = torch.is_grad_enabled(), (torch.Tensor, torch.nn.Parameter)
    for x in call.arrays:
        if x is None:
            continue
        there = x.is_cpu if device == "cpu" else x.is_cuda
        if type(x) not in plain or not there or x.layout != torch.strided or (recording and x.requires_grad):
            return False
    return True


_HOSTS = {
    "numpy": _Host(
        contiguous=_numpy_contiguous,
        address=_numpy_address,
        empty=lambda shape, dtype, _: np.empty(shape, dtype),
        empty_like=lambda x: np.empty(x.shape, x.dtype),
        threads=cpu_library.threads,
        parallel_for=lambda: 0,
        finished=lambda x: x[()],
    ),
    "torch": _Host(
        contiguous=_torch_contiguous,
        address=lambda x: int(x.data_ptr()),
        empty=lambda shape, dtype, like: like.new_empty(shape, dtype=dtype, requires_grad=False),
        empty_like=lambda x: sys.modules["torch"].empty_like(x, memory_format=sys.modules["torch"].contiguous_format),
        threads=lambda: int(sys.modules["torch"].get_num_threads()),
        # A fork inherits no threads, but PyTorch's loop would wait for them.
        parallel_for=lambda: _torch_parallel_for() if os.getpid() == _PROCESS else 0,
        finished=lambda x: x,
    ),
}
