"""The page's list of adapters, and uploads into ``--adapters-dir``.

An upload is one request: its query names the adapter and its files with their sizes, and the body is the concatenated
files. The server writes them to a hidden folder, checks them against the base, and renames the folder. A failed upload
leaves no files.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ...base.locking import check_unlocked, locked
from ...base.writing import writing
from ...errors import AdapterError, ConfigError, MLXLoRAError
from ..bank import AdapterBank, Listed
from ..engine import BusyError
from ..residents import signature_of
from .connection import CLOSED
from .streams import server_of

router = APIRouter(include_in_schema=False)
CONFIG, WEIGHTS = "adapter_config.json", ".safetensors"
_TEMPORARY = ".upload-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".npy")
_AT_ONCE = 4  # uploads at the same time
_MOST_FILES = 16
_CONFIG_LIMIT = 1_000_000  # bytes


@router.get("/page/adapters")
async def adapters(request: Request) -> dict[str, Any]:
    """List every adapter with its facts, and whether the server accepts uploads."""
    server, cache = server_of(request), _state(request, "adapter_facts", dict)
    bank = server.engine.bank
    listed = await run_in_threadpool(lambda: [_facts(bank, each, cache) for each in bank.listed()])
    upload = {"limit": server.config.upload_limit} if bank.folder is not None else None
    return {"adapters": listed, "upload": upload}


@router.post("/page/adapters", status_code=201)
async def upload(request: Request, name: str, file: Annotated[list[str], Query()]) -> dict[str, Any]:
    """Upload an adapter. Each ``file`` is ``NAME:SIZE``, in the order of the files in the body."""
    server = server_of(request)
    bank, going = server.engine.bank, _state(request, "uploads", set)
    if bank.folder is None:
        raise ConfigError("this server does not accept uploads", "Start it with --adapters-dir FOLDER.")
    _check_name(name, bank, (server.name, "base"))
    files = _announced(file)
    total = sum(files.values())
    if total > server.config.upload_limit:
        raise HTTPException(
            413, f"the files have {total} bytes; an upload may have at most {server.config.upload_limit}"
        )
    if len(going) >= _AT_ONCE:
        raise BusyError(f"{_AT_ONCE} uploads are already running", "Upload again later.")
    mark = object()
    going.add(mark)
    try:
        with _temporary(bank.folder) as folder:
            with writing(folder, needed=total):
                await _receive(request, folder, files)
            return await run_in_threadpool(_accept, bank, folder, name)
    except ClientDisconnect:
        raise HTTPException(CLOSED, "the client closed the request") from None
    finally:
        going.discard(mark)


def remove_left(folder: Path | None) -> None:
    """Remove unfinished uploads in ``folder`` that a killed server left."""
    for left in folder.glob(f"{_TEMPORARY}*") if folder is not None else ():
        try:
            check_unlocked(left)
        except MLXLoRAError:  # locked: another server is receiving it
            continue
        shutil.rmtree(left, ignore_errors=True)


def _check_name(name: str, bank: AdapterBank, taken: tuple[str, ...]) -> None:
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"an uploaded adapter cannot be named {name[:200]!r}",
            "Use up to 100 letters, digits, dots, dashes and underscores, such as pirate-v2.",
        )
    if name in taken or name in bank or (bank.folder / name).exists():
        raise AdapterError(f"{name!r} already exists", "Choose another name.")


def _announced(given: list[str]) -> dict[str, int]:
    """Return file sizes by name. Raises: AdapterError: lists every problem with the names and sizes."""
    faults, files = [], {}
    for each in given[: _MOST_FILES + 1]:
        name, _, size = each.rpartition(":")
        if name.lower().endswith(_PICKLES):
            faults.append(f"{name[:200]!r} is not a safetensors file, and unpickling a file can run code")
        elif name != CONFIG and not (name.endswith(WEIGHTS) and _NAME.fullmatch(name)):
            faults.append(f"{name[:200]!r} is neither {CONFIG} nor the name of a {WEIGHTS} file")
        elif name.lower() in map(str.lower, files):  # macOS ignores case in file names
            faults.append(f"{name!r} is listed twice")
        if not (size.isascii() and size.isdecimal() and len(size) < 16 and int(size) > 0):
            faults.append(f"{name[:200]!r} has the size {size[:20]!r}; it must be a number of bytes above 0")
        else:
            files[name] = int(size)
    if len(given) > _MOST_FILES:
        faults.append(f"there are {len(given)} files; an adapter may have at most {_MOST_FILES}")
    if not faults and CONFIG not in files:
        faults.append(f"{CONFIG} is missing")
    if not faults and len(files) == 1:
        faults.append(f"a {WEIGHTS} file is missing")
    if files.get(CONFIG, 0) > _CONFIG_LIMIT:
        faults.append(f"{CONFIG} is larger than {_CONFIG_LIMIT} bytes")
    if faults:
        hint = f"Send {CONFIG} and the {WEIGHTS} files of one folder; mlx-lora convert writes them from other formats."
        raise AdapterError("\n".join(faults), hint)
    return files


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Create a hidden folder in ``folder`` and remove it afterwards. A lock keeps ``remove_left`` away from it."""
    with writing(folder):
        outer = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder))
    try:
        with locked(outer):
            inner = outer / "adapter"
            inner.mkdir()
            yield inner
    finally:
        shutil.rmtree(outer, ignore_errors=True)


