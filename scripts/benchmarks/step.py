"""What a training step is spent on: ./scripts/bench step [--rows 4 --tokens 112]

The pieces of a step of the Llama that `bench train` uses (46M parameters, LoRA on all linears), each alone, forward and
backward, times how often it occurs; beside them the whole compiled step. The pieces need not add up: alone they fuse
and overlap differently.
"""

from __future__ import annotations

import argparse
import statistics
import time

import mlx_lora  # before MLX: on Linux it opens a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from train import LLAMA, RANK, SCALE, mlx_model

from mlx_lora import AdapterConfig, OptimizerConfig
from mlx_lora.fast import accelerate
from mlx_lora.training.losses import cross_entropy
from mlx_lora.training.optimizers import MasterWeights
from mlx_lora.training.step import Step

HIDDEN, INNER, LAYERS, VOCABULARY = (
    LLAMA[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
)
HEADS, KV_HEADS = LLAMA["num_attention_heads"], LLAMA["num_key_value_heads"]
HEAD = HIDDEN // HEADS
# (in, out) of the linears of a layer
SHAPES = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KV_HEADS * HEAD)] * 2 + [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)]


def timed(call, rounds: int = 7) -> float:
    """Median seconds of ``call``, which returns arrays."""
    times = []
    for _ in range(rounds + 2):
        tic = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - tic)
    return statistics.median(times[2:])


def both_ways(function, *arrays: mx.array, grads: int | None = None):
    """A compiled call of ``function`` and its backward pass, with gradients to the first ``grads`` arrays (all)."""
    wanted = list(range(len(arrays) if grads is None else grads))
    ones = mx.ones(function(*arrays).shape)
    run = mx.compile(mx.value_and_grad(lambda *a: (function(*a) * ones).sum(), argnums=wanted))
    return lambda: run(*arrays)


def pieces(rows: int, tokens: int) -> dict[str, float]:
    """Seconds of a step by piece."""

    def normal(*shape: int) -> mx.array:
        array = mx.random.normal(shape) * 0.1
        mx.eval(array)
        return array

    def linears(shapes: list[tuple[int, int]]) -> float:
        return sum(
            timed(both_ways(lambda x, w: x @ w.T, normal(rows * tokens, i), normal(o, i), grads=1)) for i, o in shapes
        )

    def low_rank(shapes: list[tuple[int, int]]) -> float:
        def update(x, a, b, y):
            return mx.addmm(y, x @ a, b, alpha=SCALE)

        n = rows * tokens
        return sum(
            timed(both_ways(update, normal(n, i), normal(i, RANK), normal(RANK, o), normal(n, o))) for i, o in shapes
        )

    def heads(count: int) -> mx.array:
        return normal(rows, count, tokens, HEAD)

    def attention(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=HEAD**-0.5, mask="causal")

    def rope(x):
        return mx.fast.rope(x, HEAD, traditional=False, base=1e4, scale=1.0, offset=0)

    labels = mx.random.randint(0, VOCABULARY, (rows, tokens))
    x, inner = normal(rows, tokens, HIDDEN), [normal(rows, tokens, INNER) for _ in range(2)]
    return {
        "base matrices (BLAS)": LAYERS * linears(SHAPES),
        "head, 512 x 16384 (BLAS)": linears([(HIDDEN, VOCABULARY)]),
        "low-rank path": LAYERS * low_rank(SHAPES),
        "cross entropy": timed(
            both_ways(lambda y: cross_entropy.token_losses(y, labels), normal(rows, tokens, VOCABULARY))
        ),
        "attention": LAYERS * timed(both_ways(attention, heads(HEADS), heads(KV_HEADS), heads(KV_HEADS))),
        "rotary embedding": LAYERS * (timed(both_ways(rope, heads(HEADS))) + timed(both_ways(rope, heads(KV_HEADS)))),
        "SwiGLU": LAYERS * timed(both_ways(lambda g, u: nn.silu(g) * u, *inner)),
        "norms": (2 * LAYERS + 1) * timed(both_ways(lambda y: mx.fast.rms_norm(y, mx.ones(HIDDEN), 1e-5), x)),
    }


def whole(rows: int, tokens: int, bits: int | None) -> float:
    """Seconds of the compiled step, optimizer included."""
    model = mlx_model(bits)
    accelerate(model)
    mlx_lora.attach(model, AdapterConfig(rank=RANK, scale=SCALE, num_layers=-1))
    optimizer = MasterWeights(mlx_lora.build_optimizer(OptimizerConfig(learning_rate=1e-4), 100))
    optimizer.init(dict(tree_flatten(model.trainable_parameters())))
    step = Step(model, optimizer, loss=cross_entropy.loss, seed=0, fused=True)
    ids, mask = mx.random.randint(0, VOCABULARY, (rows, tokens + 1)), mx.ones((rows, tokens), mx.bool_)
    count = iter(range(1, 1000))

    def run():
        step.run(next(count), ids, mask, ends_window=True)
        step.outcome()
        return step.parameters

    return timed(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=112, help="in a row; 112 is WikiSQL's middle")
    options = parser.parse_args()
    total = whole(options.rows, options.tokens, 4)
    parts = pieces(options.rows, options.tokens)
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"{name:<28}{1000 * seconds:>8.1f} ms{100 * seconds / total:>6.0f} %")
    print(f"{'together':<28}{1000 * sum(parts.values()):>8.1f} ms{100 * sum(parts.values()) / total:>6.0f} %")
    per_second = options.rows * options.tokens / total
    print(f"{'the whole step, 4-bit base':<28}{1000 * total:>8.1f} ms   {per_second:.0f} tokens/s")


if __name__ == "__main__":
    main()
