"""Type variables of named tuples, for type checkers alone.

At run time a `NamedTuple` of `Generic` has a second base. Older versions of PyTorch, among other libraries, recognise
as a named tuple only a class whose single base is `tuple`, and would find no tensors in another one.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Generic as TupleGeneric

    from typing_extensions import TypeVar  # its default is Any: an annotation may leave the array's type out

    ArrayT = TypeVar("ArrayT", default=Any)
else:
    from typing import TypeVar

    ArrayT = TypeVar("ArrayT")

    class TupleGeneric:
        """Stands in a list of bases and leaves no base behind."""

        def __class_getitem__(cls, item):
            return cls()

        def __mro_entries__(self, bases):
            return ()


__all__ = ["ArrayT", "TupleGeneric"]
