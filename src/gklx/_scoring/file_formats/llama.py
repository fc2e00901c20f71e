"""What llama.cpp's `llama-perplexity --kl-divergence-base` writes: log-probabilities in 16-bit codes, and the tokens.

Little-endian: ``_logits_``, the context's length, the size of the vocabulary, the number of chunks, the tokens. Then
for each chunk a row for every position of its second half but the last: a scale and a smallest log-probability in
float32, and a code c a class, log p = scale c + smallest. The token after a position is the target of its row.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .rows import Room, Stamp, reading, stamp

MAGIC = b"_logits_"
_HEAD = struct.Struct("<8sIii")
_LOWEST = -16.0
"""llama.cpp's tool treats a class of at most this log-probability as one of probability 0."""
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class _Layout:
    """The layout of the file."""

    context: int
    classes: int
    chunks: int

    @property
    def rows_a_chunk(self) -> int:
        return self.context - 1 - self.context // 2

    @property
    def codes_a_row(self) -> int:
        """The 16-bit words of a row: codes, scale, smallest log-probability, and one of padding where C is odd."""
        return 2 * ((self.classes + 1) // 2) + 4

    @property
    def first_row(self) -> int:
        return _HEAD.size + 4 * self.chunks * self.context

    @property
    def size(self) -> int:
        return self.first_row + 2 * self.chunks * self.rows_a_chunk * self.codes_a_row


@dataclass(frozen=True)
class LlamaTargets:
    """The token that follows each row."""

    name: str
    path: str
    layout: _Layout
    stamps: tuple[Stamp, ...]
    dtype: str = "int32"
    held_bytes: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """One target for each row."""
        return (self.layout.chunks * self.layout.rows_a_chunk,)

    def read(self, start: int, stop: int, room: Room | None = None) -> Any:
        """Targets as int64."""
        of, found, at = self.layout, np.empty(stop - start, np.int64), start
        with reading(self.name), open(self.path, "rb", buffering=0) as file:
            while at < stop:
                chunk, row = divmod(at, of.rows_a_chunk)
                count = min(stop - at, of.rows_a_chunk - row)
                file.seek(_HEAD.size + 4 * (chunk * of.context + of.context // 2 + 1 + row))
                tokens = np.empty(count, "<i4")
                _fill(file, tokens)
                found[at - start : at - start + count] = tokens
                at += count
        return found


@dataclass(frozen=True)
class LlamaRows:
    """Log-probabilities as they are stored: the probabilities of a row add up to 1 to the precision of the codes."""

    name: str
    path: str
    layout: _Layout
    stamps: tuple[Stamp, ...]
    dtype: str = "float32"
    held_bytes: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """[samples, classes]."""
        return self.layout.chunks * self.layout.rows_a_chunk, self.layout.classes

    @property
    def targets(self) -> LlamaTargets:
        """The targets that the file holds."""
        return LlamaTargets(self.name, self.path, self.layout, self.stamps)

    def read(self, start: int, stop: int, room: Room | None = None) -> Any:
        """Rows in float32."""
        width, classes = self.layout.codes_a_row, self.layout.classes
        codes = np.empty((stop - start, width), "<u2")
        with reading(self.name), open(self.path, "rb", buffering=0) as file:
            file.seek(self.layout.first_row + 2 * start * width)
            _fill(file, codes)
        head = codes[:, :4].copy().view("<f4").astype(np.float32, copy=False)
        shape = stop - start, classes
        found = np.empty(shape, np.float32) if room is None else room.array(shape, np.dtype(np.float32))
        with np.errstate(all="ignore"):  # a damaged scale may overflow, and its sample is then undefined
            np.multiply(codes[:, 4 : 4 + classes], head[:, :1], out=found, dtype=np.float32, casting="unsafe")
            found += head[:, 1:]
        return found


def open_llama(name: str, path: str) -> LlamaRows:
    """The log-probabilities of a dump; ValueError where header and size of the file do not agree."""
    stamps = (stamp(path),)
    with Path(path).open("rb") as file:
        head = file.read(_HEAD.size)
        size = os.fstat(file.fileno()).st_size
    if len(head) < _HEAD.size:
        raise ValueError(f"{name}: the llama.cpp dump is cut short: its header has {_HEAD.size} bytes, got {len(head)}")
    _, context, classes, chunks = _HEAD.unpack(head)
    layout = _Layout(context, classes, chunks)
    said = f"context {context:,}, vocabulary {classes:,}, {chunks:,} chunks"
    if classes < 1 or chunks < 1 or layout.rows_a_chunk < 1:
        raise ValueError(f"{name}: the llama.cpp dump is damaged or empty: its header says {said}")
    if size != layout.size:
        raise ValueError(
            f"{name}: the llama.cpp dump is damaged or cut short: its header promises {layout.size:,} bytes "
            f"({said}), and there are {size:,}"
        )
    return LlamaRows(name, path, layout, stamps)


def divergence(student: Any, teacher: Any) -> Any:
    """KL of each row as the tool computes it, [n], from log-probabilities as they are stored, [n, C].

    The teacher's are taken as they are, and a class of at most e^-16 is left out. The student's are normalised, since
    the tool has its logits.
    """
    found = np.empty(len(teacher))
    rows = max(1, _BLOCK_BYTES // (4 * teacher.shape[-1]))
    with np.errstate(all="ignore"):
        for start in range(0, len(teacher), rows):
            s, t = student[start : start + rows], teacher[start : start + rows]
            largest = s.max(axis=-1, keepdims=True)
            p = np.exp(s - largest)
            # In float64: the sum of a peaked softmax is 1 plus the small probabilities of the other classes.
            total = largest + np.log(p.sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
            ratios = t - s
            ratios += total
            np.exp(t, out=p)
            p *= t > _LOWEST
            p *= ratios
            found[start : start + rows] = p.sum(axis=-1)
    return found


def _fill(file: Any, x: Any) -> None:
    """Reads the next bytes of the file."""
    rest = memoryview(x.reshape(math.prod(x.shape)).view(np.uint8))
    while rest:
        count = file.readinto(rest)
        if not count:
            raise EOFError("it has become shorter")
        rest = rest[count:]
