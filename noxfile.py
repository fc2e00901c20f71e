"""The test matrix: a session a library, one with all of them, the oldest NumPy, lint and types.

`nox` runs what can run here; a session whose interpreter, library or GPU is absent skips and says why. `nox -l` lists
the sessions, `nox -s 'library-3.11(torch)'` runs one, and what stands behind `--` goes to pytest.
"""

import os
import pathlib
import shutil
import subprocess

import nox

PYTHONS = ("3.11", "3.12", "3.13")
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")
# What a library's session installs beside gklx: extras, and what the examples need; and the backend whose tests it then
# runs: NumPy's own are those of NumPy's session alone. The constraints file keeps pip from fetching a newer PyTorch
# with gigabytes of CUDA where a build that fits is at hand.
LIBRARIES = {
    "numpy": (["score"], ["scipy>=1.14"], "numpy"),
    "strict": (["strict"], [], "array_api_strict"),
    "torch": (["torch"], ["scikit-learn>=1.5"], "torch"),
    "jax": (["jax"], ["scikit-learn>=1.5", "optax>=0.2.5"], "jax"),
    "dask": (["dask"], [], "dask"),
}


def _ignored(*names: str) -> tuple[str, ...]:
    return tuple(f"--ignore=tests/test_{name}.py" for name in names)


# Files, processes and pictures: tested with NumPy, and with all libraries together where more take part.
FILES = _ignored(
    "atomic",
    "benches",
    "files",
    "memory",
    "mutations",
    "plot",
    "progress",
    "sample_files",
    "score_peers",
    "score_runs",
    "work_file",
)
# The kernels, compiled by g++ and by NVRTC: one session's, and a GPU's.
KERNELS = _ignored("cuda_rows")
# All libraries side by side: one session's.
SIDE_BY_SIDE = _ignored("agreement")
# The theory's identities and the experiments: one session's.
EVIDENT = ("experiments", "theory", "trajectories")
EVIDENCE = _ignored(*EVIDENT)
# Of NumPy's tests those in which another Python changes nothing.
ALIKE = _ignored("benches", "mutations")
# Of JAX's tests those in which another Python may change something; the others are minutes of compiling.
PYTHONIC = tuple(f"tests/test_{name}.py" for name in ("autodiff", "errors", "extremes", "prior", "theorem"))

# pyenv shows the interpreters it holds only where asked to.
if shutil.which("pyenv") and "PYENV_VERSION" not in os.environ:
    held = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=False).stdout.split()
    wanted = [version for python in PYTHONS for version in held if version.startswith(f"{python}.")]
    if wanted:
        os.environ["PYENV_VERSION"] = ":".join(wanted)

nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = [
    "lint",
    "types",
    *(f"library-{python}(numpy)" for python in PYTHONS),
    *(f"library-{PYTHONS[0]}({library})" for library in LIBRARIES if library != "numpy"),
    "library-3.13(jax)",
    "together",
    "oldest",
    "kernels",
    "evidence",
    "cupy",
    "docs",
    "package",
]


def _install(session: nox.Session, extras: list[str], *more: str) -> None:
    project = f".[{','.join(extras)}]" if extras else "."
    # Python compiles what it imports; of the thousands of files of a library that is a small part.
    session.install("--no-compile", project, *TOOLS, *more, "-c", "tests/constraints.txt")


def _pytest(session: nox.Session, *arguments: str, backends: str) -> None:
    session.run("pytest", "-n", "2", *arguments, *session.posargs, env={"GKLX_BACKENDS": backends})


@nox.session(python=PYTHONS)
@nox.parametrize("library", [nox.param(name, id=name) for name in LIBRARIES])
def library(session: nox.Session, library: str) -> None:
    """All tests that one library can run; NumPy's include the mutations, the files and the processes."""
    extras, more, backends = LIBRARIES[library]
    _install(session, extras, *more)
    between = session.python not in (PYTHONS[0], PYTHONS[-1])
    chosen = KERNELS + EVIDENCE + SIDE_BY_SIDE + (FILES if library != "numpy" or between else ())
    if library == "numpy" and session.python != PYTHONS[0]:
        chosen += ALIKE
    if library == "jax" and session.python != PYTHONS[0]:
        chosen = PYTHONIC
    _pytest(session, *chosen, backends=backends)


