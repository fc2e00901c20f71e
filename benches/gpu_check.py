"""Check the results on a GPU, before anything is timed on it. Parts a and c of benches/gpu.sh.

    python benches/gpu_check.py values --library torch cupy jax      # the kernels, compared with the definition
    python benches/gpu_check.py memory --library cupy                # few calls, for compute-sanitizer
    python benches/gpu_check.py score --backend cupy torch jax       # `gklx score`, compared with NumPy's results
    python benches/gpu_check.py values --library torch --device cpu  # a dry run, without a GPU

Each check prints its name and "ok", "skipped" with the reason, or the traceback of its failure. The exit status is 1
if a check failed, and 77 if no library could be checked.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import timeit
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import arrays
import definitions
import numpy as np
import peers
import scoring

import gklx
from gklx._run import cuda_launch, dispatch
from gklx.transforms import _unwrapped as call_builder

Loss = Callable[..., Any]
# Relative to the value, and to the largest entry of a gradient's row; the definition takes the rounded logits.
_TOLERANCES = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2}


_SKIPPED = 77


class Skipped(Exception):  # noqa: N818, not an error
    """Raised with the reason by a check that cannot run on this machine."""


class Target(NamedTuple):
    """The library and the device that are checked."""

    library: str
    device: str

    def put(self, x: np.ndarray, dtype: str) -> Any:
        """Convert a NumPy array to the library's, on the device."""
        return arrays.into(self.library, x, dtype, self.device)

    def wait(self) -> None:
        """Wait for the queued work, so that its errors are raised by this check."""
        if self.device == "cuda" and self.library == "torch":
            sys.modules["torch"].cuda.synchronize()
        elif self.library == "cupy":
            sys.modules["cupy"].cuda.Device().synchronize()

    def needs_torch(self) -> Any:
        """PyTorch; raises Skipped for any other library."""
        if self.library != "torch":
            raise Skipped("for PyTorch only")
        return sys.modules["torch"]

    def needs_torch_on_cuda(self) -> Any:
        """PyTorch; raises Skipped for any other library, and without a GPU."""
        torch = self.needs_torch()
        if self.device != "cuda":
            raise Skipped("needs a GPU")
        return torch


# --- values -----------------------------------------------------------------------------------------------------------


