"""A long run with many options: flat memory, few traces, and the same bytes after kills: ./scripts/bench long_run

Trains a small model twice in separate processes: once without a break, and once killed by SIGKILL at random
moments and continued with ``--resume``. Then it compares the files of both runs, and looks at the memory of the run
without a break. Two sets of options: with ``pack``, and with ``cache_prefix``, which exclude each other here because a
prefix is kept for the last layers only. Exit code 1 where a check fails.

The text is a folder with train.jsonl and valid.jsonl (rows of ``text``) or a plain text file; without ``--data``, the
corpus of the tiny model.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import yaml

CHARACTERS = 16  # of a prompt, and of its completion: several rows fit into a short sequence
MEASURES = "measures.jsonl"
# A resumed call logs these again. The fields differ from one run to the next.
PER_CALL = {"Run", "DataLoaded", "Planned", "Started", "PrefixCache", "Warned", "Done", "EarlierRunMoved"}
TIMES = {"time", "iterations_per_second", "tokens_per_second", "peak_memory", "val_time", "seconds"}
ACCUMULATION = 3
SETTLED = 1000  # iterations; in the half of a shorter run, the system's allocator still takes memory for the first time
METRIC = '''
def shared_words(given, expected):
    """The mean share of expected words that are in the answer."""
    pairs = [({*a.split()}, {*b.split()}) for a, b in zip(given, expected)]
    return sum(len(a & b) / max(1, len(b)) for a, b in pairs) / len(pairs)
'''
OPTIONS = {
    "pack": {"pack": True, "num_layers": -1, "grad_checkpoint": True, "max_seq_length": 64},
    "prefix": {"cache_prefix": "disk", "num_layers": 1},
}


def settings(iters: int, name: str, model: Path) -> dict:
    """The configuration of a run, a ``-c`` file."""
    often = max(4, iters // 40)
    return {
        "model": str(model),
        "data": "../data",
        "mask_prompt": True,
        "adapter_path": "run",
        "iters": iters,
        "batch_size": 2,
        "grad_accumulation_steps": ACCUMULATION,
        "seed": 7,
        "max_grad_norm": 1.0,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "lr_schedule": "cosine_decay",
        "warmup": 10,
        "lora_parameters": {"rank": 8, "alpha": 16, "dropout": 0.1},
        "loraplus_lr_ratio": 4.0,
        "steps_per_report": 5,
        "steps_per_eval": often,
        "save_every": max(3, iters // 50),
        "val_batches": 2,
        "metric": "../metric.py:shared_words",
        "metric_rows": 4,
        "metric_max_tokens": 8,
        "best_by": "shared_words",
        "report_prompts": 2,
        "keep": 3,
        "patience": 0,
        **OPTIONS[name],
    }


def write_rows(source: Path | None, folder: Path) -> None:
    """Write prompts and completions made of the text in ``source``."""
    folder.mkdir()
    for split in ("train", "valid"):
        if source is not None and source.is_dir():
            texts = [json.loads(line)["text"] for line in (source / f"{split}.jsonl").read_text("utf-8").splitlines()]
        else:
            if source is None:
                from mlx_lora.tiny_base import corpus

                documents = itertools.islice(corpus.documents(0), 300)
                text = " ".join(turn["content"] for document in documents for turn in document.get("messages", ()))
            else:
                text = source.read_text("utf-8")
            cut = [text[i : i + 2 * CHARACTERS] for i in range(0, len(text), 2 * CHARACTERS)]
            texts = cut[::10] if split == "valid" else [part for i, part in enumerate(cut) if i % 10]
        rows = [{"prompt": text[:CHARACTERS], "completion": text[CHARACTERS : 2 * CHARACTERS]} for text in texts]
        lines = [json.dumps(row) + "\n" for row in rows if row["completion"].strip()]
        (folder / f"{split}.jsonl").write_text("".join(lines), "utf-8")


# ---- the process that trains


def train(*words: str) -> None:
    """``mlx-lora train``, with a line of measurements for each iteration."""
    import mlx.core as mx  # after mlx_lora, which opens a fast BLAS on Linux

    from mlx_lora.training.step import Step

    traces, shapes, now = {"_train_batch_fn": 0, "_accumulate_fn": 0, "_update_fn": 0}, set(), [0]

    def counted(name: str, own):
        def call(self, *arrays):
            traces[name] += 1
            return own(self, *arrays)

        return call

    for name in traces:
        setattr(Step, name, counted(name, getattr(Step, name)))
    run, outcome = Step.run, Step.outcome

    def noted(self, iteration, *batch, **options):
        now[0] = iteration
        if not shapes:  # the plan traces the step, too
            traces.update(dict.fromkeys(traces, 0))
        shapes.add(str([array.shape for array in batch]))
        return run(self, iteration, *batch, **options)

    def measured(self):
        result = outcome(self)
        record = {"iteration": now[0], "active": mx.get_active_memory(), "rss": resident(), "shapes": len(shapes)}
        file.write(json.dumps({**record, **traces}) + "\n")
        file.flush()
        return result

    Step.run, Step.outcome = noted, measured
    from mlx_lora.cli.main import main

    with open(MEASURES, "a") as file:
        main(["train", *words])


def resident() -> int:
    """Bytes of this process that are in memory now; on Linux without files, and with what was swapped out."""
    if (status := Path("/proc/self/status")).exists():
        lines = [line.split() for line in status.read_text().splitlines()]
        return 1024 * sum(int(line[1]) for line in lines if line[0] in ("RssAnon:", "VmSwap:"))
    return 1024 * int(subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True).stdout)


# ---- the process that kills and compares


def start(folder: Path) -> subprocess.Popen:
    resume = ["--resume"] if (folder / "run" / "training_state.safetensors").exists() else []
    words = ["--train", "-c", "run.yaml", "--json", *resume]
    words += ["--yes"] if "cache_prefix" in (folder / "run.yaml").read_text() else []
    with open(folder / "output", "a") as output:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *words], cwd=folder, stdout=output, stderr=output
        )


def measures(folder: Path, start: int = 0) -> list[dict]:
    """The measurements from this byte of the file on; the last line may not be complete."""
    file = folder / MEASURES
    lines = file.read_bytes()[start:].decode().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]


def finish(folder: Path) -> None:
    """Train until the run is complete."""
    if start(folder).wait():
        raise SystemExit(f"{folder.name} failed:\n" + (folder / "output").read_text()[-3000:])


def train_with_kills(folder: Path, iters: int, kills: int, seed: int) -> list[int]:
    """Train, and kill the process at random moments; return the iterations that it had reached."""
    draw, killed = random.Random(seed), []
    for after in sorted(draw.randrange(1, max(2, int(iters * 0.95))) for _ in range(kills)):
        process, at = start(folder), 0
        known = (folder / MEASURES).stat().st_size if (folder / MEASURES).exists() else 0
        while process.poll() is None and at < after:
            time.sleep(0.1)
            at = max((m["iteration"] for m in measures(folder, known)[-1:]), default=0)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"{folder.name} ended before it was killed:\n" + (folder / "output").read_text()[-3000:])
        killed.append(measures(folder)[-1]["iteration"])
        with open(folder / MEASURES, "a") as file:
            file.write("\n")  # after half a line
    finish(folder)
    return killed


def log(folder: Path) -> list[str]:
    """The lines of the log that a resumed run must have too, without times."""
    records = map(json.loads, (folder / "run" / "log.jsonl").read_text("utf-8").splitlines())
    return [
        json.dumps({name: value for name, value in record.items() if name not in TIMES})
        for record in records
        if record["kind"] not in PER_CALL
    ]


def files(folder: Path) -> dict[str, bytes]:
    """What must be the same in both runs, by file. Of the log and the page, which hold times, that they are there.

    A run killed before its first checkpoint begins anew, and its log is moved to ``earlier-N``.
    """
    found = {p.relative_to(folder).as_posix(): p for p in sorted((folder / "run").rglob("*")) if p.is_file()}
    found = {name: p for name, p in found.items() if not name.startswith("run/earlier-")}
    compared = {name: p for name, p in found.items() if name.endswith(("adapters.safetensors", "adapter_config.json"))}
    state = {name: state_bytes(p) for name, p in found.items() if p.name == "training_state.safetensors"}
    return {**dict.fromkeys(found, b""), **{name: p.read_bytes() for name, p in compared.items()}, **state}


def state_bytes(file: Path) -> bytes:
    """All of a training state but the seconds that it counts."""
    import mlx.core as mx

    from mlx_lora.training import TrainingState

    state = vars(TrainingState.load(file))
    facts = {name: state[name] for name in ("fingerprint", "run")} | {"tally": {**vars(state["tally"])}}
    facts["tally"].pop("window_seconds")
    text = json.dumps(facts, sort_keys=True)
    for group in ("parameters", "optimizer", "pending", "reference"):
        for name, array in sorted(state[group].items()):
            text += f"\n{group}/{name} {array.dtype} {array.shape} "
            text += hashlib.sha256(np.array(array.reshape(-1).view(mx.uint8)).tobytes()).hexdigest()
    return text.encode()


def growth(values: list[tuple[int, int]]) -> float:
    """Bytes gained over these (iteration, bytes), by the slope of the line that fits them best."""
    at, sizes = np.array(values, float).T
    return float(np.polyfit(at - at[0], sizes, 1)[0] * (at[-1] - at[0]))


def check(name: str, one: Path, two: Path, killed: list[int]) -> list[str]:
    """Print what was measured; return what is wrong."""
    faults, records = [], measures(one)
    half = [m for m in records[len(records) // 2 :] if m["iteration"] % ACCUMULATION == 0]
    last = records[-1]
    print(f"{name}: {last['iteration']} iterations; killed at {killed}")
    for kind, allowed in (("active", 0.01), ("rss", 0.05)):
        gained, size = growth([(m["iteration"], m[kind]) for m in half]), half[0][kind]
        print(
            f"  {kind:6} memory: {size / 1e6:.2f} MB at half, {half[-1][kind] / 1e6:.2f} MB at the end; slope "
            f"{gained / len(half) / ACCUMULATION:+.1f} bytes an iteration, {gained / size:+.3%} over this half"
        )
        settled = kind == "active" or last["iteration"] >= SETTLED
        if settled and gained > allowed * size:
            faults.append(f"{name}: {kind} memory grows by {gained / size:.1%} in the second half")
    print(
        f"  traces: {last['_accumulate_fn']} of accumulate for {last['shapes']} shapes, {last['_update_fn']} of update"
    )
    if last["_accumulate_fn"] != last["shapes"] or last["_update_fn"] != 1 or last["_train_batch_fn"]:
        faults.append(f"{name}: the step was traced more often than once for each shape")
    first, second = files(one), files(two)
    different = sorted(f for f in first.keys() | second.keys() if first.get(f) != second.get(f))
    print(f"  files: {len(first)} of {len(first)} equal" if not different else f"  files that differ: {different}")
    faults += [f"{name}: {file} differs" for file in different]
    a, b = log(one), log(two)
    unequal = [f"{x}\n  {y}" for x, y in zip(a, b, strict=False) if x != y]
    print(
        f"  log: {len(a)} lines, {len(unequal)} different" + ("" if len(a) == len(b) else f"; {len(b)} after the kills")
    )
    if a != b:
        faults.append(f"{name}: the log differs:\n  " + "\n  ".join(unequal[:3]))
    return faults


def compare(name: str, folder: Path, model: Path, iters: int, kills: int, seed: int) -> list[str]:
    """Train both ways with the options ``name``, at the same time."""
    one, two = folder / f"{name}-one", folder / f"{name}-two"
    for place in (one, two):
        place.mkdir()
        (place / "run.yaml").write_text(yaml.safe_dump(settings(iters, name, model)))
    thread = threading.Thread(target=finish, args=(one,))
    thread.start()
    killed = train_with_kills(two, iters, kills, seed)
    thread.join()
    return check(name, one, two, killed)


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        return train(*sys.argv[2:])
    from mlx_lora.tiny_base import PATH

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of rows of text, or a text file")
    parser.add_argument("--model", type=Path, default=PATH, help="a model's folder; by default the tiny model")
    parser.add_argument("--iters", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--options", choices=OPTIONS, action="append", help="one set of options only")
    parser.add_argument("--folder", type=Path, help="keep the runs in this new folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(options.data, folder / "data")
        (folder / "metric.py").write_text(METRIC)
        faults = []
        for name in options.options or OPTIONS:
            tic = time.monotonic()
            faults += compare(name, folder, options.model.resolve(), options.iters, options.kills, options.seed)
            print(f"  {time.monotonic() - tic:.0f} s", flush=True)
    for fault in faults:
        print(f"FAILED {fault}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
