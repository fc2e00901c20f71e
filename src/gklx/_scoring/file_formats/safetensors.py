"""Hugging Face's `.safetensors`, opened anew for each read, so that what a read has mapped is freed after it."""

from dataclasses import dataclass
from typing import Any

from .rows import Room, Stamp, chosen, picked, reading, reason, stamp, widened

_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool"}
_NAMES |= {f"{sign}{bits}": f"{word}{bits}" for sign, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class SafetensorsRows:
    """A tensor of a file."""

    name: str
    path: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    axes: int
    stamps: tuple[Stamp, ...]
    held_bytes: int = 0

    def read(self, start: int, stop: int, room: Room | None = None) -> Any:
        """Rows of the flattened leading axes."""
        safe_open = _safe_open(self.name)
        with reading(self.name), safe_open(self.path, framework="numpy") as file:
            x = picked(file.get_slice(self.key), self.shape, self.axes, start, stop)
        return widened(x.view("V2") if self.dtype == "bfloat16" else x, self.axes, room)


def open_safetensors(name: str, path: str, key: str | None, axes: int) -> SafetensorsRows:
    """A tensor of a file; ValueError where there is none of that key, or the file is damaged."""
    safe_open = _safe_open(name)
    from safetensors import SafetensorError

    stamps = (stamp(path),)
    try:
        with safe_open(path, framework="numpy") as file:
            key = chosen(name, key, list(file.keys()))
            found = file.get_slice(key)
            shape, dtype = tuple(found.get_shape()), found.get_dtype()
    except SafetensorError as error:
        raise ValueError(f"{name}: the .safetensors file is damaged or cut short ({reason(error)})") from None
    if dtype == "BF16":
        try:
            import ml_dtypes  # noqa: F401, safetensors needs it for bfloat16
        except ImportError:
            raise ValueError(
                f"{name}: bfloat16 in .safetensors needs ml_dtypes, which is not installed (pip install 'gklx[score]')"
            ) from None
    return SafetensorsRows(name, path, key, shape, _NAMES.get(dtype, dtype), axes, stamps)


def _safe_open(name: str) -> Any:
    try:
        from safetensors import safe_open
    except ImportError:
        raise ValueError(
            f"{name}: .safetensors needs safetensors, which is not installed (pip install 'gklx[score]')"
        ) from None
    return safe_open
