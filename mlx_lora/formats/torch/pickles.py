"""An interpreter of pickles that runs no code. A pickle is a program for a stack machine.

The interpreter knows numbers, strings, plain containers and tensors. Any other global name, and any other opcode, is
refused by name. Nothing is imported and nothing is called. ``read.py`` finds the pickles in a file.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import FormatError
from .tensors import STORAGES, Storage, TensorRef, checked

_MARK = object()
_MAX_DEPTH, _MAX_ITEMS = 32, 2_000_000
_HINT = (
    "Save only the adapter's state dict, a dict of tensors: torch.save({k: v for k, v in ... if 'lora_' in k}, file)."
)
_DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
)


@dataclass(frozen=True)
class _Global:
    """A global name that a pickle may use. ``_reduce`` gives it its meaning; it is never imported."""

    module: str
    name: str


_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
    *(("torch", storage) for storage in STORAGES),
    *(("torch", dtype) for dtype in _DTYPES),
}


class Interpreter:
    """Runs one pickle, from ``start`` in ``data``. ``source`` names the file in errors."""

    def __init__(self, data: bytes, source: Path, start: int = 0):
        self._file = io.BytesIO(data)
        self._file.seek(start)
        self._source = source
        self._stack: list = []
        self._memo: dict = {}

    @property
    def position(self) -> int:
        return self._file.tell()

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self._file):
            name = opcode.name
            if name == "STOP":
                if len(self._stack) != 1 or self._stack[0] is _MARK:
                    raise ValueError("the pickle ends within a value")
                return self._stack.pop()
            getattr(self, f"_op_{name}", self._refuse(name))(argument)
        raise ValueError("the pickle has no end")

    def _refuse(self, name: str):
        def refuse(_argument):
            raise FormatError(f"{self._source}: would run code (pickle opcode {name}), which is refused", _HINT)

        return refuse

    def _items(self) -> list:
        """Pop everything above the last mark, and the mark."""
        for i in range(len(self._stack) - 1, -1, -1):
            if self._stack[i] is _MARK:
                items = self._stack[i + 1 :]
                del self._stack[i:]
                return items
        raise ValueError("a mark is missing")

    def _op_PROTO(self, version):
        if version > 5:
            raise ValueError(f"pickle protocol {version}")

    def _op_FRAME(self, _):
        pass

    def _op_MARK(self, _):
        self._stack.append(_MARK)

    def _push(self, value):
        self._stack.append(value)

    _op_BININT = _op_BININT1 = _op_BININT2 = _op_INT = _op_LONG = _op_LONG1 = _op_LONG4 = _push
    _op_BINFLOAT = _op_FLOAT = _push
    _op_BINUNICODE = _op_SHORT_BINUNICODE = _op_BINUNICODE8 = _op_UNICODE = _push
    _op_BINSTRING = _op_SHORT_BINSTRING = _op_STRING = _push
    _op_BINBYTES = _op_SHORT_BINBYTES = _op_BINBYTES8 = _push

    def _op_NONE(self, _):
        self._push(None)

    def _op_NEWTRUE(self, _):
        self._push(True)

    def _op_NEWFALSE(self, _):
        self._push(False)

    def _op_EMPTY_DICT(self, _):
        self._push({})

    def _op_EMPTY_LIST(self, _):
        self._push([])

    def _op_EMPTY_TUPLE(self, _):
        self._push(())

    def _op_EMPTY_SET(self, _):
        self._push(set())

    def _op_TUPLE(self, _):
        self._push(tuple(self._items()))

    def _op_TUPLE1(self, _):
        self._push((self._stack.pop(),))

    def _op_TUPLE2(self, _):
        self._stack[-2:] = [tuple(self._stack[-2:])]

    def _op_TUPLE3(self, _):
        self._stack[-3:] = [tuple(self._stack[-3:])]

    def _op_LIST(self, _):
        self._push(self._items())

    def _op_DICT(self, _):
        items = self._items()
        self._push({})
        self._put(items)

    def _op_APPEND(self, _):
        value = self._stack.pop()
        self._of(list).append(value)

    def _op_APPENDS(self, _):
        items = self._items()
        self._of(list).extend(items)

    def _op_ADDITEMS(self, _):
        items = self._items()
        self._of(set).update(items)

    def _op_SETITEM(self, _):
        value, key = self._stack.pop(), self._stack.pop()
        self._put([key, value])

    def _op_SETITEMS(self, _):
        self._put(self._items())

    def _put(self, items: list) -> None:
        target = self._of(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str) and key in target:
                raise FormatError(f"{self._source}: holds {key!r} twice", "Save the file again.")
            target[key] = value

    def _of(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"a {kind.__name__} is missing")
        return self._stack[-1]

    def _op_POP(self, _):
        self._stack.pop()

    def _op_POP_MARK(self, _):
        self._items()

    def _op_DUP(self, _):
        self._push(self._stack[-1])

    def _op_BINGET(self, index):
        self._push(self._memo[int(index)])

    _op_LONG_BINGET = _op_GET = _op_BINGET

    def _op_BINPUT(self, index):
        self._memo[int(index)] = self._stack[-1]

    _op_LONG_BINPUT = _op_PUT = _op_BINPUT

    def _op_MEMOIZE(self, _):
        self._memo[len(self._memo)] = self._stack[-1]

    def _op_GLOBAL(self, name):
        self._push_global(*name.split(" ", 1))

    def _op_STACK_GLOBAL(self, _):
        name, module = self._stack.pop(), self._stack.pop()
        self._push_global(str(module), str(name))

    def _push_global(self, module: str, name: str) -> None:
        if (module, name) not in _ALLOWED:
            raise FormatError(
                f"{self._source}: holds {module}.{name}; only tensors and plain containers are read",
                _HINT,
            )
        self._push(_Global(module, name))

    def _op_REDUCE(self, _):
        arguments, what = self._stack.pop(), self._stack.pop()
        if not isinstance(what, _Global) or not isinstance(arguments, tuple):
            self._refuse("REDUCE")(None)
        self._push(self._reduce(what.name, arguments))

    def _reduce(self, name: str, arguments: tuple) -> Any:
        if name == "OrderedDict":
            return dict(arguments[0]) if arguments else {}
        if name == "Size":
            return tuple(arguments[0])
        if name == "device":
            return ":".join(str(a) for a in arguments)
        if name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            return checked(TensorRef(storage, offset, tuple(shape), tuple(strides)))
        if name == "_rebuild_parameter":
            if not isinstance(arguments[0], TensorRef):
                raise ValueError("a parameter without a tensor")
            return arguments[0]
        return self._refuse(f"REDUCE of torch.{name}")(None)

    def _op_BUILD(self, _):
        # PyTorch sets ``_metadata`` on the OrderedDict of a state dict; it does not affect the numbers.
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            self._refuse("BUILD")(None)

    def _op_BINPERSID(self, _):
        tag, kind, key, _location, numel, *_ = self._stack.pop()
        if tag != "storage" or not isinstance(kind, _Global) or kind.name not in STORAGES:
            raise FormatError(
                f"{self._source}: holds a {getattr(kind, 'name', kind)}, which is not an array of numbers", _HINT
            )
        if not isinstance(numel, int) or numel < 0:
            raise ValueError(f"a storage of {numel!r} numbers")
        self._push(Storage(str(key), kind.name, numel))


def replace_tensors(value: Any, change: Callable[[TensorRef], Any], count: list[int], depth: int = 0) -> Any:
    """``value`` with every ``TensorRef`` replaced by ``change(ref)``.

    Containers that contain each other many times could grow without bound: ``count[0]`` counts the items visited, and
    too many are refused.
    """
    count[0] += 1
    if isinstance(value, TensorRef):
        return change(value)
    if depth > _MAX_DEPTH or count[0] > _MAX_ITEMS:
        raise ValueError(f"containers nested more than {_MAX_DEPTH} deep, or of more than {_MAX_ITEMS} items")
    if isinstance(value, dict):
        return {k: replace_tensors(v, change, count, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replace_tensors(v, change, count, depth + 1) for v in value)
    return f"torch.{value.name}" if isinstance(value, _Global) else value
