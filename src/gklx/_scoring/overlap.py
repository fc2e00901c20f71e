"""How many of the teacher's k largest classes are among the student's, for each sample."""

from typing import Any

import numpy as np

_BLOCK_BYTES = 2**21
_GROUP = 128


def overlaps(student: Any, teacher: Any, top_k: tuple[int, ...]) -> list[Any]:
    """For each k the number of classes that are among the k largest of both, [n]; of equal logits the first counts."""
    classes = teacher.shape[-1]
    most = min(max(top_k), classes)
    found = [np.zeros(len(teacher), np.int32) for _ in top_k]
    rows = max(1, _BLOCK_BYTES // (classes * teacher.itemsize))
    for start in range(0, len(teacher), rows):
        window = slice(start, start + rows)
        s, t = (_largest(x[window], most) for x in (student, teacher))
        for counts, k in zip(found, top_k, strict=True):
            among = np.zeros((len(s), classes), np.bool_)
            np.put_along_axis(among, s[:, :k], True, axis=-1)
            counts[window] = np.take_along_axis(among, t[:, :k], axis=-1).sum(axis=-1)
    return found


def _largest(x: Any, k: int) -> Any:
    """The classes of the k largest logits of each row, the largest first and the lower class first of equal ones.

    They lie in the k groups with the largest maxima, so that no more than these are sorted.
    """
    n, classes = x.shape
    if x.dtype.itemsize == 2:
        x = x.astype(np.float32)
    groups, rest = divmod(classes, _GROUP)
    if groups < 2 * k:
        return np.argsort(-x, axis=-1, kind="stable")[:, :k]
    maxima = x[:, : groups * _GROUP].reshape(n, groups, _GROUP).max(axis=-1)
    chosen = np.sort(np.argsort(-maxima, axis=-1, kind="stable")[:, :k], axis=-1)  # the lower group first of equal ones
    members = (chosen[:, :, None] * _GROUP + np.arange(_GROUP)).reshape(n, -1)
    if rest:
        tail = np.broadcast_to(np.arange(groups * _GROUP, classes), (n, rest))
        members = np.concatenate([members, tail], axis=-1)
    order = np.argsort(-np.take_along_axis(x, members, axis=-1), axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(members, order, axis=-1)
