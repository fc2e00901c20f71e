"""The test matrix: a session a library, one with all of them, the oldest NumPy, lint and types.

`nox` runs what can run here; a session whose interpreter, library or GPU is absent skips and says why. `nox -l` lists
the sessions, `nox -s 'library-3.11(torch)'` runs one, and what stands behind `--` goes to pytest.
"""

import functools
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import nox

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "pytest-cov>=7", "hypothesis>=6.100")
# What a library's session installs beside gklx: extras, and what the examples need; and the backend whose tests it then
# runs: NumPy's own are those of NumPy's session alone. The constraints file keeps pip from fetching a newer PyTorch
# with gigabytes of CUDA where a build that fits is at hand.
LIBRARIES = {
    "numpy": (["score"], ["scipy>=1.14"], "numpy"),
    "strict": (["strict"], [], "array_api_strict"),
    "torch": (
        ["torch"],
        ["scikit-learn>=1.5", "keras>=3", "transformers>=4.50", "accelerate>=1", "lightning>=2.4"],
        "torch",
    ),
    "jax": (["jax"], ["scikit-learn>=1.5", "optax>=0.2.5"], "jax"),
    "dask": (["dask"], [], "dask"),
}
# The libraries whose sessions measure coverage, as `together` does. In the others it costs minutes for a few lines.
MEASURED = ("numpy", "torch", "jax")
# NumPy's session on the first of these Pythons runs all cases of a parametrised test. The sessions of other Pythons and
# libraries, and `oldest`, run one in so many; `exhaustive` runs all cases of the other libraries, every night.
ONE_IN = "3"
# Which tests the session of a library runs, by their marks.
OF_ONE_LIBRARY = "not cuda_kernels and not evidence and not side_by_side"
NOT_NUMPYS = "not library_independent and not numpy_alone"
KERNELS = pathlib.Path("src", "gklx", "_kernels")

# pyenv shows the interpreters it holds only where asked to.
if shutil.which("pyenv") and "PYENV_VERSION" not in os.environ:
    held = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=False).stdout.split()
    wanted = [version for python in PYTHONS for version in held if version.startswith(f"{python}.")]
    if wanted:
        os.environ["PYENV_VERSION"] = ":".join(wanted)

# uv installs in a second or two what pip installs in ten or twenty; nox takes pip where uv is missing.
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = [
    "lint",
    "types",
    *(f"library-{python}(numpy)" for python in PYTHONS),
    *(f"library-{PYTHONS[0]}({library})" for library in LIBRARIES if library != "numpy"),
    "library-3.13(jax)",
    "together",
    "coverage",
    "oldest",
    "kernels",
    "sanitize",
    "clang",
    "evidence",
    "fuzz",
    "cupy",
    "docs",
    "package",
]


@functools.cache
def _find_links() -> dict[str, str]:
    """The environment that tells uv, which does not read pip's settings, where pip finds wheels on this machine."""
    if "UV_FIND_LINKS" in os.environ:
        return {}
    links = os.environ.get("PIP_FIND_LINKS")
    if links is None:
        command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
        links = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"UV_FIND_LINKS": links} if links else {}


_built: list[pathlib.Path] = []


def _wheel(session: nox.Session) -> pathlib.Path:
    """The wheel that all sessions of a run install; its kernel is put into the sources, which the tests import."""
    if not _built:
        folder = session.cache_dir / "wheel"
        shutil.rmtree(folder, ignore_errors=True)
        # The build folder stays, so that the next run compiles what has changed.
        build = f"--config-settings=build-dir={session.cache_dir / 'build'}"
        command = ["python", "-m", "pip", "wheel", "--no-deps", f"--wheel-dir={folder}"]
        if session.venv_backend == "uv":
            command = ["uv", "build", "--wheel", f"--out-dir={folder}"]
        session.run_install(*command, build, ".", env={"GKLX_XLA_HEADERS": "jaxlib"}, silent=True)
        (wheel,) = folder.glob("*.whl")
        if wheel.stem.endswith("-any"):
            session.error("the kernel did not compile: `pip wheel -v --no-deps .` says why")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("gklx/_kernels/") and name.endswith((".so", ".dll")):
                    (KERNELS / pathlib.Path(name).name).write_bytes(archive.read(name))
        _built.append(wheel)
    return _built[0].resolve()


