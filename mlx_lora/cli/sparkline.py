"""A small curve in one line of text, and the state of training in the free width of a terminal line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.,-=+*#"  # from low to high
_NARROW, _WIDE = 5, 20  # columns of a curve


def sparkline(values: Sequence[float | None], width: int, levels: str = BLOCKS) -> str:
    """The curve of ``values`` in at most ``width`` characters, each the mean of a group of neighbours.

    Values that are None or not finite are skipped.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    count = min(width, len(finite))
    if count < 1:
        return ""
    edges = [i * len(finite) // count for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (len(levels) - 1)
    return "".join(levels[round((mean - low) / step) if step > 0 else 0] for mean in means)


def status(
    width: int, losses: Sequence[float | None], tokens_per_second: float | None, memory: float | None, levels: str
) -> str:
    """The last loss, the curve of ``losses``, the speed and the memory in ``width`` columns.

    The curve shrinks first; if there is no room for it, memory and then speed are left out.

    Args:
        memory: GB.
    """
    last = next((loss for loss in reversed(losses) if loss is not None), None)
    parts = [f"loss {last:.3f}" if last is not None else ""]
    parts.append(f"{tokens_per_second:,.0f} tok/s" if tokens_per_second is not None else "")
    parts.append(f"{memory:.2f} GB" if memory is not None else "")
    while len(parts) > 1 and len(_joined(parts)) > width:
        parts.pop()
    room = width - len(_joined(parts)) - 1
    if room >= _NARROW:
        parts.insert(1, sparkline(losses, min(room, _WIDE), levels))
    return _joined(parts)[: max(0, width)]


def _joined(parts: list[str]) -> str:
    return "".join(f" {part}" for part in parts if part)
