"""The class prior of IKL and GKL: the mean of the teacher's softmax over the samples of each class."""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Generic, NamedTuple, SupportsIndex, TypeVar, cast

import numpy as np

from ._core.call import Array
from ._core.checks import (
    class_count,
    computed_in,
    known_library,
    labelled_logits,
    one_library,
    positive_number,
    type_name,
)
from ._core.formulas import is_class, sample_weights, softmax, valid_mask
from ._core.libraries import Library, device_like, dtype_name, exact_matmul, from_numpy, library_of, to_numpy
from ._core.ranks import ranks_of
from ._generic import ArrayT, TupleGeneric

_Array = TypeVar("_Array")


def class_sums(
    logits: _Array,
    labels: Array,
    num_classes: int,
    *,
    temperature: float = 1.0,
    sample_weight: Array | None = None,
) -> _Array:
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
        NaN in a sample that counts makes the row of its class NaN, and no other.

    Raises
    ------
    TypeError, ValueError
        As in `ikl`; also a C that is not `num_classes`.

    See Also
    --------
    ClassPrior : Keeps the sums, and the prior made from them, over epochs.
    ClassPriorState : The same as a value, for `jax.jit`.

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
    temperature = positive_number("temperature", temperature, "float64" if dtype == xp.float64 else "float32")
    x = xp.astype(library.constant(logits), dtype, copy=False)
    valid = valid_mask(xp, (x,), None, sample_weight)
    has_valid = xp.any(valid, axis=-1)
    p = softmax(xp, x, valid, has_valid, temperature).probabilities
    v = sample_weights(xp, sample_weight, has_valid, dtype)
    v = xp.where(is_class(labels, num_classes) | ~has_valid, v, xp.nan)
    weighted = p * v[..., None]
    if labels.ndim != 1:
        weighted, labels = xp.reshape(weighted, (-1, num_classes)), xp.reshape(labels, (-1,))
    classes = xp.arange(num_classes, dtype=labels.dtype, device=device_like(library, labels))
    member = labels[:, None] == classes[None, :]
    # In the product a NaN would reach every class, since 0 · NaN is NaN. So samples with NaN are set to 0, and the rows
    # of their classes are made NaN afterwards: all rows for a label that names no class.
    finite = xp.all(xp.isfinite(weighted), axis=-1, keepdims=True)
    weighted = xp.where(finite, weighted, 0.0)
    spoiled = xp.any((member | ~is_class(labels, num_classes)[:, None]) & ~finite, axis=0)
    with exact_matmul(library, weighted):
        sums = xp.matmul(xp.matrix_transpose(xp.astype(member, dtype)), weighted)
    sums = xp.where(spoiled[:, None], xp.nan, sums)
    ranks = ranks_of(library)
    return cast(_Array, sums if ranks is None else ranks.total(sums))


