"""Fine-tune language models on Apple silicon with LoRA and its relatives. This file lists the public names."""

from __future__ import annotations

import importlib

from .device import open_blas

open_blas()  # before anything imports MLX; see device.py

__version__ = "0.1.0"

# Imported on first use: `mlx-lora --help` must not wait for MLX.
_NAMES = {
    "Adapter": "adapter",
    "AdapterConfig": "config",
    "DataConfig": "config",
    "GenerateConfig": "config",
    "OptimizerConfig": "config",
    "TrainConfig": "config",
    "FORMATS": "formats",
    "load_adapter": "formats",
    "save_adapter": "formats",
    "METHODS": "layers",
    "MLXLoRAError": "errors",
    "attach": "model.attach",
    "disable_adapter": "model.attach",
    "extract": "model.attach",
    "fuse": "merge.fuse",
    "load": "model.loading",
    "as_lora": "merge.combine",
    "merge_adapters": "merge.combine",
    "mount": "model.attach",
    "quantize": "base.quantizing",
    "save_model": "model.loading",
    "unmount": "model.attach",
    "load_dataset": "data",
    "tokenize": "data",
    "build_optimizer": "training",
    "evaluate": "training",
    "plan": "planning.plan",
    "run": "runs",
    "train": "training",
    "Progress": "training",
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module 'mlx_lora' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
