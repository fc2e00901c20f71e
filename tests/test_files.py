"""Logits and labels in files: every format reads the same rows as NumPy, and an error is one sentence."""

import copy
import io
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import warnings
import zipfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gklx
from gklx._scoring.file_formats import npz
from gklx._scoring.file_formats.npy import NpyRows
from gklx._scoring.file_formats.rows import Room, picked, stamp
from gklx._scoring.files import check_together, open_labels, open_logits

pytestmark = pytest.mark.library_independent

rng = np.random.default_rng(11)


def bfloat16(x):
    """As `np.save` writes ml_dtypes' bfloat16."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16).view("V2")


def of_dtype(x, dtype):
    return bfloat16(x) if dtype == "bfloat16" else x.astype(dtype)


def value(x):
    """An array as the readers return it: floats as float32 or float64, integers as int64."""
    if x.dtype.kind == "V":
        return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if x.dtype.kind in "iu":
        return x.astype(np.int64)
    return x.astype(np.float64 if x.dtype.itemsize == 8 else np.float32)


def save_safetensors(path, **arrays):
    numpy = pytest.importorskip("safetensors.numpy")
    for name, x in arrays.items():
        if x.dtype.kind == "V":
            arrays[name] = x.view(pytest.importorskip("ml_dtypes").bfloat16)
    numpy.save_file(arrays, path)


def save_zarr(path, zarr_format, **arrays):
    """One array without a name, or a group."""
    zarr = pytest.importorskip("zarr")
    group = None if list(arrays) == [""] else zarr.open_group(path, mode="w", zarr_format=zarr_format)
    for name, x in arrays.items():
        chunks = tuple(max(1, size // 2) for size in x.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # format 3 has no V2 yet
            if group is None:
                made = zarr.create_array(path, shape=x.shape, dtype=x.dtype, chunks=chunks, zarr_format=zarr_format)
            else:
                made = group.create_array(name, shape=x.shape, dtype=x.dtype, chunks=chunks)
        made[...] = x


def save(kind, path, x):
    """Writes the array to a file of this format; returns the name to open it by."""
    path = str(path)
    if kind == "npy":
        np.save(path + ".npy", x)
    elif kind == "fortran":
        np.save(path + ".npy", np.asfortranarray(x))
    elif kind == "npz":
        np.savez(path + ".npz", other=np.zeros(3), wanted=x)
    elif kind == "packed":
        np.savez_compressed(path + ".npz", other=np.zeros(3), wanted=x)
    elif kind == "packed fortran":
        np.savez_compressed(path + ".npz", other=np.zeros(3), wanted=np.asfortranarray(x))
    elif kind == "safetensors":
        save_safetensors(path + ".safetensors", wanted=x, other=np.zeros(3))
    elif kind.startswith("zarr"):
        save_zarr(path + ".zarr", int(kind[-1]), **{"a/wanted": x, "other": np.zeros(3)})
    found = {"fortran": "npy", "packed": "npz", "packed fortran": "npz", "zarr 2": "zarr", "zarr 3": "zarr"}
    key = {"npy": "", "fortran": "", "zarr 2": "::a/wanted", "zarr 3": "::a/wanted"}.get(kind, "::wanted")
    return f"{path}.{found.get(kind, kind)}{key}"


KINDS = ("npy", "fortran", "npz", "packed", "packed fortran", "safetensors", "zarr 2", "zarr 3")
DTYPES = ("float16", "bfloat16", "float32", "float64", ">f2", ">f4", ">f8")
SHAPES = {"two axes": (24, 5), "three": (4, 6, 5), "one first": (1, 24, 5), "four": (2, 3, 4, 5)}
WINDOWS = ((0, 24), (0, 1), (23, 24), (5, 7), (3, 21), (6, 12), (11, 13))


def assert_read(got, expected, start, stop, axes):
    expected = value(expected).reshape(-1, *expected.shape[expected.ndim - axes :])[start:stop]
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.dtype.isnative
    assert got.flags.c_contiguous
    assert (got == expected).all()


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_reads_the_same_rows_as_numpy(tmp_path, kind, dtype, shape):
    if kind == "safetensors" and dtype.startswith(">"):
        pytest.skip("little-endian by definition")
    x = of_dtype(rng.standard_normal(shape), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if (kind, dtype) == ("zarr 3", "bfloat16") else "error")
        name = save(kind, tmp_path / "x", x)
        rows = open_logits(name)
        assert (rows.name, rows.shape) == (name, shape)
        assert rows.dtype == ("bfloat16" if dtype == "bfloat16" else np.dtype(dtype).name)
        for start, stop in WINDOWS:
            assert_read(rows.read(start, stop), x, start, stop, 1)


@pytest.mark.parametrize("dtype", ["int8", "uint8", ">i2", "int32", "uint32", "int64"])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_read_from_every_format(tmp_path, kind, dtype):
    if kind == "safetensors" and dtype.startswith(">"):
        pytest.skip("little-endian by definition")
    for shape in ((24,), (4, 6)):
        y = rng.integers(0, 100, shape).astype(dtype)
        rows = open_labels(save(kind, tmp_path / f"y{len(shape)}", y))
        assert (rows.shape, rows.dtype) == (shape, np.dtype(dtype).name)
        for start, stop in WINDOWS:
            assert_read(rows.read(start, stop), y, start, stop, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_rows_stay_half_precision_in_a_buffer(tmp_path, kind, dtype):
    """With a buffer, float16 and bfloat16 are not widened to float32; all values are the same."""
    if kind == "safetensors" and dtype.startswith(">"):
        pytest.skip("little-endian by definition")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = of_dtype(rng.standard_normal((4, 6, 5)), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if (kind, dtype) == ("zarr 3", "bfloat16") else "error")
        rows, room = open_logits(save(kind, tmp_path / "x", x)), Room()
        as_they_are = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}.get(dtype)
        for start, stop in WINDOWS:
            got = rows.read(start, stop, room)
            if as_they_are is not None:
                assert got.dtype == as_they_are
                assert got.flags.c_contiguous
            if got.dtype.itemsize == 2:  # as Zarr may, after converting the byte order
                got = got.astype(np.float32)
            assert_read(got, x, start, stop, 1)


def test_buffer_is_reused(tmp_path):
    x = rng.standard_normal((24, 5)).astype(np.float16)
    rows, room = open_logits(save("npy", tmp_path / "x", x)), Room()
    first, second = rows.read(3, 21, room), rows.read(0, 7, room)
    assert np.shares_memory(first, second)
    assert (second == x[:7]).all()
    assert not np.shares_memory(rows.read(0, 7), rows.read(0, 7))
    larger = rows.read(0, 24, room)
    assert (larger == x).all()


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float16", "bfloat16"), ("bfloat16", "float64")])
def test_shards_are_read_into_a_buffer(tmp_path, dtypes):
    pytest.importorskip("ml_dtypes")
    parts = [of_dtype(rng.standard_normal((12, 5)), dtype) for dtype in dtypes]
    for i, part in enumerate(parts):
        save("npy", tmp_path / f"x{i}", part)
    rows, room = open_logits(str(tmp_path / "x*.npy")), Room()
    whole = np.concatenate([value(part) for part in parts])
    for start, stop in WINDOWS:
        got = rows.read(start, stop, room)
        assert (got.astype(np.float64) == whole[start:stop]).all()


def test_bfloat16_of_ml_dtypes_is_read(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.asarray([[1.5, -np.inf, 3e38], [np.nan, -0.0, 1e-40]], dtype=ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", x)
    save_safetensors(tmp_path / "x.safetensors", x=x)
    for path in tmp_path.iterdir():
        rows = open_logits(path)
        assert rows.dtype == "bfloat16"
        assert (rows.read(0, 2).view(np.uint32) == x.astype(np.float32).view(np.uint32)).all()


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
        lambda leading: st.tuples(st.just((*leading, 2)), st.tuples(*[st.integers(0, math.prod(leading))] * 2))
    )
)
def test_picked_reads_each_row_once_and_no_other(case):
    shape, window = case
    start, stop = min(window), max(window)
    if start == stop:
        return
    x = np.arange(math.prod(shape)).reshape(shape)
    taken = []

    class CountingArray:
        def __getitem__(self, index):
            taken.append(x[index].size)
            return x[index]

    assert (picked(CountingArray(), shape, 1, start, stop) == x.reshape(-1, 2)[start:stop]).all()
    assert sum(taken) == 2 * (stop - start)


def test_many_columns_in_fortran_order_are_read(tmp_path):
    x = rng.standard_normal((3, 4, 2500))
    for kind in ("fortran", "packed fortran"):
        rows = open_logits(save(kind, tmp_path / "x", x))
        assert_read(rows.read(2, 7), x, 2, 7, 1)


@pytest.mark.parametrize(("shape", "reads"), [((30, 5000), 5), ((5000, 30), 30)])
def test_whole_short_columns_are_read_together(tmp_path, monkeypatch, shape, reads):
    """Many classes of few samples would else take a read for each class and block."""
    x, fill, seen = rng.standard_normal(shape), NpyRows._fill, []
    rows = open_logits(save("fortran", tmp_path / "x", x))
    monkeypatch.setattr(NpyRows, "_fill", lambda *args: (seen.append(1), fill(*args))[1])
    assert_read(rows.read(7, 29), x, 7, 29, 1)
    assert len(seen) == reads


def test_short_columns_are_mapped_together(tmp_path, monkeypatch):
    x, memmap, seen = rng.standard_normal((30, 5000)), np.memmap, []
    rows = open_logits(save("packed fortran", tmp_path / "x", x))
    monkeypatch.setattr(np, "memmap", lambda *args: (seen.append(1), memmap(*args))[1])
    assert_read(rows.read(7, 29), x, 7, 29, 1)
    assert len(seen) == 5
    npz.forget()


def test_file_with_one_array_needs_no_key(tmp_path):
    x = rng.standard_normal((3, 2))
    np.savez(tmp_path / "a.npz", x=x)
    np.savez_compressed(tmp_path / "b.npz", x=x)
    save_safetensors(tmp_path / "c.safetensors", x=x)
    save_zarr(tmp_path / "d.zarr", 3, x=x)
    save_zarr(tmp_path / "e.zarr", 2, **{"": x})
    for path in tmp_path.iterdir():
        assert_read(open_logits(path).read(1, 3), x, 1, 3, 1)
    assert open_logits(f"{tmp_path / 'e.zarr'}/").shape == (3, 2)


def test_numpy_files_may_have_any_name(tmp_path):
    x = rng.standard_normal((3, 2))
    for name in ("logits", "logits.bin", "a::b.npy", "logits[1].npy"):
        with open(tmp_path / name, "wb") as file:
            np.save(file, x)
        assert_read(open_logits(tmp_path / name).read(0, 3), x, 0, 3, 1)
    with open(tmp_path / "archive", "wb") as file:
        np.savez(file, x=x)
    np.savez(tmp_path / "archive[1]", x=x)
    for name in ("archive", "archive[1].npz"):
        assert_read(open_logits(f"{tmp_path / name}::x").read(0, 3), x, 0, 3, 1)


# --- shards -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(sum),
    st.sampled_from([(3,), (2, 3)]),
    st.randoms(use_true_random=False),
)
def test_read_may_span_shards(sizes, row, random):
    dtypes = [random.choice(["float16", "bfloat16", "float32", "float64"]) for _ in sizes]
    with tempfile.TemporaryDirectory() as folder:
        parts = [of_dtype(rng.standard_normal((size, *row)), dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
        for i, part in enumerate(parts):
            np.save(f"{folder}/x-{i}.npy", part)
        widest = np.float64 if "float64" in dtypes else np.float32
        whole = np.concatenate([value(part) for part in parts]).astype(widest)
        for what in (f"{folder}/x-*.npy", [Path(folder, f"x-{i}.npy") for i in range(len(sizes))]):
            rows = open_logits(what)
            assert rows.shape == whole.shape
            count = math.prod(whole.shape[:-1])
            start = random.randrange(count)
            for stop in (start + 1, random.randint(start + 1, count), count):
                assert_read(rows.read(start, stop), whole, start, stop, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_read_in_natural_order(tmp_path, kind):
    parts = {i: rng.standard_normal((2, 3)).astype(np.float32) for i in (1, 2, 10, 9)}
    for i, part in parts.items():
        name = save(kind, tmp_path / f"x-{i}", part)
    rows = open_logits(name.replace("x-9", "x-*"))
    whole = np.concatenate([parts[i] for i in (1, 2, 9, 10)])
    assert (rows.name, rows.shape, rows.dtype) == (name.replace("x-9", "x-*"), (8, 3), "float32")
    assert_read(rows.read(1, 7), whole, 1, 7, 1)
    assert [Path(each.path).name.partition(".")[0] for each in rows.stamps] == ["x-1", "x-2", "x-9", "x-10"] or (
        kind.startswith("zarr")
    )


def test_sequence_of_paths_keeps_its_order_and_may_hold_patterns(tmp_path):
    for i in range(4):
        np.save(tmp_path / f"{'ab'[i // 2]}{i}.npy", np.full((1, 2), i, np.float32))
    rows = open_logits([tmp_path / "b3.npy", str(tmp_path / "a*.npy")])
    assert rows.read(0, 3)[:, 0].tolist() == [3, 0, 1]
    assert rows.name == f"{tmp_path / 'b3.npy'}, …"


def test_order_of_shards_with_equal_numbers_is_fixed(tmp_path, monkeypatch):
    names = ["x1.npy", "x01.npy", "x².npy", "x1²2.npy"]
    for i, name in enumerate(names):
        np.save(tmp_path / name, np.full((1, 2), i, np.float32))
    first = open_logits(str(tmp_path / "x*")).read(0, 4)
    found = sorted(str(tmp_path / name) for name in names)
    for order in (found, found[::-1]):
        monkeypatch.setattr("glob.glob", lambda path, recursive, order=order: order)
        assert (open_logits(str(tmp_path / "x*")).read(0, 4) == first).all()


def test_label_shards_may_differ_in_dtype(tmp_path):
    np.save(tmp_path / "y0.npy", np.arange(3, dtype=np.uint8))
    np.save(tmp_path / "y1.npy", np.arange(3, 5))
    np.save(tmp_path / "y2.npy", np.asarray([2**64 - 100], dtype=np.uint64))
    assert open_labels(str(tmp_path / "y*.npy")).read(1, 5).tolist() == [1, 2, 3, 4]
    assert open_labels(str(tmp_path / "y*.npy")).read(1, 6).tolist() == [1, 2, 3, 4, 2**64 - 100]


# --- other processes and threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_readers_can_be_pickled_and_shared_by_threads(tmp_path, monkeypatch, kind):
    x = rng.standard_normal((60, 4))
    monkeypatch.chdir(tmp_path)
    save(kind, "x-0", x[:20])
    rows = open_logits(save(kind, "x-1", x[20:]).replace("x-1", "x-*"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for other in (copy.deepcopy(rows), ForkingPickler.loads(bytes(ForkingPickler.dumps(rows)))):
        assert other == rows
        assert_read(other.read(10, 30), x, 10, 30, 1)
    failed, start = [], threading.Barrier(4)

    def read(i):
        try:
            start.wait()
            for at in range(i, 50, 7):
                assert_read(rows.read(at, at + 9), x, at, at + 9, 1)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed


def test_archive_is_unpacked_once_and_leaves_no_file(tmp_path, monkeypatch):
    x = rng.standard_normal((20_000, 10))
    rows = open_logits(save("packed fortran", tmp_path / "x", x))
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    npz.forget()
    made, make = [], npz._Copy.__init__
    monkeypatch.setattr(npz._Copy, "__init__", lambda *args: (made.append(1), make(*args))[1])
    start = threading.Barrier(4)

    def read(i):
        start.wait()
        rows.read(i, i + 1)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(made) == 1
    if os.name == "posix":
        assert list(folder.iterdir()) == []
    save("packed fortran", tmp_path / "x", x + 1)
    assert_read(rows.read(5, 6), x + 1, 5, 6, 1)
    assert len(made) == 2


def test_compressed_member_is_read_as_a_stream(tmp_path, monkeypatch):
    """Rows that are read roughly in order are unpacked once, without a file, and not all kept."""
    x = rng.standard_normal((40_000, 100)).astype(np.float32)
    rows = open_logits(save("packed", tmp_path / "x", x))
    monkeypatch.setattr(npz, "_PIECE", 2**16)
    monkeypatch.setattr(npz, "threads", lambda: 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    npz.forget()
    starts, start = [], npz._Stream._start
    monkeypatch.setattr(npz._Stream, "_start", lambda self: (starts.append(1), start(self)))
    windows = list(range(0, 40_000, 500))
    for i in range(0, len(windows), 4):
        for at in windows[i : i + 4][::-1]:
            assert_read(rows.read(at, at + 500), x, at, at + 500, 1)
            kept = npz._streams(rows.path, rows.member, stamp(rows.path))._kept
            assert sum(map(len, kept)) <= 7 * 500 * 400 + 2**16
    assert len(starts) == 1
    assert_read(rows.read(0, 10), x, 0, 10, 1)
    assert len(starts) == 2


def test_little_of_a_member_is_kept_for_small_reads(tmp_path, monkeypatch):
    x = np.zeros((1000, 1000))
    rows = open_logits(save("packed", tmp_path / "x", x))
    monkeypatch.setattr(npz, "threads", lambda: 2)
    for at in range(1000):
        rows.read(at, at + 1)
    assert sum(map(len, npz._streams(rows.path, rows.member, stamp(rows.path))._kept)) < 500_000
    npz.forget()


@pytest.mark.parametrize("kind", ["packed", "packed fortran", "zarr 3"])
def test_each_of_many_inputs_is_unpacked_once(tmp_path, monkeypatch, kind):
    """However many are read in turn; nothing is kept after the run."""
    if kind.startswith("zarr"):
        pytest.importorskip("zarr")
    from gklx._scoring.file_formats import zarr

    monkeypatch.setattr("gklx._scoring.backend.threads", lambda: 1)
    made = []
    for of, name in ((npz._Copy, "__init__"), (npz._Stream, "_start"), (zarr, "picked")):
        make = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *args, make=make: (made.append(1), make(*args))[1])
    x = rng.standard_normal((60, 4))
    paths = [save(kind, tmp_path / str(i), x + i) for i in range(12)]
    y, mask = (save(kind, tmp_path / name, np.ones(60, np.int64)) for name in ("y", "mask"))
    others = {"targets": y, "sample_weight": mask}
    found = gklx.score(dict(zip(paths, paths, strict=True)), paths[0], losses=["kl"], batch_size=3, **others)
    assert len(found.students) == 12
    inputs, pieces = 15 - 1, 2 if kind.startswith("zarr") else 1  # the teacher is one of the candidates
    assert len(made) == inputs * pieces
    assert not any(kept._held for kept in (npz._copies, npz._streams, zarr._bands))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("beyond", [-4, 4, 50_000_000])
def test_member_whose_size_differs_from_its_header_is_refused(tmp_path, order, compression, beyond):
    """Otherwise an unbounded amount of data could be unpacked."""
    content = io.BytesIO()
    np.save(content, np.asarray(rng.standard_normal((50, 4)), order=order))
    content = content.getvalue()
    with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
        archive.writestr("wanted.npy", content[:beyond] if beyond < 0 else content + bytes(beyond))
    message = (
        rf"damaged or cut short: its header promises shape \[50, 4\], 1,728 bytes, and there are {1728 + beyond:,}$"
    )
    fails(f"{tmp_path / 'x.npz'}::wanted", message)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_every_zip_compression_is_read(tmp_path, compression):
    x = rng.standard_normal((500, 4))
    content = io.BytesIO()
    np.save(content, x)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
        archive.writestr("wanted.npy", content.getvalue())
    rows = open_logits(tmp_path / "x.npz")
    assert_read(rows.read(3, 200), x, 3, 200, 1)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz: can no longer be read as when it was opened"):
        rows.read(0, 500)


@pytest.mark.parametrize("kind", KINDS)
def test_stamps_detect_a_changed_file(tmp_path, kind):
    x = rng.standard_normal((4, 2))
    rows = open_logits(save(kind, tmp_path / "x", x))
    before = rows.stamps
    assert before == open_logits(rows.name).stamps == copy.deepcopy(rows).stamps == current_stamps(rows)
    assert all(os.path.isabs(each.path) for each in before)
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert rows.stamps == before
    assert current_stamps(rows) != before


def current_stamps(rows):
    return tuple(stamp(each.path) for each in rows.stamps)


@pytest.mark.skipif(os.name != "posix", reason="no time of change here")
@pytest.mark.parametrize("kind", KINDS)
def test_stamps_detect_a_change_with_the_old_modification_time(tmp_path, kind):
    """A change of the same size, in place or by a new file, with the old modification time."""
    rows = open_logits(save(kind, tmp_path / "x", rng.standard_normal((4, 2))))
    files = [path for each in rows.stamps for path in [Path(each.path), *Path(each.path).rglob("*")] if path.is_file()]
    for replaced in (False, True):
        before = current_stamps(rows)
        time.sleep(0.02)  # the system's clock of changes ticks some hundred times a second
        dates, content = files[-1].stat(), bytearray(files[-1].read_bytes())
        content[-1] ^= 1
        written = files[-1].with_name("new") if replaced else files[-1]
        written.write_bytes(content)
        os.utime(written, ns=(dates.st_atime_ns, dates.st_mtime_ns))
        os.replace(written, files[-1])
        assert (files[-1].stat().st_size, files[-1].stat().st_mtime_ns) == (dates.st_size, dates.st_mtime_ns)
        assert current_stamps(rows) != before


BOUNDED = """
import os, sys
import numpy as np
from gklx._scoring.files import open_logits

