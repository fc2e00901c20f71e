"""`gklx.show_config` reports each library's version and what executes its losses."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import backends
import gklx
from gklx._run import blocks, cpu_library, cuda_launch

ROOT = Path(__file__).parents[1]
KERNELS = {"dask", "numpy", "torch", "torch.compile"}
if hasattr(cpu_library.library(), "gklx_jax_rows"):
    KERNELS |= {"jax", "jax.jit"}


def in_a_process(code, **environment):
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def executions(config):
    """All executions in the report."""
    return [x for of in config["libraries"].values() for name, x in of.items() if name != "version"]


def test_config_reports_versions_and_libraries():
    found = gklx.show_config(mode="dicts")
    assert (found["gklx"], found["numpy"]) == (gklx.__version__, np.__version__)
    assert found["kernel"] == cpu_library.instruction_set()
    assert found["threads"] == cpu_library.threads()
    here = [name for name in backends.BY_BACKEND if importlib.util.find_spec(name) is not None]
    assert list(found["libraries"]) == here
    assert found["libraries"]["numpy"]["version"] == np.__version__


def test_config_prints_what_it_returns(capsys):
    assert gklx.show_config() is None
    lines = capsys.readouterr().out.splitlines()
    found = gklx.show_config(mode="dicts")
    assert lines[:2] == [f"gklx: {gklx.__version__}", f"python: {found['python']}"]
    assert f"kernel: {found['kernel']}" in lines
    at = lines.index("  numpy:")
    assert lines[at + 1 : at + 3] == [
        f"    version: {np.__version__}",
        f"    eager: {found['libraries']['numpy']['eager']}",
    ]


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match=r"^mode must be \"stdout\" or \"dicts\", got 'json'$"):
        gklx.show_config("json")


def test_config_reports_formulas_when_the_kernel_is_off(monkeypatch):
    monkeypatch.setenv("GKLX_KERNEL", "0")
    found = gklx.show_config("dicts")
    assert found["kernel"] is None
    assert set(executions(found)) == {"formulas"}


def test_config_reports_formulas_when_the_kernel_library_is_missing():
    code = "import gklx; c = gklx.show_config('dicts'); print(c['kernel'], c['libraries']['numpy']['eager'])"
    assert in_a_process(code, GKLX_KERNEL_LIBRARY=str(ROOT / "no" / "such.so")) == "None formulas\n"


def test_kernel_of_another_version_is_refused(monkeypatch):
    """Here a library that has none of the kernel's functions."""
    monkeypatch.setenv("GKLX_KERNEL_LIBRARY", np.linalg._umath_linalg.__file__)
    message = r"^.*_umath_linalg.* is the row kernel of another version of gklx: build it again$"
    with pytest.raises(ImportError, match=message):
        cpu_library.library.__wrapped__()


def test_config_imports_no_library():
    names = sorted(backends.BY_BACKEND.keys() - {"numpy"})
    code = f"import gklx, sys; gklx.show_config('dicts'); print([m for m in {names} if m in sys.modules])"
    assert in_a_process(code) == "[]\n"


def test_config_leaves_out_missing_libraries(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch" not in gklx.show_config("dicts")["libraries"]


def test_version_is_found_under_another_distribution_name(monkeypatch, tmp_path):
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("CuPy is installed")
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text("raise AssertionError('it is not to be imported')")
    (tmp_path / "cupy_cuda99x-13.5.dist-info").mkdir()
    (tmp_path / "cupy_cuda99x-13.5.dist-info" / "METADATA").write_text("Name: cupy-cuda99x\nVersion: 13.5\n")
    (tmp_path / "cupy_cuda99x-13.5.dist-info" / "top_level.txt").write_text("cupy\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert gklx.show_config("dicts")["libraries"]["cupy"]["version"] == "13.5"


@pytest.mark.parametrize(("kernel", "says"), [("0", "formulas"), ("1", "kernels (cuda)")])
def test_config_reports_cuda_kernels_when_a_launcher_is_installed(monkeypatch, kernel, says):
    backends.needs("torch")
    monkeypatch.setenv("GKLX_KERNEL", kernel)
    monkeypatch.setattr(cuda_launch, "_is_installed", lambda module: module == "cuda.core")
    found = gklx.show_config("dicts")["libraries"]
    assert found["torch"]["gpu"] == says
    assert "cupy" not in found or found["cupy"]["gpu"] == "formulas"


@pytest.mark.parametrize("kernel", ["0", "1"])
@pytest.mark.parametrize("name", ["numpy", "torch", "torch.compile", "jax", "jax.jit", "dask", "array_api_strict"])
def test_reported_execution_is_what_runs(name, kernel, monkeypatch):
    library, _, compiler = name.partition(".")
    backends.needs(library)
    monkeypatch.setenv("GKLX_KERNEL", kernel)
    reported = gklx.show_config("dicts")["libraries"][library][name if compiler else "eager"]
    runs, formulas = [], []
    true_run, true_evaluate = cpu_library.run, blocks.evaluate
    monkeypatch.setattr(cpu_library, "run", lambda request: runs.append(true_run(request)))
    monkeypatch.setattr(blocks, "evaluate", lambda *a, **k: formulas.append(1) or true_evaluate(*a, **k))
    xp = backends.BY_BACKEND[library].namespace()
    logits = xp.ones((2, 3))
    if name == "jax.jit":
        import jax

        # A new function: JAX would reuse its trace of `gklx.kl`.
        lowered = jax.jit(lambda student, teacher: gklx.kl(student, teacher)).lower(logits, logits)
        by_kernel = "gklx_rows" in lowered.as_text()
    else:
        f = gklx.kl
        if name == "torch.compile":
            import torch

            torch.compiler.reset()
            f = torch.compile(gklx.kl, backend="aot_eager", fullgraph=True)
        assert float(f(logits, logits)) == 0
        by_kernel = bool(runs) if library != "jax" else not formulas
    assert reported == (f"kernel ({cpu_library.instruction_set()})" if by_kernel else "formulas")
    assert by_kernel == (kernel == "1" and cpu_library.library() is not None and name in KERNELS)
