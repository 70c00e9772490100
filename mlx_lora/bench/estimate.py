"""Decoding times estimated from counted launches and bytes. Arithmetic, not a measurement.

A token's time is the bytes of the base and its adapter divided by the reached bandwidth, plus the cost of a dependent
launch for each launch beyond the base's. It leaves out host time, the key-value cache and the base's own launches. The
two constants are assumptions until a report of ``bench check`` measures them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .chips import BANDWIDTH, bandwidth
from .models import MODELS, adapter_numbers, base_bytes
from .report import Report

TABLE_MODELS = ("Llama-3.2-1B", "Qwen3-4B", "Llama-3.1-8B", "Qwen3-32B")
TABLE_CHIPS = ("Apple M1", "Apple M4", "Apple M4 Pro", "Apple M1 Max", "Apple M4 Max", "Apple M5 Max", "Apple M2 Ultra")
# Launches of a layer beyond the base's, counted in tests/fast/test_decode_layers.py; mlx-lm's adapters are float32.
EXTRA_LAUNCHES = {"base": 0, "fused": 0, "kernels": 2, "plain": 14, "mlx-lm": 42}
# Bytes per number of an adapter on a half-precision model.
_ADAPTER_BYTES = {"base": 0, "fused": 0, "kernels": 2, "plain": 2, "mlx-lm": 4}


@dataclass(frozen=True)
class Assumptions:
    """What an estimate assumes about a GPU."""

    efficiency: float = 0.8  # share of the data sheet's bandwidth that a token reaches
    microseconds: float = 2.5  # of a dependent launch; published values: 1.2 to 5.2
    source: str = "published values: 1.2 to 5.2; no Mac has confirmed these figures"


def token_seconds(model: str, path: str, gigabytes: float, given: Assumptions) -> float:
    """Seconds of a decoded token.

    Args:
        model: of ``MODELS``, at 4 bits. path: of ``EXTRA_LAUNCHES``; "fused" has its layers in 8 bits.
        gigabytes: bandwidth of the data sheet, GB/s.
    """
    size = base_bytes(model, 8 if path == "fused" else 4) + _ADAPTER_BYTES[path] * adapter_numbers(model)
    launches = EXTRA_LAUNCHES[path] * MODELS[model]["num_hidden_layers"]
    return size / (gigabytes * 1e9 * given.efficiency) + launches * given.microseconds * 1e-6


def kernel_seconds(size: float, launches: int, gigabytes: float, given: Assumptions) -> float:
    """Seconds of a part of a layer that reads ``size`` bytes in ``launches``."""
    return size / (gigabytes * 1e9 * given.efficiency) + launches * given.microseconds * 1e-6


def assumptions_of(reports: Iterable[Report]) -> Assumptions:
    """The constants that the decoding figures of reports imply; medians over the models of all reports.

    The bandwidth reached is the base model's bytes over its time; a launch costs the difference between plain
    operations and kernels, which read the same bytes, divided by the launches saved. A constant that no report measures
    keeps its default, such as the bandwidth reached on a chip that is not in ``chips.py``. Only reports of Metal count,
    because the table is about Macs.
    """
    efficiencies, costs, chips = [], [], []
    for report in reports:
        if not counts(report):
            continue
        peak, times = bandwidth(report.machine.chip), {}
        for figure in report.figures:
            if figure.part == "decoding" and figure.unit == "tokens/s":
                times.setdefault(figure.model, {})[figure.path] = 1 / figure.median
        for model, of in times.items():
            if peak and "base" in of:
                efficiencies.append(base_bytes(model) / of["base"] / (peak * 1e9))
            if {"plain", "kernels"} <= of.keys():
                saved = EXTRA_LAUNCHES["plain"] - EXTRA_LAUNCHES["kernels"]
                costs.append((of["plain"] - of["kernels"]) / (saved * MODELS[model]["num_hidden_layers"]) * 1e6)
        if times:
            chips.append(report.machine.chip)
    known = {}
    if efficiencies:
        known["efficiency"] = statistics.median(efficiencies)
    if costs:
        known["microseconds"] = max(0.0, statistics.median(costs))
    return Assumptions(**known, source="measured on " + ", ".join(dict.fromkeys(chips))) if known else Assumptions()


def counts(report: Report) -> bool:
    """Whether a report was made on a Mac."""
    return report.machine.backend == "Metal" and not report.emulated


def table(given: Assumptions | None = None) -> str:
    """The table of ``metal/README.md``: mlx-lm's time over the kernels', and in brackets that of plain operations."""
    given = given or Assumptions()
    lines = [
        "| estimated | " + " | ".join(chip.removeprefix("Apple ") for chip in TABLE_CHIPS) + " |",
        "|---|" + "---|" * len(TABLE_CHIPS),
    ]
    for model in TABLE_MODELS:
        cells = []
        for chip in TABLE_CHIPS:
            theirs, plain = (ratio(model, path, BANDWIDTH[chip], given) for path in ("mlx-lm", "plain"))
            cells.append(f"{theirs:.2f} ({plain:.2f})")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio(model: str, path: str, gigabytes: float, given: Assumptions) -> float:
    """Time of a token on ``path`` over its time with the kernels."""
    return token_seconds(model, path, gigabytes, given) / token_seconds(model, "kernels", gigabytes, given)
