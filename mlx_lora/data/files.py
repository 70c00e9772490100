"""Rows of one file: JSON lines, JSON, CSV, TSV, Parquet or Arrow, each also compressed with gzip.

Row numbers count lines in JSON lines files, and rows in other formats; a CSV header is not counted. Parquet and Arrow
fill keys that a nested object does not have with null, so null is taken as "no such key" there.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from .faults import Fault, Place, counted
from .shapes import CHATS

_FIRST_ROWS = 50  # characters of a CSV file to read when looking for its delimiter


class Row(NamedTuple):
    """A value as read, and where it was read."""

    where: Place
    value: Any


def file_format(name: str) -> str | None:
    """The extension in ``FORMATS`` of a file name, with or without ``.gz``; None for other files."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in FORMATS else None


def read_file(path: Path, faults: list[Fault], notes: list[str]) -> list[Row]:
    """The rows of a file; ``faults`` receives what cannot be read, ``notes`` how ambiguous files were read."""
    name, data = str(path), path.read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        elif name.lower().endswith(".gz"):
            raise OSError("it does not begin as one")
    except (OSError, EOFError, zlib.error) as error:
        faults.append(Fault(Place(name), f"not a gzip file ({error}): compress it again"))
        return []
    if file_format(name) not in _BINARY and (encoding := _other_encoding(data)):
        fix = f"convert it with iconv -f {encoding} -t UTF-8, or save it as UTF-8"
        faults.append(Fault(Place(name), f"is written in {encoding}, not in UTF-8: {fix}"))
        return []
    values = FORMATS[file_format(name)](data.removeprefix(b"\xef\xbb\xbf"), name, faults, notes)
    return [Row(Place(name, number), value) for number, value in values]


