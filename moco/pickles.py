"""Pickles read as data: nothing in one is imported, called or changed. Needs no torch.

Python's unpickler, and torch's for weights too, does what a file tells it to: looks names up, calls
them, sets attributes, hashes whatever is the key of a dict. `parse` only walks the opcodes. Plain
values become plain values; what a pickle would have Python make becomes a `Call` that names it.
`Values` then makes values of the few calls that are known to be harmless, by code of its own; other
objects become `Inert` text. Time and memory are bounded by the size of the file.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from typing import BinaryIO

MOST_OPCODES, MOST_VALUES, DEEPEST = 5_000_000, 200_000, 50  # far above any checkpoint's


class Refused(ValueError):
    """A pickle of harmful or endless content; the message goes on from "FILE is refused: "."""


class Inert(str):
    """Stands for an object of another program: "<module.Class>"."""


class Call:
    """What a pickle would have Python look up (`args` is None) or make."""

    __slots__ = ("args", "items", "made", "name", "state")

    def __init__(self, name: str, args: tuple | None = None) -> None:
        self.name, self.args = name, args
        self.state = None  # what would be given to __setstate__
        self.items: dict | list | None = None  # what would be set in it, or appended to it
        self.made = None  # a tensor, made once however often it is named


# ------------------------------------------------------------------------------------------------
# Opcodes
# ------------------------------------------------------------------------------------------------


def parse(file: BinaryIO) -> object:
    """Plain values and `Call`s of the pickle at the file's position, which moves behind it.

    Raises:
        pickle.UnpicklingError: it calls something that is neither known nor a class; "GLOBAL name".
        Refused: a key of a dict that takes long to hash, or opcodes without end.
        Exception: of any kind, for a damaged pickle.
    """
    machine = _Machine()
    for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
        if count > MOST_OPCODES:
            raise Refused("it has no end of opcodes")
        if opcode.name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"GLOBAL pickle.{opcode.name}")
        _OPERATIONS[opcode.name](machine, arg)
    (value,) = machine.stack
    return value


class _Machine:
    """The stack, the stacks below each mark, and what was put by for later."""

    def __init__(self) -> None:
        self.stack: list = []
        self.below: list[list] = []
        self.memo: dict[int, object] = {}

    def mark(self, _: object) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        found, self.stack = self.stack, self.below.pop()
        return found

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self, _: object) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def put(self, number: int | None) -> None:
        number = len(self.memo) if number is None else number
        if number > MOST_OPCODES:
            raise Refused("it has no end of values")
        self.memo[number] = self.stack[-1]

    def take(self, count: int) -> None:
        values = tuple(self.stack[len(self.stack) - count :])
        if len(values) < count:
            raise IndexError("the stack is empty")
        del self.stack[len(self.stack) - count :]
        self.stack.append(values)

    def top(self, kind: type, doing: str) -> object:
        """The list or dict on the stack, or that of the `Call` there."""
        into = self.stack[-1]
        if isinstance(into, Call):
            into.items = kind() if into.items is None else into.items
            into = into.items
        if type(into) is not kind:
            raise pickle.UnpicklingError(f"{doing} a {type(into).__name__}")
        return into

    def append(self, values: list) -> None:
        self.top(list, "something is appended to").extend(values)

    def set_items(self, values: list) -> None:
        into = self.top(dict, "items are set in")
        for key, value in zip(values[::2], values[1::2], strict=True):
            into[checked_key(key)] = value

    def name_from_stack(self, _: object) -> None:
        module, name = self.stack.pop(-2), self.stack.pop()
        if type(module) is not str or type(name) is not str:
            raise pickle.UnpicklingError("a name is no text")
        self.push(Call(_modern(f"{module}.{name}")))

    def call(self, _: object) -> None:
        """What the opcode REDUCE would call: functions that are not known are refused."""
        args, function = self.stack.pop(), self.stack.pop()
        name = function.name if isinstance(function, Call) else type(function).__name__
        known = isinstance(function, Call) and function.args is None and _is_harmless(name)
        if not known or type(args) is not tuple:
            raise pickle.UnpicklingError(f"GLOBAL {name}")
        self.push(Call(name, args))

    def new(self, _: object) -> None:
        """What would be an instance of a class, whatever the class."""
        args, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Call) or kind.args is not None or type(args) is not tuple:
            raise pickle.UnpicklingError("an instance of what is no class")
        self.stack.append(Call(kind.name, args))

    def build(self, _: object) -> None:
        state, into = self.stack.pop(), self.stack[-1]
        if not isinstance(into, Call) or into.args is None:
            raise pickle.UnpicklingError("GLOBAL pickle.BUILD of what is no object")
        into.state = state

    def persistent_text(self, text: str) -> None:
        """Of protocol 0, which has the tuple that torch gave as text: torch.load cannot read it."""
        found = _STORAGE_TEXT.fullmatch(text)
        if not found:
            raise ValueError(f"a storage that is none of torch's: {text[:100]}")
        kind, key, place, count = found.groups()
        storage = ("storage", Call(kind), key, place, int(count), None)
        self.stack.append(Call(PERSISTENT, (storage,)))


PERSISTENT = "persistent_id"  # name of a Call for what lies outside of the pickle
_STORAGE_TEXT = re.compile(
    r"\('storage', <class '(torch\.[\w.]{1,40})'>, '(\d{1,20})', '([\w:]{0,40})', (\d{1,18})"
    r"(?:, None)?\)"
)
_OPERATIONS: dict[str, Callable[[_Machine, object], object]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(
        "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING UNICODE "
        "SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 "
        "FLOAT BINFLOAT".split(),
        _Machine.push,
    ),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_SET": lambda m, _: m.push(Call("builtins.set", ())),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, number: m.push(m.memo[number])),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.take(1),
    "TUPLE2": lambda m, _: m.take(2),
    "TUPLE3": lambda m, _: m.take(3),
    "LIST": lambda m, _: m.push(m.since_mark()),
    "APPEND": lambda m, _: m.append([m.stack.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: m.append(m.since_mark())),
    "FROZENSET": lambda m, _: m.push(Call("builtins.frozenset", (m.since_mark(),))),
    "DICT": lambda m, _: (values := m.since_mark(), m.push({}), m.set_items(values)),
    "SETITEM": lambda m, _: (m.take(2), m.set_items(list(m.stack.pop()))),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GLOBAL": lambda m, name: m.push(Call(_modern(name.replace(" ", ".", 1)))),
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new,
    "NEWOBJ_EX": lambda m, _: (m.stack.pop(), m.new(None)),  # keywords
    "BUILD": _Machine.build,
    "BINPERSID": lambda m, _: m.push(Call(PERSISTENT, (m.stack.pop(),))),
    "PERSID": _Machine.persistent_text,
}


def checked_key(key: object) -> object:
    """A key whose hash is known at once and is shared by no other: a nested tuple takes longer than
    anybody waits, and whole numbers from 2^61 on can be chosen to have one hash, as can tuples: of
    a short one its text is the key. One of numpy's numbers or texts is a plain one."""
    if isinstance(key, Call) and key.name == NUMPY_SCALAR:
        key = _numpy_scalar(key, Values(_LONGEST_KEY), 0)
    elif isinstance(key, Call) and key.args is None:  # torch.float32
        return Inert(f"<{key.name}>")
    if _is_plain_key(key):
        return key
    if type(key) is tuple and len(key) <= 8 and all(map(_is_plain_key, key)):
        text = repr(tuple(k[:20] if type(k) in (str, bytes) else k for k in key))
        return Inert(text)
    what = "large number" if type(key) is int else type(key).__name__
    what = key.name if isinstance(key, Call) else what
    raise Refused(f"a {what} is the key of a dict, where text and numbers are expected")


