"""The judges, and how they are asked: PEFT and transformers where they are installed (else the tests are skipped)."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import mlx_lora  # opens a BLAS before torch and MLX are imported

assert mlx_lora  # keep the import first

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5")

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_peft_fixtures"
_loader = importlib.machinery.SourceFileLoader("make_peft_fixtures", str(_SCRIPT))
maker = importlib.util.module_from_spec(importlib.util.spec_from_loader("make_peft_fixtures", _loader))
_loader.exec_module(maker)

TOLERANCE = 5e-6  # max |difference| / max |logit|
IDS = maker.random_ids(seed=9)


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def told(what: str, **measured: float) -> None:
    """Print what was measured and hold it to the tolerance; a ``control`` is damage that must be seen."""
    print(f"\n{what}: " + ", ".join(f"{name} {value:.1e}" for name, value in measured.items()), end="")
    for name, value in measured.items():
        if name.startswith("control"):
            assert value > 100 * TOLERANCE, f"the damage went unseen: {name} {value:.1e}"
        else:
            assert value <= TOLERANCE, f"{name}: max difference {value:.1e}, tolerance {TOLERANCE:.0e}"


def make_bases(root: Path, models: list[str] | tuple[str, ...], seed: int) -> dict[str, Path]:
    for number, model in enumerate(models):
        maker.save_base(maker.make_model(model, seed + number), root / model)
    return {model: root / model for model in models}


def hf(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
