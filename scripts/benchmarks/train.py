"""Training speed and memory beside mlx-lm and PEFT: the same random Llama (46M parameters), the same rows.

./scripts/bench train [--rounds 3] [--seconds 12] [--batch-size 4] [--only NAME ...] [--peft-python PATH]

Each contestant runs in a process of its own, in turn, round after round; the table gives medians over the rounds.
Counted are the tokens that are learned, not padding. Rows of similar length are padded together; "unsorted" pads rows
in random order, and "packed" is --pack with a sequence of 512 or 2048 tokens as a batch. PEFT takes part where torch
and peft can be imported (pip install 'mlx-lora[judge]'), or through another Python named by --peft-python.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
RANK, SCALE, RATE = 8, 20.0, 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name: (worker, its arguments, environment)
CONTESTANTS = {
    "mlx-lora, 4-bit base": ("ours", {"bits": 4}, {}),
    "mlx-lora, float32 base": ("ours", {}, {}),
    "mlx-lora, 4-bit base, unsorted": ("ours", {"bits": 4, "grouped": False}, {}),
    "mlx-lora, 4-bit base, packed 512": ("ours", {"bits": 4, "pack": 512}, {}),
    "mlx-lora, 4-bit base, packed 2048": ("ours", {"bits": 4, "pack": 2048}, {}),
    "mlx-lora, DoRA, 4-bit base": ("ours", {"bits": 4, "method": "dora"}, {}),
    "mlx-lm, 4-bit base": ("mlx_lm", {"bits": 4}, {"MLX_LORA_BLAS": "off"}),
    "mlx-lm, 4-bit base, same BLAS": ("mlx_lm", {"bits": 4}, {}),
    "mlx-lm, float32 base": ("mlx_lm", {}, {"MLX_LORA_BLAS": "off"}),
    "mlx-lm, float32 base, same BLAS": ("mlx_lm", {}, {}),
    "PEFT, float32": ("peft", {"dtype": "float32"}, {}),
    "PEFT, bfloat16": ("peft", {"dtype": "bfloat16"}, {}),
}


def rows() -> list[dict]:
    """WikiSQL if it is available, else sentences that the package makes."""
    path = SHARED / "wikisql" / "train.jsonl"
    if path.exists():
        return [json.loads(line) for line in path.read_text().splitlines()]
    from mlx_lora.tiny_base.corpus import documents

    chats = (d["messages"] for d in itertools.islice(documents(0), 2000) if "messages" in d)
    return [{"text": " ".join(message["content"] for message in chat)} for chat in chats]


def tokenizer():
    from transformers import AutoTokenizer

    folder = SHARED / "tokenizers" / "minimind"
    return AutoTokenizer.from_pretrained(folder if folder.exists() else ROOT / "mlx_lora" / "tiny_base")


def mlx_model(bits: int | None):
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import llama

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(LLAMA))
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    return model


class Clock:
    """Counts steps after a warm-up (three, or one that takes longer than all may) until the time is up."""

    def __init__(self, seconds: float):
        self.seconds, self.warm, self.steps, self.tokens = seconds, 3, 0, 0
        self.tic = self.toc = time.perf_counter()

    def step(self, tokens: int) -> bool:
        """A step is done; True when it is enough."""
        self.toc = time.perf_counter()
        if self.warm > 0:
            self.warm = self.warm - 1 if self.toc - self.tic < self.seconds else 0
            self.tic = self.toc
            return False
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        return self.toc - self.tic >= self.seconds

    def result(self) -> dict:
        return {"tokens_per_second": self.tokens / (self.toc - self.tic), "steps": self.steps}


def ours(
    seconds: float,
    batch: int,
    bits: int | None = None,
    method: str = "lora",
    grouped: bool = True,
    pack: int | None = None,
) -> dict:
    """grouped: batches of rows of similar lengths. pack: tokens in a sequence; a batch is then one sequence."""
    import numpy as np

    import mlx_lora
    from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
    from mlx_lora.data import batches, packed_batches, train_batches
    from mlx_lora.fast import accelerate
    from mlx_lora.training import Progress, TrainReport

    model = mlx_model(bits)
    accelerate(model)
    mlx_lora.attach(model, AdapterConfig(method=method, rank=RANK, scale=SCALE, num_layers=-1))
    data = mlx_lora.tokenize(rows(), tokenizer(), DataConfig(max_seq_length=pack or 2048))
    batch = 1 if pack else batch
    if not grouped:
        batches.length_groups = lambda room, *_: [np.arange(len(room))]
    config = TrainConfig(iters=100_000, batch_size=batch, steps_per_report=1, pack=bool(pack))
    optimizer = mlx_lora.build_optimizer(OptimizerConfig(learning_rate=RATE), config.iters)
    clock, before = Clock(seconds), 0
    for report in mlx_lora.train(model, optimizer, data, None, config):
        if isinstance(report, TrainReport):
            if clock.step(report.trained_tokens - before):
                break
            before = report.trained_tokens
        assert not isinstance(report, Progress) or report.loss is not None
    made = (packed_batches if pack else train_batches)(data, batch, seed=0)
    learned, all_ = zip(*((b.mask.sum(), b.mask.size) for b in itertools.islice(made, 300)), strict=True)
    return {**clock.result(), "padding": 1 - float(sum(learned) / sum(all_))}


def mlx_lm(seconds: float, batch: int, bits: int | None = None) -> dict:
    """mlx-lm's own trainer, its data set and its loop."""
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset, TextDataset
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = mlx_model(bits)
    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    data = CacheDataset(TextDataset(rows(), tokenizer()))
    clock = Clock(seconds)

    class Enough(Exception):
        pass

    def batches(dataset, batch_size, max_seq_length, **options):
        """mlx-lm's batches; asked for the next one, the step before is done."""
        first = True
        real = 0
        for tokens, lengths in trainer_batches(dataset, batch_size, max_seq_length, **options):
            if not first and clock.step(real):
                raise Enough
            # Tokens that count: the row's own. mlx-lm also learns one pad token a row.
            real = int((np.array(lengths)[:, 1] - 1).sum())
            first = False
            yield tokens, lengths

    trainer_batches = trainer.iterate_batches
    arguments = trainer.TrainingArgs(
        batch_size=batch, iters=100_000, steps_per_report=10**9, steps_per_save=10**9, adapter_file="/dev/null"
    )
    with contextlib.suppress(Enough):
        trainer.train(model, optim.Adam(learning_rate=RATE), data, None, arguments, iterate_batches=batches)
    return clock.result()


