"""Requests for several adapters at once: in one batch, in turn, and as mlx-lm's server takes them.

    ./scripts/bench serve [--model FOLDER] [--requests 1,2,4,8,16] [--tokens 64] [--rounds 3]

Measures tokens per second for N requests with N different adapters, the time to change from one adapter to another, and
the memory of an adapter against that of a second model. Everything in one run, alternating; medians.
mlx-lm's server loads the model again for another adapter (`ModelProvider.load`); here that is its own `load`, without
HTTP on either side.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

import mlx_lora  # before mlx.core
from mlx_lora import AdapterConfig, GenerateConfig, attach, extract, load, save_adapter, unmount
from mlx_lora.serving.bank import AdapterBank
from mlx_lora.serving.engine import Engine
from mlx_lora.serving.requests import Request
from mlx_lora.tiny_base import PATH


def make_adapters(model, count: int, folder: Path, rank: int) -> list[Path]:
    paths = []
    for seed in range(count):
        mx.random.seed(seed)
        attach(model, AdapterConfig(rank=rank, num_layers=-1))
        adapter = extract(model)
        noise = {n: a if n.endswith("lora_a") else 0.01 * mx.random.normal(a.shape) for n, a in adapter.weights.items()}
        from dataclasses import replace

        paths.append(folder / f"adapter{seed}")
        save_adapter(replace(adapter, weights=noise), paths[-1])
        unmount(model)
    return paths


def seconds(work: Callable[[], object]) -> float:
    tic = time.perf_counter()
    work()
    return time.perf_counter() - tic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PATH))
    parser.add_argument("--requests", default="1,2,4,8,16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    sizes = [int(part) for part in given.requests.split(",")]
    model, tokenizer = load(given.model)
    mx.eval(model.parameters())
    weights = mx.get_active_memory()
    with tempfile.TemporaryDirectory() as folder:
        paths = make_adapters(model, max(sizes), Path(folder), given.rank)
        bank = AdapterBank(model)
        for number, path in enumerate(paths):
            bank.add(str(number), path)
        engine = Engine(model, tokenizer, bank, batch_size=max(sizes), prefill_batch_size=8, prompt_cache_size=0)
        endless = dict.fromkeys(tokenizer.eos_token_ids, -1000000000.0)
        config = GenerateConfig(max_tokens=given.tokens, logit_bias=endless)
        prompt = [5 + n % 200 for n in range(given.prompt_tokens)]
        before = mx.get_active_memory()
        for number in range(len(paths)):
            bank.acquire(str(number))
        bank.choose([bank.load(str(number)).key for number in range(len(paths))])
        of_one = (mx.get_active_memory() - before) / len(paths)

        def batched(count: int) -> None:
            list(engine.stream_all([Request(prompt, config, str(n)) for n in range(count)]))

        def in_turn(count: int) -> None:
            for number in range(count):
                list(engine.stream(Request(prompt, config, str(number))))

        def as_mlx_lm(count: int) -> None:
            """A server that holds one adapter at a time: each request loads the model with its own."""
            from mlx_lm import load as mlx_lm_load
            from mlx_lm import stream_generate
            from mlx_lm.sample_utils import make_logits_processors

            for number in range(count):
                other, its_tokenizer = mlx_lm_load(given.model, adapter_path=str(paths[number]))
                mx.eval(other.parameters())
                for _ in stream_generate(
                    other,
                    its_tokenizer,
                    prompt,
                    max_tokens=given.tokens,
                    logits_processors=make_logits_processors(endless),
                ):
                    pass
                del other
                gc.collect()

        ways = {"one batch": batched, "in turn": in_turn, "mlx-lm, loading each": as_mlx_lm}
        for way in ways.values():
            way(1)
        print(f"tokens/s, {given.tokens} tokens each, {len(paths)} adapters of rank {given.rank}")
        print(
            f"| requests | {' | '.join(ways)} | one batch / in turn | one batch / mlx-lm |\n|{'---|' * (len(ways) + 3)}"
        )
        for count in sizes:
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(given.rounds):
                for name, way in ways.items():
                    times[name].append(seconds(lambda way=way, count=count: way(count)))
            rates = {name: count * given.tokens / statistics.median(found) for name, found in times.items()}
            fast, slow, other = rates.values()
            shown = " | ".join(f"{rate:,.0f}" for rate in rates.values())
            print(f"| {count} | {shown} | {fast / slow:.2f} | {fast / other:.2f} |", flush=True)

        keys = [bank.load(str(number)).key for number in range(len(paths))]
        swaps = [seconds(lambda key=key: bank.choose([key])) for key in keys * 20]
        loads = []
        for path in paths[: given.rounds]:
            from mlx_lm import load as mlx_lm_load

            def reload(path=path):
                other, _ = mlx_lm_load(given.model, adapter_path=str(path))
                mx.eval(other.parameters())

            loads.append(seconds(reload))
        swap, reloaded = statistics.median(swaps), statistics.median(loads)
        times = f"{1e6 * swap:.0f} us; mlx-lm loads again: {1e3 * reloaded:.0f} ms"
        print(f"change of the adapter: {times} ({reloaded / swap:,.0f}x)")
        sizes = f"an adapter {of_one / 1e6:.2f} MB, a second model {weights / 1e6:.1f} MB"
        print(f"memory: {sizes} ({weights / of_one:.1f}x)")
        engine.close()


if __name__ == "__main__":
    assert mlx_lora
    main()
