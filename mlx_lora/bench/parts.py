"""The measured parts of ``bench check``: kernels, decoding, training, prompts, a swap of adapters.

Each part takes a plan and a clock. It yields figures, repeatedly with more samples, and notes (text) about what was
left out. If a part holds a model several times, all copies share the base's arrays.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from .. import device
from ..adapter import Adapter
from ..fast import explain
from ..merge.fuse import fuse
from ..model.attach import mount
from .chips import bandwidth
from .contestants import (
    LORA,
    base_and_adapter,
    float_dtype,
    mlx_lm_training_step,
    training_step,
    with_adapter,
    with_mlx_lm_adapter,
)
from .estimate import Assumptions, kernel_seconds, ratio, token_seconds
from .kernels import measure_kernels
from .models import (
    RANK,
    adapter_numbers,
    base_bytes,
    linear_numbers,
    random_model,
    random_nf4_model,
    with_same_weights,
)
from .report import Figure, figure
from .timing import Clock, OutOfTime, in_turn, kernels_set, memory_of_gpu, seconds_and_peak, seconds_of

# Peak of a step above the model's memory relative to mlx-lm's, measured on a CPU: scripts/benchmarks/README.md.
STEP_MEMORY = 0.59
# The low-rank product of a prompt is less than 1 % of the work.
PROMPT_TIME = 1.0


@dataclass(frozen=True)
class Plan:
    """The measured models and sizes.

    Args:
        kernels: models whose layers are measured, with 4 bits. decoding: models that decode; the first one also trains,
            reads prompts and swaps adapters. tokens: decoded in a sample. prompt: tokens of a prompt.
        lengths: row lengths of training steps. rounds: most rounds of each measurement.
    """

    kernels: tuple[str, ...] = ("Llama-3.2-1B", "Qwen3-4B")
    decoding: tuple[str, ...] = ("Llama-3.2-1B", "Qwen3-4B")
    tokens: int = 32
    prompt: int = 512
    lengths: tuple[int, ...] = (256, 1024)
    rounds: int = 15


TINY = Plan(("tiny",), ("tiny", "tiny Qwen3"), tokens=3, prompt=32, lengths=(16, 24), rounds=1)
Found = Iterator[Figure | str]


def kernels(plan: Plan, clock: Clock) -> Found:
    """Every kernel next to plain operations and mlx-lm's layers, at the sizes of each model."""
    late = []
    for number, model in enumerate(plan.kernels):
        mine = clock.share(1 / (len(plan.kernels) - number))
        with kernels_set("on"):
            for time_ in measure_kernels(model, RANK, 4, 1, 4 * plan.rounds, mine.seconds / 12):
                peak, estimate = bandwidth(time_.chip), None
                if peak and time_.launches is not None:
                    size = time_.gigabytes_per_second * time_.microseconds * 1e3
                    estimate = 1e6 * kernel_seconds(size, time_.launches, peak, Assumptions())
                spread = time_.microseconds, time_.low_microseconds, time_.high_microseconds, time_.samples
                yield Figure("kernels", model, time_.part, time_.path, "us", *spread, estimate=estimate)
                if mine.left() < 0:
                    late.append(f"the time for {model} was up after {time_.part}, {time_.path}")
                    break
        _forget()
    if late:
        raise OutOfTime("; ".join(late))


def decoding(plan: Plan, clock: Clock) -> Found:
    """Tokens per second: base; adapter with kernels, with plain operations, with mlx-lm's layers; fused."""
    for number, name in enumerate(plan.decoding):
        mine = clock.share(1 / (len(plan.decoding) - number))
        more = 6 * adapter_numbers(name)
        if reason := _too_large(base_bytes(name) + more):
            yield f"{name} was left out: {reason}"
            continue
        yield from _decoding(name, plan, mine)
        _forget()


def _decoding(name: str, plan: Plan, clock: Clock) -> Found:
    base, adapter = base_and_adapter(name)
    models = {
        "base": ("off", base),
        "kernels": ("on", with_adapter(name, base, adapter, "on")),
        "plain": ("off", with_adapter(name, base, adapter, "off")),
        "mlx-lm": ("off", with_mlx_lm_adapter(name, base)),
    }
    with kernels_set("on"):
        reasons = {row.reason for row in explain(models["kernels"][1]) if not row.done and "BLAS" not in row.what}
    if reasons:
        yield f"{name}, kernels: some layers do not use kernels: {'; '.join(sorted(reasons))}"
    if reason := _too_large(base_bytes(name) + base_bytes(name, 8) + 6 * adapter_numbers(name)):
        yield f"{name}, fused, was left out: {reason}"
    else:
        with kernels_set("off"):
            fused = with_adapter(name, base, adapter, "off")
            fuse(fused, bits=8)  # what `fuse` stores by default if the update survives it
        models["fused"] = ("off", fused)

    def decoded(kernels: str, model: nn.Module) -> float:
        """Seconds per token, generated as in mlx-lm; the prompt is not counted."""
        from mlx_lm.generate import generate_step

        with kernels_set(kernels):
            mx.synchronize()
            times = [time.perf_counter() for _ in generate_step(mx.arange(16), model, max_tokens=plan.tokens)]
        return (times[-1] - times[0]) / (len(times) - 1)

    peak = bandwidth(device.describe().chip)
    ways = {path: functools.partial(decoded, *of) for path, of in models.items()}
    for samples in in_turn(ways, clock, plan.rounds):
        for path, times in samples.items():
            speeds = [1 / seconds for seconds in times]
            estimate = 1 / token_seconds(name, path, peak, Assumptions()) if peak else None
            yield figure(speeds, "decoding", name, "a token", path, "tokens/s", estimate=estimate)
        for path in ("mlx-lm", "plain"):
            ratios = [t / k for t, k in zip(samples[path], samples["kernels"], strict=True)]
            estimate = ratio(name, path, peak, Assumptions()) if peak else None
            yield figure(ratios, "decoding", name, "time of a token", f"{path} / kernels", "x", estimate=estimate)


