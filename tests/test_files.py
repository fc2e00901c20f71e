"""Logits in files: every format gives the rows that NumPy has, window by window, and says what is wrong with one."""

import copy
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gklx
from gklx._scoring.files import open_labels, open_logits

rng = np.random.default_rng(0)
X = rng.standard_normal((3, 7, 5)).astype(np.float32)
FLAT = X.reshape(-1, 5)
WINDOWS = ((0, 21), (3, 9), (20, 21), (7, 14), (6, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def rounded(dtype):
    """What a file of a dtype holds, widened."""
    if dtype == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        return X.astype(ml_dtypes.bfloat16)
    return X.astype(dtype)


def save_zarr(name, x, **kwargs):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(name, shape=x.shape, dtype=x.dtype, chunks=(1, 3, 5), overwrite=True, **kwargs)
    array[...] = x


def save_group(x):
    zarr = pytest.importorskip("zarr")
    array = zarr.open_group("group.zarr", mode="w").create_array("logits", shape=x.shape, dtype=x.dtype)
    array[...] = x


def save_safetensors(x):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"logits": x, "other": np.zeros(3)}, "x.safetensors")


WRITERS = {
    "x.npy": lambda x: np.save("x.npy", x),
    "fortran.npy": lambda x: np.save("fortran.npy", np.asfortranarray(x)),
    "x.npz::logits": lambda x: np.savez("x.npz", logits=x, other=x[0]),
    "one.npz": lambda x: np.savez("one.npz", x),
    "packed.npz::logits": lambda x: np.savez_compressed("packed.npz", logits=x, other=x[0]),
    "x.safetensors::logits": save_safetensors,
    "x.zarr": lambda x: save_zarr("x.zarr", x),
    "two.zarr": lambda x: save_zarr("two.zarr", x, zarr_format=2),
    "group.zarr::logits": save_group,
    "group.zarr": save_group,
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_and_dtype(name, dtype):
    x = rounded(dtype)
    if dtype == "bfloat16" and ".zarr" in name:
        pytest.skip("zarr has no bfloat16")
    WRITERS[name](x)
    found = copy.deepcopy(open_logits(name))  # holds no handle that could not be copied
    assert (found.shape, found.dtype) == ((3, 7, 5), dtype)
    for start, stop in WINDOWS:
        rows = found.read(start, stop)
        assert rows.dtype == ("float64" if dtype == "float64" else "float32")
        assert rows.flags.c_contiguous
        assert (rows == x.astype(rows.dtype).reshape(-1, 5)[start:stop]).all()


@pytest.mark.parametrize("dtype", ["<i8", "uint8", ">i4"])
def test_labels(dtype):
    labels = rng.integers(0, 5, (3, 7)).astype(dtype)
    np.save("y.npy", labels)
    np.savez("y.npz", y=labels)
    for name in ("y.npy", "y.npz::y"):
        found = open_labels(name)
        assert found.shape == (3, 7)
        assert found.read(5, 15).dtype == np.int64
        assert (found.read(5, 15) == labels.reshape(-1)[5:15]).all()


@given(st.lists(st.integers(0, 4), min_size=2, max_size=13).filter(any), st.data())
def test_shards_in_natural_order(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("shards")
    x = np.arange(sum(sizes) * 3, dtype=np.float32).reshape(-1, 3)
    for i, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
        dtype = np.float64 if i == 1 else np.float16
        np.save(folder / f"s-{i}.npy", x[end - size : end].astype(dtype))
    found = open_logits(folder / "s-*.npy")
    assert (found.shape, found.dtype) == (x.shape, "float64")
    start = data.draw(st.integers(0, len(x) - 1))
    stop = data.draw(st.integers(start + 1, len(x)))
    assert (found.read(start, stop) == x[start:stop]).all()
    given_one_by_one = open_logits([folder / f"s-{i}.npy" for i in range(len(sizes))])
    assert (given_one_by_one.read(0, len(x)) == x).all()


def test_shards_of_several_axes_and_keys():
    for i in range(2):
        np.savez_compressed(f"part-{i}.npz", logits=X + i)
    found = open_logits("part-*.npz::logits")
    assert found.shape == (6, 7, 5)
    assert (found.read(18, 25) == np.concatenate([X, X + 1]).reshape(-1, 5)[18:25]).all()
    assert len(found.stamps()) == 2


def test_a_name_that_is_there_is_no_pattern():
    np.save("a[1].npy", X)
    np.save("a1.npy", X[0])
    assert open_logits("a[1].npy").shape == X.shape


def test_many_threads_read_one_compressed_array():
    x = rng.standard_normal((500, 40)).astype(np.float32)
    np.savez_compressed("big.npz", x)
    found = open_logits("big.npz")
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: found.read(5 * i, 5 * i + 5), range(100)))
    assert (np.concatenate(parts) == x).all()


