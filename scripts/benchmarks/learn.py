"""What fine-tuning does to held-out loss on real text: a real small Llama, quantized to 4 bits.

./scripts/bench learn [--base FOLDER --data FOLDER ...]

By default: stories260K on Shakespeare (40 iterations) and on WikiSQL (100 iterations, rows of at most 200 tokens),
if these are in a folder beside the project. Prints loss and perplexity on the test set before and after, and the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import mlx_lora  # before MLX: on Linux it opens a fast BLAS

# isort: split
import mlx.nn as nn

from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from mlx_lora.data import Dataset

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
RUNS = {"shakespeare": (40, 512), "wikisql": (100, 200)}  # iterations, longest row


def four_bits(base: Path, folder: Path) -> Path:
    """The base quantized where its dimensions allow it; other layers stay floats."""
    model, _ = mlx_lora.load(base, dtype="stored")
    fits = lambda path, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 64 == 0  # noqa: E731
    nn.quantize(model, 64, 4, class_predicate=fits)
    return mlx_lora.save_model(model, folder)


def learn(base: Path, data: Path, iters: int, longest: int) -> None:
    model, tokenizer = mlx_lora.load(base)
    sets = mlx_lora.load_dataset(DataConfig(data=str(data)), tokenizer, ("train", "test"))
    train_set, test_set = (Dataset(e for e in s if len(e.tokens) <= longest) for s in (sets.train, sets.test))
    config = TrainConfig(iters=iters, batch_size=8, seed=0)
    before = mlx_lora.evaluate(model, test_set, 8)
    mlx_lora.attach(model, AdapterConfig(rank=8, scale=20.0, num_layers=-1))
    optimizer = mlx_lora.build_optimizer(OptimizerConfig(learning_rate=1e-3), iters)
    tic = time.perf_counter()
    *_, done = mlx_lora.train(model, optimizer, train_set, None, config)
    took = time.perf_counter() - tic
    after = mlx_lora.evaluate(model, test_set, 8)
    print(
        f"{data.name}, {len(train_set)} rows, {iters} iterations, {took:.0f} s: "
        f"test loss {before.loss:.3f} -> {after.loss:.3f}, "
        f"perplexity {before.perplexity:.0f} -> {after.perplexity:.1f} ({done.trained_tokens:,} tokens learned)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=SHARED / "stories260K")
    parser.add_argument("--data", type=Path, nargs="+", default=[SHARED / name for name in RUNS])
    parser.add_argument("--iters", type=int, help="for every data set")
    options = parser.parse_args()
    if missing := [str(p) for p in (options.base, *options.data) if not p.is_dir()]:
        sys.exit(f"not here: {', '.join(missing)}; name others with --base and --data")
    with tempfile.TemporaryDirectory() as folder:
        base = four_bits(options.base, Path(folder) / "base")
        for data in options.data:
            iters, longest = RUNS.get(data.name, (100, 512))
            learn(base, data, options.iters or iters, longest)


if __name__ == "__main__":
    main()
