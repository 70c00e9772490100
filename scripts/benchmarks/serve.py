"""Requests for several adapters at once: in one batch, in turn, and as mlx-lm's server takes them.

    ./scripts/bench serve [--model FOLDER] [--bits 0,4] [--requests 1,2,4,8,16] [--tokens 16] [--rounds 2]

For each base (a random Llama of 59M parameters, or --model) four tables, everything in one run, alternating, medians:

speed     tokens per second for N requests with N different adapters in one batch; the same one after another (N take N
          times one, so one is measured); mlx-lm's server, which loads the model again for another adapter
          (``ModelProvider.load``; here its own ``load`` and ``stream_generate``, without HTTP on either side); and
          mlx-lm's batch without any adapter, which bounds what a batch can reach
swap      from one resident adapter to another; to one that must be read first; mlx-lm's loading again
memory    of an adapter, with its place in the batch, against a second model
launches  kernels on Metal in one step of N rows, counted from the graph (a compiled SwiGLU as three): with N adapters,
          and without
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx_lora  # before MLX: on Linux it opens a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import AdapterConfig, GenerateConfig, attach, extract, load, save_adapter, unmount
from mlx_lora.bench.timing import kernels_set
from mlx_lora.fast import accelerate, undo
from mlx_lora.kernels.counting import launches
from mlx_lora.serving.bank import AdapterBank
from mlx_lora.serving.engine import Engine
from mlx_lora.serving.requests import Request
from mlx_lora.tiny_base import PATH

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 3072,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def make_base(folder: Path, bits: int) -> Path:
    """A random Llama with the tiny base's tokenizer, quantized unless ``bits`` is 0."""
    from mlx_lm.models import llama

    mx.random.seed(0)
    model, config = llama.Model(llama.ModelArgs.from_dict(LLAMA)), dict(LLAMA)
    if bits:
        config["quantization"] = {"group_size": 64, "bits": bits}
        nn.quantize(model, **config["quantization"])
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in PATH.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def make_adapters(model: nn.Module, count: int, folder: Path, rank: int) -> list[Path]:
    paths = []
    for seed in range(count):
        mx.random.seed(seed)
        attach(model, AdapterConfig(rank=rank, num_layers=-1))
        adapter = extract(model)
        noise = {n: a if n.endswith("lora_a") else 0.01 * mx.random.normal(a.shape) for n, a in adapter.weights.items()}
        paths.append(folder / f"adapter{seed}")
        save_adapter(replace(adapter, weights=noise), paths[-1])
        unmount(model)
    return paths


def seconds(work: Callable[[], object]) -> float:
    tic = time.perf_counter()
    work()
    return time.perf_counter() - tic