def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) // 1024

rows = open_logits(sys.argv[1])
step, count = int(sys.argv[2]), int(np.prod(rows.shape[:-1]))
before = peak()
for at in range(0, count, step)[:int(sys.argv[3])]:
    rows.read(at, at + step)
print(peak() - before)
"""


def sparse_npy(path, shape, fortran):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": fortran, "shape": shape})
        file.truncate(file.tell() + 4 * math.prod(shape))


def sparse_safetensors(path, shape):
    size = 4 * math.prod(shape)
    header = f'{{"x":{{"dtype":"F32","shape":{list(shape)},"data_offsets":[0,{size}]}}}}'.encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + size)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks from /proc, sparse files")
@pytest.mark.parametrize(
    ("name", "make", "step", "reads"),
    [
        ("c.npy", lambda path: sparse_npy(path, (250_000, 1000), False), 2500, None),
        ("one.npy", lambda path: sparse_npy(path, (1, 250_000, 1000), False), 2500, None),
        ("f.npy", lambda path: sparse_npy(path, (10_000, 25_000), True), 16, 2),
        ("one f.npy", lambda path: sparse_npy(path, (1, 10_000, 25_000), True), 16, 2),
        ("x.safetensors", lambda path: sparse_safetensors(path, (250_000, 1000)), 2500, 20),
        ("one.safetensors", lambda path: sparse_safetensors(path, (1, 250_000, 1000)), 2500, 20),
    ],
)
def test_memory_of_a_read_is_bounded_by_its_rows(tmp_path, name, make, step, reads):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path / name
    make(path)
    assert path.stat().st_size > 10**9
    argv = [sys.executable, "-c", BOUNDED, path, str(step), str(reads or 10**9)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120)
    path.unlink()
    assert int(done.stdout) < 120


# --- errors -----------------------------------------------------------------------------------------------------------


def fails(what, message, opens=open_logits):
    with pytest.raises(ValueError, match=message) as caught:
        opens(what)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def header(descr="<f4", shape=(2, 3), order=False):
    text = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the file is empty$"),
        (b"hello, world", r"not a NumPy \.npy or \.npz file nor a llama\.cpp dump, nor \.safetensors or \.zarr by"),
        (b"\x93NUM", r"not a NumPy \.npy"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr'", r"the \.npy file is damaged or cut short \("),
        (b"\x93NUMPY\x07\x00\x10\x00{'descr'", r"the \.npy file is damaged or cut short \("),
        (b"PK\x03\x04 and no more", r"the \.npz archive is damaged or cut short \("),
        (header(), r"damaged or cut short: its header promises shape \[2, 3\], \d+ bytes, and there are \d+$"),
        (header(shape=(2**40, 2**40)), r"its header promises shape \[1099511627776, 1099511627776\]"),
        (header(shape=(-2, 3)), r"the \.npy file is damaged or cut short \(shape \[-2, 3\]\)$"),
        (header("O"), r"holds pickled Python objects, which are never loaded$"),
        (header(("|i1", (2,))) + bytes(12), r"logits must be float16, bfloat16, float32 or float64, got void16$"),
    ],
)
@pytest.mark.parametrize("opens", [open_logits, open_labels])
def test_file_without_an_array_is_refused(tmp_path, content, message, opens):
    path = tmp_path / "bad.npy"
    path.write_bytes(content)
    if opens is open_labels:
        message = message.replace("logits must be float16, bfloat16, float32 or float64", "labels must be integers")
    assert fails(path, message, opens).startswith(f"{path}: ")


def test_path_that_is_no_file_is_refused(tmp_path):
    fails(tmp_path / "none.npy", r"none\.npy: No such file or directory$")
    fails(tmp_path / "none.npz", r"none\.npz: No such file or directory$")
    fails(tmp_path / "none.safetensors", r"none\.safetensors: No such file or directory$")
    fails(tmp_path / "none.zarr", r"none\.zarr: No such Zarr array$")
    fails(f"{tmp_path}/none-*.npy", r"none-\*\.npy: No such file or directory$")
    fails(tmp_path, r": is a directory$")
    fails(os.devnull, r": is not a regular file$")
    fails("x" * 5000, r"x: File name too long$")
    fails([], r"must be in one file at least, got an empty sequence$")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("kind", ["npy", "npz", "packed", "safetensors"])
def test_unreadable_file_is_refused(tmp_path, kind):
    name = save(kind, tmp_path / "x", np.zeros((2, 2)))
    os.chmod(name.partition("::")[0], 0)
    fails(name, r"Permission denied$")


def test_unknown_and_missing_keys_are_refused(tmp_path):
    x = np.zeros((2, 2))
    named = {"one": x, "two": x}
    np.savez(tmp_path / "x.npz", **named)
    np.savez_compressed(tmp_path / "packed.npz", **named)
    save_safetensors(tmp_path / "x.safetensors", **named)
    save_zarr(tmp_path / "x.zarr", 3, **named)
    for path in list(tmp_path.iterdir()):
        assert fails(path, r"no array was named \(FILE::key\); it holds one, two$").startswith(f"{path}: ")
        fails(f"{path}::three", r"::three: there is no array 'three'; it holds one, two$")
    np.savez(tmp_path / "none.npz")
    fails(tmp_path / "none.npz", r"no array was named \(FILE::key\); it holds none$")
    np.savez(tmp_path / "many.npz", **{f"x{i:02}": x for i in range(12)})
    fails(tmp_path / "many.npz", r"it holds x00, x01, .*, x09, …$")
    np.save(tmp_path / "x.npy", x)
    fails(f"{tmp_path / 'x.npy'}::one", r"an \.npy file holds one array without a name, got the key 'one'$")
    save_zarr(tmp_path / "one.zarr", 2, **{"": x})
    fails(f"{tmp_path / 'one.zarr'}::one", r"a Zarr array has no others in it, got the key 'one'$")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((3, 2), dtype=np.int64), r"float16, bfloat16, float32 or float64, got int64$"),
        (np.zeros((3, 2), dtype=bool), r"got bool$"),
        (np.zeros((3, 2), dtype=np.complex64), r"got complex \(complex64\)$"),
        (np.asarray([["a"]]), r"got text$"),
        (np.asarray([[b"a"]]), r"got bytes$"),
        (np.zeros((3, 2), dtype=[("x", "f4")]), r"got a structured dtype$"),
        (np.zeros((3, 2), dtype=[("größe", "f2")]), r"got a structured dtype$"),
        (np.zeros((3, 2), dtype="M8[s]"), r"got datetime64\[s\]$"),
        (np.zeros((3, 2), dtype="V4"), r"got void32$"),
        (np.asarray([[None]]), r"holds pickled Python objects, which are never loaded$"),
        (np.zeros(3), r"logits must have shape \[samples, classes\] or more axes, got \[3\]$"),
        (np.float32(1), r"got \[\]$"),
    ],
)
@pytest.mark.parametrize("write", [np.save, np.savez, np.savez_compressed])
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0:UserWarning")
def test_arrays_that_are_no_logits_are_refused(tmp_path, x, message, write):
    path = tmp_path / f"bad.{'npy' if write is np.save else 'npz'}"
    write(path, x)
    assert fails(path, message).startswith(f"{path}: ")


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="no wider float here")
def test_long_doubles_are_refused(tmp_path):
    np.save(tmp_path / "bad.npy", np.zeros((2, 2), dtype=np.longdouble))
    fails(tmp_path / "bad.npy", r"logits must be float16, bfloat16, float32 or float64, got (longdouble|float\d+)$")


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(3), r"labels must be integers, got float64$"),
        (np.zeros(3, dtype=bool), r"labels must be integers, got bool$"),
        (np.int64(3), r"labels must have one label a sample, got a single number$"),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "packed", "safetensors", "zarr 2"])
def test_arrays_that_are_no_labels_are_refused(tmp_path, y, message, kind):
    fails(save(kind, tmp_path / "bad", np.asarray(y)), message, open_labels)


def test_safetensors_of_other_dtypes_are_refused(tmp_path):
    for name, x in (("int16", np.zeros((2, 2), np.int16)), ("bool", np.zeros((2, 2), bool))):
        fails(save("safetensors", tmp_path / name, x), rf"logits must be float16, .*, got {name}$")


@pytest.mark.parametrize(
    ("opens", "shapes", "dtypes"),
    [
        (open_logits, ((2, 3), (2, 4)), "ff"),
        (open_logits, ((2, 3), (2, 3, 3)), "ff"),
        (open_labels, ((2,), (2, 3)), "ii"),
    ],
)
def test_shards_of_different_shapes_are_refused(tmp_path, opens, shapes, dtypes):
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        np.save(tmp_path / f"x{i}.npy", np.zeros(shape, dtype))
    line = fails(f"{tmp_path}/x*.npy", r" has, got \[2, \d(, 3)?\]$", opens)
    wanted = "[..., 3]" if opens is open_logits else "[...]"
    assert line.startswith(f"{tmp_path / 'x1.npy'}: must have shape {wanted} as {tmp_path / 'x0.npy'} has,")


def test_error_names_the_shard_of_another_dtype(tmp_path):
    np.save(tmp_path / "x0.npy", np.zeros((2, 3)))
    np.save(tmp_path / "x1.npy", np.zeros((2, 3), int))
    fails(f"{tmp_path}/x*.npy", r"x1\.npy: logits must be float16, bfloat16, float32 or float64, got int64$")


def test_files_of_different_shapes_are_refused(tmp_path):
    def rows(name, shape, opens=open_logits):
        np.save(tmp_path / f"{name}.npy", np.zeros(shape, int if opens is open_labels else float))
        return opens(tmp_path / f"{name}.npy")

    s, y = rows("s", (4, 3)), rows("y", 4, open_labels)
    check_together(s, rows("t", (4, 3)), y)
    check_together(s, s, None)
    for shape, message in (((4, 5), r"^vocabulary mismatch: "), ((5, 3), r"^they do not hold the same samples: ")):
        with pytest.raises(ValueError, match=message) as caught:
            check_together(s, rows("t", shape), y)
        assert str(caught.value).endswith(f"{s.name} has shape [4, 3] and {tmp_path}/t.npy has shape {list(shape)}")
    with pytest.raises(
        ValueError, match=r"y2\.npy: labels must have one label a sample, shape \[4\] as in .*\[2, 2\]$"
    ):
        check_together(s, s, rows("y2", (2, 2), open_labels))


# --- files that change after they were opened -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_deleted_file_is_an_error_at_the_next_read(tmp_path, kind):
    name = save(kind, tmp_path / "x", rng.standard_normal((50, 4)))
    rows, path = open_logits(name), name.partition("::")[0]
    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    with pytest.raises(ValueError, match=r": can no longer be read as when it was opened \(") as caught:
        rows.read(0, 2)
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("zarr")])
def test_truncated_file_is_an_error_at_the_next_read(tmp_path, kind):
    name = save(kind, tmp_path / "x", rng.standard_normal((50, 4)))
    rows, path = open_logits(name), name.partition("::")[0]
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(ValueError, match=r": can no longer be read as when it was opened \("):
        rows.read(40, 50)


def test_changed_shape_is_an_error_at_the_next_read(tmp_path):
    for kind in ("safetensors", "zarr 3"):
        rows = open_logits(save(kind, tmp_path / "x", rng.standard_normal((50, 4))))
        for shape in ((20, 4), (50, 5), (50, 8)):
            save(kind, tmp_path / "x", rng.standard_normal(shape))
            with pytest.raises(ValueError, match=r": can no longer be read as when it was opened \("):
                rows.read(30, 35)


@pytest.mark.parametrize("kind", ["npz", "packed", "safetensors"])
def test_truncated_archive_is_refused(tmp_path, kind):
    name = save(kind, tmp_path / "x", rng.standard_normal((50, 4)))
    path = name.partition("::")[0]
    os.truncate(path, os.path.getsize(path) // 2)
    fails(name, r"(archive|\.safetensors file) is damaged or cut short \(")


def test_undecodable_name_in_an_archive_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, é=np.zeros((2, 2)))
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    assert fails(path, r"the \.npz archive is damaged or cut short \('utf-8' codec").startswith(f"{path}: ")


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_header_that_promises_too_much_is_not_read(tmp_path, kind):
    path, long = tmp_path / f"x.{kind}", 2**26
    start = b"\x93NUMPY\x02\x00" + struct.pack("<I", long)
    if kind == "npy":
        path.write_bytes(start)
        os.truncate(path, long)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", start + bytes(long))
    tracemalloc.start()
    try:
        fails(path, r"^.*x\.np[yz]: the \.npy file is damaged or cut short \(")
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_damaged_compressed_member_is_an_error(tmp_path):
    name = save("packed", tmp_path / "x", rng.standard_normal((5000, 4)))
    path = Path(name.partition("::")[0])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    rows = open_logits(name)
    with pytest.raises(ValueError, match=r"x\.npz::wanted: can no longer be read as when it was opened"):
        rows.read(0, 5000)


def test_zarr_chunk_is_unpacked_once(tmp_path, monkeypatch):
    """A chunk may hold many more rows than are read at a time, and span any axes."""
    zarr = pytest.importorskip("zarr")
    from gklx._scoring.file_formats import zarr as format_zarr

    taken, picked = [], format_zarr.picked
    monkeypatch.setattr(format_zarr, "picked", lambda *args: (taken.append(args[-2:]), picked(*args))[1])
    for i, (shape, chunks, bands) in enumerate(
        [
            ((1000, 6), (1000, 6), [(0, 1000)]),
            ((1000, 6), (300, 2), [(0, 300), (300, 600), (600, 900), (900, 1000)]),
            ((1, 1000, 6), (1, 600, 6), [(0, 600), (600, 1000)]),
            ((3, 100, 6), (1, 64, 6), [(0, 64), (64, 100), (100, 164), (164, 200), (200, 264), (264, 300)]),
            ((30, 10, 6), (7, 5, 6), [(0, 70), (70, 140), (140, 210), (210, 280), (280, 300)]),
        ]
    ):
        x = rng.standard_normal(shape)
        zarr.create_array(tmp_path / f"{i}.zarr", shape=shape, dtype=x.dtype, chunks=chunks)[...] = x
        rows = open_logits(tmp_path / f"{i}.zarr")
        count = math.prod(shape[:-1])
        for at in range(0, count, 11):
            assert_read(rows.read(at, min(at + 11, count)), x, at, min(at + 11, count), 1)
        assert taken == bands
        assert rows.held_bytes == 3 * 48 * max(b - a for a, b in bands)
        taken.clear()
        format_zarr.forget()


@pytest.mark.parametrize(
    ("shape", "chunks", "numbers"),
    [((30, 5), (1000, 20), 20_000), ((30, 5), (7, 3), 42), ((2, 30, 5), (1, 40, 4), 320), ((5, 6, 7), (2, 4, 7), 112)],
)
def test_zarr_counts_whole_chunks(tmp_path, shape, chunks, numbers):
    """Of a chunk that reaches beyond the array all is unpacked."""
    zarr = pytest.importorskip("zarr")
    zarr.create_array(tmp_path / "x.zarr", shape=shape, dtype="f8", chunks=chunks)[...] = 1
    assert open_logits(tmp_path / "x.zarr").held_bytes == 3 * 8 * numbers


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name here")
@pytest.mark.parametrize("where", ["zarr.json", "a/zarr.json", "a/wanted/zarr.json", "a/wanted/c/0/0", "a/new"])
def test_pipe_within_zarr_is_refused(tmp_path, where):
    """Opening one would block until another process writes."""
    name = save("zarr 3", tmp_path / "x", rng.standard_normal((50, 4)))
    path = tmp_path / "x.zarr" / where
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    program = "import sys; from gklx._scoring.files import open_logits; open_logits(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, name], capture_output=True, text=True, timeout=30, check=False
    )
    message = f"ValueError: {name}: {path.name} in it is neither a file nor a folder"
    assert done.stderr.splitlines()[-1] == message


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_other_files_in_a_zarr_group_are_ignored_without_a_warning(tmp_path, zarr_format):
    x = rng.standard_normal((50, 4))
    name = save(f"zarr {zarr_format}", tmp_path / "x", x)
    (tmp_path / "x.zarr" / "notes.txt").write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_read(open_logits(name).read(3, 9), x, 3, 9, 1)


def test_zarr_folders_may_be_links(tmp_path):
    x = rng.standard_normal((50, 4))
    save("zarr 3", tmp_path / "x", x)
    (tmp_path / "x.zarr" / "b").symlink_to(tmp_path / "x.zarr" / "a")
    for key in ("a/wanted", "b/wanted"):
        assert_read(open_logits(f"{tmp_path / 'x.zarr'}::{key}").read(3, 9), x, 3, 9, 1)
    (tmp_path / "x.zarr" / "a" / "above").symlink_to(tmp_path / "x.zarr")
    fails(
        f"{tmp_path / 'x.zarr'}::a/wanted", "not a Zarr array or group that can be read .*Too many levels of symbolic"
    )


@pytest.mark.parametrize("kind", ["npy", "npz", "zarr 2", "zarr 3"])
def test_error_of_a_damaged_header_is_short(tmp_path, kind):
    path = tmp_path / f"x.{kind[:4].strip()}"
    content = header(descr="x" * 30_000)
    if kind == "npy":
        path.write_bytes(content)
    elif kind == "npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    else:
        save_zarr(path, int(kind[-1]), **{"": np.zeros((3, 2))})
        for each in path.glob("*zarr*"):
            each.write_text(each.read_text().replace("float64", "x" * 30_000).replace("<f8", "x" * 30_000))
    line = fails(path, r"damaged or cut short \(.* … |not a Zarr array or group that can be read \(.* … ")
    assert len(line) < 400 + len(str(path))


def test_damaged_zarr_chunk_is_an_error(tmp_path):
    rows = open_logits(save("zarr 3", tmp_path / "x", rng.standard_normal((50, 4))))
    for path in (tmp_path / "x.zarr" / "a" / "wanted" / "c").rglob("*"):
        if path.is_file():
            path.write_bytes(b"no chunk")
    with pytest.raises(ValueError, match=r"x\.zarr::a/wanted: can no longer be read as when it was opened"):
        rows.read(0, 1)
    (tmp_path / "empty.zarr").mkdir()
    fails(tmp_path / "empty.zarr", r"empty\.zarr: not a Zarr array or group that can be read \(")


def test_full_disk_while_unpacking_is_no_error_of_the_file(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    rows = open_logits(save("packed fortran", tmp_path / "x", rng.standard_normal((50, 4))))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 0, 9))
        with pytest.raises(OSError, match=r"x\.npz::wanted: unpacking it takes [\d,]+ bytes, where 9 are free: '"):
            rows.read(0, 1)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(OSError, match=r"x\.npz::wanted: unpacking it: No space left on device: '"):
        rows.read(0, 1)


@pytest.mark.parametrize("kind", ["npy", "fortran"])
def test_memory_error_is_not_wrapped(tmp_path, monkeypatch, kind):
    def too_much(*args, **kwargs):
        raise MemoryError("8 GiB")

    rows = open_logits(save(kind, tmp_path / "x", np.zeros((2, 2))))
    monkeypatch.setattr(np, "empty", too_much)
    with pytest.raises(MemoryError, match=r"^8 GiB$"):
        rows.read(0, 1)


# --- missing libraries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype", "absent", "message"),
    [
        ("safetensors", "float32", "safetensors", r"\.safetensors needs safetensors, which is not installed \(pip"),
        ("safetensors", "bfloat16", "ml_dtypes", r"bfloat16 in \.safetensors needs ml_dtypes, which is not installed"),
        ("zarr 3", "float32", "zarr", r"Zarr needs zarr, which is not installed \(pip install 'gklx\[score\]'\)$"),
    ],
)
def test_missing_format_library_is_named(tmp_path, monkeypatch, kind, dtype, absent, message):
    name = save(kind, tmp_path / "x", of_dtype(np.zeros((2, 2)), dtype))
    rows = open_logits(name)
    monkeypatch.setitem(sys.modules, absent, None)
    assert fails(name, message).startswith(f"{name}: ")
    if absent != "ml_dtypes":
        with pytest.raises(ValueError, match=message):
            rows.read(0, 1)


@pytest.mark.parametrize("kind", ["npy", "npz", "packed"])
def test_bfloat16_is_read_without_ml_dtypes(tmp_path, monkeypatch, kind):
    x = bfloat16(rng.standard_normal((4, 3)))
    name = save(kind, tmp_path / "x", x)
    for absent in ("ml_dtypes", "safetensors", "zarr"):
        monkeypatch.setitem(sys.modules, absent, None)
    assert_read(open_logits(name).read(0, 4), x, 0, 4, 1)


def test_formats_may_be_mixed(tmp_path):
    x = rng.standard_normal((21, 5)).astype(np.float32)
    s, t = tmp_path / "s.npy", tmp_path / "t.npz"
    np.save(s, x.astype(np.float16))
    np.savez(t, x)
    mixed = gklx.score(s, t, losses=["kl"]).losses["kl"].mean
    assert mixed == gklx.score(x.astype(np.float16).astype(np.float32), x, losses=["kl"]).losses["kl"].mean
