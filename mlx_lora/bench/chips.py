"""Memory bandwidth of GPUs, from the data sheets of Apple and NVIDIA."""

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
    "NVIDIA A100-SXM4-80GB": 2039,
    "NVIDIA A100-SXM4-40GB": 1555,
    "NVIDIA H100 PCIe": 2000,
    "NVIDIA H100 NVL": 3900,
    "NVIDIA H100": 3350,
    "NVIDIA H200": 4800,
    "NVIDIA L40S": 864,
    "NVIDIA GeForce RTX 3090": 936,
    "NVIDIA GeForce RTX 4090": 1008,
    "NVIDIA GeForce RTX 5090": 1792,
}


def bandwidth(chip: str) -> float | None:
    """GB/s; None for a chip that is not listed."""
    return next((speed for name, speed in BANDWIDTH.items() if chip.startswith(name)), None)
