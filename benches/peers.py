"""What is timed: gklx as each library's users call it, what they would call in its place, and a copy.

A call is built for a task: it is given its arrays, compiles what it compiles, and waits for its results, so that
libraries that queue work are timed to its end. It returns the value and the gradients asked for.
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
# Of the published settings with a class prior those of CIFAR-100, where the softmaxes have a temperature.
RECIPE = definitions.Numbers(gamma=0.3, mse_weight=4.0, ce_weight=4.0, temperature=4.0)


class Task(NamedTuple):
    """The arrays of one measurement."""

    batch: int
    classes: int
    dtype: str = "float32"
    device: str = "cpu"
    compiler: str = "inductor"
    """PyTorch's."""
    waits: bool = True
    """Whether a call waits for what it queued on a GPU."""

    @property
    def size(self) -> str:
        """As tables say it."""
        return f"{self.batch:,} × {self.classes:,}" + (f" {self.dtype}" if self.dtype != "float32" else "")

    def inputs(self, library: str) -> tuple[Any, Any]:
        """Student and teacher logits."""
        student, teacher = arrays.logits(self.batch, self.classes)
        return tuple(arrays.into(library, x, self.dtype, self.device) for x in (student, teacher))


# --- the losses -------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A loss and the gradients that are asked for."""

    what: str
    loss: Callable[[Task], Loss]
    """gklx's."""
    definition: Callable[[Any, Task, Any, Any], definitions.Result]
    both: bool
    """Whether to the teacher too."""


@functools.lru_cache(maxsize=1)
def prior_of(task: Task) -> tuple[Any, Any]:
    """The class prior's table [C, C] and a label for each sample, in PyTorch.

    The classes that the batch names have a drawn row, the others are uniform: at 32,000 classes the table takes 4 GB in
    float32, and drawing all of it would take longer than measuring.
    """
    import torch

    rng = np.random.default_rng(20261123)
    labels = rng.integers(task.classes, size=task.batch)
    named = np.unique(labels)
    rows = rng.standard_exponential((len(named), task.classes), dtype=np.float32)
    rows /= rows.sum(axis=-1, keepdims=True)
    table = torch.full((task.classes, task.classes), 1 / task.classes, device=task.device)
    table[torch.from_numpy(named).to(task.device)] = torch.from_numpy(rows).to(task.device)
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


KL = Asked("kl", lambda _: gklx.kl, lambda xp, _, *logits: definitions.kl(xp, *logits), both=True)
GKL = Asked(
    "gkl γ=1",
    lambda _: gklx.gkl,
    lambda xp, _, *logits: definitions.gkl(xp, *logits, definitions.Numbers()),
    both=True,
)
GKL_RECIPE = Asked("gkl recipe", _recipe, _recipe_definition, both=False)
KL_STUDENT = KL._replace(both=False)


@functools.cache
def reference(asked: Asked, task: Task) -> list[np.ndarray]:
    """Value and gradients by the definition in float64, from the very logits of the task."""
    if task.device == "cpu" and task.dtype != "bfloat16":  # which NumPy has not
        xp, logits = np, [x.astype(np.float64) for x in task.inputs("numpy")]
    else:
        import torch as xp

        logits = [x.double() for x in task.inputs("torch")]
    return definitions.kept(asked.definition(xp, task, *logits)[: 3 if asked.both else 2])


# --- how a library is asked -------------------------------------------------------------------------------------------


def by_value_and_grad(library: str, loss: Loss, task: Task, both: bool) -> Call:
    """`gklx.value_and_grad`, on any library's arrays."""
    function = gklx.value_and_grad(loss, argnums=(0, 1) if both else (0,))
    student, teacher = task.inputs(library)
    return _flat(waited(lambda: function(student, teacher), library, task))


def _flat(call: Callable[[], Any]) -> Call:
    def flat() -> Sequence[Any]:
        value, gradients = call()
        return (value, *gradients)

    return flat