NUMPY_SCALAR = "numpy._core.multiarray.scalar"
_LONGEST_KEY = 1000  # bytes of one of numpy's texts


def _is_plain_key(key: object) -> bool:
    if type(key) is int:
        return abs(key) < 2**61 - 1
    return key is None or type(key) in (str, bytes, bool, float)


_OLD_NAMES = {"__builtin__.": "builtins.", "copy_reg.": "copyreg.", "numpy.core.": "numpy._core."}


def _modern(name: str) -> str:
    """One name for what Python 2 and numpy 1 had elsewhere."""
    for old, new in _OLD_NAMES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


# Of the standard library, what people keep beside weights.
_PLAIN_MODULES = {"collections", "datetime", "decimal", "fractions", "pathlib", "uuid"}


def _is_harmless(name: str) -> bool:
    """Whether a call makes a value or an object. Of other packages this is told by the name: that
    of a class is capitalised. None of them is called here, so what is at stake is the message."""
    module, _, last = name.rpartition(".")
    package = module.partition(".")[0]
    if name in TENSORS or name in _RULES or package in _PLAIN_MODULES:
        return True
    return last[:1].isupper() and package not in sys.stdlib_module_names


# ------------------------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------------------------

# Calls that make tensors, for which `Values` is given a function.
TENSORS = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.numeric._frombuffer",
}


class Values:
    """Plain values in place of the `Call`s that `parse` gives.

    Args:
        size: bytes of the file; arrays and texts that are made take no more than a few times it.
        tensor: makes what a call named in `TENSORS` stands for; None: they stay `Inert`.
    """

    def __init__(self, size: int, tensor: Callable[[Call, Values], object] | None = None) -> None:
        self.room, self.count, self.tensor = 4 * size, 0, tensor

    def charge(self, size: int) -> None:
        """Count `size` bytes that are about to be made."""
        self.room -= size
        if self.room < 0:
            raise Refused("it would become many times as large as the file")

    def plain(self, node: object, depth: int = 0) -> object:
        """The value of a node.

        Raises:
            Refused: values without end, or larger than the file.
            pickle.UnpicklingError: a call that is not harmless with these arguments.
        """
        self.count += 1
        if self.count > MOST_VALUES or depth > DEEPEST:
            raise Refused("it has no end of nested values")
        if isinstance(node, Call):
            return self._of_call(node, depth)
        if isinstance(node, dict):
            return {key: self.plain(value, depth + 1) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)([self.plain(value, depth + 1) for value in node])
        return bytes(node) if isinstance(node, bytearray) else node

    def _of_call(self, call: Call, depth: int) -> object:
        if call.args is None:
            return Inert(f"<{call.name}>")
        if call.name in TENSORS and self.tensor is not None:
            if call.made is None:
                call.made = self.tensor(call, self)
            return call.made
        if call.name in _RULES:
            return _RULES[call.name](call, self, depth + 1)
        if call.items is not None:  # of a class that is a dict or a list
            return self.plain(call.items, depth + 1)
        return Inert(f"<{call.name}>")


