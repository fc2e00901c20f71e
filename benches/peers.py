"""The calls that are timed: gklx as each library's users call it, its alternatives, and a copy.

A call is built for a task, with its arrays. It waits for its results, so that the time of libraries that queue work
includes the work. It returns the value and the requested gradients.
"""

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import arrays
import definitions
import numpy as np

import gklx

Call = Callable[[], Sequence[Any]]
Loss = Callable[[Any, Any], Any]
# CIFAR-100's setting: of the published ones with a class prior, the one whose softmaxes have a temperature.
RECIPE = definitions.Numbers(gamma=0.3, mse_weight=4.0, ce_weight=4.0, temperature=4.0)


class Task(NamedTuple):
    """The arrays of one measurement."""

    batch: int
    classes: int
    dtype: str = "float32"
    device: str = "cpu"
    compiler: str = "inductor"
    """The backend of `torch.compile`."""
    waits: bool = True
    """Whether a call waits for the work that it queued on a GPU."""

    @property
    def size(self) -> str:
        """The size as the tables show it."""
        return f"{self.batch:,} × {self.classes:,}" + (f" {self.dtype}" if self.dtype != "float32" else "")

    def inputs(self, library: str) -> tuple[Any, Any]:
        """Student and teacher logits."""
        student, teacher = arrays.logits(self.batch, self.classes)
        return tuple(arrays.into(library, x, self.dtype, self.device) for x in (student, teacher))


# --- the losses -------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """A loss and the gradients that are requested of it."""

    what: str
    loss: Callable[[Task], Loss]
    """Builds gklx's loss for a task."""
    definition: Callable[[Any, Task, Any, Any], definitions.Result]
    both: bool
    """Whether the teacher's gradient is requested too."""


@functools.lru_cache(maxsize=1)
def prior_of(task: Task) -> tuple[Any, Any]:
    """The class prior's table [C, C] and a label for each sample, in PyTorch.

    The rows of the labels' classes are random, the others uniform: at 32,000 classes the table takes 4 GB in float32,
    and drawing all of it would take longer than the measurement.
    """
    import torch

    rng = np.random.default_rng(20261123)
    labels = rng.integers(task.classes, size=task.batch)
    label_classes = np.unique(labels)
    rows = rng.standard_exponential((len(label_classes), task.classes), dtype=np.float32)
    rows /= rows.sum(axis=-1, keepdims=True)
    table = torch.full((task.classes, task.classes), 1 / task.classes, device=task.device)
    table[torch.from_numpy(label_classes).to(task.device)] = torch.from_numpy(rows).to(task.device)
    return table, torch.from_numpy(labels).to(task.device)


def _recipe(task: Task) -> Loss:
    table, labels = prior_of(task)
    return functools.partial(gklx.gkl, prior=table, labels=labels, **RECIPE._asdict())


def _recipe_definition(xp: Any, task: Task, student: Any, teacher: Any) -> definitions.Result:
    table, labels = prior_of(task)
    rows = table[labels].double()
    if xp is np:
        rows = rows.numpy()
    return definitions.gkl(xp, student, teacher, RECIPE, rows)


KL = Request("kl", lambda _: gklx.kl, lambda xp, _, *logits: definitions.kl(xp, *logits), both=True)
GKL = Request(
    "gkl γ=1",
    lambda _: gklx.gkl,
    lambda xp, _, *logits: definitions.gkl(xp, *logits, definitions.Numbers()),
    both=True,
)
GKL_RECIPE = Request("gkl recipe", _recipe, _recipe_definition, both=False)
KL_STUDENT = KL._replace(both=False)


@functools.cache
def reference(request: Request, task: Task) -> list[np.ndarray]:
    """Value and gradients by the definition in float64, of the task's logits after they are rounded to its dtype."""
    if task.device == "cpu" and task.dtype != "bfloat16":  # NumPy has no bfloat16
        xp, logits = np, [x.astype(np.float64) for x in task.inputs("numpy")]
    else:
        import torch as xp

        logits = [x.double() for x in task.inputs("torch")]
    return definitions.some_rows_on_host(request.definition(xp, task, *logits)[: 3 if request.both else 2])


# --- ways to call a loss ----------------------------------------------------------------------------------------------


def by_value_and_grad(library: str, loss: Loss, task: Task, both: bool) -> Call:
    """`gklx.value_and_grad`, on any library's arrays."""
    function = gklx.value_and_grad(loss, argnums=(0, 1) if both else (0,))
    student, teacher = task.inputs(library)
    return _flattened(with_wait(lambda: function(student, teacher), library, task))


def _flattened(call: Callable[[], Any]) -> Call:
    def flat() -> Sequence[Any]:
        value, gradients = call()
        return (value, *gradients)

    return flat


