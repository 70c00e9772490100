"""Peak memory and time of a training step by length, with plain attention and with attention in blocks of queries.

./scripts/bench attention [--models llama qwen3_5] [--lengths 512 1024 2048 4096] [--rounds 3] [--layer]

The models are small random ones with LoRA on all linear layers: 4 layers, 8 query heads and 4 key heads of 64; a step
is the loss of one row and its gradients, compiled. With --layer it is the attention operation alone. The two ways take
turns; the time is the median of the rounds, and the ratio that of the ratios. The peak is counted by MLX's allocator,
above the memory of the model.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import time
from collections.abc import Callable

import mlx_lora  # isort: skip  (opens a BLAS before MLX is imported)
import mlx.core as mx
import mlx.nn as nn

from mlx_lora import AdapterConfig, fast
from mlx_lora.fast.attention import BlockedAttention, sizes
from mlx_lora.fast.block_attention import attention, blocks_of

SIZES = dict(hidden_size=512, num_hidden_layers=4, intermediate_size=1024, num_attention_heads=8, vocab_size=512)
SIZES |= dict(num_key_value_heads=4, head_dim=64, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=8192)
DELTA = dict(linear_num_value_heads=8, linear_num_key_heads=4, linear_key_head_dim=64, linear_value_head_dim=64)
DELTA |= dict(linear_conv_kernel_dim=4, partial_rotary_factor=0.5)
MODELS = {"llama": {}, "qwen3_5": DELTA, "gemma3_text": dict(sliding_window=512, sliding_window_pattern=4)}
WAYS = ("plain", "blocks")


def model_steps(name: str, dtype: mx.Dtype, length: int) -> dict[str, Callable]:
    """A training step for each way, by name."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    tokens = mx.random.randint(0, SIZES["vocab_size"], (1, length + 1), key=mx.random.key(0))

    def step(way: str) -> Callable:
        mx.random.seed(0)
        model = module.Model(module.ModelArgs.from_dict({"model_type": name, **SIZES, **MODELS[name]}))
        model.set_dtype(dtype)
        mlx_lora.attach(model, AdapterConfig(rank=8, scale=2.0, num_layers=-1))
        if way == "plain":
            fast.undo([layer for layer in model.modules() if isinstance(layer, BlockedAttention)])
        parameters = model.train().trainable_parameters()

        def objective(parameters):
            model.update(parameters)
            return nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:], reduction="mean")

        compiled = mx.compile(mx.value_and_grad(objective))
        mx.eval(model.parameters(), tokens)
        return lambda: compiled(parameters)

    return {way: step(way) for way in WAYS}


def layer_steps(dtype: mx.Dtype, length: int) -> dict[str, Callable]:
    """The gradients of causal attention for each way."""
    heads, key_heads, dim = (SIZES[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    shapes = [(1, n, length, dim) for n in (heads, key_heads, key_heads)]
    arrays = [mx.random.normal(shape).astype(dtype) for shape in shapes]
    blocks = blocks_of(length, length, "causal", sizes()[1])
    ways = {
        "plain": lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask="causal"),
        "blocks": lambda q, k, v: attention(q, k, v, 0.125, "causal", None, blocks),
    }

    def step(f: Callable) -> Callable:
        gradient = mx.compile(mx.grad(lambda *a: f(*a).astype(mx.float32).square().sum(), argnums=(0, 1, 2)))
        mx.eval(arrays)
        return lambda: gradient(*arrays)

    return {way: step(f) for way, f in ways.items()}


def measure(step: Callable) -> tuple[float, float]:
    """(MB, seconds)."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before, tic = mx.get_active_memory(), time.perf_counter()
    mx.eval(step())
    return (mx.get_peak_memory() - before) / 1e6, time.perf_counter() - tic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=["llama", "qwen3_5"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--layer", action="store_true", help="the attention operation alone, at any length in blocks")
    options = parser.parse_args()
    dtype = getattr(mx, options.dtype)
    print(f"{'':<12} {'tokens':>7} {'plain MB':>9} {'blocks MB':>10} {'plain s':>8} {'blocks s':>9} {'time ratio':>11}")
    for name in ["attention"] if options.layer else options.models:
        for length in options.lengths:
            steps = layer_steps(dtype, length) if options.layer else model_steps(name, dtype, length)
            found = [[measure(steps[way]) for way in WAYS] for _ in range(options.rounds + 1)][1:]
            peaks = [found[-1][i][0] for i in range(2)]
            times = [statistics.median(row[i][1] for row in found) for i in range(2)]
            ratio = statistics.median(row[1][1] / row[0][1] for row in found)
            columns = f"{peaks[0]:>9.0f} {peaks[1]:>10.0f} {times[0]:>8.2f} {times[1]:>9.2f} {ratio:>10.2f}x"
            print(f"{name:<12} {length:>7} {columns}", flush=True)


if __name__ == "__main__":
    main()
