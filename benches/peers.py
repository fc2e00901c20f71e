"""Everything that is compared: gklx on each library, and what one would use in its place.

A peer is built for a task: it is given its arrays, compiles what it compiles, and the call that comes back is what is
timed. Every call waits for its results, so that libraries that queue work are timed to its end.
"""

import contextlib
import functools
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import arrays
import forms
import numpy as np

import gklx

LOSSES: dict[str, Callable[..., Any]] = {
    "kl": gklx.kl,
    "gkl": functools.partial(gklx.gkl, **forms.SETTINGS),
    "gkl γ=1": functools.partial(gklx.gkl, **(forms.SETTINGS | {"gamma": 1.0})),
}
Call = Callable[[], forms.Result]


class Task(NamedTuple):
    """What is asked of every peer."""

    batch: int
    classes: int
    gradient: str = "both"
    """Of "both", or of the "student" alone, the teacher frozen."""
    dtype: str = "float32"
    device: str = "cpu"
    compiler: str = "inductor"
    """PyTorch's."""

    @property
    def both(self) -> bool:
        """Whether the gradient to the teacher is asked for."""
        return self.gradient == "both"

    def inputs(self, library: str, dtype: str | None = None) -> tuple[Any, Any]:
        """Make student and teacher logits; of another dtype, those of this one widened."""
        made = (arrays.into(library, x, self.dtype, self.device) for x in _logits(self.batch, self.classes))
        student, teacher = (x if dtype is None else _astype(x, dtype) for x in made)
        return student, teacher


@functools.lru_cache(maxsize=1)
def _logits(batch: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    return arrays.logits(batch, classes)


def _astype(x: Any, dtype: str) -> Any:
    if hasattr(x, "astype"):
        return x.astype(dtype)
    import torch

    return x.to(getattr(torch, dtype))


class Peer(NamedTuple):
    """One way to the same value and gradients."""

    what: str
    backend: str
    loss: str
    build: Callable[[Task], Call]
    library: str
    """The module whose arrays it takes."""
    needs: tuple[str, ...] = ()
    """Modules beyond that."""
    own: bool = False
    """Whether it is gklx."""
    pairs: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    gradients: tuple[str, ...] = ("both", "student")
    dtypes: tuple[str, ...] = ("float16", "float32", "bfloat16")

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.what} · {self.backend}"

    def takes(self, task: Task) -> bool:
        """Whether it can do a task at all."""
        return task.device in self.devices and task.gradient in self.gradients and task.dtype in self.dtypes


# --- NumPy and CuPy ---------------------------------------------------------------------------------------------------


def _by_value_and_grad(loss: Callable[..., Any], library: str, task: Task) -> Call:
    function = gklx.value_and_grad(loss, argnums=(0, 1) if task.both else (0,))
    student, teacher = task.inputs(library)

    def call() -> forms.Result:
        value, gradients = function(student, teacher)
        return value, gradients[0], gradients[1] if len(gradients) > 1 else None

    return _waiting(call, library, task.device)


def _plain(form: Callable[..., forms.Result], library: str, task: Task) -> Call:
    student, teacher = task.inputs(library)
    namespace = importlib.import_module(library)
    return _waiting(lambda: form(namespace, student, teacher, task.both), library, task.device)


def _waiting(call: Call, library: str, device: str) -> Call:
    """The call and the end of what it queued on a GPU."""
    if device == "cpu":
        return call
    if library == "cupy":
        import cupy

        wait = cupy.cuda.Device().synchronize
    else:
        import torch

        wait = torch.cuda.synchronize

    def waited() -> forms.Result:
        result = call()
        wait()
        return result

    return waited


def _numpy_of(form: Callable[..., forms.Result], task: Task) -> Call:
    student, teacher = task.inputs("numpy")
    return lambda: form(student, teacher, task.both)


def _numpy_pairs(task: Task) -> Call:
    return functools.partial(forms.numpy_pairs, *task.inputs("numpy"))


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def _f_kl_div(student: Any, teacher: Any) -> Any:
    import torch

    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _liger(student: Any, teacher: Any) -> Any:
    import torch

    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return _liger_loss()(log_q, log_p)


@functools.cache
def _liger_loss() -> Any:
    from liger_kernel.transformers import LigerKLDIVLoss

    return LigerKLDIVLoss(reduction="batchmean", log_target=True)


def _by_backward(loss: Callable[..., Any], task: Task, compiled: bool = False) -> Call:
    """Value by a call, gradients by `backward`, as a training step does; a frozen teacher records nothing."""
    student, teacher = task.inputs("torch")
    student.requires_grad_()
    teacher.requires_grad_(task.both)
    if compiled:
        import torch

        # Sizes as constants: what is compiled is for this task alone.
        function = torch.compile(lambda x, y: loss(x, y), dynamic=False, backend=task.compiler)
    else:
        function = loss

    def call() -> forms.Result:
        student.grad = teacher.grad = None  # so that it is set and not added to
        value = function(student, teacher)
        value.backward()
        return value.detach(), student.grad, teacher.grad

    return _waiting(call, "torch", task.device)