def training(plan: Plan, clock: Clock) -> Found:
    """Time and memory of a step at each length: LoRA and DoRA next to mlx-lm's, and LoRA on an NF4 base."""
    name = plan.decoding[0]
    base = random_model(name, float_dtype())
    for number, length in enumerate(plan.lengths):
        mine = clock.share(1 / (len(plan.lengths) - number))
        tokens = mx.random.randint(0, 512, (1, length + 1))
        mx.eval(tokens)
        with kernels_set("on"):
            steps = {
                "LoRA": training_step(with_same_weights(name, base), LORA, tokens),
                "LoRA, mlx-lm": mlx_lm_training_step(with_mlx_lm_adapter(name, base), tokens),
                "DoRA": training_step(with_same_weights(name, base), replace(LORA, method="dora"), tokens),
                "LoRA on NF4": training_step(random_nf4_model(name, float_dtype()), LORA, tokens),
            }
            # mlx-lm's DoRA keeps the float weights of all layers for the backward pass.
            if reason := _too_large(base_bytes(name) + 6 * linear_numbers(name)):
                yield f"mlx-lm's DoRA, {length} tokens, was left out: {reason}"
            else:
                steps["DoRA, mlx-lm"] = mlx_lm_training_step(with_mlx_lm_adapter(name, base, dora=True), tokens)
            peaks: dict[str, list[float]] = {path: [] for path in steps}

            def measured(path: str, steps: dict = steps, peaks: dict = peaks) -> float:
                seconds, peak = seconds_and_peak(steps[path])
                peaks[path].append(peak)
                return 1e3 * seconds

            what = f"a step of 1 x {length} tokens"
            # mlx-lm's step compiles twice: its optimizer has no state before the first one.
            ways = {path: functools.partial(measured, path) for path in steps}
            for samples in in_turn(ways, mine, plan.rounds, warm=2):
                for path, times in samples.items():
                    yield figure(times, "training", name, what, path, "ms")
                    yield figure(peaks[path][2:], "training", name, f"{what}, peak", path, "MB")
                for method, estimate in (("LoRA", STEP_MEMORY), ("DoRA", None)):
                    if f"{method}, mlx-lm" not in peaks:
                        continue
                    ours, theirs = peaks[method][2:], peaks[f"{method}, mlx-lm"][2:]
                    of = [o / max(t, 1e-6) for o, t in zip(ours, theirs, strict=True)]
                    names = ("training", name, f"{what}, peak", f"{method}: mlx-lora / mlx-lm", "x")
                    yield figure(of, *names, estimate=estimate)
        del steps, ways, measured  # each holds the models
        _forget()


def prompts(plan: Plan, clock: Clock) -> Found:
    """Reading a prompt: the base, with mlx-lora's adapter, with mlx-lm's."""
    from mlx_lm.models.cache import make_prompt_cache

    name = plan.decoding[0]
    base, adapter = base_and_adapter(name)
    models = {
        "base": ("off", base),
        "kernels": ("on", with_adapter(name, base, adapter, "on")),
        "mlx-lm": ("off", with_mlx_lm_adapter(name, base)),
    }
    tokens = mx.random.randint(0, 512, (1, plan.prompt))
    mx.eval(tokens)

    def read(kernels: str, model: nn.Module) -> float:
        cache = make_prompt_cache(model)

        def work() -> None:
            model(tokens, cache=cache)
            mx.eval([c.state for c in cache])

        with kernels_set(kernels):
            return seconds_of(work)

    what = f"a prompt of {plan.prompt} tokens"
    for samples in in_turn({path: functools.partial(read, *of) for path, of in models.items()}, clock, plan.rounds):
        for path, times in samples.items():
            yield figure([plan.prompt / t for t in times], "prompts", name, what, path, "tokens/s")
        over = [o / b for o, b in zip(samples["kernels"], samples["base"], strict=True)]
        yield figure(over, "prompts", name, f"time of {what}", "kernels / base", "x", estimate=PROMPT_TIME)


def swaps(plan: Plan, clock: Clock) -> Found:
    """Putting another adapter on a loaded model."""
    name = plan.decoding[0]
    base, adapter = base_and_adapter(name)
    other = Adapter(adapter.config, {key: -array for key, array in adapter.weights.items()}, base=adapter.base)
    mx.eval(list(other.weights.values()))
    both = [adapter, other]

    def swap() -> float:
        def work() -> None:
            mount(base, both[0])
            mx.eval(base.parameters())

        both.reverse()
        with kernels_set("on"):
            return 1e3 * seconds_of(work)

    what = f"a swap of adapters ({len(adapter.modules)} modules)"
    for samples in in_turn({"mlx-lora": swap}, clock, plan.rounds):
        yield figure(samples["mlx-lora"], "swaps", name, what, "mlx-lora", "ms")


PARTS: dict[str, Callable[[Plan, Clock], Found]] = {
    "kernels": kernels,
    "decoding": decoding,
    "training": training,
    "prompts": prompts,
    "swaps": swaps,
}


def _too_large(size: float) -> str | None:
    """Why ``size`` bytes do not fit; None if they do, with a quarter of the memory left for everything else."""
    memory = memory_of_gpu()
    if memory is None or size < 0.75 * memory:
        return None
    return f"it needs {size / 1e9:.1f} GB, and the GPU may use {memory / 1e9:.1f} GB"


def _forget() -> None:
    """Free the memory of one measurement before the next."""
    gc.collect()
    mx.clear_cache()
