"""The memory of a training step of a base model that is not loaded: from its config and its files' headers."""

from __future__ import annotations

import contextvars
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..base.modules import unique
from ..base.names import BaseModel
from ..config import OptimizerConfig
from ..device import assumed_gpu
from ..errors import ModelError
from ..fast.swap import traced_only
from ..init import SUBTRACTED
from ..model.attach import attach, parameter_counts
from ..training import build_optimizer
from .bare import bare_model, flops_per_token
from .layers import repeats, shortened
from .machines import Variant
from .memory import CPU, GPU
from .step import Parts, Traced


@dataclass(frozen=True)
class Estimate:
    """What a step takes, in bytes, and the sizes of the model."""

    parts: Parts
    trainable: int  # parameters
    parameters: int  # of the model with its adapter; a quantized weight counts as one
    flops: float  # of a token's forward pass
    layers: int
    quantized: bool  # the base


def estimate(base: BaseModel, optimizer: OptimizerConfig, variant: Variant, gpu: bool, processes: int = 1) -> Estimate:
    """Trace the step of ``variant`` on its widest batch.

    Args:
        gpu: as on a GPU, in the dtype of the checkpoint; else as on a CPU, in float32.

    Raises: MLXLoRAError for settings that the model does not have; ModelError where the step cannot be traced.
    """
    context = contextvars.copy_context()
    # MLX's random state belongs to a thread, and tracing leaves tracers in it.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(context.run, _in_thread, base, optimizer, variant, gpu, processes).result()


def _in_thread(*arguments: Any) -> Estimate:
    try:
        return _estimate(*arguments)
    finally:  # else the process aborts at its end, because this thread's stream still runs
        getattr(mx, "clear_streams", lambda: None)()


def _estimate(base: BaseModel, optimizer: OptimizerConfig, variant: Variant, gpu: bool, processes: int) -> Estimate:
    with assumed_gpu() if gpu else nullcontext():
        model = bare_model(base, variant.quantize, full_precision=not gpu)
        flops = flops_per_token(model, base.config)
        subtracted = variant.adapter.init.startswith(SUBTRACTED)
        with traced_only(lambda module, name, compute: compute()):
            attach(
                model, replace(variant.adapter, init="default", init_batches=None) if subtracted else variant.adapter
            )
        trainable, parameters = parameter_counts(model)
        train = variant.train
        steps = -(-train.iters // train.grad_accumulation_steps)
        traced = Traced(model, lambda: build_optimizer(optimizer, steps, model), train, GPU if gpu else CPU)
        batch = _batch(variant, processes)
        runs = repeats(model)
        try:
            parts = _extrapolated(traced, batch, runs)
        except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
            if not runs:
                raise _untraceable(error) from error
            try:
                parts = traced.parts(*batch)
            except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError) as again:
                raise _untraceable(again) from again
        if subtracted:  # a frozen copy of each initial pair
            extra = sum(a.nbytes for a in unique(a for _, a in tree_flatten(model.trainable_parameters())))
            parts = replace(parts, adapter=parts.adapter + extra, peak=parts.peak + extra)
        quantized = bool(base.config.get("quantization") or base.config.get("quantization_config"))
        layers = len(getattr(model, "layers", None) or [])
        return Estimate(parts, trainable, parameters, flops, layers, quantized)


def _extrapolated(traced: Traced, batch: tuple[mx.array, ...], runs: list[tuple[int, int, int]]) -> Parts:
    """The parts of all layers, from traces of few: in every run of equal layers they grow by the same with each."""

    def few(counts: list[int]) -> Parts:
        with shortened(traced.model, runs, counts):
            return traced.parts(*batch)

    least = [2] * len(runs)
    first = total = few(least)
    for i, (_, _, periods) in enumerate(runs):
        more = few([count + (i == j) for j, count in enumerate(least)])
        total = total + (more - first) * (periods - 2)
    return total


def _batch(variant: Variant, processes: int) -> tuple[mx.array, ...]:
    if getattr(variant.train, "loss", "cross_entropy") != "cross_entropy":
        raise ModelError(f"the memory of the loss {variant.train.loss} is not known", "Train it without a plan.")
    rows, length = max(1, variant.train.batch_size // processes), max(2, variant.length)
    tokens, mask = mx.zeros((rows, length), mx.int32), mx.zeros((rows, length - 1), mx.bool_)
    return (tokens, mask, tokens) if variant.train.pack else (tokens, mask)


def _untraceable(error: Any) -> ModelError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(f"its training step cannot be traced ({text[:200]})", "Train it without a plan.")