def by_backward(loss: Loss, task: Task, both: bool) -> Call:
    """Value by a call, gradients by `backward`, as a training step does; a frozen teacher records nothing."""
    student, teacher = task.inputs("torch")
    student.requires_grad_()
    teacher.requires_grad_(both)

    def call() -> Sequence[Any]:
        student.grad = teacher.grad = None  # so that it is set and not added to
        value = loss(student, teacher)
        value.backward()
        return (value.detach(), student.grad, teacher.grad)[: 3 if both else 2]

    return waited(call, "torch", task)


def by_compiled_backward(loss: Loss, task: Task, both: bool) -> Call:
    """The same through `torch.compile`, the sizes as constants: what is compiled is for this task alone."""
    import torch

    compiled = torch.compile(lambda x, y: loss(x, y), dynamic=False, backend=task.compiler)
    return by_backward(compiled, task, both)


def by_jit(loss: Loss, task: Task, both: bool) -> Call:
    """`jax.jit` of `jax.value_and_grad`."""
    import jax

    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1) if both else (0,)))
    student, teacher = task.inputs("jax")
    wait = jax.block_until_ready if task.waits else lambda result: result
    return _flat(lambda: wait(function(student, teacher)))


def waited(call: Callable[[], Any], library: str, task: Task) -> Callable[[], Any]:
    """The call and, where the task waits, the end of what it queued on a GPU."""
    if task.device == "cpu" or not task.waits:
        return call
    if library == "cupy":
        import cupy

        wait = cupy.cuda.Device().synchronize
    else:
        import torch

        wait = torch.cuda.synchronize

    def to_the_end() -> Any:
        result = call()
        wait()
        return result

    return to_the_end


# --- what one would use in its place ----------------------------------------------------------------------------------


def f_kl_div(student: Any, teacher: Any) -> Any:
    """PyTorch's."""
    import torch

    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def liger(student: Any, teacher: Any) -> Any:
    """Liger-Kernel's, which is Triton's, and gives no gradient to the teacher."""
    import torch

    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return _liger_loss()(log_q, log_p)


@functools.cache
def _liger_loss() -> Any:
    from liger_kernel.transformers import LigerKLDIVLoss

    return LigerKLDIVLoss(reduction="batchmean", log_target=True)


def optax_kl(student: Any, teacher: Any) -> Any:
    """Optax's."""
    import jax
    import optax

    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p).mean()


# --- a copy -----------------------------------------------------------------------------------------------------------


def copies(library: str, task: Task, both: bool) -> dict[str, Callable[[], Any]]:
    """The least that a loss must move, written into arrays that are there already, in each way there is.

    Both inputs are copied to the two gradients; for one gradient both are added into it: as much is read and written.
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

        return {"copy": waited(copy, library, task)}
    student, teacher = task.inputs("numpy")
    first, second = np.full_like(student, 0), np.full_like(teacher, 0)  # so that no page is met for the first time
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


# --- what is here -----------------------------------------------------------------------------------------------------


@functools.cache
def missing(module: str, device: str) -> str | None:
    """Say why a library cannot be used here; None where it can."""
    try:
        found = importlib.import_module(module)
        if device == "cuda" and module == "torch" and not found.cuda.is_available():
            return "PyTorch sees no GPU"
        if device == "cuda" and module == "jax":
            found.devices("cuda")
        if module == "cupy":
            found.cuda.Device().compute_capability  # noqa: B018
    except Exception as error:  # whatever a library raises that cannot run here
        return f"{module}: {_said(error)}"
    return None


@functools.cache
def cannot_compile(device: str, compiler: str) -> str | None:
    """Try it: a C++ compiler or Triton is needed, and looked for in many places."""
    import torch

    try:
        torch.compile(lambda x: x * 2 + 1, backend=compiler)(torch.zeros(8, device=device))
    except Exception as error:
        return f"torch.compile: {_said(error)}"
    return None


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
