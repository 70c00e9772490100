"""C++ to a shared object: finds clang >= 19, compiles, caches by content.

Compilers, in this order: ``MSLEMU_CXX``, a system clang++, the ``ziglang`` wheel (clang 22, no root needed). The cache
lies in ``MSLEMU_CACHE``, by default ``~/.cache/mslemu``; it can be thrown away at any time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .source import HERE, MLX_HEADERS

CACHE = Path(
    os.environ.get("MSLEMU_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mslemu"
)
# Compiled with ThreadSanitizer's instrumentation and linked without its library: runtime.cpp answers the callbacks.
# No vectoriser and no excess precision: one access and one rounding for each that the source has.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-mf16c",
    "-fsanitize=thread",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-ftrivial-auto-var-init=pattern",
    "-fvisibility=hidden",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-Xclang",
    "-cl-single-precision-constant",
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
    "-mllvm",
    "-tsan-instrument-atomics=0",
    "-Wno-user-defined-literals",
    "-Wno-reserved-user-defined-literal",
    "-Wno-unknown-attributes",
    "-Wno-unknown-pragmas",
    "-Wno-deprecated-literal-operator",
    "-Wno-ignored-attributes",
    "-Wno-invalid-constexpr",
    "-Wno-c++20-extensions",
    "-Wno-unused-value",
    "-Wno-pass-failed",
    "-Wno-undefined-inline",
    "-Wno-undefined-internal",
    "-Wno-nan-infinity-disabled",
]
RUNTIME_FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"]


class CompileError(RuntimeError):
    """The Metal source does not compile."""


@dataclass(frozen=True)
class Toolchain:
    """A compiler and a linker command."""

    compile: tuple[str, ...]
    link: tuple[str, ...]
    name: str


def unavailable() -> str | None:
    """Why kernels cannot be emulated here; None where they can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"mslemu runs on x86-64 Linux, not on {sys.platform} {platform.machine()}"
    if toolchain() is None:
        return "mslemu needs clang++ 19 or newer: pip install ziglang, or apt-get install clang-19"
    return None


@functools.cache
def toolchain() -> Toolchain | None:
    """The first compiler that is new enough."""
    if chosen := os.environ.get("MSLEMU_CXX"):
        command = tuple(chosen.split())
        return Toolchain(command, (*command, "-shared", "-lm"), chosen)
    for name in ("clang++", *(f"clang++-{version}" for version in range(30, 18, -1))):
        path = shutil.which(name)
        if path and _version(path) >= 19:
            return Toolchain((path, "-march=x86-64-v2"), (path, "-shared", "-lm"), name)
    spec = importlib.util.find_spec("ziglang")
    if spec is None:
        return None
    zig = str(Path(spec.origin).parent / "zig")
    # Linked by lld alone: through `zig c++` the first link builds libc and libtsan, for a minute.
    return Toolchain((zig, "c++", "-mcpu=x86_64_v2+f16c"), (zig, "ld.lld", "-shared"), "ziglang")


def _version(path: str) -> int:
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"version (\d+)", text)
    return int(found.group(1)) if found and "Apple" not in text else 0


@dataclass
class Built:
    """A compiled kernel."""

    path: Path
    library: ctypes.CDLL
    seconds: float  # to compile; 0 where it came from the cache


_built: dict[str, Built] = {}


def build(source: str, instrument: bool = True) -> Built:
    """The shared object of C++ ``source``, which holds an ``msl_entry``. Raises CompileError."""
    extra = () if instrument else ("-fno-sanitize=all", "-O2")
    command = (*toolchain().compile, *FLAGS, *extra)
    key = _digest(source, _fingerprint(), *command)
    if key not in _built:
        path, tic = CACHE / f"kernel-{key}.so", time.perf_counter()
        fresh = not path.exists()
        if fresh:
            _compile(source, command, path)
        seconds = time.perf_counter() - tic if fresh else 0.0
        _built[key] = Built(path, ctypes.CDLL(str(path)), seconds)
    return _built[key]


def _compile(source: str, command: tuple[str, ...], path: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    stem = path.with_suffix(f".{os.getpid()}")
    cpp, obj, so = (Path(f"{stem}{suffix}") for suffix in (".cpp", ".o", ".so"))
    cpp.write_text(source)
    includes = [f"-I{HERE / 'shim'}", f"-I{HERE}", f"-I{MLX_HEADERS}"]
    try:
        _run([*command, *includes, "-c", str(cpp), "-o", str(obj)])
        _run([*toolchain().link, "-o", str(so), str(obj), str(_runtime())])
        os.replace(so, path)
    finally:
        cpp.unlink(missing_ok=True)
        obj.unlink(missing_ok=True)


@functools.cache
def _runtime() -> Path:
    command = (*toolchain().compile, *RUNTIME_FLAGS)
    path = CACHE / f"runtime-{_digest(_fingerprint(), *command)}.o"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.o")
        _run([*command, "-c", str(HERE / "runtime.cpp"), "-o", str(temporary)])
        os.replace(temporary, path)
    return path


@functools.cache
def _fingerprint() -> str:
    files = [HERE / "rt.h", HERE / "runtime.cpp", *sorted(p for p in (HERE / "shim").rglob("*") if p.is_file())]
    return _digest(mx.__version__, *(f.read_text() for f in files))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def _run(command: list[str]) -> None:
    zig = {"ZIG_GLOBAL_CACHE_DIR": str(CACHE / "zig"), "ZIG_LOCAL_CACHE_DIR": str(CACHE / "zig")}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **zig})
    if done.returncode:
        raise CompileError(done.stderr[:6000])


def where(built: Built, pc: int) -> str:
    """`` at file:line`` of an address in the object, where a symbolizer is at hand."""
    if not pc:
        return ""
    for tool in ("llvm-symbolizer", "llvm-symbolizer-19", "addr2line"):
        if shutil.which(tool):
            options = ["-e", str(built.path), "-i", hex(pc - 1)]
            lines = subprocess.run([tool, *options], capture_output=True, text=True).stdout.split("\n")
            frames = [re.sub(r"^.*/", "", line) for line in lines if ":" in line and "msl" not in line.split("/")[-1]]
            if frames:
                return " at " + ", from ".join(frames[:3])
    return ""