def _install(session: nox.Session, extras: list[str], *more: str) -> None:
    wheel = _wheel(session)
    # Python compiles what it imports; of the thousands of files of a library that is a small part.
    options = ("--no-compile", "-c", "tests/constraints.txt")
    session.install(*options, f"{wheel}[{','.join(['cli', *extras])}]", *more, env=_find_links())


# With these flags XLA compiles in a quarter of the time. Its own passes still run; LLVM does not optimise their result.
UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
UNFUSED = "--xla_cpu_use_fusion_emitters=false"


@functools.cache
def _unoptimized(folder: str) -> dict[str, str]:
    """The flags for the Python of a folder, without those that its XLA does not know: such a one ends the process."""
    python, given = shutil.which("python", path=folder), os.environ.get("XLA_FLAGS", "")
    for flags in (f"{given} {UNOPTIMIZED} {UNFUSED}".strip(), f"{given} {UNOPTIMIZED}".strip()):
        found = {"XLA_FLAGS": flags}
        compiles = [str(python), "-c", "import jax; jax.numpy.zeros(1) + 1"]
        if not subprocess.run(compiles, env={**os.environ, **found}, capture_output=True, check=False).returncode:
            return found
    return {}


def _pytest(
    session: nox.Session,
    marked: str,
    backends: str,
    *,
    sampled: bool = False,
    optimized: bool = False,
    measured_as: str = "",
) -> None:
    # The wheel has the row kernel: a test that needs it fails without it. PyTorch's idle threads sleep: where those of
    # two processes wait in busy loops, each takes the cores from the other, and the tests twice the time.
    environment = {"GKLX_BACKENDS": backends, "GKLX_KERNEL_REQUIRED": "1", "OMP_WAIT_POLICY": "passive"}
    if sampled and not session.posargs:  # they may name a case that is not in the sample
        environment["GKLX_SAMPLE"] = ONE_IN
    if "jax" in backends and not optimized:
        environment |= _unoptimized(session.bin)
    # Two processes, several sessions and the next run share what JAX has compiled.
    environment["JAX_COMPILATION_CACHE_DIR"] = str(session.cache_dir.resolve() / "jax")
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # Under `worksteal` an idle worker takes tests of the other. What stands behind `--` may choose no test.
    codes = [0, 5] if session.posargs else [0]
    options = ["-n", "2", "--dist", "worksteal", "-m", marked]
    if measured_as and not session.posargs:
        environment["COVERAGE_FILE"] = str(_measured(session) / measured_as)
        options += ["--cov", "--cov-report=", "--cov-fail-under=0"]  # one session alone is below the bound
    session.run("pytest", *options, *session.posargs, env=environment, success_codes=codes)


def _measured(session: nox.Session) -> pathlib.Path:
    """The folder of the coverage data."""
    return session.cache_dir.resolve() / "coverage"


@nox.session(python=PYTHONS)
@nox.parametrize("library", [nox.param(name, id=name) for name in LIBRARIES])
def library(session: nox.Session, library: str) -> None:
    """The tests that one library can run, NumPy's with the mutations, files and processes; of the others a sample."""
    extras, more, backends = LIBRARIES[library]
    _install(session, extras, *TOOLS, *more)
    marked = OF_ONE_LIBRARY
    if library != "numpy":
        marked += f" and {NOT_NUMPYS}"
    elif session.python == "3.12":
        marked += " and not library_independent and not version_independent"
    elif session.python != PYTHONS[0]:
        marked += " and not version_independent"
    if library == "jax" and session.python != PYTHONS[0]:
        # The others are minutes of compiling.
        marked = "version_dependent_jax"
    elif library == "jax":
        _pytest(session, f"{marked} and optimized_programs", backends, sampled=True, optimized=True)
        marked += " and not optimized_programs"
    measured_as = library if session.python == PYTHONS[0] and library in MEASURED else ""
    all_cases = library == "numpy" and session.python == PYTHONS[0]
    _pytest(session, marked, backends, sampled=not all_cases, measured_as=measured_as)


@nox.session(python=PYTHONS[0])
def together(session: nox.Session) -> None:
    """All libraries in one process: that they agree, and that mixing them is an error; `gklx verify` of each."""
    _install(session, ["torch", "jax", "dask", "strict", "score"], *TOOLS, "scipy>=1.14")
    _pytest(session, "together", "numpy,torch,jax,dask,array_api_strict", measured_as="together")


