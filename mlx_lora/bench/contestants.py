"""The contestants of ``bench check``: adapters of this package and of mlx-lm on one random base, and their steps."""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
from mlx.utils import tree_flatten

from .. import device
from ..adapter import Adapter
from ..config import AdapterConfig, OptimizerConfig
from ..fast import accelerate
from ..model.attach import adapters_on, attach, extract, mount, unmount
from ..training.losses import cross_entropy
from ..training.optimizers import MasterWeights, build_optimizer
from ..training.step import Step
from .models import RANK, SCALE, random_model, with_same_weights
from .timing import kernels_set

LORA = AdapterConfig(rank=RANK, scale=SCALE, num_layers=-1)


def float_dtype() -> mx.Dtype:
    """Of x and of the scales: bfloat16, as in most published models. A CPU computes in float32."""
    return mx.float32 if device.is_cpu() else mx.bfloat16


def base_and_adapter(name: str) -> tuple[nn.Module, Adapter]:
    """A random model, and a random adapter for it whose update matters."""
    mx.random.seed(0)
    base = random_model(name, float_dtype())
    attach(base, LORA)
    for layer in adapters_on(base).values():
        layer.lora_b = (0.02 * mx.random.normal(layer.lora_b.shape)).astype(layer.lora_b.dtype)
    adapter = extract(base)
    mx.eval(list(adapter.weights.values()))
    unmount(base)
    return base, adapter


def with_adapter(name: str, base: nn.Module, adapter: Adapter, kernels: str) -> nn.Module:
    """``adapter`` on the same base, accelerated with MLX_LORA_KERNELS=``kernels``."""
    with kernels_set(kernels):
        model = with_same_weights(name, base)
        mount(model, adapter)
        accelerate(model)
        mx.eval(model.parameters())
    return model.eval()


def with_mlx_lm_adapter(name: str, base: nn.Module, dora: bool = False) -> nn.Module:
    """New adapters of mlx-lm, which are float32, on the same base."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = with_same_weights(name, base)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0}, use_dora=dora)
    mx.eval(model.parameters())
    return model.eval()


def training_step(model: nn.Module, config: AdapterConfig, tokens: mx.array) -> Callable[[], None]:
    """One optimizer step of ``mlx_lora.train``, until the last array is computed."""
    attach(model, config)
    mx.eval(model.train().parameters())
    optimizer = MasterWeights(build_optimizer(OptimizerConfig(learning_rate=1e-5), 1000))
    optimizer.init(dict(tree_flatten(model.trainable_parameters())))
    step = Step(model, optimizer, loss=cross_entropy.loss, seed=0, fused=True)
    mask = mx.ones((tokens.shape[0], tokens.shape[1] - 1), mx.bool_)
    number = iter(range(1, 1000))

    def run() -> None:
        step.run(next(number), tokens, mask, ends_window=True)
        step.outcome()
        mx.eval(step.parameters, step.state)

    return run


def mlx_lm_training_step(model: nn.Module, tokens: mx.array) -> Callable[[], None]:
    """One optimizer step as in mlx-lm's ``tuner/trainer.py``. model: with mlx-lm's adapters."""
    from mlx_lm.tuner.trainer import default_loss

    model.train()
    optimizer = opt.Adam(learning_rate=1e-5)
    gradients_of = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]
    lengths = mx.array([[0, tokens.shape[1]]] * tokens.shape[0])

    @functools.partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        (loss, count), gradients = gradients_of(model, tokens, lengths)
        optimizer.update(model, gradients)
        return loss, count

    return lambda: mx.eval(state, *step(tokens, lengths))