class ClassPriorState(NamedTuple, TupleGeneric[ArrayT]):
    """The class prior as a value: two arrays and two functions that return a new state.

    A named tuple, hence a pytree: it lives inside `jax.jit` and `jax.lax.scan`, and `torch.func` and `torch.compile`
    take it as well. `ClassPrior` is an object that holds one.

    See Also
    --------
    ClassPrior : An object that holds one.
    class_sums : The sums of one batch.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> teacher, labels = np.log(np.asarray([[0.25, 0.75], [0.5, 0.5]])), np.asarray([1, 1])
    >>> state = gklx.ClassPriorState.uniform(2, like=teacher)
    >>> state.update(teacher, labels).advance().table
    array([[0.5  , 0.5  ],
           [0.375, 0.625]])
    """

    table: ArrayT
    """[C, C]: row y is the mean softmax of class y up to the last `advance`."""
    sums: ArrayT
    """[C, C]: the class sums since then, of the table's dtype."""

    @classmethod
    def uniform(cls, num_classes: int, *, like: _Array) -> "ClassPriorState[_Array]":
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
        library = known_library("like", like)
        xp = library.namespace()
        kind = {"dtype": getattr(xp, computed_in("like", like)), "device": device_like(library, like)}
        shape = (num_classes, num_classes)
        state = cls(xp.full(shape, 1.0 / num_classes, **kind), xp.zeros(shape, **kind))
        return cast("ClassPriorState[_Array]", state)

    def update(
        self, logits: Array, labels: Array, *, temperature: float = 1.0, sample_weight: Array | None = None
    ) -> "ClassPriorState[ArrayT]":
        """The state with a batch added to its sums; arguments and errors as in `class_sums`."""
        own: Array = self.sums
        one_library({"this state": own, "logits": logits})
        sums = class_sums(logits, labels, own.shape[0], temperature=temperature, sample_weight=sample_weight)
        return self._replace(sums=own + _namespace(sums).astype(sums, own.dtype, copy=False))

    def advance(self) -> "ClassPriorState[ArrayT]":
        """The state whose table is that of the sums, and whose sums are 0.

        A class not seen keeps its row, and so does one whose sums are NaN, since a teacher's logit overflowed. Where
        all are NaN, as after a label that names no class, the table is NaN.
        """
        xp = _namespace(self.table)
        totals = xp.sum(self.sums, axis=-1, keepdims=True)
        seen = (totals > 0) | xp.all(xp.isnan(totals))
        table = xp.where(seen, self.sums / xp.where(seen, totals, 1.0), self.table)
        return ClassPriorState(table, xp.zeros_like(self.sums))


class StateArray(np.ndarray):
    """A NumPy array of a `state_dict` that is pickled in another way.

    By default `torch.load` calls only allowed functions. A plain array is restored by `numpy.dtype`, through which a
    forged file can read foreign memory; to allow it would weaken every later `torch.load` of the process. This array is
    restored by a function that only makes floats of bytes, and that one is allowed.
    """

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> Any:
        if self.dtype not in (np.float32, np.float64):  # the result of an operation on such an array
            return super().__reduce_ex__(protocol)
        return _state_array, (self.dtype.str, self.shape, self.tobytes())


def _state_array(dtype: str, shape: tuple[int, ...], data: bytes) -> np.ndarray:
    """Restores an array of a `state_dict`. Files name this function and its module: both must keep their names."""
    kind = np.dtype(dtype) if dtype in ("<f4", "<f8", ">f4", ">f8") else None
    if kind is None:
        raise ValueError(f"a class prior's arrays must be float32 or float64, got {dtype!r}")
    return np.frombuffer(data, kind).reshape(shape).astype(kind.newbyteorder("=")).view(StateArray)


def allow_in_torch_load() -> None:
    """Allows `torch.load` to restore the arrays of a `state_dict`, where PyTorch is imported."""
    serialization = getattr(sys.modules.get("torch"), "serialization", None)
    if serialization is not None:
        serialization.add_safe_globals([_state_array])


