"""Captions written for MNIST's images: the digit, the thickness of its stroke, and its slant."""

from typing import NamedTuple

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = ("thin", "bold")
SLANTS = ("left-leaning", "upright", "right-leaning")
TO_LEARN = (
    "a handwritten {digit}",
    "the digit {digit}, written by hand",
    "an image of the number {digit}",
    "a {stroke} {digit}",
    "somebody wrote a {slant} {digit}",
    "a {stroke}, {slant} {digit}",
    "{digit}: {slant}, with a {stroke} pen",
)
"""The templates of captions in training."""
HELD_OUT = ("a photo of the number {digit}", "this is a {digit}", "the figure {digit} in white on black")
"""Templates of captions of the digits alone; training does not use them."""
HELD_OUT_IN_FULL = "a photo of a {stroke} and {slant} {digit}"
"""A template of captions with all attributes; training does not use it."""
LENGTH = 64
"""The bytes of a caption, padded with zeros."""


class Attributes(NamedTuple):
    """The attributes of images that captions state, each [N], as indices into the names above."""

    digit: np.ndarray
    stroke: np.ndarray
    slant: np.ndarray


class Thresholds(NamedTuple):
    """The thresholds between the attributes, from the training images."""

    ink: np.ndarray
    """The median ink of each digit, [10]."""
    slant: np.ndarray
    """The slants that separate the three thirds of the images, [2]."""


def thresholds_of(images: np.ndarray, labels: np.ndarray) -> Thresholds:
    """The thresholds between thin and bold strokes, and between the three slants."""
    ink = images.mean(axis=(1, 2, 3))
    return Thresholds(
        np.array([np.median(ink[labels == digit]) for digit in range(len(DIGITS))]),
        np.quantile(_slant(images), [1 / 3, 2 / 3]),
    )


def attributes_of(images: np.ndarray, labels: np.ndarray, thresholds: Thresholds) -> Attributes:
    """The attributes of images [N, 1, height, width] with these digits."""
    bold = images.mean(axis=(1, 2, 3)) > thresholds.ink[labels]
    return Attributes(labels, bold.astype(np.int64), np.searchsorted(thresholds.slant, _slant(images)))


def captions(attributes: Attributes, templates: tuple[str, ...], draw: np.random.Generator) -> np.ndarray:
    """A caption for each image, by a random template: bytes, [N, LENGTH], uint8."""
    choices = draw.integers(len(templates), size=len(attributes.digit))
    return as_bytes([_filled(templates[n], *indices) for n, *indices in zip(choices, *attributes, strict=True)])


def classes(template: str) -> np.ndarray:
    """A caption for each digit, [10, LENGTH], uint8."""
    return as_bytes([template.format(digit=name) for name in DIGITS])


def all_captions(template: str) -> np.ndarray:
    """A caption for each digit, stroke and slant, of which the last varies fastest: [60, LENGTH], uint8."""
    shape = (len(DIGITS), len(STROKES), len(SLANTS))
    return as_bytes([_filled(template, *indices) for indices in np.ndindex(*shape)])


def index(attributes: Attributes) -> np.ndarray:
    """The row in `all_captions` of each image's attributes, [N]."""
    return (attributes.digit * len(STROKES) + attributes.stroke) * len(SLANTS) + attributes.slant


def as_bytes(texts: list[str]) -> np.ndarray:
    """Texts as rows of `LENGTH` bytes, padded with zeros.

    Raises
    ------
    ValueError
        A text is longer.
    """
    encoded = [text.encode() for text in texts]
    longest = max(encoded, key=len)
    if len(longest) > LENGTH:
        raise ValueError(f"a caption may have {LENGTH} bytes, got {len(longest)}: {longest.decode()!r}")
    return np.frombuffer(b"".join(text.ljust(LENGTH, b"\0") for text in encoded), np.uint8).reshape(-1, LENGTH)


def _filled(template: str, digit: int, stroke: int, slant: int) -> str:
    return template.format(digit=DIGITS[digit], stroke=STROKES[stroke], slant=SLANTS[slant])


def _slant(images: np.ndarray) -> np.ndarray:
    """The slant of each image, [N]: how far its ink moves right per row upwards, by regression of columns on rows."""
    ink = images[:, 0]
    rows, columns = np.indices(ink.shape[1:])
    total = ink.sum(axis=(1, 2))
    row = (ink * rows).sum(axis=(1, 2)) / total
    column = (ink * columns).sum(axis=(1, 2)) / total
    off_row, off_column = rows - row[:, None, None], columns - column[:, None, None]
    return -(ink * off_row * off_column).sum(axis=(1, 2)) / (ink * off_row**2).sum(axis=(1, 2))
