"""English text from Python's own installation, as sequences of bytes."""

import importlib.util
from typing import NamedTuple

import numpy as np

SPLIT_SEED = 2024
HELD_OUT = 0.2  # the fraction of the documents
START = 0  # stands before the first byte; no text contains it


class Sequences(NamedTuple):
    """Pieces of documents."""

    before: np.ndarray
    """[N, T], int64: the byte before each byte."""
    bytes: np.ndarray
    """[N, T], int64: the bytes; 0 after a document's end."""
    counts: np.ndarray
    """[N, T], boolean: False for padding."""


def load(length: int) -> tuple[Sequences, Sequences]:
    """The documents to train on and those held out, cut into sequences of `length` bytes.

    The documents are the topics of Python's built-in help, some 80 chapters of the language reference.

    Raises
    ------
    ModuleNotFoundError
        This installation of Python lacks them.
    """
    if importlib.util.find_spec("pydoc_data") is None or importlib.util.find_spec("pydoc_data.topics") is None:
        raise ModuleNotFoundError("the text is the module pydoc_data.topics of Python's help, which is not installed")
    from pydoc_data.topics import topics

    documents = [topics[name].encode("ascii", "replace") for name in sorted(topics)]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(documents))
    first = round(HELD_OUT * len(documents))
    return cut([documents[n] for n in order[first:]], length), cut([documents[n] for n in order[:first]], length)


def cut(documents: list[bytes], length: int) -> Sequences:
    """Cut each document into pieces of `length` bytes, the last of which is padded."""
    texts, before = [], []
    for document in documents:
        for start in range(0, len(document), length):
            texts.append(document[start : start + length].ljust(length, bytes([START])))
            before.append(document[start - 1 : start] or bytes([START]))
    rows = np.frombuffer(b"".join(texts), np.uint8).reshape(-1, length).astype(np.int64)
    first = np.frombuffer(b"".join(before), np.uint8).astype(np.int64)[:, None]
    return Sequences(np.concatenate([first, rows[:, :-1]], axis=1), rows, rows != START)