class ClassPrior(Generic[ArrayT]):
    """Keeps the class prior over epochs: it adds up the sums of an epoch, and makes them the table at its end.

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

    See Also
    --------
    ClassPriorState : The same as a value, for `jax.jit`.
    class_sums : The sums of one batch.
    gklx.torch.GKLLoss : Keeps a class prior of its own.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> prior = gklx.ClassPrior(2)
    >>> prior.table
    array([[0.5, 0.5],
           [0.5, 0.5]])
    >>> prior.update(np.log(np.asarray([[0.25, 0.75], [0.5, 0.5]])), np.asarray([1, 1]))
    >>> prior.advance()
    >>> prior.table
    array([[0.5  , 0.5  ],
           [0.375, 0.625]])
    """

    def __init__(self, num_classes: int, *, temperature: float = 1.0, like: ArrayT | None = None) -> None:
        self.num_classes = class_count(num_classes)
        self.temperature = positive_number("temperature", temperature)
        self._library: Library | None = None
        self._device: Any = None
        self._settled = False  # whether the dtype has been chosen
        self._state: ClassPriorState[Array] = ClassPriorState.uniform(self.num_classes, like=np.zeros(1))
        if like is not None:
            library = known_library("like", like)
            self._move(library, like, computed_in("like", like))
        allow_in_torch_load()

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles. Devices of JAX cannot be pickled: the arrays tell the device again."""
        return {**vars(self), "_device": self._device is not None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        on_one = self._library is not None and state["_device"]
        self._device = self._library.device(self._state.sums) if self._library is not None and on_one else None

    @property
    def table(self) -> ArrayT:
        """[C, C]: row y is the mean softmax of class y up to the last `advance`, uniform 1/C before the first."""
        return cast(ArrayT, self._state.table)

    def update(self, logits: Array, labels: Array, sample_weight: Array | None = None) -> None:
        """Adds a batch to the sums; arguments and errors as in `class_sums`. The table stays as it is.

        Not from several threads at once: of two sums one could be lost.
        """
        sums = class_sums(logits, labels, self.num_classes, temperature=self.temperature, sample_weight=sample_weight)
        self._add("logits", sums)

    def advance(self) -> None:
        """Turns the sums since the last call into the table, and sets the sums to 0.

        A class not seen since then keeps its previous row, and so does one whose sums are NaN, since a teacher's logit
        overflowed. Where all are NaN, as after a label that names no class, the table is NaN.
        """
        self._state = self._state.advance()

    def merge(self, other: "ClassPrior[ArrayT]") -> None:
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
        """The state to continue from, as NumPy arrays and plain numbers.

        `torch.load` reads them back from a file by its default ``weights_only=True`` in a process that has imported
        `gklx.torch`, or has made a `ClassPrior` after it imported PyTorch.
        """
        allow_in_torch_load()
        return {
            "num_classes": self.num_classes,
            "temperature": self.temperature,
            "settled": int(self._settled),
            "table": np.array(to_numpy(self._state.table)).view(StateArray),
            "sums": np.array(to_numpy(self._state.sums)).view(StateArray),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict`; library and device of this object stay the same.

        The arrays may also be of another library, such as tensors made from those of the state.

        ValueError where a key is missing or unknown, or an entry does not fit this prior; TypeError where `state` is no
        mapping.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type_name(state)}")
        expected = {"num_classes", "temperature", "settled", "table", "sums"}
        if set(state) != expected:
            raise ValueError(f"state must have the keys {sorted(expected)}, got {sorted(state)}")
        for name in ("num_classes", "temperature"):
            if np.ndim(state[name]) != 0 or state[name] != getattr(self, name):
                raise ValueError(f"state must have {name} {getattr(self, name)}, got {state[name]}")
        if np.ndim(state["settled"]) != 0 or state["settled"] not in (0, 1):
            raise ValueError(f"state must have settled 0 or 1, got {state['settled']!r}")
        square = (self.num_classes, self.num_classes)
        found = {}
        for name in ("table", "sums"):
            x = state[name]
            dtype, shape = dtype_name(getattr(x, "dtype", None)), tuple(getattr(x, "shape", ()))
            if dtype not in ("float32", "float64") or shape != square:
                raise ValueError(f"state must hold {name} as float32 or float64 {square}, got {dtype} {shape}")
            found[name] = np.array(to_numpy(x) if library_of(x) else x)
            if (found[name] < 0).any():
                raise ValueError(f"state must hold {name} without negative numbers, got {found[name].min()}")
        dtype = dtype_name(found["sums"].dtype if state["settled"] else self._state.table.dtype)
        self._settled = self._settled or bool(state["settled"])
        self._state = ClassPriorState(found["table"], found["sums"])
        if self._library is not None:
            self._place(dtype)

    def _add(self, name: str, sums: Array) -> None:
        library = library_of(sums)
        assert library is not None
        if library.backend == "jax" and isinstance(sums, sys.modules["jax"].core.Tracer):
            raise TypeError(f"{name} must not be traced, as under jax.jit, where ClassPriorState keeps the sums")
        if self._library is None:
            self._move(library, sums, dtype_name(self._state.table.dtype if self._settled else sums.dtype))
        elif library is not self._library:
            raise TypeError(f"{name} must be of this prior's library, {self._library.name}, got {library.name}")
        elif (device := library.device(sums)) != self._device:
            here, there = (x or "several devices" for x in (self._device, device))
            raise ValueError(f"{name} must be on this prior's device, {here}, got {there}")
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
