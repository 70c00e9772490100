"""PyTorch's pickle files (``.pt``, ``.bin``, ``.ckpt``, ``.pth``), read and written without PyTorch and without pickle.

A pickle is a program. This file runs it on a machine of its own that knows numbers, strings, plain containers and
tensors; any other name, and any opcode beyond those, is refused by name before anything happens. Nothing is imported
and nothing called. Both layouts are read: the zip archive of today, whose arrays are read one by one, and the stream of
PyTorch before 1.6. Sizes that a file declares are held against what it has. ``torch_write.py`` writes.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import FormatError

_MARK = object()
_MAX_STREAM = 16 << 30  # bytes; files of that age are read whole
_MAX_DEPTH, _MAX_ITEMS = 32, 2_000_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_HINT = (
    "Save only the adapter's state dict, a dict of tensors: torch.save({k: v for k, v in ... if 'lora_' in k}, file)."
)

# torch storage class -> (numpy type that holds the bits, MLX type)
STORAGES = {
    "FloatStorage": (np.float32, mx.float32),
    "DoubleStorage": (np.float64, mx.float32),
    "HalfStorage": (np.float16, mx.float16),
    "BFloat16Storage": (np.uint16, mx.bfloat16),
    "LongStorage": (np.int64, mx.int64),
    "IntStorage": (np.int32, mx.int32),
    "ShortStorage": (np.int16, mx.int16),
    "CharStorage": (np.int8, mx.int8),
    "ByteStorage": (np.uint8, mx.uint8),
    "BoolStorage": (np.bool_, mx.bool_),
}
_DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
)


@dataclass(frozen=True)
class _Global:
    """A name that the program may mention; it stands for what ``_reduce`` does with it and is never looked up."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    kind: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor as the pickle describes it: where its numbers lie."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


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


