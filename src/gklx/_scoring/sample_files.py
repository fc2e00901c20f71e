"""The values of every sample in a file: a structured `.npy` or Parquet, of the same columns."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import check_writable, replacing
from .values import ValueBlock, Values

_SUFFIXES = (".npy", ".parquet")


def check_sample_file(path: str) -> None:
    """ValueError where the values cannot be written; called before the work."""
    suffix = Path(path).suffix
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path}: per-sample values must go to a .npy or .parquet file, got {suffix or 'no suffix'}")
    if suffix == ".parquet":
        _pyarrow(path)
    check_writable(path)


def write_samples(values: Values, path: str) -> None:
    """Writes one record for each sample, in the order of the input.

    The columns are each loss's ``NAME`` and, where it has parts, ``NAME_mse`` and ``NAME_ce``; ``student_class``,
    ``teacher_class``, ``student_confidence``, ``teacher_confidence``, ``label`` where there are labels, with targets
    ``student_surprisal`` and ``teacher_surprisal``, -log of their probabilities, and ``scored``.
    Of a sample not scored the numbers are NaN and the classes -1; in Parquet null.
    """
    with replacing(path) as part:
        if Path(path).suffix == ".npy":
            _write_npy(values, part)
        else:
            _write_parquet(values, part)


def _write_npy(values: Values, path: Path) -> None:
    with open(path, "wb") as file:
        for at, records in enumerate(_records(values)):
            if at == 0:
                header = {"descr": records.dtype.descr, "fortran_order": False, "shape": (values.samples,)}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(records.tobytes())


def _write_parquet(values: Values, path: Path) -> None:
    pa, parquet = _pyarrow(str(path))
    with contextlib.ExitStack() as stack:
        writer = None
        for records in _records(values):
            of = {}
            for name in records.dtype.names:
                missing = None if name in ("label", "scored") else ~records["scored"]
                of[name] = pa.array(records[name], mask=missing)
            table = pa.table(of)
            writer = writer or stack.enter_context(parquet.ParquetWriter(path, table.schema, compression="zstd"))
            writer.write_table(table)


def _records(values: Values) -> Iterator[Any]:
    for block in values.blocks():
        columns = _columns(block)
        records = np.empty(len(block.scored), dtype=[(name, x.dtype) for name, x in columns.items()])
        for name, x in columns.items():
            records[name] = x
        yield records


def _columns(block: ValueBlock) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parts in block.losses.items():
        found |= (
            {name: parts.loss}
            if parts.mse is None
            else dict(zip((name, f"{name}_mse", f"{name}_ce"), parts, strict=True))
        )
    found |= {"student_confidence": block.student_confidence, "teacher_confidence": block.teacher_confidence}
    if block.student_surprisal is not None:
        found |= {"student_surprisal": block.student_surprisal, "teacher_surprisal": block.teacher_surprisal}
    found = {name: np.where(block.scored, x, np.nan) for name, x in found.items()}
    for name in ("student_class", "teacher_class"):
        found[name] = np.where(block.scored, getattr(block, name), -1)
    if block.label is not None:
        found["label"] = block.label
    return found | {"scored": block.scored}


def _pyarrow(path: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: .parquet needs pyarrow, which is not installed (pip install 'gklx[score]')"
        ) from None
    return pyarrow, pyarrow.parquet
