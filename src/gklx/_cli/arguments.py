"""Types of command-line arguments: they convert text, or raise an error that says what was expected."""

import argparse
import math


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return number


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if (number := finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    if (number := finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def whole(text: str) -> int:
    """A whole number of at least 1."""
    if not _is_whole(text):
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text}")
    return int(text)


def any_whole(text: str) -> int:
    """A whole number, positive, negative or 0."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text}")
    return int(text)


def wholes(text: str) -> tuple[int, ...]:
    """Different whole numbers of at least 1, separated by commas."""
    parts = text.split(",")
    if not all(map(_is_whole, parts)) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"must be different whole numbers with commas between, got {text}")
    return tuple(int(each) for each in parts)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0
