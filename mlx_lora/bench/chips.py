"""Memory bandwidth of Apple's chips, from Apple's data sheets."""

from __future__ import annotations

BANDWIDTH = {  # GB/s; the first entry that a chip's name starts with applies
    "Apple M1 Ultra": 800,
    "Apple M1 Max": 400,
    "Apple M1 Pro": 200,
    "Apple M1": 68,
    "Apple M2 Ultra": 800,
    "Apple M2 Max": 400,
    "Apple M2 Pro": 200,
    "Apple M2": 100,
    "Apple M3 Ultra": 819,
    "Apple M3 Max": 400,
    "Apple M3 Pro": 150,
    "Apple M3": 100,
    "Apple M4 Max": 546,
    "Apple M4 Pro": 273,
    "Apple M4": 120,
    "Apple M5 Max": 614,
    "Apple M5 Pro": 307,
    "Apple M5": 153,
}


def bandwidth(chip: str) -> float | None:
    """GB/s; None for a chip that is not listed."""
    return next((speed for name, speed in BANDWIDTH.items() if chip.startswith(name)), None)