@contextmanager
def on_a_gpu() -> Iterator[list[mx.array]]:
    """A context in which MLX's fused operations are one operation each, as on a GPU; on a CPU they are many.

    Yields the keys, values and masks of attention, which the stand-ins do not read.
    """
    read: list[mx.array] = []

    def one(x: mx.array, *_, **__) -> mx.array:
        return mx.sin(x)

    def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None = None, **_) -> mx.array:
        read.extend(x for x in (k, v, mask) if isinstance(x, mx.array) and not any(x is other for other in read))
        return mx.sin(q)

    def dequantize(w: mx.array, scales: mx.array, *_, bits: int = 4, **__) -> mx.array:
        return mx.broadcast_to(mx.sin(scales[..., :1]), (*w.shape[:-1], w.shape[-1] * 32 // bits))

    stand_ins = [(mx.fast, "rms_norm", one), (mx.fast, "rope", one), (mx, "dequantize", dequantize)]
    stand_ins.append((mx.fast, "scaled_dot_product_attention", attention))
    before = [(module, name, getattr(module, name)) for module, name, _ in stand_ins]
    for module, name, function in stand_ins:
        setattr(module, name, function)
    try:
        yield read
    finally:
        for module, name, function in before:
            setattr(module, name, function)


class Bench:
    """One base with its adapters, ways to answer, and what each takes."""

    def __init__(self, base: str, folder: Path, options: argparse.Namespace, most: int):
        self.base, self.options = base, options
        self.model, self.tokenizer = load(base)
        mx.eval(self.model.parameters())
        self.weights = sum(array.nbytes for _, array in tree_flatten(self.model.parameters()))
        self.paths = make_adapters(self.model, most + 1, folder, options.rank)  # one more: it is read later
        self.bank = AdapterBank(self.model)
        for number, path in enumerate(self.paths):
            self.bank.add(str(number), path)
        self.engine = Engine(
            self.model, self.tokenizer, self.bank, batch_size=most, prefill_batch_size=8, prompt_cache_size=0
        )
        self.prompt = [5 + n % 200 for n in range(options.prompt_tokens)]
        self.endless = dict.fromkeys(self.tokenizer.eos_token_ids, -1e9)
        gc.collect()
        before = mx.get_active_memory()
        self.keys = [self.bank.acquire(str(number)).key for number in range(most)]
        self.bank.choose(self.keys)
        self.adapter_bytes = (mx.get_active_memory() - before) / most

    def batched(self, count: int) -> None:
        config = GenerateConfig(max_tokens=self.options.tokens, logit_bias=self.endless)
        list(self.engine.stream_all([Request(self.prompt, config, str(n)) for n in range(count)]))

    def mlx_lm_batch(self, count: int) -> None:
        """mlx-lm's batch of the base: no adapters."""
        from mlx_lm.generate import BatchGenerator

        self.bank.choose([None])
        generator = BatchGenerator(
            self.model, max_tokens=self.options.tokens, completion_batch_size=count, prefill_batch_size=8
        )
        generator.insert([self.prompt] * count)
        while generator.next_generated():
            pass
        generator.close()

    def mlx_lm_server(self, number: int) -> None:
        """One request to a server that holds one adapter at a time."""
        from mlx_lm import load as mlx_lm_load
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_logits_processors

        model, tokenizer = mlx_lm_load(self.base, adapter_path=str(self.paths[number]))
        mx.eval(model.parameters())
        for _ in stream_generate(
            model,
            tokenizer,
            self.prompt,
            max_tokens=self.options.tokens,
            logits_processors=make_logits_processors(self.endless),
        ):
            pass

    def speed(self, sizes: Sequence[int]) -> None:
        tokens, rounds = self.options.tokens, self.options.rounds
        for way in (self.batched, self.mlx_lm_batch, self.mlx_lm_server):
            way(1)
        times: dict[object, list[float]] = {}
        for number in range(rounds):
            times.setdefault("turn", []).append(seconds(lambda: self.batched(1)))
            times.setdefault("server", []).append(seconds(lambda n=number: self.mlx_lm_server(n)))
            for count in sizes:
                times.setdefault(count, []).append(seconds(lambda n=count: self.batched(n)))
                times.setdefault(-count, []).append(seconds(lambda n=count: self.mlx_lm_batch(n)))
        median = {name: statistics.median(found) for name, found in times.items()}
        turn, server = tokens / median["turn"], tokens / median["server"]
        print(f"tokens/s, {tokens} tokens each after a prompt of {len(self.prompt)}")
        print(
            "| requests | one batch | in turn | mlx-lm, loading each | mlx-lm's batch, no adapters | batch / in turn |"
        )
        print("|---|---|---|---|---|---|")
        for count in sizes:
            ours, plain = count * tokens / median[count], count * tokens / median[-count]
            print(f"| {count} | {ours:,.0f} | {turn:,.0f} | {server:,.0f} | {plain:,.0f} | {ours / turn:.2f} |")

    def swap(self) -> None:
        from mlx_lm import load as mlx_lm_load

        def reload(path: Path) -> None:
            model, _ = mlx_lm_load(self.base, adapter_path=str(path))
            mx.eval(model.parameters())

        def read(name: str) -> None:
            self.bank.choose([self.bank.load(name).key])
            mx.eval(self.model.parameters())

        resident = statistics.median(seconds(lambda key=key: self.bank.choose([key])) for key in self.keys * 20)
        first = seconds(lambda: read(str(len(self.paths) - 1)))
        again = statistics.median(seconds(lambda path=path: reload(path)) for path in self.paths[: self.options.rounds])
        print(
            f"change of the adapter: {1e6 * resident:.0f} us, to one that must be read {1e3 * first:.1f} ms; "
            f"mlx-lm loads again: {1e3 * again:.0f} ms ({again / resident:,.0f}x)"
        )

    def memory(self) -> None:
        one, model = self.adapter_bytes, self.weights
        print(f"memory: an adapter {one / 1e6:.2f} MB, a second model {model / 1e6:.1f} MB ({model / one:.1f}x)")

    def launches_of(self, keys: list) -> int:
        """Kernels of one decoding step of ``len(keys)`` rows, sampling included."""
        from mlx_lm.models.cache import BatchKVCache, KVCache

        rows = len(keys)
        caches = [KVCache() if rows == 1 else BatchKVCache([0] * rows) for _ in self.model.layers]
        self.bank.choose(keys)
        mx.eval(self.model(mx.array([self.prompt] * rows), cache=caches), [cache.state for cache in caches])

        def step(tokens: mx.array) -> list[mx.array]:
            with on_a_gpu() as read:
                logits = self.model(tokens, cache=caches)[:, -1, :]
            return [mx.argmax(logits - mx.logsumexp(logits, axis=-1, keepdims=True), axis=-1), *read]

        accelerated = [module for module in self.model.modules() if not isinstance(module, nn.Linear)]
        with kernels_set("on"):  # counting needs no GPU
            undo(accelerated)
            changed = accelerate(self.model)
            found = launches(step, mx.zeros((rows, 1), mx.int32))
        undo(changed)
        accelerate(self.model)
        return found.total()

    def count(self, sizes: Sequence[int]) -> None:
        alone, plain = self.launches_of(self.keys[:1]), self.launches_of([None])
        print("kernel launches on Metal for one token of each request")
        print("| requests | one batch | in turn | the base's batch | the base in turn | a token, one batch |")
        print("|---|---|---|---|---|---|")
        for count in sizes:
            ours, base = (self.launches_of(keys[:count]) for keys in (self.keys, [None] * count))
            print(f"| {count} | {ours} | {count * alone} | {base} | {count * plain} | {ours / count:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or repository; the random Llama if left out")
    parser.add_argument("--bits", default="0,4", help="of the random Llama; 0 is float32")
    parser.add_argument("--requests", default="1,2,4,8,16")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    sizes = [int(part) for part in options.requests.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        for bits in [None] if options.model else [int(part) for part in options.bits.split(",")]:
            folder = Path(temporary) / f"{bits}"
            base = options.model or str(make_base(folder, bits))
            (adapters := Path(temporary) / f"adapters{bits}").mkdir()
            bench = Bench(base, adapters, options, max(sizes))
            about = "" if options.model else f", {f'{bits} bits' if bits else 'float32'}"
            print(f"\n## {options.model or 'a random Llama of 59M parameters'}{about}; adapters of rank {options.rank}")
            bench.count(sizes)
            bench.speed(sizes)
            bench.swap()
            bench.memory()
            bench.engine.close()
            del bench


if __name__ == "__main__":
    assert mlx_lora
    main()
