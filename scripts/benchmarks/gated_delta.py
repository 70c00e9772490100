"""Peak memory and time of a gated delta layer's loss and gradients by length, as mlx-lm trains it and in chunks.

./scripts/bench gated_delta [--lengths 128 256 512] [--loop-up-to 512] [--model qwen3_next] [--dtype float32]

The layer is mlx-lm's, with 4 key heads, 8 value heads and dimensions of 128. MLX's allocator counts the bytes above
those of the layer and its input. The loop is left out above --loop-up-to, where it is slow. Memory
is that of a second call and time that of a third; nothing is compiled.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import time

import mlx_lora  # noqa: F401  isort: skip  (opens a BLAS before MLX is imported)
import mlx.core as mx
import mlx.nn as nn

from mlx_lora import fast

SIZES = dict(hidden_size=512, num_hidden_layers=2, intermediate_size=512, num_attention_heads=8, num_key_value_heads=8)
SIZES |= dict(vocab_size=64, head_dim=64, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=8192)
DELTA = dict(linear_num_value_heads=8, linear_num_key_heads=4, linear_key_head_dim=128, linear_value_head_dim=128)
DELTA |= dict(linear_conv_kernel_dim=4, partial_rotary_factor=0.5, linear_allow_neg_eigval=True)
DELTA |= dict(attention_bias=False, tie_word_embeddings=False)
MOE = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=64, shared_expert_intermediate_size=64)
MOE |= dict(decoder_sparse_step=1, mlp_only_layers=[], model_max_length=8192)
KDA = dict(num_heads=8, head_dim=128, kda_layers=[1], short_conv_kernel_size=4)
MLA = dict(kv_lora_rank=8, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, linear_attn_config=KDA)
MODELS = {"qwen3_5": {}, "qwen3_next": MOE, "olmo_hybrid": {}, "kimi_linear": MOE | MLA}


def make(name: str, dtype: mx.Dtype) -> nn.Module:
    """The first gated delta layer of a model, in training mode."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **SIZES, **DELTA, **MODELS[name]}))
    model.set_dtype(dtype)
    layer = model.layers[0]
    return (layer.self_attn if name == "kimi_linear" else layer.linear_attn).train()


def measure(layer: nn.Module, length: int, dtype: mx.Dtype) -> tuple[float, float]:
    """(MB, seconds)."""
    x = mx.random.normal((1, length, SIZES["hidden_size"])).astype(dtype)
    step = mx.value_and_grad(lambda x: layer(x).astype(mx.float32).square().sum())
    mx.eval(layer.parameters(), step(x))
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step(x))
    peak, tic = mx.get_peak_memory() - before, time.perf_counter()
    mx.eval(step(x))
    return peak / 1e6, time.perf_counter() - tic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096], help="tokens")
    parser.add_argument("--loop-up-to", type=int, default=512, help="tokens")
    parser.add_argument("--model", choices=MODELS, default="qwen3_next")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    options = parser.parse_args()
    dtype = getattr(mx, options.dtype)
    layer = make(options.model, dtype)
    print(f"{'tokens':>7} {'loop MB':>9} {'loop s':>8} {'chunks MB':>10} {'chunks s':>9}")
    for length in options.lengths:
        fast.restore(layer)
        loop = [f"{x:.2f}" for x in measure(layer, length, dtype)] if length <= options.loop_up_to else ["-", "-"]
        fast.accelerate(layer)
        memory, seconds = measure(layer, length, dtype)
        print(f"{length:>7} {loop[0]:>9} {loop[1]:>8} {memory:>10.2f} {seconds:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