def _torch_pairs(task: Task) -> Call:
    return _waiting(functools.partial(forms.torch_pairs, *task.inputs("torch")), "torch", task.device)


# --- JAX --------------------------------------------------------------------------------------------------------------


class _Jitted:
    """A compiled value and gradient, waited for."""

    def __init__(self, loss: Callable[..., Any], task: Task) -> None:
        import jax

        self._function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1) if task.both else (0,)))
        self._wait = jax.block_until_ready
        self._logits = task.inputs("jax")

    def __call__(self) -> forms.Result:
        value, gradients = self._wait(self._function(*self._logits))
        return value, gradients[0], gradients[1] if len(gradients) > 1 else None

    def compiled(self) -> Any:
        """The compiler's own account, which knows the memory."""
        return self._function.lower(*self._logits).compile()


def _optax(student: Any, teacher: Any) -> Any:
    import jax
    import optax

    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return optax.losses.kl_divergence_with_log_targets(log_q, log_p).mean()


# --- all of them ------------------------------------------------------------------------------------------------------


def _own() -> Iterator[Peer]:
    for name, loss in LOSSES.items():
        of = functools.partial(Peer, f"gklx {name}", loss=name, own=True)
        by = functools.partial(_by_value_and_grad, loss)
        wide = ("float16", "float32")
        yield of("NumPy", build=functools.partial(by, "numpy"), library="numpy", devices=("cpu",), dtypes=wide)
        yield of("PyTorch", build=functools.partial(_by_backward, loss), library="torch")
        compiled = functools.partial(_by_backward, loss, compiled=True)
        yield of("PyTorch compiled", build=compiled, library="torch", needs=("compiler",))
        yield of("JAX", build=functools.partial(_Jitted, loss), library="jax")
        yield of("CuPy", build=functools.partial(by, "cupy"), library="cupy", devices=("cuda",), dtypes=wide)


def _others() -> Iterator[Peer]:
    whole_kl, whole_gkl = (functools.partial(_plain, form) for form in (forms.whole_kl, forms.whole_gkl))
    pairs = functools.partial(Peer, "pairs", loss="gkl", pairs=True, gradients=("both",), dtypes=("float32",))
    for library, backend, devices in (("numpy", "NumPy", ("cpu",)), ("cupy", "CuPy", ("cuda",))):
        of = functools.partial(Peer, backend=backend, library=library, devices=devices, dtypes=("float32", "float16"))
        yield of("KL on whole arrays", loss="kl", build=functools.partial(whole_kl, library))
        yield of("GKL on whole arrays", loss="gkl", build=functools.partial(whole_gkl, library))
    scipy = functools.partial(_numpy_of, forms.scipy_kl)
    yield Peer("SciPy", "NumPy", "kl", scipy, "numpy", needs=("scipy",), devices=("cpu",))
    yield pairs("NumPy", build=_numpy_pairs, library="numpy", devices=("cpu",))
    yield Peer("F.kl_div", "PyTorch", "kl", functools.partial(_by_backward, _f_kl_div), "torch")
    compiled = functools.partial(_by_backward, _f_kl_div, compiled=True)
    yield Peer("F.kl_div", "PyTorch compiled", "kl", compiled, "torch", needs=("compiler",))
    yield Peer("GKL on whole arrays", "PyTorch", "gkl", functools.partial(whole_gkl, "torch"), "torch")
    yield pairs("PyTorch", build=_torch_pairs, library="torch")
    # Its kernel is Triton's, and gives no gradient to the teacher.
    liger = functools.partial(_by_backward, _liger)
    yield Peer("Liger-Kernel", "PyTorch", "kl", liger, "torch", ("liger_kernel.transformers",), gradients=("student",))
    yield Peer("optax", "JAX", "kl", functools.partial(_Jitted, _optax), "jax", needs=("optax",))


PEERS = (*_own(), *_others())


def missing(peer: Peer, device: str, compiler: str) -> str | None:
    """Say why a peer cannot run here; None where it can."""
    if device not in peer.devices:
        return f"runs on {' and '.join(peer.devices)}, not on {device}"
    if peer.what == "Liger-Kernel" and device == "cpu":
        return "needs a GPU"
    for need in (peer.library, *peer.needs):
        reason = _compiles(device, compiler) if need == "compiler" else _imports(need, device)
        if reason is not None:
            return reason
    return None


@functools.cache
def _imports(module: str, device: str) -> str | None:
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
def _compiles(device: str, compiler: str) -> str | None:
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


@contextlib.contextmanager
def cleared(device: str) -> Iterator[None]:
    """Forget at the end what PyTorch compiled, a limited number a function, and what allocators keep on a GPU."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].compiler.reset()
    if device == "cuda":
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
        if "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


def operations(call: Call) -> int:
    """Count the operations that PyTorch's dispatcher is asked for in a call, views among them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return function(*args, **(kwargs or {}))

    with Counter() as counter:
        call()
    return counter.count
