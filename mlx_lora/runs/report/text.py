"""Readable numbers, sizes and durations."""

from __future__ import annotations

import math
from typing import Any


def shown(value: Any) -> str:
    """A readable value: at most four significant digits of a fraction, thousands separated."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value and not 1e-3 <= abs(value) < 1e5:
            mantissa, power = f"{value:.2e}".split("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(item)}" for key, item in value.items())
    return str(value)


def compact(value: Any) -> str:
    """A large number in three digits: 1.23 M."""
    if not isinstance(value, (int, float)):
        return "–"
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if size == 1e4 else size):.3g}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A time in words: 45 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """Bytes as 1.50 GB (10^9 bytes), small ones as 15.0 MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
