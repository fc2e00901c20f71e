"""The class prior of IKL and GKL: the mean of the teacher's softmax over the samples of each class."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ._core.checks import class_count, computed_in, labelled_logits, positive_number
from ._core.ranks import ranks_of
from ._core.libraries import Library, beside, dtype_name, exact_matmul, from_numpy, library_of, to_numpy
from ._core.call import Array
from ._core.formulas import is_class, softmax, valid_mask


def class_sums(
    logits: Array,
    labels: Array,
    num_classes: int,
    *,
    temperature: float = 1.0,
    sample_weight: Array | None = None,
) -> Array:
    """The sum of softmax(logits / temperature) over the samples of each class.

    Pure, and additive: the sums of two batches or shards add up to those of both together.

    Parameters
    ----------
    logits : array, shape [..., C], floating
        The teacher's logits; held constant, no gradient flows through.
    labels : integer array, shape [...]
        The class of each sample, in [0, C). On a GPU or under tracing a bad label gives NaN, elsewhere an error.
    num_classes : int
        C.
    temperature : float
        > 0.
    sample_weight : array, shape [...], optional
        A weight ≥ 0 a sample. A sample of weight 0 adds nothing, whatever its logits or label hold.

    Returns
    -------
    array, shape [C, C]
        Row y is the sum over class y, and its own sum the weight of the samples seen; float32, or float64 for float64
        logits. Built by one matrix product, B·C² multiplications. Within `global_batch` over the samples of all ranks.

    Raises
    ------
    TypeError, ValueError
        As in `ikl`; also a C that is not `num_classes`.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> logits = np.log(np.asarray([[0.5, 0.5], [0.25, 0.75], [0.75, 0.25]]))
    >>> gklx.class_sums(logits, np.asarray([0, 1, 1]), 2)
    array([[0.5, 0.5],
           [1. , 1. ]])
    """
    num_classes = class_count(num_classes)
    temperature = positive_number("temperature", temperature)
    library, xp, dtype, labels, sample_weight = labelled_logits(logits, labels, num_classes, sample_weight)
    x = xp.astype(library.constant(logits), dtype, copy=False)
    valid = valid_mask(xp, (x,), None, sample_weight)
    has_valid = xp.any(valid, axis=-1)
    p = softmax(xp, x, valid, has_valid, temperature).probabilities
    v = xp.astype(has_valid, dtype)
    if sample_weight is not None:
        v = xp.where(has_valid, xp.where(sample_weight >= 0, sample_weight, xp.nan), 0.0)
    v = xp.where(is_class(labels, num_classes) | ~has_valid, v, xp.nan)
    classes = xp.arange(num_classes, dtype=labels.dtype, device=beside(library, labels))
    member = xp.astype(labels[..., None] == classes, dtype)
    member = xp.reshape(member, (-1, num_classes))
    weighted = xp.reshape(p * v[..., None], (-1, num_classes))
    with exact_matmul(library, weighted):
        sums = xp.matmul(xp.matrix_transpose(member), weighted)
    ranks = ranks_of(library)
    return sums if ranks is None else ranks.total(sums)


class ClassPriorState(NamedTuple):
    """The class prior as a value: two arrays and two functions that return a new state.

    A named tuple, hence a pytree: it lives inside `jax.jit` and `jax.lax.scan`, and `torch.func` and `torch.compile`
    take it as well. `ClassPrior` is an object that holds one.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> teacher, labels = np.log(np.asarray([[0.25, 0.75], [0.75, 0.25]])), np.asarray([1, 1])
    >>> state = gklx.ClassPriorState.uniform(2, like=teacher)
    >>> state.update(teacher, labels).advance().table
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """

    table: Array
    """[C, C]: row y is the mean softmax of class y up to the last `advance`."""
    sums: Array
    """[C, C]: the class sums since then, of the table's dtype."""

    @classmethod
    def uniform(cls, num_classes: int, *, like: Array) -> "ClassPriorState":
        """The state before the first epoch: 1/C everywhere, in the library, device and dtype computed in of `like`.

        Parameters
        ----------
        num_classes : int
            C.
        like : array, floating
            The logits, or an array like them; under tracing it may be traced.

        Raises
        ------
        TypeError, ValueError
            Bad `num_classes`; `like` is no floating array of a known library.
        """
        num_classes = class_count(num_classes)
        library = library_of(like)
        if library is None:
            raise TypeError(f"like must be an array of a known library, got {type(like).__name__}")
        xp = library.namespace()
        kind = {"dtype": getattr(xp, computed_in("like", like)), "device": beside(library, like)}
        shape = (num_classes, num_classes)
        return cls(xp.full(shape, 1.0 / num_classes, **kind), xp.zeros(shape, **kind))

    def update(
        self, logits: Array, labels: Array, *, temperature: float = 1.0, sample_weight: Array | None = None
    ) -> "ClassPriorState":
        """The state with a batch added to its sums; arguments and errors as in `class_sums`."""
        sums = class_sums(logits, labels, self.sums.shape[0], temperature=temperature, sample_weight=sample_weight)
        return self._replace(sums=self.sums + _namespace(sums).astype(sums, self.sums.dtype, copy=False))

    def advance(self) -> "ClassPriorState":
        """The state whose table is that of the sums, and whose sums are 0; a class not seen keeps its row."""
        xp = _namespace(self.table)
        totals = xp.sum(self.sums, axis=-1, keepdims=True)
        seen = totals != 0
        table = xp.where(seen, self.sums / xp.where(seen, totals, 1.0), self.table)
        return ClassPriorState(table, xp.zeros_like(self.sums))


