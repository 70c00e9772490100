"""Peak memory of one training step beside mlx-lm: the same random Llama, the same batch, LoRA on all seven linears.

./scripts/bench memory [--layers 8] [--hidden 256] [--batch 8] [--length 128] [--dtype bfloat16] [--grad-checkpoint]

mlx-lm's adapters are float32 over a bfloat16 model, and its backward pass is MLX's. Ours have the dtype of the model
and a backward pass of their own, and the activations of an MLP are computed again in the backward pass, as on Metal
(MLX_LORA_KERNELS=on; by default a CPU keeps them). MLX's allocator counts the bytes above those of the model itself.
"projections" leaves out norms, rotary embedding and attention: on a CPU, but not on Metal, MLX computes these in
several operations that keep float32 copies. The ratio on a Mac should lie between the two; no Mac has measured it.
--grad-checkpoint makes both recompute whole layers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable

import mlx_lora  # isort: skip  (opens a BLAS before MLX is imported)
import mlx.core as mx
import mlx.nn as nn

from mlx_lora import AdapterConfig
from mlx_lora.training.losses.cross_entropy import loss as loss_fn
from mlx_lora.training.recompute import recomputed_layers

CONFIG = dict(model_type="llama", vocab_size=256, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5)
RANK, SCALE = 16, 2.0


def make(layers: int, hidden: int, dtype: mx.Dtype) -> nn.Module:
    from mlx_lm.models import llama

    mx.random.seed(0)
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 3 * hidden}
    model = llama.Model(llama.ModelArgs.from_dict({**CONFIG, **sizes, "tie_word_embeddings": True}))
    model.set_dtype(dtype)
    return model


class Bare(nn.Module):
    """The blocks of a Llama without norms, rotary embedding and attention: what is left is projections and SwiGLU."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.embed, self.layers = model.model.embed_tokens, model.model.layers

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        for layer in self.layers:
            a = layer.self_attn
            queries, keys, values = a.q_proj(x), a.k_proj(x), a.v_proj(x)
            x = x + a.o_proj(queries + mx.concatenate([keys, values], axis=-1))
            x = x + layer.mlp(x)
        return self.embed.as_linear(x)


def ours(model: nn.Module) -> Callable:
    """Adapts the model; gives the loss of (tokens [B, T])."""
    mlx_lora.attach(model, AdapterConfig(rank=RANK, scale=SCALE, num_layers=-1))
    return lambda tokens: loss_fn(model, tokens, mx.ones((tokens.shape[0], tokens.shape[1] - 1), mx.bool_))[0]


def mlx_lm(model: nn.Module) -> Callable:
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    return lambda tokens: default_loss(model, tokens, mx.array([[0, tokens.shape[1]]] * tokens.shape[0]))[0]


@contextlib.contextmanager
def mlx_lm_checkpointing(model: nn.Module):
    from mlx_lm.tuner.trainer import grad_checkpoint

    layer = type(model.layers[0])
    plain = layer.__call__
    grad_checkpoint(model.layers[0])  # changes the class
    try:
        yield
    finally:
        layer.__call__ = plain


def peak(adapt, checkpointing, options, bare: bool, compiled: bool) -> float:
    """MB above the model's own, for loss and gradients."""
    model = make(options.layers, options.hidden, getattr(mx, options.dtype))
    model = Bare(model) if bare else model
    loss_of = adapt(model)
    model.train()
    tokens = mx.random.randint(0, CONFIG["vocab_size"], (options.batch, options.length + 1))
    parameters = model.trainable_parameters()
    mx.eval(model.parameters(), tokens)

    def loss(parameters, tokens):
        model.update(parameters)
        return loss_of(tokens)

    step = mx.value_and_grad(loss)
    step = mx.compile(step) if compiled else step
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with checkpointing(model) if options.grad_checkpoint else contextlib.nullcontext():
        mx.eval(step(parameters, tokens))
    return (mx.get_peak_memory() - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["MLX_LORA_KERNELS"] = "on"
    contestants = {"mlx-lora": (ours, recomputed_layers), "mlx-lm": (mlx_lm, mlx_lm_checkpointing)}
    for bare in (False,) if options.grad_checkpoint else (False, True):  # "projections" calls no whole layer
        for compiled in (False, True):
            found = {name: peak(*of, options, bare, compiled) for name, of in contestants.items()}
            how = f"{'projections' if bare else 'model'}, {'compiled' if compiled else 'eager'}"
            if options.json:
                print(json.dumps({"step": how, **found}))
            else:
                ratio = found["mlx-lora"] / found["mlx-lm"]
                print(
                    f"{how:<22} mlx-lora {found['mlx-lora']:6.1f} MB   mlx-lm {found['mlx-lm']:6.1f} MB   {ratio:.2f}x"
                )


if __name__ == "__main__":
    main()