def by_backward(loss: Loss, task: Task, both: bool) -> Call:
    """The value by a call and the gradients by `backward`, as in a training step; a frozen teacher has no gradient."""
    student, teacher = task.inputs("torch")
    student.requires_grad_()
    teacher.requires_grad_(both)

    def call() -> Sequence[Any]:
        student.grad = teacher.grad = None  # `backward` would otherwise add to it
        value = loss(student, teacher)
        value.backward()
        return (value.detach(), student.grad, teacher.grad)[: 3 if both else 2]

    return with_wait(call, "torch", task)


def by_compiled_backward(loss: Loss, task: Task, both: bool) -> Call:
    """The same through `torch.compile`, with the sizes as constants: a program serves one task."""
    import torch

    compiled = torch.compile(lambda x, y: loss(x, y), dynamic=False, backend=task.compiler)
    return by_backward(compiled, task, both)


def by_jit(loss: Loss, task: Task, both: bool) -> Call:
    """`jax.jit` of `jax.value_and_grad`."""
    import jax

    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1) if both else (0,)))
    student, teacher = task.inputs("jax")
    wait = jax.block_until_ready if task.waits else lambda result: result
    return _flattened(lambda: wait(function(student, teacher)))


def with_wait(call: Callable[[], Any], library: str, task: Task) -> Callable[[], Any]:
    """The call and, where the task waits, the wait for the work that it queued on a GPU."""
    if task.device == "cpu" or not task.waits:
        return call
    if library == "cupy":
        import cupy

        wait = cupy.cuda.Device().synchronize
    else:
        import torch

        wait = torch.cuda.synchronize

    def call_and_wait() -> Any:
        result = call()
        wait()
        return result

    return call_and_wait


# --- the alternatives to gklx -----------------------------------------------------------------------------------------


def f_kl_div(student: Any, teacher: Any) -> Any:
    """PyTorch's KL."""
    import torch

    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def liger(student: Any, teacher: Any) -> Any:
    """Liger-Kernel's KL: a Triton kernel, without a gradient to the teacher."""
    import torch

    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return _liger_loss()(log_q, log_p)


@functools.cache
def _liger_loss() -> Any:
    from liger_kernel.transformers import LigerKLDIVLoss

    return LigerKLDIVLoss(reduction="batchmean", log_target=True)


def optax_kl(student: Any, teacher: Any) -> Any:
    """Optax's KL."""
    import jax
    import optax

    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p).mean()


# --- a copy -----------------------------------------------------------------------------------------------------------


def copies(library: str, task: Task, both: bool) -> dict[str, Callable[[], Any]]:
    """Copies of the inputs to allocated outputs, by each available method: the least memory traffic of any loss.

    Both inputs are copied to the two gradients. For one gradient both are added into it, which reads and writes as much
    as the loss must.
    """
    if library in ("torch", "cupy"):
        module = importlib.import_module(library)
        student, teacher = task.inputs(library)
        outputs = [module.zeros_like(student), module.zeros_like(teacher)]

        def copy() -> None:
            if both:
                outputs[0][...] = student
                outputs[1][...] = teacher
            else:
                module.add(student, teacher, out=outputs[0])

        return {"copy": with_wait(copy, library, task)}
    student, teacher = task.inputs("numpy")
    first, second = (
        np.full_like(student, 0),
        np.full_like(teacher, 0),
    )  # written: no page faults later
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [np.array_split(x, threads) for x in (first, second, student, teacher)]

    def copy_rows(to_student: Any, to_teacher: Any, student: Any, teacher: Any) -> None:
        if both:
            np.copyto(to_student, student)
            np.copyto(to_teacher, teacher)
        else:
            np.add(student, teacher, out=to_student)

    pool = ThreadPoolExecutor(threads)
    return {
        "copy, 1 thread": functools.partial(copy_rows, first, second, student, teacher),
        f"copy, {threads} threads": lambda: list(pool.map(copy_rows, *parts)),
    }


# --- availability -----------------------------------------------------------------------------------------------------


@functools.cache
def missing(module: str, device: str) -> str | None:
    """The reason why a library cannot be used on this machine; None where it can."""
    try:
        imported = importlib.import_module(module)
        if device == "cuda" and module == "torch" and not imported.cuda.is_available():
            return "PyTorch sees no GPU"
        if device == "cuda" and module == "jax":
            imported.devices("cuda")
        if module == "cupy":
            imported.cuda.Device().compute_capability  # noqa: B018
    except Exception as error:  # a broken installation may raise anything
        return f"{module}: {_summary(error)}"
    return None


@functools.cache
def cannot_compile(device: str, compiler: str) -> str | None:
    """The reason why `torch.compile` fails here, or None: only a trial shows whether it finds its compiler."""
    import torch

    try:
        torch.compile(lambda x: x * 2 + 1, backend=compiler)(torch.zeros(8, device=device))
    except Exception as error:
        return f"torch.compile: {_summary(error)}"
    return None


def _summary(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