async def _receive(request: Request, folder: Path, files: dict[str, int]) -> None:
    """Write the body into ``files`` in chunks. Raises: AdapterError: the body's size is not the sum of the sizes."""
    waiting, out, left = list(files.items()), None, 0
    try:
        async for chunk in request.stream():
            while chunk:
                if not left:
                    if not waiting:
                        raise AdapterError(
                            "the body is longer than the sizes of its files", "Give each file's size in bytes."
                        )
                    if out is not None:
                        out.close()
                    name, left = waiting.pop(0)
                    out = open(folder / name, "xb")  # noqa: SIM115 closed below
                part, chunk = chunk[:left], chunk[left:]
                left -= len(part)
                await run_in_threadpool(out.write, part)
    finally:
        if out is not None:
            out.close()
    if left or waiting:
        raise AdapterError("the body is shorter than the sizes of its files", "Give each file's size in bytes.")


def _accept(bank: AdapterBank, folder: Path, name: str) -> dict[str, Any]:
    """Check an uploaded adapter and rename its folder. Raises: AdapterError: not an adapter for this model."""
    try:
        adapter, alone = bank.check(folder)
    except MLXLoRAError as error:
        raise AdapterError(error.message.replace(str(folder), name), error.hint) from None
    except Exception as error:  # a damaged file can raise any exception
        raise AdapterError(f"{name}: cannot be read as an adapter ({type(error).__name__})", _DAMAGED) from None
    facts = _of_adapter(adapter, alone)
    with bank.lock:  # if two uploads have the same name, the first one wins
        if (bank.folder / name).exists():
            raise AdapterError(f"{name!r} already exists", "Choose another name.")
        os.rename(folder, bank.folder / name)
    return {"name": name, **facts}


_DAMAGED = "Upload it again; if that fails too, check the files with mlx-lora inspect."


def _facts(bank: AdapterBank, listed: Listed, cache: dict) -> dict[str, Any]:
    """Return what the page shows of one adapter. Its files are read again only after a change."""
    key = (listed.name, signature_of(listed.path and Path(listed.path)))
    if key not in cache:
        try:
            found = _of_adapter(*bank.check(listed.name))
        except MLXLoRAError as error:
            text = f"{error.message}. {error.hint}"
            found = {"problem": text if listed.path is None else text.replace(listed.path, listed.name)}
        except Exception as error:
            found = {"problem": f"cannot be read as an adapter ({type(error).__name__}). {_DAMAGED}"}
        for old in [old for old in cache if old[0] == listed.name]:
            del cache[old]
        cache[key] = found
    return {"name": listed.name, "loaded": listed.loaded, "pinned": listed.pinned, "rows": listed.rows, **cache[key]}


def _of_adapter(adapter: Any, alone: list[str]) -> dict[str, Any]:
    ranks = sorted({adapter.rank_of(path) for path in adapter.modules}) if adapter.config.method != "full" else []
    return {"method": adapter.config.method, "ranks": ranks, "bytes": adapter.nbytes, "alone": alone}


def _state(request: Request, name: str, make: type) -> Any:
    """Return a value that is stored in the application's state, created at the first call."""
    if not hasattr(request.app.state, name):
        setattr(request.app.state, name, make())
    return getattr(request.app.state, name)