class ClassPrior:
    """Keeps the class prior over epochs: collects sums while one runs, and turns them into the table after it.

    Parameters
    ----------
    num_classes : int
        C.
    temperature : float
        τ > 0 of the teacher's softmax.
    like : array, optional
        An array of the library, device and dtype that the table shall have. Without it they are those of the first
        `update`, and NumPy's float64 before that.

    Raises
    ------
    TypeError, ValueError
        Bad `num_classes` or `temperature`; `like` is no floating array of a known library.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> prior = gklx.ClassPrior(2)
    >>> prior.table
    array([[0.5, 0.5],
           [0.5, 0.5]])
    >>> prior.update(np.log(np.asarray([[0.25, 0.75], [0.75, 0.25]])), np.asarray([1, 1]))
    >>> prior.advance()
    >>> prior.table
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """

    def __init__(self, num_classes: int, *, temperature: float = 1.0, like: Array | None = None) -> None:
        self.num_classes = class_count(num_classes)
        self.temperature = positive_number("temperature", temperature)
        self._library: Library | None = None
        self._device: Any = None
        self._settled = False  # the dtype is chosen
        self._state = ClassPriorState.uniform(self.num_classes, like=np.zeros(1))
        if like is not None:
            library = library_of(like)
            if library is None:
                raise TypeError(f"like must be an array of a known library, got {type(like).__name__}")
            self._move(library, like, computed_in("like", like))

    @property
    def table(self) -> Array:
        """[C, C]: row y is the mean softmax of class y up to the last `advance`, uniform 1/C before the first."""
        return self._state.table

    def update(self, logits: Array, labels: Array, sample_weight: Array | None = None) -> None:
        """Adds a batch to the sums; arguments and errors as in `class_sums`. The table stays as it is."""
        sums = class_sums(logits, labels, self.num_classes, temperature=self.temperature, sample_weight=sample_weight)
        self._add("logits", sums)

    def advance(self) -> None:
        """Turns the sums since the last call into the table, and starts anew.

        A class not seen since then keeps its previous row.
        """
        self._state = self._state.advance()

    def merge(self, other: "ClassPrior") -> None:
        """Adds the sums of another shard's prior, which stays as it is.

        ValueError where it counts other classes or has another temperature, TypeError where it is of another library.
        """
        if not isinstance(other, ClassPrior):
            raise TypeError(f"other must be a ClassPrior, got {type(other).__name__}")
        for name in ("num_classes", "temperature"):
            own, others = getattr(self, name), getattr(other, name)
            if own != others:
                raise ValueError(f"other must have {name} {own}, got {others}")
        if other._settled:
            self._add("other", other._state.sums)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as NumPy arrays and plain numbers."""
        return {
            "num_classes": self.num_classes,
            "temperature": self.temperature,
            "settled": int(self._settled),
            "table": to_numpy(self._state.table).copy(),
            "sums": to_numpy(self._state.sums).copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`; the library and device stay this object's own.

        ValueError where a key is missing or unknown, or an entry does not fit this prior.
        """
        expected = {"num_classes", "temperature", "settled", "table", "sums"}
        if set(state) != expected:
            raise ValueError(f"state must have the keys {sorted(expected)}, got {sorted(state)}")
        for name in ("num_classes", "temperature"):
            if state[name] != getattr(self, name):
                raise ValueError(f"state must have {name} {getattr(self, name)}, got {state[name]}")
        square = (self.num_classes, self.num_classes)
        found = {name: np.array(state[name]) for name in ("table", "sums")}
        for name, x in found.items():
            if x.shape != square or x.dtype not in (np.float32, np.float64):
                raise ValueError(f"state must hold {name} as float32 or float64 {square}, got {x.dtype} {x.shape}")
        dtype = dtype_name(found["sums"].dtype if state["settled"] else self._state.table.dtype)
        self._settled = self._settled or bool(state["settled"])
        self._state = ClassPriorState(found["table"], found["sums"])
        if self._library is not None:
            self._place(dtype)

    def _add(self, name: str, sums: Array) -> None:
        library = library_of(sums)
        assert library is not None
        if self._library is None:
            self._move(library, sums, dtype_name(self._state.table.dtype if self._settled else sums.dtype))
        elif library is not self._library:
            raise TypeError(f"{name} must be of this prior's library, {self._library.name}, got {library.name}")
        elif library.device(sums) != self._device:
            raise ValueError(f"{name} must be on this prior's device, {self._device}, got {library.device(sums)}")
        own = self._state.sums
        total = own + _namespace(sums).astype(sums, own.dtype, copy=False)
        self._state = self._state._replace(sums=total)

    def _move(self, library: Library, like: Array, dtype: str) -> None:
        self._library, self._device, self._settled = library, library.device(like), True
        self._place(dtype)

    def _place(self, dtype: str) -> None:
        assert self._library is not None
        place = (from_numpy(self._library, x.astype(dtype), self._device) for x in self._state)
        self._state = ClassPriorState(*place)


def _namespace(x: Array) -> ModuleType:
    library = library_of(x)
    assert library is not None
    return library.namespace()