def _inert(call: Call, values: Values, depth: int) -> Inert:
    return Inert(f"<{call.name}>")


def _attributes(call: Call, values: Values, depth: int) -> object:
    return values.plain(call.state if isinstance(call.state, dict) else {}, depth)


def _mapping(call: Call, values: Values, depth: int) -> object:
    """Of OrderedDict, defaultdict, Counter, dict: arguments are pairs, a dict or a factory."""
    found = {}
    for arg in call.args:
        pairs = arg.items() if isinstance(arg, dict) else arg if isinstance(arg, list) else ()
        found |= {checked_key(key): value for key, value in pairs}
    return values.plain(found | (call.items or {}), depth)


def _collection(call: Call, values: Values, depth: int) -> object:
    elements = values.plain(call.items or list(call.args[0] if call.args else ()), depth)
    kind = call.name.rpartition(".")[2]
    if kind in ("set", "frozenset"):
        return {checked_key(element) for element in elements}
    return elements if kind == "list" else tuple(elements)


def _bytes(call: Call, values: Values, depth: int) -> bytes:
    """bytes() or bytearray() of a text, and _codecs.encode; not of a length, which takes memory."""
    content = values.plain(call.args[0], depth) if call.args else b""
    if isinstance(content, int):
        raise pickle.UnpicklingError(f"GLOBAL {call.name}")
    values.charge(len(content))
    return content.encode("latin1") if isinstance(content, str) else bytes(content)


def _by_protocol_0(call: Call, values: Values, depth: int) -> object:
    """copyreg._reconstructor(class, object, None), or of a class that is a dict or a list (class,
    dict, content)."""
    new = Call(call.args[0].name, ())
    new.state, new.items = call.state, call.items
    if new.items is None and isinstance(call.args[2], (dict, list)):
        new.items = call.args[2]
    return values.plain(new, depth)


# Codes of numpy's types, as struct has them.
_NUMBERS = {
    "f2": "e", "f4": "f", "f8": "d", "b1": "?", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "i1": "b", "i2": "h", "i4": "i", "i8": "q",
}  # fmt: skip


def numpy_type(call: object) -> tuple[str, str]:
    """(byte order, code) of a call of numpy.dtype, whose state has the order: "<" and "f4"."""
    if not isinstance(call, Call) or call.name != "numpy.dtype" or not call.args:
        raise pickle.UnpicklingError("a type that is none of numpy's")
    order = call.state[1] if isinstance(call.state, tuple) and len(call.state) > 1 else "="
    return str(order), str(call.args[0])


def _numpy_scalar(call: Call, values: Values, depth: int) -> object:
    order, code = numpy_type(call.args[0])
    data = values.plain(call.args[1], depth) if len(call.args) > 1 else None
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes):
        return Inert("<numpy scalar>")
    if code in _NUMBERS:
        return struct.unpack(("<" if order in "=|" else order) + _NUMBERS[code], data)[0]
    if code.startswith("U"):
        values.charge(len(data))
        return data.decode("utf-32-be" if order == ">" else "utf-32-le")
    return Inert(f"<numpy scalar of type {order}{code}>")


_RULES: dict[str, Callable[[Call, Values, int], object]] = {
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace"), _attributes),
    **dict.fromkeys(("collections.OrderedDict", "collections.defaultdict", "collections.Counter",
                     "builtins.dict"), _mapping),
    **dict.fromkeys(("builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple",
                     "torch.Size"), _collection),
    **dict.fromkeys(("builtins.bytes", "builtins.bytearray", "_codecs.encode"), _bytes),
    **dict.fromkeys(("builtins.complex", "builtins.range", "builtins.slice", "functools.partial",
                     "numpy.dtype", "torch.device", "torch.serialization._get_layout"), _inert),
    "copyreg._reconstructor": _by_protocol_0,
    NUMPY_SCALAR: _numpy_scalar,
}  # fmt: skip


def peek(path: str | os.PathLike) -> dict:
    """The values beside the tensors of a file of torch.save, of which little is read.

    Raises:
        Exception: of any kind, for a file that is damaged or no such file.
    """
    with zipfile.ZipFile(path) as archive:
        (entry,) = (e for e in archive.infolist() if e.filename.endswith("/data.pkl"))
        if entry.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile("it is compressed")
        data = archive.read(entry)
    content = Values(len(data)).plain(parse(io.BytesIO(data)))
    if not isinstance(content, dict):
        raise Refused(f"it holds a {type(content).__name__} instead of a dict")
    return content
