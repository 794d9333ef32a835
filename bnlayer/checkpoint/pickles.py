"""Read a pickle as data. Nothing in it is ever called, imported or looked up.

Python's own unpickler does what a pickle says: it imports names, calls them, and sizes tables by numbers in the file.
This one builds plain containers, and a record (`Call`) wherever a pickle asks for something to be called. What a record
means is for a format's module to say, by the names that it knows.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, cast

from ..errors import CheckpointError
from .source import Stream


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """Something that the pickle wants to be called, and what it wants done to the result.

    Attributes:
        function: what; a `Global`, or whatever else stood there.
        arguments: with what.
        state: what the result was to be updated with (`BUILD`), or None.
        items: what was to be put into it by key, in order.
        elements: what was to be appended or added.
    """

    function: Any
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The function's full name."""
        function = self.function
        if isinstance(function, Persistent) and isinstance(function.identity, tuple) and len(function.identity) > 1:
            function = function.identity[
                1
            ]  # old files of torch wrap a module's class: ("module", class, its source ...)
        return str(function) if isinstance(function, Global) else "?"


@dataclass(frozen=True, eq=False)
class Persistent:
    """A reference to something outside of the pickle, such as a storage of torch."""

    identity: Any


class _Mark:
    """Where an argument list begins on the stack."""


_MARK: Final = _Mark()
_NOTHING: Final = object()
_MOST_BITS: Final = 1024  # random states have numbers of 128; Python refuses to print much longer ones
_DEEPEST_KEY: Final = 8
_MOST_MEMBERS: Final = 1000  # of a key that is a tuple, on one level
_CONSTANTS: Final[dict[str, Callable[[], Any]]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
# Opcodes whose argument is the value.
_VALUES: Final = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip


class Reader:
    """The pickle machine, with data in place of deeds."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: Stream) -> Any:
        """Read one pickle from where the stream stands; afterwards it stands behind it.

        Raises:
            CheckpointError: it is truncated or malformed.
        """
        try:
            for opcode, argument, _ in pickletools.genops(cast("Any", stream)):
                if opcode.name == "STOP":
                    break
                self._step(opcode.name, argument)
            return self._pop()  # without a STOP genops raises
        except CheckpointError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, UnicodeError, OverflowError) as error:
            raise CheckpointError(f"{self._place}: the pickle is damaged ({type(error).__name__}: {error}).") from error

    def _step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
                self._refuse(f"it has a number of {argument.bit_length()} bits")
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name not in ("PROTO", "FRAME"):
            step: Callable[[Any], None] | None = getattr(self, f"_do_{name.lower()}", None)
            if step is None:
                self._refuse(f"it uses {name}, which no checkpoint needs")
            step(argument)

    # The stack

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            self._refuse("something is taken from an empty stack")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            self._refuse("something is changed on an empty stack")
        return self._stack[-1]

    def _to_mark(self) -> list[Any]:
        marks = (at for at in range(len(self._stack) - 1, -1, -1) if self._stack[at] is _MARK)
        at = next(marks, None)
        if at is None:
            self._refuse("a list of arguments has no beginning")
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    def _do_mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _do_pop(self, _: Any) -> None:
        if not self._stack:
            self._refuse("something is taken from an empty stack")
        self._stack.pop()

    def _do_pop_mark(self, _: Any) -> None:
        self._to_mark()

    def _do_dup(self, _: Any) -> None:
        self._stack.append(self._top())

    # The memo: a dict, so that a number in the file sizes nothing

    def _do_put(self, index: int) -> None:
        self._memo[index] = self._top()

    _do_binput = _do_long_binput = _do_put

    def _do_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def _do_get(self, index: int) -> None:
        found = self._memo.get(index, _NOTHING)
        if found is _NOTHING:
            self._refuse(f"entry {index} of the memo is used and never made")
        self._stack.append(found)

    _do_binget = _do_long_binget = _do_get

    # Containers

    def _do_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._to_mark()))

    def _do_tuple1(self, _: Any) -> None:
        self._stack.append((self._pop(),))

    def _do_tuple2(self, _: Any) -> None:
        last = self._pop()
        self._stack.append((self._pop(), last))

    def _do_tuple3(self, _: Any) -> None:
        last, middle = self._pop(), self._pop()
        self._stack.append((self._pop(), middle, last))

    def _do_list(self, _: Any) -> None:
        self._stack.append(self._to_mark())

    def _do_dict(self, _: Any) -> None:
        self._stack.append(dict(_pairs(self._to_mark())))

    def _do_frozenset(self, _: Any) -> None:
        self._stack.append(frozenset(map(_key, self._to_mark())))

    def _do_append(self, _: Any) -> None:
        self._extend([self._pop()])

    def _do_appends(self, _: Any) -> None:
        self._extend(self._to_mark())

    _do_additems = _do_appends

    def _do_setitem(self, _: Any) -> None:
        value = self._pop()
        self._put_items([self._pop(), value])

    def _do_setitems(self, _: Any) -> None:
        self._put_items(self._to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(map(_key, values))
        elif isinstance(target, Call):
            target.elements.extend(values)
        else:
            self._refuse(f"something is appended to a {type(target).__name__}")

    def _put_items(self, values: list[Any]) -> None:
        target = self._top()
        items = target.items if isinstance(target, Call) else target
        if not isinstance(items, dict):
            self._refuse(f"an item is set in a {type(target).__name__}")
        items.update(_pairs(values))

    # What another unpickler would import and call

    def _do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(Global(module, name))

    def _do_stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            self._refuse("a name is referred to by something that is no text")
        self._stack.append(Global(module, name))

    def _do_reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(arguments, tuple):
            self._refuse("something is called with arguments that are no tuple")
        self._stack.append(Call(function, arguments))

    _do_newobj = _do_reduce

    def _do_newobj_ex(self, _: Any) -> None:
        keywords, arguments, function = self._pop(), self._pop(), self._pop()
        if not isinstance(arguments, tuple) or not isinstance(keywords, dict):
            self._refuse("something is made with arguments that are none")
        self._stack.append(Call(function, arguments, items=dict(keywords)))

    def _do_build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, Call):
            self._refuse(f"a {type(target).__name__} is given a state")
        target.state = state

    def _do_binpersid(self, _: Any) -> None:
        self._stack.append(Persistent(self._pop()))

    def _refuse(self, cause: str) -> NoReturn:
        raise CheckpointError(f"{self._place}: the pickle is damaged: {cause}.")


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    if len(values) % 2:
        raise ValueError("a key has no value")
    return zip(map(_key, values[::2]), values[1::2], strict=True)


def _key(value: Any) -> Any:
    """What is to be hashed: Python hashes a tuple in a tuple by recursion in C, without a limit."""
    level, depth = [value], 0
    while level := [member for one in level if isinstance(one, tuple) for member in one]:
        depth += 1
        if depth > _DEEPEST_KEY or len(level) > _MOST_MEMBERS:
            raise ValueError("a key is a tuple that is nested too deep or too large")
    return value