def random_logits(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random logits of student and teacher."""
    teacher, noise = np.random.default_rng(seed).standard_normal((2, rows, classes)).astype(np.float32)
    return 2 * teacher + noise, 2 * teacher


def definition(name: str, student: np.ndarray, teacher: np.ndarray) -> definitions.Result:
    """Value and both gradients of a loss by its definition in float64."""
    logits = student.astype(np.float64), teacher.astype(np.float64)
    if name == "kl":
        return definitions.kl(np, *logits)
    return definitions.gkl(np, *logits, definitions.Numbers(gamma=0.5))


LOSSES: dict[str, Loss] = {"kl": gklx.kl, "gkl": functools.partial(gklx.gkl, gamma=0.5)}


def on_host(found: Sequence[Any]) -> list[np.ndarray]:
    """Value and gradients as NumPy's float64."""
    value, gradients = found
    return [definitions._to_numpy(x) for x in (value, *gradients)]


def check_against_definition(target: Target, name: str, student: Any, teacher: Any, dtype: str) -> None:
    """Raise AssertionError where the value or a gradient of a loss differs from the definition."""
    call = gklx.value_and_grad(LOSSES[name], (0, 1))
    if target.library == "jax":
        call = sys.modules["jax"].jit(call)
    elif target.device == "cuda":
        kernel = dispatch.kernel_of(call_builder(LOSSES[name])(student, teacher))
        assert kernel == "cuda", f"the call does not run on the CUDA kernels but on {kernel}"
    found = call(student, teacher)
    target.wait()
    given = (definitions._to_numpy(x) for x in (student, teacher))
    expected = [np.asarray(x) for x in definition(name, *given)]
    error = definitions.difference(expected, on_host(found))
    assert error <= _TOLERANCES[dtype], f"{error:.1e} from the definition, allowed {_TOLERANCES[dtype]:g}"


def dtypes_of(library: str) -> tuple[str, ...]:
    """The dtypes that are checked; few for JAX, which compiles for seconds and whose dtypes the tests cover."""
    if library == "jax":
        return ("float32", "bfloat16")
    halves = ("float16",) if library == "cupy" else ("float16", "bfloat16")
    return ("float32", *halves, "float64")


def check_shapes(target: Target) -> None:
    """Check rows shorter and longer than a group of threads, with single and with vector loads."""
    for rows, classes in ((1, 2), (3, 7), (9, 32), (5, 1000), (2, 50_257), (2, 128_256))[
        3 * (target.library == "jax") :
    ]:
        for dtype in dtypes_of(target.library):
            for name in LOSSES:
                s, t = (target.put(x, dtype) for x in random_logits(rows, classes))
                try:
                    check_against_definition(target, name, s, t, dtype)
                except AssertionError as error:
                    raise AssertionError(f"{name} at {rows} × {classes} {dtype}: {error}") from None


def check_many_rows(target: Target) -> None:
    """Check more rows than the largest height of a grid."""
    s, t = (target.put(x, "float32") for x in random_logits(70_001, 10))
    check_against_definition(target, "gkl", s, t, "float32")


def check_layouts(target: Target) -> None:
    """Check logits that are not contiguous, and rows that are not aligned to 16 bytes."""
    for dtype in dtypes_of(target.library):
        s, t = (target.put(x, dtype) for x in random_logits(64, 65))
        check_against_definition(target, "gkl", s.T, t.T, dtype)
        check_against_definition(target, "gkl", s[::2, 1:], t[1::2, :64], dtype)
        flat_s, flat_t = s.reshape(-1)[1 : 1 + 60 * 64], t.reshape(-1)[3 : 3 + 60 * 64]
        check_against_definition(target, "gkl", flat_s.reshape(60, 64), flat_t.reshape(60, 64), dtype)


def check_masks(target: Target) -> None:
    """Check a prior by labels, sample weights and masks against NumPy."""
    s, t = random_logits(33, 100, seed=1)
    rng = np.random.default_rng(2)
    given = {
        "prior": rng.dirichlet(np.ones(100), 100).astype(np.float32),
        "labels": rng.integers(0, 100, 33),
        "sample_weight": rng.random(33).astype(np.float32),
        "where": rng.random((33, 100)) < 0.7,
    }
    given["sample_weight"][3], s[3], t[~given["where"]] = 0.0, np.nan, -np.inf
    s[:, 5] = t[:, 5] = -np.inf
    loss = functools.partial(gklx.gkl, gamma=0.3, temperature=4.0)
    wide = {name: x.astype(np.float64) if x.dtype.kind == "f" else x for name, x in given.items()}
    with np.errstate(all="ignore"):
        expected = gklx.value_and_grad(loss, (0, 1))(s.astype(np.float64), t.astype(np.float64), **wide)
    own = {name: target.put(x, x.dtype.name) for name, x in given.items()}
    found = gklx.value_and_grad(loss, (0, 1))(target.put(s, "float32"), target.put(t, "float32"), **own)
    for x, y in zip(on_host(found), on_host(expected), strict=True):
        assert np.isfinite(y).all()
        assert np.max(np.abs(x - y)) <= 2e-5 * np.max(np.abs(y)), "masked results differ from NumPy's"


def check_empty_and_infinite(target: Target) -> None:
    """Check an empty batch, and rows whose loss is NaN or infinite."""
    s, t = (target.put(x, "float32") for x in (np.zeros((0, 5)), np.zeros((0, 5))))
    value, gradients = gklx.value_and_grad(gklx.kl, (0, 1))(s, t)
    assert float(value) == 0.0
    assert [x.shape for x in gradients] == [(0, 5)] * 2
    s, t = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    s[0, 1], s[1, 1] = np.nan, -np.inf
    found = definitions._to_numpy(gklx.kl(target.put(s, "float32"), target.put(t, "float32"), reduction="none"))
    assert np.isnan(found[0]), found
    assert (found[1], found[2]) == (np.inf, 0), found


def check_backward(target: Target) -> None:
    """Check autograd, with gradients in half precision too."""
    torch = target.needs_torch()
    for dtype in dtypes_of(target.library):
        s, t = (target.put(x, dtype).requires_grad_() for x in random_logits(17, 1000))
        gklx.gkl(s, t, gamma=0.5).backward()
        _, to_s, to_t = definition("gkl", *(definitions._to_numpy(x) for x in (s, t)))
        found = [definitions._to_numpy(x.grad) for x in (s, t)]
        assert definitions.difference([to_s, to_t], found) <= _TOLERANCES[dtype], dtype
    assert torch.is_grad_enabled()


def check_threads(target: Target) -> None:
    """Check threads that start kernels before anything else of theirs has bound a context of the GPU."""
    target.needs_torch_on_cuda()
    s, t = (target.put(x, "float32").requires_grad_() for x in random_logits(3, 7))
    with ThreadPoolExecutor(1) as executor:
        executor.submit(gklx.value_and_grad(gklx.kl), s.detach(), t.detach()).result()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(gklx.kl(s, t).backward).result()
    gklx.kl(s, t).backward()
    target.wait()
    assert s.grad is not None


def check_no_transfers(target: Target) -> None:
    """Check that no call waits for the GPU, and that the profiler sees no copy between host and GPU."""
    torch = target.needs_torch_on_cuda()
    s, t = (target.put(x, "float32") for x in random_logits(64, 1000))
    given = {
        "labels": torch.arange(64, device="cuda"),
        "prior": torch.ones(1000, 1000, device="cuda"),
        "sample_weight": torch.ones(64, device="cuda"),
        "where": torch.ones(1000, device="cuda", dtype=torch.bool),
    }

    def calls() -> None:
        for loss in (gklx.kl, gklx.dkl, gklx.ikl, gklx.gkl):
            gklx.value_and_grad(loss, (0, 1))(s, t)
            own = s.clone().requires_grad_()
            loss(own, t).backward()
        gklx.value_and_grad(functools.partial(gklx.gkl, gamma=0.3), (0, 1))(s, t, **given)

    calls()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        gklx.value_and_grad(gklx.kl, (0, 1))(s, t)
        torch.cuda.synchronize()
    ran = {event.key: event.count for event in profile.key_averages()}
    kernels = {name: count for name, count in ran.items() if not name.startswith(("Mem", "cuda", "cu"))}
    print(f"  kernels of one kl with both gradients: {sum(kernels.values())}", kernels)
    moved = [name for name in ran if name.startswith("Memcpy") and "DtoD" not in name]
    assert not moved, moved


def check_streams(target: Target) -> None:
    """Check calls on streams other than the default one, whose allocator reuses memory between calls."""
    torch = target.needs_torch_on_cuda()
    s, t = (target.put(x, "float32") for x in random_logits(4096, 1000))
    expected, _ = gklx.value_and_grad(gklx.gkl)(s, t)
    streams = [torch.cuda.Stream() for _ in range(4)]
    values = []
    torch.cuda.synchronize()
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                own = s * 1.0  # a kernel on another stream would read it too early
                values.append(gklx.value_and_grad(gklx.gkl)(own, t)[0])
                del own
    torch.cuda.synchronize()
    for value in values:
        assert torch.equal(value, expected), (float(value), float(expected))


def check_graph(target: Target) -> None:
    """Check that each replay of a captured call reads the new logits."""
    torch = target.needs_torch_on_cuda()
    from gpu_bench import capture

    s, t = (target.put(x, "float32") for x in random_logits(64, 1000))
    replay = capture(lambda: gklx.value_and_grad(gklx.gkl, (0, 1))(s, t))
    other_s, other_t = (target.put(x, "float32") for x in random_logits(64, 1000, seed=9))
    s.copy_(other_s)
    t.copy_(other_t)
    value, gradients = replay()
    expected, expected_gradients = gklx.value_and_grad(gklx.gkl, (0, 1))(other_s, other_t)
    torch.cuda.synchronize()
    assert torch.equal(value, expected)
    assert all(map(torch.equal, gradients, expected_gradients))


def check_launchers(target: Target) -> None:
    """Check each launcher of the kernels alone, and that it does not change the current device."""
    torch = target.needs_torch_on_cuda()
    s, t = (target.put(x, "float32") for x in random_logits(64, 1000))
    launchers, found = cuda_launch._LAUNCHERS, {}
    try:
        for launcher in launchers:
            cuda_launch._LAUNCHERS = (launcher,)
            if not cuda_launch._is_installed(launcher.module):
                print(f"  {launcher.module}: not installed")
                continue
            before = torch.cuda.current_device()
            assert cuda_launch.available(s), f"{launcher.module} does not work"
            check_against_definition(target, "gkl", s, t, "float32")
            assert torch.cuda.current_device() == before
            call = functools.partial(gklx.value_and_grad(gklx.kl, (0, 1)), s, t)
            call()
            found[launcher.module] = timeit.timeit(call, number=200) / 200
            target.wait()
    finally:
        cuda_launch._LAUNCHERS = launchers
    print("  microseconds a call by:", {name: round(x * 1e6) for name, x in found.items()})
    assert found, "there is no launcher"


def check_devices(target: Target) -> None:
    """Check tensors on a device other than the current one."""
    torch = target.needs_torch_on_cuda()
    if torch.cuda.device_count() < 2:
        raise Skipped("there is only one GPU")
    s, t = (target.put(x, "float32").to("cuda:1") for x in random_logits(64, 1000))
    check_against_definition(target, "gkl", s, t, "float32")
    assert torch.cuda.current_device() == 0


def check_more_than_2_31(target: Target) -> None:
    """Check more logits than a 32-bit index can count: the last rows must equal a call with these rows alone."""
    torch = target.needs_torch_on_cuda()
    rows, classes = 67_000, 32_768
    if torch.cuda.mem_get_info()[0] < 30e9:
        raise Skipped("needs 30 GB on the GPU")
    s = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    t = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    assert s.numel() > 2**31
    loss = functools.partial(gklx.kl, reduction="sum")
    to_s, to_t = gklx.grad(loss, (0, 1))(s, t)
    last_s, last_t = gklx.grad(loss, (0, 1))(s[-3:].clone(), t[-3:].clone())
    assert torch.equal(to_s[-3:], last_s)
    assert torch.equal(to_t[-3:], last_t)


VALUES = (
    check_threads,  # first, while its threads, and autograd's, have no context
    check_shapes,
    check_layouts,
    check_masks,
    check_many_rows,
    check_empty_and_infinite,
    check_backward,
    check_launchers,
    check_no_transfers,
    check_streams,
    check_graph,
    check_devices,
    check_more_than_2_31,
)


def run_checks(target: Target) -> bool:
    """Run all checks of a library; return whether all passed."""
    all_passed = [
        _passes(f"{target.library}: {check.__name__[6:]}", functools.partial(check, target)) for check in VALUES
    ]
    return all(all_passed)


def _passes(name: str, check: Callable[[], None]) -> bool:
    start = timeit.default_timer()
    try:
        check()
    except Skipped as reason:
        print(f"{name}: skipped, {reason}", flush=True)
    except Exception:  # the other checks must still run
        print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
        return False
    else:
        print(f"{name}: ok, {timeit.default_timer() - start:.1f} s", flush=True)
    return True


def memory(library: str, device: str) -> bool:
    """Run few calls of each kind, each array in its own allocation, so that a tool sees accesses beyond its bounds."""
    if library == "cupy":
        sys.modules["cupy"].cuda.set_allocator(None)
    target = Target(library, device)
    checks = (check_layouts, check_masks)
    all_passed = [_passes(f"{library}: {check.__name__[6:]}", functools.partial(check, target)) for check in checks]
    for rows, classes in ((3, 7), (5, 1000), (2, 5003)):
        for name in LOSSES:
            s, t = (target.put(x, "float32") for x in random_logits(rows, classes))
            all_passed.append(
                _passes(
                    f"{name} {rows} × {classes}",
                    functools.partial(check_against_definition, target, name, s, t, "float32"),
                )
            )
    return all(all_passed)


# --- gklx score -------------------------------------------------------------------------------------------------------


def score(backends: Sequence[str], gigabytes: float, classes: int, device: str) -> bool:
    """Compare `gklx score` of the digits and of a generated dump with NumPy's results."""
    all_passed = True
    digits = [Path(__file__).parents[1] / "examples" / "digits" / f"{name}.npy" for name in ("student", "teacher")]
    labels = digits[0].with_name("labels.npy")
    with tempfile.TemporaryDirectory() as folder:
        expected = table(digits, labels, "numpy", None, Path(folder))
        for backend in backends:
            all_passed &= _passes(
                f"score, digits, {backend}", lambda backend=backend: _check_digits(backend, device, expected)
            )
        paths = scoring.dumps(Path(folder), gigabytes, classes)
        size = sum(path.stat().st_size for path in paths)
        found: dict[str, scoring.Scored] = {}

        def dump(backend: str) -> None:
            if backend != "numpy":
                _require(backend, device)
            found[backend] = scoring.scored(paths, backend=backend, device=_device(backend, device), memory="4GB")
            scoring.check(found["numpy"], found[backend])
            seconds, peak = found[backend].seconds, found[backend].peak_bytes
            print(f"  {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s, peak {peak / 1e9:.2f} GB on the host")

        reading = timeit.timeit(lambda: scoring.read(paths), number=1)
        print(f"a plain read of {size / 1e9:.2g} GB: {reading:.1f} s")
        for backend in ("numpy", *backends):
            all_passed &= _passes(f"score, {size / 1e9:.2g} GB, {backend}", functools.partial(dump, backend))
    return all_passed


def _check_digits(backend: str, device: str, expected: dict[str, Any]) -> None:
    _require(backend, device)
    digits = [Path(__file__).parents[1] / "examples" / "digits" / f"{name}.npy" for name in ("student", "teacher")]
    with tempfile.TemporaryDirectory() as folder:
        found = table(digits, digits[0].with_name("labels.npy"), backend, _device(backend, device), Path(folder))
    for name, numbers in expected.items():
        for which, x in numbers.items():
            y = found[name][which]
            # A sample's CE is the difference of two numbers about 1 or larger, which float32 rounds to 1e-7.
            close = x == y or abs(x - y) <= max(1e-5 * abs(x), 1e-6)
            assert close, f"{which} of {name}: NumPy has {x}, {backend} {y}"


def _device(backend: str, device: str) -> str | None:
    """The `--device` option: PyTorch alone would run on the CPU without it."""
    return device if backend == "torch" else None


def _require(backend: str, device: str) -> None:
    reason = peers.missing(backend, device)
    if reason:
        raise Skipped(reason)


def table(
    paths: Sequence[Path], labels: Path, backend: str, device: str | None, folder: Path
) -> dict[str, dict[str, float]]:
    """The numbers of the report for each loss."""
    report = folder / f"{backend}.json"
    command = [sys.executable, "-m", "gklx", "score", *map(str, paths), "--labels", str(labels), "--backend", backend]
    command += ["--format", "json", "--output", str(report), "--work-dir", str(folder)]
    command += ["--device", device] if device else []
    paths = [str(Path(gklx.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1:]
    losses = json.loads(report.read_text(encoding="utf-8"))["losses"]
    return {
        name: {which: x for which, x in found.items() if isinstance(x, float)}
        for name, found in losses.items()
        if found
    }


# --- the command line -------------------------------------------------------------------------------------------------


def usable(libraries: Sequence[str], device: str) -> Iterator[str]:
    """The libraries that can run on the device; the reasons for the others are printed."""
    for library in libraries:
        reason = peers.missing(library, device)
        if reason:
            print(f"{library}: skipped, {reason}", flush=True)
        else:
            yield library


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("values", "memory", "score"))
    parser.add_argument("--library", "--backend", nargs="+", default=["torch", "cupy", "jax"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the dump that is scored")
    parser.add_argument("--classes", type=int, default=32_000, help="of the dump that is scored")
    options = parser.parse_args(arguments)
    if options.what == "score":
        if not list(usable(options.library, options.device)):
            return _SKIPPED
        return 0 if score(options.library, options.gigabytes, options.classes, options.device) else 1
    if options.what == "values":
        gklx.show_config()
    all_passed, libraries = True, list(usable(options.library, options.device))
    for library in libraries:
        with contextlib.ExitStack() as stack:
            if library == "jax":
                enable = sys.modules["jax"].enable_x64
                stack.enter_context(enable(True))
            run = memory if options.what == "memory" else lambda *given: run_checks(Target(*given))
            all_passed &= run(library, options.device)
    return 1 if not all_passed else 0 if libraries else _SKIPPED


if __name__ == "__main__":
    sys.exit(main())
