"""Peak memory of one training step beside mlx-lm: the same random Llama, the same batch, LoRA on all seven linears.

./scripts/bench memory [--layers 8] [--tokens 1024] [--dtype bfloat16]

mlx-lm's adapters are float32 over a bfloat16 model, its backward pass autograd's; ours have the model's dtype and their
own backward pass. Counted by MLX's allocator, above what the models themselves hold; both compiled as their trainers
do it, on matrices large enough to matter but not on a GPU, where MLX's allocator keeps other books: expect the ratio to
hold, not the megabytes.
"""

from __future__ import annotations

import argparse
import json

import mlx_lora  # isort: skip  (opens a BLAS before MLX is imported)
import mlx.core as mx
import mlx.nn as nn

from mlx_lora import AdapterConfig
from mlx_lora.training.loss import loss_fn

CONFIG = dict(model_type="llama", vocab_size=1024, num_attention_heads=8, num_key_value_heads=4, rms_norm_eps=1e-5)
RANK, SCALE = 16, 2.0


def make(layers: int, hidden: int, dtype: mx.Dtype) -> nn.Module:
    from mlx_lm.models import llama

    mx.random.seed(0)
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 3 * hidden}
    model = llama.Model(llama.ModelArgs.from_dict({**CONFIG, **sizes, "tie_word_embeddings": True}))
    model.set_dtype(dtype)
    nn.quantize(model, group_size=64, bits=4)
    return model


def ours(model: nn.Module) -> None:
    mlx_lora.attach(model, AdapterConfig(rank=RANK, scale=SCALE, num_layers=-1))


def mlx_lm(model: nn.Module) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})


def peak(adapt, options, compiled: bool) -> float:
    """MB above the model's own, for loss and gradients."""
    model = make(options.layers, options.hidden, getattr(mx, options.dtype))
    adapt(model)
    model.train()
    tokens, mask = mx.random.randint(0, 1024, (1, options.tokens + 1)), mx.ones((1, options.tokens), mx.bool_)
    parameters = model.trainable_parameters()
    mx.eval(model.parameters(), tokens, mask)

    def loss(parameters, tokens, mask):
        model.update(parameters)
        return loss_fn(model, tokens, mask)[0]

    step = mx.value_and_grad(loss)
    step = mx.compile(step) if compiled else step
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step(parameters, tokens, mask))
    return (mx.get_peak_memory() - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024, help="in the batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for compiled in (False, True):
        found = {name: peak(adapt, options, compiled) for name, adapt in (("mlx-lora", ours), ("mlx-lm", mlx_lm))}
        how = "compiled" if compiled else "eager"
        if options.json:
            print(json.dumps({"step": how, **found}))
        else:
            ratio = found["mlx-lora"] / found["mlx-lm"]
            print(f"{how:<9} mlx-lora {found['mlx-lora']:7.0f} MB   mlx-lm {found['mlx-lm']:7.0f} MB   {ratio:.2f}x")


if __name__ == "__main__":
    main()
