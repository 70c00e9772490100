"""How long the adapter of a 7B model takes to convert, and how much memory: `scripts/bench convert`.

LoRA of rank 16 on all linear layers of Llama 2 7B (224 modules, 448 arrays, 160 MB in float32), from one format into
another and back, each in a process of its own. Memory is what the process takes at its peak beyond what it has after
the imports; `seconds` is reading and writing, from the files to the files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {
    **{f"self_attn.{name}": (4096, 4096) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp.{name}": (4096, 11008) for name in ("gate_proj", "up_proj")},
    "mlp.down_proj": (11008, 4096),
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
}
TARGETS = {"peft": "", "mlx-lm": "", "gguf": ".gguf", "torchtune": "", "loralib": ".pt", "nemo": ".nemo", "litgpt": ""}


def peak() -> int:
    """Bytes that the process had at its peak."""
    import resource

    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else 1024 * value


def make(folder: Path, layers: int) -> None:
    """The adapter as PEFT would save it."""
    import mlx.core as mx

    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in SIZES.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = mx.random.normal((16, rows))
            tensors[f"{stem}.lora_B.weight"] = mx.random.normal((columns, 16))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    told = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": sorted(n[n.index(".") + 1 :] for n in SIZES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(told))


def one(source: str, target: str, format: str, alpha: float | None) -> None:
    """One conversion; prints a JSON object."""
    from mlx_lora.formats import load_adapter, save_adapter

    import mlx.core as mx  # isort: skip

    base = str(Path(source).parent / "config.json")
    mx.eval(mx.zeros(4).T @ mx.zeros(4))
    before, tic = peak(), time.perf_counter()
    adapter = load_adapter(source, base=base, alpha=alpha)
    save_adapter(adapter, target, format, base=base)
    print(json.dumps({"seconds": time.perf_counter() - tic, "memory": peak() - before}))


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--formats", nargs="*", default=[f for f in TARGETS if f != "peft"])
    parser.add_argument("--one", nargs=4, metavar=("SOURCE", "TARGET", "FORMAT", "ALPHA"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        return one(*asked.one[:3], float(asked.one[3]) if asked.one[3] else None)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "config.json").write_text(json.dumps(CONFIG))
        (root / "peft").mkdir()
        made = "import sys; from pathlib import Path; import mlx_lora; import convert; "
        made += f"convert.make(Path({str(root / 'peft')!r}), {asked.layers})"
        environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
        subprocess.run([sys.executable, "-c", made], check=True, env=environment)
        print(f"{'from':<10} {'to':<10} {'seconds':>8} {'memory / file':>14} {'file MB':>8}")
        for format in asked.formats:
            there = root / f"{format}{TARGETS[format]}"
            for source, target, to in ((root / "peft", there, format), (there, root / f"{format}-back", "peft")):
                alpha = "32" if source == there and format == "loralib" else ""
                command = [sys.executable, __file__, "--one", str(source), str(target), to, alpha]
                done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                file = size(source)
                print(
                    f"{source.name.partition('.')[0]:<10} {to:<10} {done['seconds']:>8.2f} "
                    f"{done['memory'] / file:>14.2f} {file / 1e6:>8.0f}"
                )


if __name__ == "__main__":
    main()
