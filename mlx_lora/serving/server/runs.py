"""The page's list of runs (``--runs-dir``): each run's state, losses and time left, read from its growing log.

A request can only name runs in the folder. Nothing here writes to a run; each report is rendered from the log.
"""

from __future__ import annotations

import hmac
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from ...base.locking import LOCK, is_locked
from ...errors import AdapterError, ConfigError
from ...formats.checkpoints import BEST, LAST, checkpoints
from ...runs.log import LOG, read_line
from ...runs.report.history import TRAIN, VALID, flat, number, read_history
from ...runs.report.page import run_page
from .streams import server_of

router = APIRouter(include_in_schema=False)
# A report needs only inline styles and images. The sandbox takes away its origin, so it cannot call this server.
_ISOLATED = {
    "Content-Security-Policy": "sandbox allow-popups; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_SIGNED_FOR = 3600  # seconds; the address of a report is valid for one to two times as long


class Checkpoint(BaseModel):
    """POST /page/runs/NAME/adapter."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: Literal["best", "last"]


class Run:
    """One run. Each ``read`` continues where the last one ended in the log."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self._lock, self._locked = threading.Lock(), False
        self._restart(None)

    def _restart(self, file: tuple | None) -> None:
        self._file, self._offset, self._seen = file, 0, None
        self.version = secrets.token_hex(4)  # of the points: a new version means that the list was restarted
        self.points: list[list] = []  # [training or validation, iteration, loss or None]
        self.unreadable = self.iteration = 0
        self.settings: dict[str, Any] = {}
        self.iters = self.ended = self.time = self._first = None

    def read(self) -> Run:
        """Read the log records since the last call."""
        with self._lock:
            try:
                with open(self.folder / LOG, "rb") as log:
                    self._read(log)
            except OSError:
                if self._file is not None:
                    self._restart(None)
                self._locked = is_locked(self.folder)
        return self

    def _read(self, log: Any) -> None:
        found = os.fstat(log.fileno())
        # A run only appends to its log. A resumed or restarted run replaces the file.
        file = (found.st_dev, found.st_ino, log.readline(4096))
        if (self._file is not None and file != self._file) or found.st_size < self._offset:
            self._restart(file)
        self._file = file if file[2].endswith(b"\n") or len(file[2]) == 4096 else None
        # Test the lock only if the log has changed or the run was active, so that a starting run always gets its lock.
        if self._locked or self._seen != (found.st_size, found.st_mtime_ns):
            self._locked = is_locked(self.folder)
        self._seen = (found.st_size, found.st_mtime_ns)
        log.seek(self._offset)
        for line in log:
            if not line.endswith(b"\n"):  # incomplete: the run is still writing this line
                break
            self._offset += len(line)
            record = read_line(line)
            if record is not None:
                self._add(record)
            elif line.strip():
                self.unreadable += 1

    def _add(self, record: dict[str, Any]) -> None:
        kind, iteration = record["kind"], number(record.get("iteration"))
        self.time = number(record.get("time")) or self.time
        if kind in ("TrainReport", "ValReport", "Checkpoint", "Done") and iteration is not None:
            self.iteration = int(iteration)
        if kind == "Run":
            self.settings, self.ended, self._first = flat(record.get("settings")), None, None
        elif kind == "Started":
            self.iters = number(record.get("iters"))
        elif kind == "Done":
            self.ended = record
        elif kind in ("TrainReport", "ValReport") and iteration is not None:
            of, loss = (TRAIN, "train_loss") if kind == "TrainReport" else (VALID, "val_loss")
            self.points.append([of, int(iteration), number(record.get(loss))])
            if kind == "TrainReport" and self._first is None and self.time is not None:
                self._first = (self.time, int(iteration), number(record.get("iterations_per_second")))

    @property
    def state(self) -> str:
        """The state: starting, running, finished, ended early, stopped, interrupted or empty."""
        if self.ended is not None:
            if self.ended.get("stopped"):
                return "stopped"
            return "ended early" if self.ended.get("reason") == "patience" else "finished"
        if self._locked:
            return "running" if self.points else "starting"
        return "interrupted" if self.settings or self.points else "empty"

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds left, from the speed since the first report; None if unknown."""
        if self.state != "running" or self._first is None or not self.iters or self.time is None:
            return None
        begun, iteration, speed = self._first
        if self.iteration > iteration and self.time > begun:
            speed = (self.iteration - iteration) / (self.time - begun)
        if not speed:
            return None
        return max(0.0, (self.iters - self.iteration) / speed - max(0.0, time.time() - self.time))

    def facts(self) -> dict[str, Any]:
        """Return what the page shows of the run, except its points."""
        last = {of: next((p[2] for p in reversed(self.points) if p[0] == of), None) for of in (TRAIN, VALID)}
        return {
            "name": self.name,
            "state": self.state,
            "iteration": self.iteration,
            "iters": self.iters,
            "seconds_left": self.seconds_left,
            "time": self.time,
            "train_loss": last[TRAIN],
            "val_loss": last[VALID],
            "unreadable": self.unreadable,
            "version": self.version,
            "points": len(self.points),
        }


class Runs:
    """The runs in a folder, by name."""

    def __init__(self, folder: Path):
        self.folder, self._runs, self._lock = folder, {}, threading.Lock()

    def read(self) -> dict[str, Run]:
        """Read all runs: the folder itself or its subfolders. Active runs come first, then the newest."""
        with self._lock:
            known = self._runs
            self._runs = {each: known.get(each) or Run(each.resolve().name, each) for each in self._folders()}
            found = self._runs
        for run in found.values():
            run.read()
        going = ("starting", "running")
        ordered = sorted(found.values(), key=lambda run: (run.state not in going, -(run.time or 0)))
        return {run.name: run for run in ordered}

    def _folders(self) -> list[Path]:
        if _is_run(self.folder):
            return [self.folder]
        try:
            inside = sorted(self.folder.iterdir())
        except OSError:
            return []
        return [path for path in inside if not path.name.startswith(".") and not path.is_symlink() and _is_run(path)]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (LOG, LOCK))


@router.get("/page/runs")
async def runs(request: Request) -> dict[str, Any]:
    """List every run with its facts. ``runs`` is None if the server has no ``--runs-dir``."""
    found = _runs(request)
    if found is None:
        return {"runs": None}
    return {"runs": await run_in_threadpool(lambda: [_shown(request, run) for run in found.read().values()])}


@router.get("/page/runs/{name}/points")
async def points(
    request: Request, name: str, version: str = "", after: Annotated[int, Query(ge=0)] = 0
) -> dict[str, Any]:
    """Return a run's losses from index ``after`` on, or all of them if ``version`` is outdated."""
    run = await _run(request, name)
    start = after if version == run.version else 0
    return {**_shown(request, run), "start": start, "losses": run.points[start:]}


@router.post("/page/runs/{name}/adapter")
async def adapter(request: Request, name: str, body: Checkpoint) -> dict[str, str]:
    """Offer a run's checkpoint as an adapter that requests can name. The run must be in ``--adapters-dir``."""
    run, bank = await _run(request, name), server_of(request).engine.bank
    if not _inside(run.folder, bank.folder):
        raise ConfigError(
            "the run is not in --adapters-dir", "Start the server with --adapters-dir and the run's parent."
        )
    path = checkpoints(run.folder).get(body.checkpoint)
    if path is None:
        raise AdapterError(f"the run has no {body.checkpoint} checkpoint", "Wait until it saves one.")
    named = f"{name}-{body.checkpoint}"
    if named in bank.in_folder():
        raise AdapterError(f"an adapter named {named!r} already exists", "Rename the adapter's folder.")
    if named not in bank.registered:
        await run_in_threadpool(bank.add, named, path)
    await run_in_threadpool(bank.load, named)
    return {"name": named}


@router.get("/reports/{name}")
async def report(request: Request, name: str, until: int = 0, sign: str = "") -> HTMLResponse:
    """Render a run's report from its log. With an API key, only the signed address from the list of runs works."""
    if server_of(request).config.api_key is not None:
        signed = hmac.compare_digest(_sign(request, name, until).encode(), sign.encode())
        if not signed or until < time.time():
            raise HTTPException(403, "this address is no longer valid; open the report from the chat page again")
    run = await _run(request, name)
    try:
        page = await run_in_threadpool(lambda: run_page(read_history(run.folder, run.name)))
    except OSError:
        raise HTTPException(404, "the run has logged nothing yet") from None
    return HTMLResponse(page, headers=_ISOLATED)


def _shown(request: Request, run: Run) -> dict[str, Any]:
    bank = server_of(request).engine.bank
    found = checkpoints(run.folder) if _inside(run.folder, bank.folder) else {}
    address = f"reports/{quote(run.name, safe='')}"
    if server_of(request).config.api_key is not None:
        until = (int(time.time()) // _SIGNED_FOR + 2) * _SIGNED_FOR
        address += f"?until={until}&sign={_sign(request, run.name, until)}"
    return {
        **run.facts(),
        "report": address if run.points or run.settings else None,
        "checkpoints": [name for name in (BEST, LAST) if name in found],
    }


def _sign(request: Request, name: str, until: int) -> str:
    state = request.app.state
    if not hasattr(state, "report_secret"):
        state.report_secret = secrets.token_bytes(32)
    return hmac.new(state.report_secret, f"{until} {name}".encode(), "sha256").hexdigest()


def _inside(folder: Path, outer: Path | None) -> bool:
    return outer is not None and folder.resolve().is_relative_to(outer.resolve())


def _runs(request: Request) -> Runs | None:
    folder, state = server_of(request).config.runs_dir, request.app.state
    if folder is not None and not hasattr(state, "runs"):
        state.runs = Runs(Path(folder))
    return getattr(state, "runs", None)


async def _run(request: Request, name: str) -> Run:
    """Raises: HTTPException: the folder has no such run."""
    found = _runs(request)
    run = None if found is None else (await run_in_threadpool(found.read)).get(name)
    if run is None:
        raise HTTPException(404, "there is no run with this name")
    return run