@nox.session(python=PYTHONS[0])
@nox.parametrize("library", [nox.param(name, id=name) for name in LIBRARIES if name != "numpy"])
def exhaustive(session: nox.Session, library: str) -> None:
    """Every case under every mask, JAX's programs optimised, and `gklx verify`: for every night."""
    extras, more, backends = LIBRARIES[library]
    _install(session, extras, *TOOLS, *more)
    session.env["GKLX_EXHAUSTIVE"] = "1"
    _pytest(session, f"{OF_ONE_LIBRARY} and {NOT_NUMPYS}", backends, optimized=True)
    session.run("gklx", "verify", "--backend", backends, "--format", "markdown")


@nox.session(python=PYTHONS[0])
def coverage(session: nox.Session) -> None:
    """The coverage of the package by all sessions that measure it, lines and branches; 95 % are required."""
    measured = {**{name: f"library-{PYTHONS[0]}({name})" for name in MEASURED}, "together": "together"}
    missing = [each for name, each in measured.items() if not (_measured(session) / name).exists()]
    if missing:
        session.skip(f"they measure it and have not run: {', '.join(missing)}")
    session.install("coverage>=7.10")
    paths = [_measured(session) / name for name in measured]
    environment = {"COVERAGE_FILE": str(_measured(session) / "all")}
    session.run("coverage", "combine", "--keep", *map(str, paths), env=environment, silent=True)
    session.run("coverage", "report", env=environment)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The oldest supported NumPy and array-api-compat."""
    _install(session, [], *TOOLS, "numpy==1.26.*", "array-api-compat==1.12.*")
    _pytest(session, "not library_independent and not cuda_kernels and not evidence", "numpy", sampled=True)


@nox.session(python=PYTHONS[0])
def kernels(session: nox.Session) -> None:
    """The CUDA kernels without a GPU: run on the CPU, thread by thread, and compiled for GPUs."""
    _install(
        session, [], *TOOLS, "ml-dtypes>=0.5", "nvidia-cuda-nvrtc-cu12>=12.8", "cuda-core>=1", "cuda-bindings==12.*"
    )
    _pytest(session, "cuda_kernels", "numpy")


@nox.session(python=PYTHONS[0])
def sanitize(session: nox.Session) -> None:
    """The row kernel under AddressSanitizer and UndefinedBehaviorSanitizer: its own tests, and all losses in NumPy."""
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    sanitizer = pathlib.Path(found.stdout.strip())
    if not sanitizer.is_absolute():
        session.skip(f"{compiler} has no libasan.so")
    _install(session, [], *TOOLS, "cmake>=3.20", "ninja", "ml-dtypes>=0.5")
    build = session.cache_dir.resolve() / "sanitize"
    session.run("cmake", "-S", ".", "-B", str(build), "-G", "Ninja", "-DGKLX_SANITIZE=ON", silent=True)
    session.run("cmake", "--build", str(build), silent=True)
    environment = {
        "GKLX_BACKENDS": "numpy",
        "GKLX_KERNEL_REQUIRED": "1",
        "GKLX_KERNEL_LIBRARY": str(build / "rows.so"),
        "LD_PRELOAD": str(sanitizer),
        # Python frees at its end what it does not need to.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    tests = ("tests/test_kernel.py", "tests/test_against_definition.py", "tests/test_extremes.py")
    session.run("pytest", "-n", "2", "-k", "not formulas", *tests, *session.posargs, env=environment)


@nox.session(python=PYTHONS[0])
def clang(session: nox.Session) -> None:
    """The row kernel's loops by Clang, macOS' compiler, for arm64 and x86-64: all in vectors, without a warning."""
    session.install("cmake>=3.20", "ninja", "ziglang>=0.15")  # it brings a Clang, and the headers of other systems
    folder = session.cache_dir.resolve() / "clang"
    shutil.rmtree(folder, ignore_errors=True)
    for target, system, processor, sets in (
        ("aarch64-macos", "Darwin", "arm64", ("neon",)),
        ("aarch64-linux-gnu", "Linux", "aarch64", ("neon",)),
        ("x86_64-linux-gnu", "Linux", "x86_64", ("avx2", "avx512")),
    ):
        options = {
            "CXX_FLAGS": "-Wall -Wextra -Wno-missing-field-initializers -Werror",
            "SYSTEM_NAME": system,
            "SYSTEM_PROCESSOR": processor,
            "TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",  # nothing is linked for another system
        }
        defined = [f"-DCMAKE_{name}={value}" for name, value in options.items()]
        environment = {"CXX": f"{session.bin}/python -m ziglang c++ -target {target}"}
        build, targets = str(folder / target), [f"rows_{name}" for name in sets]
        session.run("cmake", "-S", ".", "-B", build, "-G", "Ninja", *defined, env=environment, silent=True)
        session.run("cmake", "--build", build, "--target", *targets, env=environment, silent=True)


@nox.session(python=PYTHONS[0])
@nox.parametrize("execution", [nox.param(name, id=name) for name in ("formulas", "kernel")])
def mutations(session: nox.Session, execution: str) -> None:
    """Every mutant of the formulas and of the kernel, which take minutes; the matrix tries a sample."""
    _install(session, [], *TOOLS)
    session.run("python", "tests/mutants.py", execution, *session.posargs)


@nox.session(python=PYTHONS[0])
def evidence(session: nox.Session) -> None:
    """The identities of the theory page, and each experiment for two steps."""
    _install(session, ["torch", "jax", "experiments"], *TOOLS, "optax>=0.2.5", "sympy>=1.13")
    _pytest(session, "evidence", "numpy,torch,jax")


@nox.session(python=PYTHONS[0])
def fuzz(session: nox.Session) -> None:
    """Random problems against an oracle: a minute of fixed seeds here.

    `nox -s fuzz -- --seconds 3600` draws its own, which it prints.
    """
    _install(session, ["torch", "jax", "dask", "strict", "score"], *TOOLS)
    # JAX compiles each problem.
    programs = [("benches/fuzz_files.py", "20"), ("benches/fuzz_losses.py --backend jax", "30")]
    programs += [(f"benches/fuzz_losses.py --backend {name}", "10") for name in ("torch", "numpy", "strict")]

    def run(program: str, seconds: str) -> None:
        session.run("python", *program.split(), *(session.posargs or ["--seconds", seconds, "--seed", "0"]))

    with ThreadPoolExecutor(2) as pool:  # two programs at a time
        list(pool.map(lambda program: run(*program), programs))


@nox.session(python=PYTHONS[0])
def cupy(session: nox.Session) -> None:
    """CuPy's tests, on a CUDA GPU."""
    if shutil.which("nvidia-smi") is None:
        session.skip("no NVIDIA GPU here: nvidia-smi is not on the path")
    _install(session, ["cupy"], *TOOLS)
    _pytest(session, "not library_independent and not evidence", "cupy")