def is_pickle(path: Path) -> bool:
    """Whether a file begins as PyTorch's archives or streams do."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError:
        return False
    return head == b"PK\x03\x04" or head[:1] == b"\x80"


def read_torch(path: Path, start: int = 0, size: int | None = None) -> Any:
    """What ``torch.load(path, weights_only=True)`` would give, tensors as MLX arrays; float64 becomes float32.

    Args:
        start, size: the part of the file to read, in bytes, where it lies in an archive.

    Raises:
        FormatError: the file is damaged, or wants to run code; the names it wanted are told.
    """
    return _read(path, start, size, arrays=True)


def peek_torch(path: Path) -> Any:
    """As ``read_torch``, with a ``TensorRef`` in place of each tensor: no array is read."""
    return _read(path, 0, None, arrays=False)


def _read(path: Path, start: int, size: int | None, arrays: bool) -> Any:
    try:
        window = np.memmap(path, np.uint8, "r")[start : None if size is None else start + size]
        if window[:4].tobytes() == b"PK\x03\x04":
            value, storages = _read_zip(window, path, start)
        else:
            value, storages = _read_stream(window, path)
        return _map(value, lambda ref: _array(ref, storages), [0]) if arrays else value
    except FormatError:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, OverflowError, struct.error) as error:
        raise FormatError(
            f"{path}: is not a whole PyTorch file ({type(error).__name__}: {error})", "Save or download the file again."
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, MemoryError, RecursionError, RuntimeError) as error:
        raise FormatError(
            f"{path}: is not a whole PyTorch file ({error})", "Save or download the file again."
        ) from None


# -- the machine -----------------------------------------------------------------------------------------------------


class _Machine:
    """Runs one pickle. ``source`` names the file in errors."""

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
                    raise ValueError("the pickle ends amid a value")
                return self._stack.pop()
            getattr(self, f"_op_{name}", self._refuse(name))(argument)
        raise ValueError("the pickle has no end")

    def _refuse(self, name: str):
        def refuse(_argument):
            raise FormatError(f"{self._source}: wants to run code (pickle opcode {name}); refused", _HINT)

        return refuse

    def _items(self) -> list:
        """What lies above the last mark; takes the mark off too."""
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
                f"{self._source}: holds {module}.{name}; only tensors and plain containers are read, nothing is run",
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
            return _checked(TensorRef(storage, offset, tuple(shape), tuple(strides)))
        if name == "_rebuild_parameter":
            if not isinstance(arguments[0], TensorRef):
                raise ValueError("a parameter without a tensor")
            return arguments[0]
        return self._refuse(f"REDUCE of torch.{name}")(None)

    def _op_BUILD(self, _):
        # PyTorch hangs ``_metadata`` on the OrderedDict of a state dict; it says nothing of the numbers.
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            self._refuse("BUILD")(None)

    def _op_BINPERSID(self, _):
        tag, kind, key, _location, numel, *_ = self._stack.pop()
        if tag != "storage" or not isinstance(kind, _Global) or kind.name not in STORAGES:
            raise FormatError(
                f"{self._source}: holds a {getattr(kind, 'name', kind)}, which is no array of numbers", _HINT
            )
        if not isinstance(numel, int) or numel < 0:
            raise ValueError(f"a storage of {numel!r} numbers")
        self._push(_Storage(str(key), kind.name, numel))


def _checked(ref: TensorRef) -> TensorRef:
    """Refuse a tensor that reaches beyond its storage, or that repeats few numbers into many."""
    sizes = (ref.offset, *ref.shape, *ref.strides)
    if not isinstance(ref.storage, _Storage) or len(ref.shape) != len(ref.strides) or len(ref.shape) > 8:
        raise ValueError("a tensor without storage or strides")
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**62 for n in sizes):
        raise ValueError(f"a tensor of shape {ref.shape} and strides {ref.strides}")
    if math.prod(ref.shape):
        last = ref.offset + sum((n - 1) * stride for n, stride in zip(ref.shape, ref.strides, strict=True))
        if last >= ref.storage.numel or math.prod(ref.shape) > ref.storage.numel:
            raise ValueError(f"a tensor of shape {ref.shape} in a storage of {ref.storage.numel} numbers")
    return ref


def _map(value: Any, change: Callable[[TensorRef], Any], count: list[int], depth: int = 0) -> Any:
    """``value`` with ``change`` of every ``TensorRef`` in its place. Containers that hold each other many times over,
    which would grow without end, are refused by ``count``."""
    count[0] += 1
    if isinstance(value, TensorRef):
        return change(value)
    if depth > _MAX_DEPTH or count[0] > _MAX_ITEMS:
        raise ValueError(f"containers nested more than {_MAX_DEPTH} deep, or of more than {_MAX_ITEMS} items")
    if isinstance(value, dict):
        return {k: _map(v, change, count, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, change, count, depth + 1) for v in value)
    return f"torch.{value.name}" if isinstance(value, _Global) else value


def _array(ref: TensorRef, storages: dict[str, np.ndarray] | _Stored) -> mx.array:
    numbers, dtype = STORAGES[ref.storage.kind]
    flat = storages[ref.storage.key]
    if flat.size < ref.storage.numel * np.dtype(numbers).itemsize:
        raise ValueError(f"storage {ref.storage.key} is shorter than declared")
    flat = flat[: ref.storage.numel * np.dtype(numbers).itemsize].view(numbers)
    if not math.prod(ref.shape):
        return mx.zeros(ref.shape, dtype)
    steps = tuple(stride * flat.itemsize for stride in ref.strides)
    view = np.lib.stride_tricks.as_strided(flat[ref.offset :], ref.shape, steps, writeable=False)
    if numbers is np.float64:
        view = view.astype(np.float32)
    array = mx.array(view if view.flags.c_contiguous else np.ascontiguousarray(view))
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


# -- the two layouts -------------------------------------------------------------------------------------------------


def _read_zip(window: np.ndarray, path: Path, start: int) -> tuple[Any, _Stored]:
    with zipfile.ZipFile(_Bytes(window)) as archive:
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            if info.filename in entries:
                raise ValueError(f"two entries {info.filename!r}")
            entries[info.filename] = info
        programs = [name for name in entries if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError(f"{len(programs)} entries data.pkl")
        root = programs[0].removesuffix("data.pkl")
        stored = sum(info.file_size for info in entries.values())
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()) or stored > window.size:
            raise ValueError("its entries are compressed, or larger than the file")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder").strip() != b"little":
            raise ValueError("its numbers are big-endian")
        value = _Machine(archive.read(programs[0]), path).run()
    return value, _Stored(path, start, window, {n.removeprefix(f"{root}data/"): info for n, info in entries.items()})


class _Bytes(io.RawIOBase):
    """A mapped file as a file, for zipfile."""

    def __init__(self, data: np.ndarray):
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._data.size)[whence]
        if at < 0:
            raise OSError("a seek to before the start")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        part = self._data[self._at : self._at + len(buffer)]
        buffer[: part.size] = part.data
        self._at += part.size
        return part.size


class _Stored:
    """Storage key -> its bytes, read and checked when asked for; the last one is kept, for tensors that share it."""

    def __init__(self, path: Path, start: int, window: np.ndarray, entries: dict[str, zipfile.ZipInfo]):
        self._path, self._start, self._window, self._entries = path, start, window, entries
        self._last: tuple[str, np.ndarray] | None = None

    def __getitem__(self, key: str) -> np.ndarray:
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        info = self._entries[key]
        at = info.header_offset
        head = self._window[at : at + 30].tobytes()
        if head[:4] != b"PK\x03\x04":
            raise ValueError(f"entry {key} is not where the directory says")
        name, extra = struct.unpack("<HH", head[26:30])
        at += 30 + name + extra
        if at + info.file_size > self._window.size:
            raise ValueError(f"storage {key} lies outside the file")
        self._last = None  # freed before the next is read
        # Read, not mapped: what is mapped and copied counts twice.
        flat = np.fromfile(self._path, np.uint8, info.file_size, offset=self._start + at)
        if flat.size != info.file_size or zlib.crc32(flat) != info.CRC:
            raise ValueError(f"storage {key} is damaged")
        self._last = key, flat
        return flat


def _read_stream(window: np.ndarray, path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    if window.size > _MAX_STREAM:
        raise ValueError("too large for a file of PyTorch before 1.6")
    data = window.tobytes()
    machine = _Machine(data, path)
    magic = machine.run()
    if magic != _LEGACY_MAGIC:
        raise ValueError("not PyTorch's magic number")
    for _ in range(2):  # protocol version, sizes of C types
        machine = _Machine(data, path, machine.position)
        machine.run()
    machine = _Machine(data, path, machine.position)
    value = machine.run()
    keys = _Machine(data, path, machine.position)
    names, at = keys.run(), keys.position
    kinds: dict[str, _Storage] = {}
    _map(value, lambda ref: kinds.setdefault(ref.storage.key, ref.storage), [0])
    flat, storages = np.frombuffer(data, np.uint8), {}
    for name in names:
        (numel,) = struct.unpack_from("<q", data, at)
        if name not in kinds or numel != kinds[name].numel:
            raise ValueError(f"storage {name} has {numel} numbers")
        size = numel * np.dtype(STORAGES[kinds[name].kind][0]).itemsize
        storages[str(name)] = flat[at + 8 : at + 8 + size]
        at += 8 + size
    return value, storages
