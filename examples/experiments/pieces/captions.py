"""Captions written for MNIST's images: a digit by its name, how thick it was drawn and which way it leans."""

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
"""Of which every image's caption in training is one."""
HELD_OUT = ("a photo of the number {digit}", "this is a {digit}", "the figure {digit} in white on black")
"""For classes, in no caption of the training."""
HELD_OUT_IN_FULL = "a photo of a {stroke} and {slant} {digit}"
"""For an image in particular, likewise."""
LENGTH = 64
"""Of a caption in bytes, with zeros after its end."""


class Looks(NamedTuple):
    """What captions say of images, each [N], indices into the names above."""

    digit: np.ndarray
    stroke: np.ndarray
    slant: np.ndarray


class Scale(NamedTuple):
    """What divides the looks, from the images to learn from."""

    ink: np.ndarray
    """[10], the median ink of a digit."""
    slant: np.ndarray
    """[2], thirds of the slants."""


def scale_of(images: np.ndarray, labels: np.ndarray) -> Scale:
    """Where thin ends and bold begins, and the slants between which an image is called upright."""
    ink = images.mean(axis=(1, 2, 3))
    return Scale(
        np.array([np.median(ink[labels == digit]) for digit in range(len(DIGITS))]),
        np.quantile(_slant(images), [1 / 3, 2 / 3]),
    )


def looks(images: np.ndarray, labels: np.ndarray, scale: Scale) -> Looks:
    """What there is to say of images [N, 1, height, width] of these digits."""
    bold = images.mean(axis=(1, 2, 3)) > scale.ink[labels]
    return Looks(labels, bold.astype(np.int64), np.searchsorted(scale.slant, _slant(images)))


def captions(of: Looks, templates: tuple[str, ...], draw: np.random.Generator) -> np.ndarray:
    """A caption for each image after a template drawn at random: bytes, [N, LENGTH], uint8."""
    chosen = draw.integers(len(templates), size=len(of.digit))
    return as_bytes([_filled(templates[n], *each) for n, *each in zip(chosen, *of, strict=True)])


def classes(template: str) -> np.ndarray:
    """A caption for each digit, [10, LENGTH], uint8."""
    return as_bytes([template.format(digit=name) for name in DIGITS])


def every_look(template: str) -> np.ndarray:
    """A caption for each digit, stroke and slant, the last varying fastest: [60, LENGTH], uint8."""
    shape = (len(DIGITS), len(STROKES), len(SLANTS))
    return as_bytes([_filled(template, *each) for each in np.ndindex(*shape)])


def index(of: Looks) -> np.ndarray:
    """The row of each image's look in `every_look`, [N]."""
    return (of.digit * len(STROKES) + of.stroke) * len(SLANTS) + of.slant


def as_bytes(texts: list[str]) -> np.ndarray:
    """Texts as rows of `LENGTH` bytes, zeros after the end.

    Raises
    ------
    ValueError
        A text is longer than that.
    """
    encoded = [text.encode() for text in texts]
    longest = max(encoded, key=len)
    if len(longest) > LENGTH:
        raise ValueError(f"a caption may have {LENGTH} bytes, got {len(longest)}: {longest.decode()!r}")
    return np.frombuffer(b"".join(text.ljust(LENGTH, b"\0") for text in encoded), np.uint8).reshape(-1, LENGTH)


def _filled(template: str, digit: int, stroke: int, slant: int) -> str:
    return template.format(digit=DIGITS[digit], stroke=STROKES[stroke], slant=SLANTS[slant])


def _slant(images: np.ndarray) -> np.ndarray:
    """How far an image's ink moves to the right for a row upwards, [N]: a regression of columns on rows."""
    ink = images[:, 0]
    rows, columns = np.indices(ink.shape[1:])
    total = ink.sum(axis=(1, 2))
    row = (ink * rows).sum(axis=(1, 2)) / total
    column = (ink * columns).sum(axis=(1, 2)) / total
    off_row, off_column = rows - row[:, None, None], columns - column[:, None, None]
    return -(ink * off_row * off_column).sum(axis=(1, 2)) / (ink * off_row**2).sum(axis=(1, 2))