@nox.session(python=PYTHONS[0])
def lint(session: nox.Session) -> None:
    """ruff, rules and format."""
    session.install("ruff>=0.9", "-c", "tests/constraints.txt")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(python=PYTHONS[0])
def types(session: nox.Session) -> None:
    """mypy, strict."""
    _install(session, ["torch", "jax", "dask", "strict", "score"], "mypy>=1.13")
    session.run("mypy", *session.posargs)


@nox.session(python=PYTHONS[0])
def docs(session: nox.Session) -> None:
    """The site, in docs/_build/html; a warning is an error, and so is a reference that leads nowhere."""
    _install(session, ["docs", "torch"])
    # The width of the command's help.
    strictly = ("--fail-on-warning", "--keep-going", "--nitpicky", "--fresh-env")
    session.run("sphinx-build", *strictly, *session.posargs, "docs", "docs/_build/html", env={"COLUMNS": "100"})


@nox.session(python=PYTHONS[0], venv_backend="virtualenv")
@nox.parametrize("compiler", [nox.param(name, id=name) for name in ("works", "fails")])
def package(session: nox.Session, compiler: str) -> None:
    """What pip installs: the wheel for this platform, and the source distribution where the compiler fails."""
    if compiler == "works":
        source = _wheel(session)
    else:
        folder = pathlib.Path(session.create_tmp())
        session.install("build")
        session.run_install("python", "-m", "build", "--sdist", f"--outdir={folder}", silent=True)
        (source,) = folder.resolve().glob("*.tar.gz")
    failing = {"CC": "false", "CXX": "false"} if compiler == "fails" else {}
    score = ("python", "-m", "gklx", "score", *(f"examples/digits/{name}.npy" for name in ("student", "teacher")))
    session.install(str(source), env=failing)
    session.run("python", "tests/check_install.py", "kernel" if compiler == "works" else "pure")
    session.run(*score, success_codes=[2])  # it names the extra
    session.install(f"{source}[cli]", env=failing)
    session.run(*score, "--labels", "examples/digits/labels.npy")