def _other_encoding(data: bytes) -> str:
    """UTF-16 or UTF-32, by the byte order mark or the zero bytes of an ASCII letter; "" for other encodings."""
    if data[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "UTF-32"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    zeros = tuple(byte == 0 for byte in data[:4])
    return {(False, True, False, True): "UTF-16LE", (True, False, True, False): "UTF-16BE"}.get(zeros, "")


def numbered(values: Iterable[Any]) -> list[tuple[int, Any]]:
    """Values with their numbers from 1."""
    return list(enumerate(values, 1))


def without_nulls(value: Any) -> Any:
    """Nested objects without the keys whose value is None."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


Values = list[tuple[int, Any]]


def _json_lines(data: bytes, name: str, faults: list[Fault], notes: list[str]) -> Values:
    if data.lstrip()[:1] == b"[":  # a JSON list in a file named .jsonl
        return _json(data, name, faults, notes)
    rows = []
    # Not splitlines(): it also splits at U+2028 and others, which JSON strings may contain unescaped.
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            before = len(faults)
            value = _parse(line, Place(name, number), faults)
            if len(faults) == before:
                rows.append((number, value))
    return rows


def _json(data: bytes, name: str, faults: list[Fault], notes: list[str]) -> Values:
    """A list of rows, an object that holds one list of rows, one row, or JSON lines in a file named .json."""
    try:
        value = json.loads(data)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and data.lstrip()[:1] == b"{":
            return _json_lines(data, name, faults, notes)
        value = _parse(data, Place(name), faults)
    except (UnicodeDecodeError, RecursionError):
        value = _parse(data, Place(name), faults)
    if value is None:
        return []
    if isinstance(value, list):
        return numbered(value)
    if not isinstance(value, dict):
        faults.append(Fault(Place(name), "is one value, not a list of rows: write [{...}, {...}]"))
        return []
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if any(key.lower() in CHATS for key in lists):
        return [(1, value)]
    if not lists:
        return _columns(value, name, faults, notes)
    if len(lists) > 1:
        text = f"holds several lists ({', '.join(lists)}): save each list in its own file"
        faults.append(Fault(Place(name), text))
        return []
    notes.append(f"Reading the rows in {lists[0]!r} of {name}")
    return numbered(value[lists[0]])


def _columns(value: dict, name: str, faults: list[Fault], notes: list[str]) -> Values:
    """The rows of an object that holds a column under each key: a list, or pandas' object of row names and values."""
    if not value or not all(isinstance(column, list) or _by_row_name(column) for column in value.values()):
        return [(1, value)]
    columns = {key: column if isinstance(column, dict) else dict(enumerate(column)) for key, column in value.items()}
    first = next(iter(columns.values()))
    if any(column.keys() != first.keys() for column in columns.values()):
        lengths = ", ".join(f"{key}: {len(column)}" for key, column in columns.items())
        text = f"holds columns whose rows differ ({lengths}): write a list of rows, [{{...}}, {{...}}]"
        faults.append(Fault(Place(name), text))
        return []
    rows = [{key: column[row] for key, column in columns.items()} for row in first]
    notes.append(f"Reading {name} by columns ({', '.join(columns)}): {counted(len(rows), 'row')}")
    return numbered(rows)


def _by_row_name(column: Any) -> bool:
    return isinstance(column, dict) and bool(column) and all(key.isdecimal() for key in column)


def _parse(data: bytes, where: Place, faults: list[Fault]) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        faults.append(_not_utf8(where, error))
    except json.JSONDecodeError as error:
        fix = "write one {...} on each line, quotes and newlines escaped"
        spot = f"line {error.lineno}, column {error.colno}" if where.number is None else f"column {error.colno}"
        faults.append(Fault(where, f"not JSON ({error.msg}): {fix}", spot=spot))
    except RecursionError:
        faults.append(Fault(where, "nested too deeply: flatten the row"))
    return None


def _not_utf8(where: Place, error: UnicodeDecodeError) -> Fault:
    return Fault(where, "not UTF-8: save the file as UTF-8", spot=f"byte {error.start + 1}")


def _csv(data: bytes, name: str, faults: list[Fault], notes: list[str], delimiter: str = ",") -> Values:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        faults.append(_not_utf8(Place(name), error))
        return []
    before = csv.field_size_limit(max(csv.field_size_limit(), min(len(text) + 1, 2**31 - 1)))
    number, rows = 0, []
    try:
        found = max((delimiter, *";\t|,"), key=lambda mark: _consistency(text, mark))
        if found != delimiter:
            delimiter = found
            notes.append(f"Reading {name} with {delimiter!r} as the delimiter")
        # strict: otherwise a quote that is never closed takes the rest of the file into one cell.
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(lines, [])
        if twice := sorted({key for key in header if header.count(key) > 1}):
            faults.append(Fault(Place(name), f"has two columns named {', '.join(twice)}: rename one of them"))
            return []
        for number, cells in enumerate(filter(None, lines), 1):
            if len(cells) != len(header):
                text = f"does not have the {counted(len(header), 'cell')} of the header: "
                text += f"quote texts that contain {delimiter!r}"
                faults.append(Fault(Place(name, number), text, spot=counted(len(cells), "cell")))
            else:
                rows.append((number, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        fix = "put texts with quotes or newlines between double quotes, and double each quote inside"
        faults.append(Fault(Place(name, number + 1), f"not CSV ({error}): {fix}"))
    finally:
        csv.field_size_limit(before)
    return rows


def _consistency(text: str, delimiter: str) -> tuple[bool, float, bool]:
    """How well a delimiter fits a file, for comparison with other delimiters.

    Returns: whether the header has several cells, the share of the first rows with as many cells as the header, and
    whether no header cell begins with a blank, as it would after a comma inside a text.
    """
    head: list[str] = []
    rows: list[bool] = []
    try:
        lines = filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
        head = next(lines, [])
        rows.extend(len(cells) == len(head) for cells in itertools.islice(lines, _FIRST_ROWS))
    except csv.Error:
        pass
    if len(head) < 2:
        return False, 0.0, False
    return True, sum(rows) / max(len(rows), 1), not any(cell.startswith(" ") for cell in head)


def _tsv(data: bytes, name: str, faults: list[Fault], notes: list[str]) -> Values:
    return _csv(data, name, faults, notes, "\t")


def _parquet(data: bytes, name: str, faults: list[Fault], notes: list[str]) -> Values:
    def read(arrow: Any) -> Any:
        from pyarrow import parquet

        return parquet.read_table(arrow.BufferReader(data))

    return _table(read, name, faults)


def _arrow(data: bytes, name: str, faults: list[Fault], notes: list[str]) -> Values:
    def read(arrow: Any) -> Any:
        try:
            return arrow.ipc.open_file(arrow.BufferReader(data)).read_all()
        except arrow.ArrowInvalid:  # the streaming format, in which datasets keeps its cache
            return arrow.ipc.open_stream(arrow.BufferReader(data)).read_all()

    return _table(read, name, faults)


def _table(read: Any, name: str, faults: list[Fault]) -> Values:
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(
            f"Reading {name} needs the pyarrow package.",
            "pip install datasets pyarrow, or convert the file to .jsonl or .csv.",
        ) from None
    try:
        rows = read(pyarrow).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        faults.append(Fault(Place(name), f"cannot be read as {file_format(name)} ({said}): write the file again"))
        return []
    return numbered({key: without_nulls(value) for key, value in row.items()} for row in rows)


FORMATS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv}
_BINARY = (".parquet", ".arrow", ".feather")
FORMATS |= {".parquet": _parquet, ".arrow": _arrow, ".feather": _arrow}
