"""What LoRA promises, in numbers, on a random 4-bit Llama of 46M parameters: ./scripts/bench promises

Trainable parameters, size of the adapter and of the training state against full fine-tuning; decoding with the base,
with a live adapter and merged; the time of a swap.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import mlx_lora  # before MLX: on Linux it opens a fast BLAS

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten
from train import mlx_model

from mlx_lora import AdapterConfig
from mlx_lora.fast import accelerate
from mlx_lora.model.attach import parameter_counts

TOKENS, ROUNDS = 48, 5


def decode(model) -> float:
    """Seconds a token, one token at a time with a cache; the prompt is not counted."""
    from mlx_lm.generate import generate_step

    times = []
    for _ in generate_step(mx.arange(16), model, max_tokens=TOKENS):
        times.append(time.perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1)


def main() -> None:
    base, live, merged = (mlx_model(4) for _ in range(3))
    for model in (base, live, merged):
        accelerate(model.eval())
    config = AdapterConfig(rank=8, scale=2.0, num_layers=-1)
    adapters = []
    for seed in (1, 2):
        mx.random.seed(seed)
        mlx_lora.attach(live, config)
        for layer in (m for m in live.modules() if hasattr(m, "lora_b")):
            layer.lora_b = 0.02 * mx.random.normal(layer.lora_b.shape)
        adapters.append(mlx_lora.extract(live))
        mlx_lora.unmount(live)
    mlx_lora.mount(live, adapters[0])
    trained, total = parameter_counts(live)
    mlx_lora.mount(merged, adapters[0])
    reports = mlx_lora.fuse(merged)
    with tempfile.TemporaryDirectory() as folder:
        mlx_lora.save_adapter(adapters[0], folder)
        size = sum(f.stat().st_size for f in Path(folder).iterdir())
    stored = sum(a.nbytes for _, a in tree_flatten(base.parameters()))
    full = 12 * (total - trained)  # float32 gradient and two moments of Adam
    print(f"trainable parameters     {trained:,} of {total - trained:,} ({100 * trained / (total - trained):.2f} %)")
    print(f"adapter on disk          {size / 1e6:.2f} MB; the 4-bit base {stored / 1e6:.1f} MB")
    print(f"gradients and moments    {12 * trained / 1e6:.1f} MB, {full / 1e6:.0f} MB for all parameters (arithmetic)")
    swaps = []
    for i in range(20):
        tic = time.perf_counter()
        mlx_lora.mount(live, adapters[i % 2])
        mx.eval(live.trainable_parameters())
        swaps.append(time.perf_counter() - tic)
    print(f"swap of adapters         {1000 * statistics.median(swaps):.1f} ms ({len(adapters[0].modules)} modules)")
    mlx_lora.mount(live, adapters[0])
    seconds: dict[str, list[float]] = {"base": [], "live adapter": [], "merged": []}
    for _ in range(ROUNDS):
        for name, model in zip(seconds, (base, live, merged), strict=True):
            seconds[name].append(decode(model))
    plain = statistics.median(seconds["base"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"decoding, {name:<14} {1000 * middle:.2f} ms a token, {middle / plain:.2f}x the base")
    print(f"merged layers            {', '.join(sorted({r.storage for r in reports}))}")


if __name__ == "__main__":
    main()