def peft(seconds: float, batch: int, dtype: str) -> dict:
    """PEFT under a plain PyTorch loop, on batches of rows of like length, padded to the longest."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{k: v for k, v in LLAMA.items() if k not in ("model_type", "rope_theta")})
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    lora = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=TARGETS)
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    encode = tokenizer()
    texts = [encode(row["text"])["input_ids"] + [encode.eos_token_id] for row in rows()]
    texts.sort(key=len)
    batches = [texts[i : i + batch] for i in range(0, len(texts) - batch + 1, batch)]
    order = torch.randperm(len(batches)).tolist()
    clock = Clock(seconds)
    while True:
        for i in order:
            width = max(map(len, batches[i]))
            ids = torch.tensor([t + [0] * (width - len(t)) for t in batches[i]])
            labels = torch.tensor([t + [-100] * (width - len(t)) for t in batches[i]])
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if clock.step(sum(len(t) - 1 for t in batches[i])):
                return clock.result()


WORKERS = {"ours": ours, "mlx_lm": mlx_lm, "peft": peft}


def worker(name: str, seconds: float, batch: int) -> None:
    kind, arguments, _ = CONTESTANTS[name]
    if kind != "peft":
        import mlx_lora  # noqa: F401  (before MLX: opens the BLAS, or not, as MLX_LORA_BLAS says)
    result = WORKERS[kind](seconds, batch, **arguments)
    # Kilobytes on Linux, bytes on macOS.
    unit = 1e9 if sys.platform == "darwin" else 1e6
    result["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant runs")
    parser.add_argument("--seconds", type=float, default=12, help="time of a measurement, after warming up")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="contestants whose name contains one of these")
    parser.add_argument("--peft-python", default=sys.executable, help="Python that has torch and peft")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options.seconds, options.batch_size)
    names = [n for n in CONTESTANTS if not options.only or any(part in n for part in options.only)]
    probe = [options.peft_python, "-c", "import torch, peft"]
    if any(CONTESTANTS[n][0] == "peft" for n in names) and subprocess.run(probe, capture_output=True).returncode:
        print("PEFT is left out: pip install 'mlx-lora[judge]', or name a Python with --peft-python.", file=sys.stderr)
        names = [n for n in names if CONTESTANTS[n][0] != "peft"]
    found: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names:
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
            kind, _, environment = CONTESTANTS[name]
            python = options.peft_python if kind == "peft" else sys.executable
            sizes = ["--seconds", str(options.seconds), "--batch-size", str(options.batch_size)]
            done = subprocess.run(
                [python, __file__, "--worker", name, *sizes],
                env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", **environment},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    report(found, options.json)


def report(found: dict[str, list[dict]], as_json: bool) -> None:
    def median(name: str, key: str) -> float:
        return statistics.median(result[key] for result in found[name])

    first = next(iter(found))
    speed = {name: median(name, "tokens_per_second") for name in found}
    if as_json:
        for name, results in found.items():
            print(json.dumps({"name": name, "tokens_per_second": speed[name], "rounds": results}))
        return
    print(f"{'':<34}{'tokens/s':>10}{'spread':>16}{'peak GB':>9}{'padding':>9}   {first} is")
    for name, results in found.items():
        all_speeds = [r["tokens_per_second"] for r in results]
        spread = f"{min(all_speeds):.0f}-{max(all_speeds):.0f}"
        padding = f"{results[0]['padding']:.1%}" if "padding" in results[0] else ""
        print(
            f"{name:<34}{speed[name]:>10.0f}{spread:>16}{median(name, 'peak_memory'):>9.2f}{padding:>9}"
            f"   {speed[first] / speed[name]:.2f}x its speed"
        )


if __name__ == "__main__":
    main()
