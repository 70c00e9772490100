"""Estimated decoding times on Macs from counted launches and bytes. Arithmetic, not a measurement.

./scripts/bench estimate [--microseconds 2.5] [--efficiency 0.8]

A token takes the bytes of the base and its adapters (4 bits, group 64, rank 16 on all seven linears) over the chip's
bandwidth, times the efficiency that MLX reaches, and for each launch beyond the base's what a dependent launch costs
(published: 1.2 to 5.2 microseconds). `mlx-lora bench kernels` measures instead, on a Mac.
"""

from __future__ import annotations

import argparse

import mlx_lora  # noqa: F401  isort: skip  (opens a BLAS before MLX is imported)
from mlx_lora.bench import BANDWIDTH

MODELS = {  # layers, hidden, key and value size, intermediate, bytes of the whole base at 4 bits
    "Llama-3.2-1B": (16, 2048, 512, 8192, 0.70e9),
    "Qwen3-4B": (36, 2560, 1024, 9728, 2.26e9),
    "Llama-3.1-8B": (32, 4096, 1024, 14336, 4.22e9),
    "Qwen3-32B": (64, 5120, 1024, 25600, 18.0e9),
}
CHIPS = ("Apple M1", "Apple M4", "Apple M4 Pro", "Apple M1 Max", "Apple M4 Max", "Apple M5 Max", "Apple M2 Ultra")
# Launches of a layer beyond the base's, counted in tests/fast/test_decode_layers.py; mlx-lm's adapters are float32.
EXTRA = {"kernels": 2, "plain": 14, "mlx-lm": 42}
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microseconds", type=float, default=2.5, help="of a dependent launch")
    parser.add_argument("--efficiency", type=float, default=0.8, help="share of the chip's bandwidth that is reached")
    options = parser.parse_args()
    print("| estimated: mlx-lm's time over the kernels' (over plain operations') | " + " | ".join(CHIPS) + " |")
    print("|---|" + "---|" * len(CHIPS))
    for name, (layers, hidden, keys, intermediate, size) in MODELS.items():
        dims = [(hidden, n) for n in (hidden, keys, keys, hidden, intermediate, intermediate)] + [
            (intermediate, hidden)
        ]
        adapter = sum(RANK * (i + o) for i, o in dims) * layers
        cells = []
        for chip in CHIPS:
            speed = BANDWIDTH[chip] * 1e9 * options.efficiency
            times = {}
            for path, extra in EXTRA.items():
                width = 4 if path == "mlx-lm" else 2  # bytes of an adapter's number
                times[path] = (size + width * adapter) / speed + extra * layers * options.microseconds * 1e-6
            cells.append(f"{times['mlx-lm'] / times['kernels']:.2f} ({times['plain'] / times['kernels']:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