@nox.session(python=PYTHONS[0])
def together(session: nox.Session) -> None:
    """All libraries in one process: that they agree with each other, and that mixing them is an error."""
    _install(session, ["torch", "jax", "dask", "strict", "score"], "scipy>=1.14")
    _pytest(
        session,
        "tests/test_agreement.py",
        "tests/test_errors.py",
        "tests/test_score.py",
        "tests/test_score_peers.py",
        "tests/test_readme.py",
        backends="numpy,torch,jax,dask,array_api_strict",
    )
    session.run("gklx", "verify", "--format", "markdown")


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The oldest supported NumPy and array-api-compat."""
    _install(session, [], "numpy==1.26.*", "array-api-compat==1.12.*")
    _pytest(session, *FILES, *KERNELS, *EVIDENCE, backends="numpy")


@nox.session(python=PYTHONS[0])
def kernels(session: nox.Session) -> None:
    """The CUDA kernels without a GPU: run on the CPU, thread by thread, and compiled for GPUs."""
    _install(session, [], "ml-dtypes>=0.5", "nvidia-cuda-nvrtc-cu12>=12.6")
    _pytest(session, "tests/test_cuda_rows.py", backends="numpy")


@nox.session(python=PYTHONS[0])
def evidence(session: nox.Session) -> None:
    """The identities of the theory page, and each experiment for two steps."""
    _install(session, ["torch", "jax", "experiments"], "optax>=0.2.5", "sympy>=1.13")
    _pytest(session, *(f"tests/test_{name}.py" for name in EVIDENT), backends="numpy,torch,jax")


@nox.session(python=PYTHONS[0])
def cupy(session: nox.Session) -> None:
    """CuPy's tests, on a CUDA GPU."""
    if shutil.which("nvidia-smi") is None:
        session.skip("no NVIDIA GPU here: nvidia-smi is not on the path")
    _install(session, ["cupy"])
    _pytest(session, *FILES, *EVIDENCE, backends="cupy")


@nox.session(python=PYTHONS[0])
def lint(session: nox.Session) -> None:
    """ruff, rules and format."""
    session.install("ruff>=0.9", "-c", "tests/constraints.txt")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(python=PYTHONS[0])
def types(session: nox.Session) -> None:
    """mypy, strict."""
    session.install("--no-compile", ".[torch,jax,dask,strict,score]", "mypy>=1.13", "-c", "tests/constraints.txt")
    session.run("mypy", *session.posargs)


@nox.session(python=PYTHONS[0])
def docs(session: nox.Session) -> None:
    """The site, in docs/_build/html; a warning is an error, and so is a reference that leads nowhere."""
    session.install("--no-compile", ".[docs,torch]", "-c", "tests/constraints.txt")
    # The width of the command's help.
    strictly = ("--fail-on-warning", "--keep-going", "--nitpicky", "--fresh-env")
    session.run("sphinx-build", *strictly, *session.posargs, "docs", "docs/_build/html", env={"COLUMNS": "100"})


@nox.session(python=PYTHONS[0])
def package(session: nox.Session) -> None:
    """The wheel holds the typed package, and the command runs from it."""
    wheels = pathlib.Path(session.create_tmp())
    session.install("build")
    session.run("python", "-m", "build", "--wheel", "--outdir", str(wheels), silent=True)
    session.run("python", "-m", "pip", "uninstall", "--yes", "build", silent=True)
    session.install(*(str(wheel) for wheel in wheels.glob("*.whl")))
    session.run("gklx", "score", *(f"examples/digits/{name}.npy" for name in ("student", "teacher")))
    session.run(
        "python", "-c", "import gklx, pathlib; assert (pathlib.Path(gklx.__file__).parent / 'py.typed').exists()"
    )
