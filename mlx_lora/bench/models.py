"""The models for estimates and ``bench check``: their configs, sizes in bytes, and random weights."""

from __future__ import annotations

import importlib
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..base.nf4 import BLOCK, NF4
from ..base.nf4_linear import NF4Linear

RANK, SCALE = 16, 2.0
GROUP = 64


def _config(model_type: str, layers: int, widths: tuple[int, ...], heads: tuple[int, ...], tied: bool) -> dict:
    hidden, intermediate, vocabulary = widths
    queries, keys, size = heads
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "head_dim": size,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 32768,
    }


MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": _config("llama", 16, (2048, 8192, 128256), (32, 8, 64), True),
    "Qwen3-4B": _config("qwen3", 36, (2560, 9728, 151936), (32, 8, 128), True),
    "Llama-3.1-8B": _config("llama", 32, (4096, 14336, 128256), (32, 8, 128), False),
    "Qwen3-32B": _config("qwen3", 64, (5120, 25600, 151936), (64, 8, 128), False),
    "tiny": _config("llama", 2, (128, 256, 512), (2, 1, 64), True),
    "tiny Qwen3": _config("qwen3", 2, (128, 256, 512), (2, 1, 64), True),
}
SIZES = {"1b": "Llama-3.2-1B", "4b": "Qwen3-4B", "8b": "Llama-3.1-8B", "tiny": "tiny"}  # of ``bench kernels``


def widths(name: str) -> tuple[int, int, int, int]:
    """(hidden, key and value, intermediate, vocabulary) sizes of a model."""
    c = MODELS[name]
    return c["hidden_size"], c["num_key_value_heads"] * c["head_dim"], c["intermediate_size"], c["vocab_size"]


def linears(name: str) -> list[tuple[int, int]]:
    """(in, out) of the seven linear layers of one transformer layer."""
    hidden, keys, intermediate, _ = widths(name)
    queries = MODELS[name]["num_attention_heads"] * MODELS[name]["head_dim"]
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [*attention, (hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]


def linear_numbers(name: str) -> int:
    """Numbers in all linear layers but the output head."""
    return MODELS[name]["num_hidden_layers"] * sum(i * o for i, o in linears(name))


def base_bytes(name: str, bits: int = 4) -> float:
    """Bytes of the base that a token reads, scales included: layers with ``bits``, the output head with 4."""
    hidden, _, _, vocabulary = widths(name)
    layers = linear_numbers(name)
    scales = 32 / GROUP  # bits: two half-precision numbers a group
    return (layers * (bits + scales) + hidden * vocabulary * (4 + scales)) / 8


def adapter_numbers(name: str) -> int:
    """Numbers in an adapter of rank ``RANK`` on all linear layers."""
    return MODELS[name]["num_hidden_layers"] * sum(RANK * (i + o) for i, o in linears(name))


def random_model(name: str, dtype: mx.Dtype) -> nn.Module:
    """A model of ``MODELS`` with random weights of 4 bits, in evaluation mode.

    The packed weights are drawn as they are stored, one layer after the other. So the model never takes more memory
    than its own size; MLX is lazy, and the float weights of a new model are never computed.
    """
    model = _unfilled(name, dtype)
    nn.quantize(model, GROUP, 4)
    for module in model.modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            step = 1 / (4.6 * math.sqrt(module.scales.shape[-1] * GROUP))  # variance of the weights: 1 / in
            module.weight = _random_bytes(4 * module.weight.size).view(mx.uint32).reshape(module.weight.shape)
            module.scales = mx.full(module.scales.shape, step, dtype)
            module.biases = mx.full(module.biases.shape, -7.5 * step, dtype)
            mx.eval(module.parameters())
    mx.eval(model.parameters())
    return model.eval()


def with_same_weights(name: str, model: nn.Module) -> nn.Module:
    """Another model object that shares the arrays of ``model``, made by ``random_model``, and needs no extra memory."""
    dtype = next(m.scales.dtype for m in model.modules() if isinstance(m, nn.QuantizedLinear))
    other = _unfilled(name, dtype)
    nn.quantize(other, GROUP, 4)
    other.update(model.parameters())
    return other.eval()


def random_nf4_model(name: str, dtype: mx.Dtype) -> nn.Module:
    """The same model in NF4. Embeddings and output head stay floats, as with ``mlx-lora quantize --mode nf4``."""
    model = _unfilled(name, dtype)
    new = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in f".{path}":
            rows, columns = module.weight.shape
            absmax = mx.full((-(-rows * columns // BLOCK),), math.sqrt(3 / columns))
            codes = _random_bytes(rows * columns // 2)
            new[path] = NF4Linear(NF4(codes, absmax, None, (rows, columns)), None, dtype)
            mx.eval(new[path].parameters())
    model.update_modules(tree_unflatten(list(new.items())))
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
    return model.eval()


def _random_bytes(count: int) -> mx.array:
    """uint8 [count], count even. MLX draws integers from floats: all bits of 16 are random, not all of 32."""
    return mx.random.randint(0, 1 << 16, (count // 2,), mx.uint16).view(mx.uint8)


def _unfilled(name: str, dtype: mx.Dtype) -> nn.Module:
    config = MODELS[name]
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    return model
