"""Which method: quality, memory and speed of each on WikiSQL, over a small real Llama and the built-in tiny base.

./scripts/bench methods [--iters 60 --bases FOLDER ... --data FOLDER --only LoRA DoRA --json]

Every method trains on the same batches from the same seed, all layers adapted, rank 8 at scale 20 unless named. Test
loss is on held-out rows; ``step`` is the median of the steps after the first five; ``peak`` is MLX's peak memory in a
step, weights included. Without WikiSQL the models learn the task of the tiny base instead. Prints a table in
Markdown, and DoRA's step and memory as multiples of LoRA's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx_lora  # before MLX: on Linux it opens a fast BLAS

# isort: split
import mlx.core as mx

from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from mlx_lora.data import Dataset, train_batches
from mlx_lora.init import FROM_DATA
from mlx_lora.model.attach import parameter_counts
from mlx_lora.tiny_base import PATH, skill

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
BATCH, LONGEST = 4, 200
ROWS = {"train": 1000, "test": 100}  # of the skill
# name: (settings of the adapter, of the optimizer, how the base is quantized)
METHODS: dict[str, tuple[dict, dict, str | None]] = {
    "LoRA": ({}, {}, None),
    "rsLoRA (alpha 16)": (dict(scale=None, alpha=16, rslora=True), {}, None),
    "LoRA+ (x 8, scale 10)": (dict(scale=10.0), dict(loraplus_lr_ratio=8), None),
    "DoRA": (dict(method="dora"), {}, None),
    "VeRA (r 256)": (dict(method="vera", rank=256, scale=None), dict(learning_rate=2e-2), None),
    "PiSSA (scale 2)": (dict(init="pissa", scale=2.0), {}, None),
    "OLoRA (scale 2)": (dict(init="olora", scale=2.0), {}, None),
    "orthogonal (scale 2)": (dict(init="orthogonal", scale=2.0), {}, None),
    "EVA": (dict(init="eva", init_batches=8), {}, None),
    "LoRA-GA (scale 2)": (dict(init="lora_ga", scale=2.0), {}, None),
    "QLoRA, NF4 double": ({}, {}, "nf4"),
    "QLoRA, MLX 4 bits": ({}, {}, "affine"),
    "DoRA, MLX 4 bits": (dict(method="dora"), {}, "affine"),
    "full": (dict(method="full", rank=None, scale=None), {}, None),
}


def rows_of(data: Path | None, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Rows to train on and to test with, of at most LONGEST tokens; without a folder those of the tiny base's skill."""
    if data is None:
        sets = [mlx_lora.tokenize(skill.rows(split, n), tokenizer, DataConfig()) for split, n in ROWS.items()]
    else:
        loaded = mlx_lora.load_dataset(DataConfig(data=str(data)), tokenizer, tuple(ROWS))
        sets = [loaded.train, loaded.test]
    train_set, test_set = (Dataset(e for e in s if len(e.tokens) <= LONGEST) for s in sets)
    return train_set, test_set


def measure(name: str, base: Path, data: Path | None, iters: int) -> dict:
    """Train one method; its facts by column."""
    settings, rate, storage = METHODS[name]
    model, tokenizer = mlx_lora.load(base)
    if storage:
        group = 32 if storage == "affine" else None
        mlx_lora.quantize(model, storage, double_quant=storage == "nf4", group_size=group)
    train_set, test_set = rows_of(data, tokenizer)
    config = AdapterConfig(**{"rank": 8, "scale": 20.0, "num_layers": -1, **settings})
    mx.random.seed(0)
    batches = train_batches(train_set, BATCH, seed=1) if config.init in FROM_DATA else None
    mlx_lora.attach(model, config, batches)
    trained, total = parameter_counts(model)
    optimizer = mlx_lora.build_optimizer(OptimizerConfig(**{"learning_rate": 1e-3, **rate}), iters, model)
    steps, peak, tic = [], 0.0, time.perf_counter()
    for report in mlx_lora.train(model, optimizer, train_set, None, TrainConfig(iters=iters, batch_size=BATCH)):
        if isinstance(report, mlx_lora.Progress):
            steps.append(time.perf_counter() - tic)
            tic = time.perf_counter()
        peak = getattr(report, "peak_memory", peak)
    loss = mlx_lora.evaluate(model, test_set, 8).loss
    return {
        "method": name,
        "trained": trained,
        "share": trained / total,
        "test_loss": loss,
        "step_ms": 1000 * statistics.median(steps[5:]),
        "peak_mb": 1000 * peak,
    }


def alone(name: str, base: Path, data: Path | None, iters: int) -> dict:
    """``measure`` in a process of its own, where no earlier run holds memory."""
    command = [sys.executable, __file__, "--worker", "--only", name, "--bases", str(base), "--iters", str(iters)]
    done = subprocess.run([*command, *(["--data", str(data)] if data else [])], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: list[dict]) -> str:
    lines = ["| method | trained | share | test loss | step | peak |", "|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {r['method']} | {r['trained']:,} | {100 * r['share']:.2f} % | {r['test_loss']:.3f} "
            f"| {r['step_ms']:.0f} ms | {r['peak_mb']:.0f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    at_hand = [p for p in (SHARED / "stories260K", SHARED / "wikisql") if p.is_dir()]
    parser.add_argument("--bases", type=Path, nargs="+", default=[*at_hand[:1], PATH] if len(at_hand) == 2 else [PATH])
    parser.add_argument("--data", type=Path, default=at_hand[1] if len(at_hand) == 2 else None)
    parser.add_argument("--iters", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if missing := [str(p) for p in (options.data, *options.bases) if p and not p.is_dir()]:
        sys.exit(f"not here: {', '.join(missing)}")
    if options.worker:
        return print(json.dumps(measure(options.only[0], options.bases[0], options.data, options.iters)))
    for base in options.bases:
        rows = []
        for name in options.only or METHODS:
            print(f"{base.name}: {name}", file=sys.stderr)
            rows.append(alone(name, base, options.data, options.iters))
            if options.json:
                print(json.dumps({"base": base.name, **rows[-1]}), flush=True)
        if options.json:
            continue
        learned = options.data.name if options.data else "its skill"
        print(f"\n{base.name}, {learned}, {options.iters} steps of {BATCH} rows\n\n{table(rows)}")
        found = {r["method"]: r for r in rows}
        for dora, lora in (("DoRA", "LoRA"), ("DoRA, MLX 4 bits", "QLoRA, MLX 4 bits")):
            if dora in found and lora in found:
                a, b = found[dora], found[lora]
                print(
                    f"\n{dora} over {lora}: step x {a['step_ms'] / b['step_ms']:.2f}, "
                    f"peak x {a['peak_mb'] / b['peak_mb']:.2f}"
                )


if __name__ == "__main__":
    main()
