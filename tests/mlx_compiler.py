"""Faster first use of the functions that MLX compiles on a CPU.

For each function that it fuses, MLX calls g++, and keeps the library in the folder for temporary files. Four fifths of
that time go into one header, which the suite would read hundreds of times on a new machine. g++ takes a precompiled
header instead where one of the same name lies beside the source. The machine code stays the same.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import mlx
import mlx.core as mx

NAME = Path("mlx", "backend", "cpu", "compiled_preamble.h")
FLAGS = ["-std=c++17", "-O3", "-Wall", "-fPIC"]  # as MLX calls it: g++ takes no header compiled with other flags


class PrecompiledHeader:
    """Made in the background, and deleted by ``remove``. Without g++ or that header there is none."""

    def __init__(self):
        include = Path(next(iter(mlx.__path__)), "include")
        folder = Path(tempfile.gettempdir(), "mlx", mx.__version__, "cpu")
        self.path = folder / f"{NAME}.gch"
        self._new, self._process = self.path.with_suffix(".new"), None
        command = [*FLAGS, "-w", "-x", "c++-header", f"-I{include}", str(include / NAME), "-o", str(self._new)]
        if (include / NAME).exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # no g++
                rename = 'g++ "$@" 2>/dev/null && mv "$0.new" "$0.gch"'
                self._process = subprocess.Popen(["sh", "-c", rename, str(self.path.with_suffix("")), *command])

    def remove(self) -> None:
        if self._process is not None:
            self._process.wait()
        for path in (self._new, self.path):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            os.removedirs(self.path.parent)
