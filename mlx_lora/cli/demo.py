"""``demo``: the whole way on the built-in tiny model, in about a minute and without a network."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import click

from ..config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from ..errors import ConfigError
from . import console
from .options import json_option
from .train import Run

ROWS = {"train": 3000, "valid": 40, "test": 100}
ADAPTER = AdapterConfig(rank=16, scale=4.0, num_layers=-1)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, lr_schedule="cosine_decay", warmup=10)
TRAIN = TrainConfig(iters=300, batch_size=32, steps_per_report=50, steps_per_eval=150, save_every=1000)
SHOWN, MAX_TOKENS = 4, 64
MARK = ".mlx-lora-demo"  # says that the folder is the demo's own, to be replaced by the next one


@click.command()
@click.option(
    "--output", default="demo_output", show_default=True, metavar="FOLDER", help="Where to leave what is made."
)
@json_option
def demo(output: str, as_json: bool):
    """See a small model learn, speak differently, and leave as a Hugging Face adapter.

    A tiny chat model comes with this package. The demo quantizes it to 4 bits, asks it to file notes of a
    lost-property desk as records, which it cannot, fine-tunes it with LoRA, asks again on notes it never saw, merges
    the adapter and exports it to PEFT. No network; about a minute on 4 CPU cores.

    \b
    mlx-lora demo
    mlx-lora demo --output somewhere --json
    """
    tic = time.perf_counter()
    folder = _fresh(Path(output))
    base = _quantized_base(folder / "base-4bit")
    console.title("1. A skill the base does not have")
    _write_rows(folder / "data")
    data = DataConfig(data=str(folder / "data"), mask_prompt=True)
    run = Run(str(base), folder / "adapters", data, as_json=as_json)
    run.load(("train", "valid", "test"))
    before, shown = _score(run)
    console.note(f"Exact match of the base, 4 bits: {before} of {ROWS['test']}")

    console.title("2. Fine-tuning")
    run.attach(ADAPTER, TRAIN.seed)
    if run.train(OPTIMIZER, TRAIN):
        raise KeyboardInterrupt
    after, answers = _score(run)

    console.title(f"3. {ROWS['test']} notes it never saw: {before} right before, {after} right after")
    for (question, wanted, old), (_, _, new) in zip(shown, answers, strict=True):
        console.note(
            f"\n  note    {question}\n  before  {old}\n  after   {new}" + ("" if new == wanted else "   (wrong)")
        )

    console.title("\n4. Leaving")
    merged = _merge(run, folder)
    peft = _export(folder)
    seconds = time.perf_counter() - tic
    if as_json:
        fields = {"exact_match_before": before / ROWS["test"], "exact_match_after": after / ROWS["test"]}
        return console.event("Demo", {**fields, "seconds": seconds, "fused": str(merged), "peft": str(peft)})
    console.note(f"\nDone in {seconds:.0f} s. Try next:")
    note = shown[0][0]
    for line in (
        f"mlx-lora chat --model {base} --adapter-path {folder / 'adapters'}      then /compare {note}",
        f'mlx-lora generate --model {merged} --prompt "{note}"',
        f"mlx-lora inspect {peft}",
        "mlx-lora train --model Qwen/Qwen3-0.6B --data YOUR_DATA --mask-prompt",
    ):
        console.note(f"  {line}")


def _fresh(folder: Path) -> Path:
    """An empty folder; one that an earlier demo left is replaced, anything else is not touched."""
    if folder.exists() and not (folder.is_dir() and ((folder / MARK).exists() or not any(folder.iterdir()))):
        raise ConfigError(f"{folder}: is there, and not from an earlier demo", "Choose another --output.")
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / MARK).touch()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error})", "Choose another --output.") from None
    return folder


def _quantized_base(folder: Path) -> Path:
    import mlx.nn as nn

    from ..model.loading import load, save_model
    from ..tiny_base import PATH

    model, _ = load(PATH, dtype="stored")
    nn.quantize(model, group_size=64, bits=4)
    return save_model(model, folder)


def _write_rows(folder: Path) -> None:
    from ..tiny_base.skill import rows

    folder.mkdir()
    for split, count in ROWS.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split, count))
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _score(run: Run) -> tuple[int, list[tuple[str, str, str]]]:
    """How many test rows are answered to the letter, and the first few as (question, wanted, given)."""
    pairs = run.answers(ROWS["test"], MAX_TOKENS)
    right = sum(given == wanted for _, wanted, given in pairs)
    return right, pairs[:SHOWN]


def _merge(run: Run, folder: Path) -> Path:
    from ..merge.fuse import fuse
    from ..model.loading import load, save_model

    # As stored, not as a CPU computes: the merged model keeps the base's dtype.
    model, _ = load(run.name, run.folder, dtype="stored")
    reports = fuse(model)
    kept = min(r.cosine for r in reports)
    saved = save_model(model, folder / "fused")
    storage = ", ".join(sorted({r.storage for r in reports}))
    console.note(f"Merged into the weights ({storage}; least cosine of a layer's update {kept:.4f}): {saved}")
    return saved


def _export(folder: Path) -> Path:
    from dataclasses import replace

    from ..formats import load_adapter, save_adapter

    adapter = replace(load_adapter(folder / "adapters"), base=str(folder / "base-4bit"))
    saved = save_adapter(adapter, folder / "peft", "peft")
    console.note(
        f"Hugging Face adapter ({adapter.nbytes / 1e3:.0f} kB, {adapter.num_parameters:,} parameters): {saved}"
    )
    return saved
