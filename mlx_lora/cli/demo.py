"""``demo``: fine-tune, merge and export the built-in tiny model, in about a minute and without a network."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import click

from ..config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from ..errors import ConfigError
from . import console
from .options import json_option
from .reports import Stop, show_reports

ROWS = {"train": 3000, "valid": 40, "test": 100}
ADAPTER = AdapterConfig(rank=16, scale=4.0, num_layers=-1)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, lr_schedule="cosine_decay", warmup=10)
TRAIN = TrainConfig(iters=300, batch_size=32, steps_per_report=50, steps_per_eval=150, save_every=1000)
SHOWN, MAX_TOKENS = 4, 64
FOLDER, CHAT_FOLDER = "demo_output", "demo_chat"
MARK = ".mlx-lora-demo"  # marks a folder that the next demo may replace


@click.command()
@click.option(
    "--output", metavar="FOLDER", help=f"Folder for all results (default: {FOLDER}; with --chat, {CHAT_FOLDER})."
)
@click.option("--chat", is_flag=True, help="Train two adapters, and compare them with the base model on the chat page.")
@click.option("--port", type=int, help="Port of the chat page (default: a free one).")
@click.option("--no-browser", is_flag=True, help="Only print the chat page's address.")
@json_option
def demo(output: str | None, chat: bool, port: int | None, no_browser: bool, as_json: bool):
    """Fine-tune a built-in tiny model and compare its answers before and after.

    The demo quantizes a tiny chat model to 4 bits, asks it to turn notes from a lost-property office into records,
    which it cannot do yet, and fine-tunes it with LoRA. Then it asks again with notes that were not in the training
    data, merges the adapter, and exports it to PEFT. It needs no network and about a minute on 4 CPU cores.

    With --chat it trains two adapters, in about as much time, and serves them with the base until Ctrl-C. The page
    opens where there is a browser; its address is printed in any case. It needs the extra packages of serve.

    \b
    mlx-lora demo
    mlx-lora demo --output somewhere --json
    mlx-lora demo --chat
    """
    if chat and as_json:
        raise click.UsageError("--chat shows a page and has no --json output.")
    if not chat and (port is not None or no_browser):
        raise click.UsageError("--port and --no-browser need --chat.")
    if chat:
        from .demo_chat import chat_demo

        return chat_demo(fresh(Path(output or CHAT_FOLDER)), port or 0, not no_browser)
    _demo(fresh(Path(output or FOLDER)), as_json)


def _demo(folder: Path, as_json: bool) -> None:
    from ..data import questions
    from ..model.loading import load
    from ..runs import run

    tic = time.perf_counter()
    base = quantized_base(folder / "base-4bit")
    console.title("1. The base model, in 4 bits")
    write_rows(folder / "data", ROWS)
    data = DataConfig(data=str(folder / "data"), mask_prompt=True)
    model, tokenizer = load(base)
    asked = questions(data, tokenizer, "test")
    before = _answer(model, tokenizer, asked, as_json)

    console.title("2. Fine-tuning")
    stop = Stop()
    reports = run(
        folder / "adapters",
        model=(model, tokenizer),
        data=data,
        adapter=ADAPTER,
        optimizer=OPTIMIZER,
        train=TRAIN,
        stop=stop,
    )
    if show_reports(reports, stop, as_json=as_json)["Done"].stopped:
        raise KeyboardInterrupt
    after = _answer(model, tokenizer, asked, as_json)

    console.title(f"3. Answers to {ROWS['test']} notes that were not in the training data")
    for old, new in list(zip(before, after, strict=True))[:SHOWN]:
        wrong = "" if new.correct else "   (wrong)"
        console.note(f"\n  note    {old.question}\n  before  {old.given}\n  after   {new.given}{wrong}")

    console.title("\n4. Merging and exporting")
    merged = _merge(base, folder)
    peft = _export(folder)
    correct = {when: sum(a.correct for a in answers) for when, answers in (("before", before), ("after", after))}
    fields = {f"exact_match_{when}": count / ROWS["test"] for when, count in correct.items()}
    seconds = time.perf_counter() - tic
    if as_json:
        return console.event("Demo", {**fields, "seconds": seconds, "fused": str(merged), "peft": str(peft)})
    console.note(f"\nDone in {seconds:.0f} s. Try next:")
    note = before[0].question
    for line in (
        f"mlx-lora chat --model {base} --adapter-path {folder / 'adapters'}      then /compare {note}",
        f'mlx-lora generate --model {merged} --prompt "{note}"',
        f"mlx-lora inspect {peft}",
        "mlx-lora demo --chat      two adapters next to the base model, on a page in your browser",
        "mlx-lora train --model Qwen/Qwen3-0.6B --data YOUR_DATA --mask-prompt",
    ):
        console.note(f"  {line}")


def fresh(folder: Path) -> Path:
    """Make an empty folder. An earlier demo's folder is replaced; any other existing folder is an error."""
    if folder.exists() and not (folder.is_dir() and ((folder / MARK).exists() or not any(folder.iterdir()))):
        raise ConfigError(f"{folder}: exists and is not from an earlier demo", "Choose another --output.")
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / MARK).touch()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error})", "Choose another --output.") from None
    return folder


def quantized_base(folder: Path) -> Path:
    """The tiny base in 4 bits, written to ``folder``."""
    import mlx.nn as nn

    from ..model.loading import load, save_model
    from ..tiny_base import PATH

    model, _ = load(PATH, dtype="stored")
    nn.quantize(model, group_size=64, bits=4)
    return save_model(model, folder)


def write_rows(folder: Path, counts: dict[str, int], answer: str = "record") -> None:
    """Write rows for the tiny model's task: ``ROWS`` of each split, with this kind of answer."""
    from ..tiny_base.skill import rows

    folder.mkdir(parents=True)
    for split, count in counts.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split, count, answer=answer))
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _answer(model: Any, tokenizer: Any, asked: list, as_json: bool) -> list:
    """The model's answers to the test rows, and a line with the number of correct ones."""
    from ..runs import answers

    bar, given = console.Bar(len(asked), hidden=as_json), []
    for answer in answers(model, tokenizer, asked, MAX_TOKENS):
        given.append(answer)
        bar.step()
    bar.close()
    console.note(f"Correct answers: {sum(answer.correct for answer in given)} of {len(given)}")
    return given


def _merge(base: Path, folder: Path) -> Path:
    from ..merge.fuse import fuse
    from ..model.loading import load, save_model

    # "stored": the merged model keeps the base's dtype, even if a CPU computes in float32.
    model, _ = load(base, folder / "adapters", dtype="stored")
    reports = fuse(model)
    kept = min(r.cosine for r in reports)
    saved = save_model(model, folder / "fused")
    storage = ", ".join(sorted({r.storage for r in reports}))
    console.note(f"Merged model ({storage}; lowest cosine similarity of a stored update {kept:.4f}): {saved}")
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
