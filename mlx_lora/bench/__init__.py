"""Benchmarks of the kernels next to plain operations and mlx-lm's layers, and the check of everything on a GPU."""

from .check import Check
from .estimate import Assumptions, assumptions_of, counts, table
from .kernels import KernelTime, measure_kernels
from .markdown import gathered, markdown, verdicts
from .models import SIZES
from .report import Part, Report, read_report, write_report

__all__ = [
    "SIZES",
    "Assumptions",
    "Check",
    "KernelTime",
    "Part",
    "Report",
    "assumptions_of",
    "counts",
    "gathered",
    "markdown",
    "measure_kernels",
    "read_report",
    "table",
    "verdicts",
    "write_report",
]