def test_formats_may_be_mixed():
    np.save("s.npy", FLAT.astype(np.float16))
    np.savez("t.npz", FLAT)
    mixed = gklx.score("s.npy", "t.npz", losses=["kl"]).losses["kl"].mean
    assert mixed == gklx.score(FLAT.astype(np.float16).astype(np.float32), FLAT, losses=["kl"]).losses["kl"].mean


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.npz", r"^x\.npz: no array was named \(FILE::key\); it holds logits, other$"),
        ("x.npz::no", r"^x\.npz::no: there is no array 'no'; it holds logits, other$"),
        ("x.npy::no", r"holds one array without a name, got the key 'no'$"),
        ("none-*.npy", r"^none-\*\.npy: No such file or directory$"),
        ("none.npz::x", r"^none\.npz::x: No such file or directory$"),
        ("none.zarr", r"^none\.zarr: No such Zarr array$"),
        ("empty.zarr", r"^empty\.zarr: "),
        ("short.npy", r"damaged or cut short"),
        ("short.npz", r"the \.npz archive is damaged or cut short"),
        ("objects.npz", r"pickled Python objects, which are never loaded$"),
        ("text", r"not a NumPy \.npy or \.npz file, nor \.safetensors or \.zarr by its name$"),
    ],
)
def test_errors(name, message):
    np.save("x.npy", X)
    np.savez("x.npz", logits=X, other=X[0])
    for whole, short in (("x.npy", "short.npy"), ("x.npz", "short.npz")):
        with open(whole, "rb") as file, open(short, "wb") as cut:
            cut.write(file.read()[:-50])
    np.savez("objects.npz", np.asarray([[None]]))
    with open("text", "w") as file:
        file.write("logits")
    os.makedirs("empty.zarr", exist_ok=True)
    if ".zarr" in name:
        pytest.importorskip("zarr")
    with pytest.raises(ValueError, match=message):
        open_logits(name)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("::no", r"there is no array 'no'; it holds logits, other$"),
        ("", r"no array was named"),
        ("::other", r"must have shape"),
    ],
)
def test_errors_of_safetensors(key, message):
    save_safetensors(X)
    with pytest.raises(ValueError, match=message):
        open_logits(f"x.safetensors{key}")
    with open("x.safetensors", "rb") as file, open("cut.safetensors", "wb") as cut:
        cut.write(file.read()[:-9])
    with pytest.raises(ValueError, match=r"^cut\.safetensors: the \.safetensors file is damaged or cut short"):
        open_logits("cut.safetensors")


def test_shards_that_do_not_fit():
    np.save("odd-1.npy", FLAT)
    np.save("odd-2.npy", FLAT[:, :4])
    with pytest.raises(
        ValueError, match=r"^odd-2\.npy: must have shape \[\.\.\., 5\] as odd-1\.npy has, got \[21, 4\]$"
    ):
        open_logits("odd-*.npy")


def test_a_file_that_shrinks_meanwhile():
    np.save("shrinks.npy", FLAT)
    found = open_logits("shrinks.npy")
    os.truncate("shrinks.npy", 200)
    with pytest.raises(ValueError, match=r"^shrinks\.npy: can no longer be read as when it was opened"):
        found.read(0, 21)


@pytest.mark.parametrize(("library", "name"), [("safetensors", "x.safetensors::logits"), ("zarr", "x.zarr")])
def test_a_library_that_is_not_here(library, name, monkeypatch):
    pytest.importorskip(library)
    WRITERS[name](X)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"needs {library}, which is not installed \(pip install 'gklx\[score\]'\)$"):
        open_logits(name)
