"""Time of an epoch with and without kept states of frozen layers: ./scripts/bench prefix [--rows 240 --batch-size 2]

A random Llama of 32 layers with LoRA on the last 16, and WikiSQL's rows, one token a byte. Two runs take turns, one
epoch each, with `cache_prefix` and without, so that a busy machine slows both. The first epoch of either also traces
the step for every width: judge by the plain run's same epoch. Ratios are to the same run's first
epoch, and to the plain run's same epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import mlx_lora  # before MLX: on Linux it opens a fast BLAS

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.models import llama

from mlx_lora import AdapterConfig, TrainConfig
from mlx_lora.data.batches import Dataset, Example, batches_per_epoch

SIZES = dict(model_type="llama", vocab_size=256, num_hidden_layers=32, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(rms_norm_eps=1e-5, tie_word_embeddings=True)


def rows(file: Path | None, count: int, longest: int) -> Dataset:
    """The first bytes of each row of a JSON lines file, or random lengths."""
    if file is None:
        draw = np.random.default_rng(0)
        texts = [draw.integers(1, 256, n) for n in np.clip(draw.normal(110, 25, count), 20, longest).astype(int)]
    else:
        lines = file.read_text("utf-8").splitlines()[:count]
        texts = [np.frombuffer(json.loads(line)["text"].encode()[:longest], np.uint8) for line in lines]
    return Dataset(Example(text.astype(np.int32), np.arange(len(text)) > 0) for text in texts)


def epochs(data: Dataset, options: argparse.Namespace, place: str):
    """Yield (seconds of an epoch, its losses) of a run."""
    mx.random.seed(0)
    sizes = dict(hidden_size=options.hidden, intermediate_size=3 * options.hidden)
    model = llama.Model(llama.ModelArgs.from_dict({**SIZES, **sizes}))
    mlx_lora.attach(model, AdapterConfig(num_layers=16, rank=8, scale=2.0))
    each = batches_per_epoch(data, options.batch_size)
    settings = dict(steps_per_report=10**6, save_every=10**6, val_batches=0, cache_prefix=place)
    config = TrainConfig(iters=each * options.epochs + 1, batch_size=options.batch_size, **settings)
    optimizer = mlx_lora.build_optimizer(mlx_lora.OptimizerConfig(), config.iters)
    losses: list[float] = []
    reports = mlx_lora.train(model, optimizer, data, None, config)
    for _ in range(options.epochs):
        tic = time.perf_counter()
        losses = [next(reports).loss for _ in range(each)]
        yield time.perf_counter() - tic, losses
    reports.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of rows with `text`; without it, random rows of like lengths")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    data = rows(options.data, options.rows, options.longest)
    runs = {place: epochs(data, options, place) for place in ("none", "memory")}
    times: dict[str, list[float]] = {place: [] for place in runs}
    for epoch in range(options.epochs):
        losses = {}
        for place, run in runs.items():
            seconds, losses[place] = next(run)
            times[place].append(seconds)
        plain, kept = (times[place][epoch] for place in ("none", "memory"))
        same = "equal" if losses["none"] == losses["memory"] else "DIFFERENT"
        first = kept / times["memory"][0]
        print(f"epoch {epoch + 1}: {plain:6.1f} s plain, {kept:6.1f} s kept, {kept / plain:.2f}x of the plain epoch, "
              f"{first:.2f}x of the first, losses {same}", flush=True)  # fmt: skip
    ratios = [kept / plain for plain, kept in list(zip(times["none"], times["memory"], strict=True))[1:]]
    print(f"from the second epoch on, median: {statistics.median(ratios):.2f}x of the plain epoch at the same time")


if __name__ == "__main__":
    main()
