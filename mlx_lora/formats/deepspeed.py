"""Adapters of DeepSpeed, read only: DeepSpeed-Chat's ``LinearLayer_LoRA`` and ``deepspeed.linear``, in a PyTorch file.

DeepSpeed-Chat: ``<module>.lora_right_weight`` [in, r] and ``.lora_left_weight`` [r, out]; the multiplier is
lora_scaling / lora_dim, and lora_scaling (1 by default) is not stored. ``deepspeed.linear``: ``lora_weight_1.weight``
[r, in], ``lora_weight_2.weight`` [out, r], multiplier lora_alpha / lora_r. A checkpoint also has the frozen model,
which is not read. Arrays of ZeRO-3 that were not gathered are refused.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..adapter import Adapter, raise_faults
from ..errors import FormatError
from .options import ReadOptions
from .state_dicts import has_tensor, low_rank_adapter, only_file, read_state

READS, FILES = {"alpha"}, ("*.bin", "*.pt")
# DeepSpeed's array: (ours, whether it is transposed).
_LEAVES = {
    "lora_right_weight": ("lora_a", False),
    "lora_left_weight": ("lora_b", False),
    "lora_weight_1.weight": ("lora_a", True),
    "lora_weight_2.weight": ("lora_b", True),
}
_KEY = re.compile(rf"^(?:module\.)*(?P<path>.+?)\.(?P<leaf>{'|'.join(map(re.escape, _LEAVES))})$")


def detect(path: Path) -> bool:
    return has_tensor(only_file(path, FILES), _KEY)


def read(path: Path, options: ReadOptions) -> Adapter:
    weights, faults = {}, []
    for name, array in read_state(only_file(path, FILES)).items():
        if found := _KEY.match(name):
            leaf, transposed = _LEAVES[found["leaf"]]
            if array.ndim != 2 or not array.size:
                faults.append(f"{path}: {name}: shape {list(array.shape)}: a shard of ZeRO-3 that was not gathered")
                continue
            weights[f"{options.to_mlx(found['path'])}.{leaf}"] = array.T if transposed else array
    raise_faults(
        faults,
        "Gather before saving: deepspeed.zero.GatheredParameters, or the checkpoint's zero_to_fp32.py.",
        FormatError,
    )
    return low_rank_adapter(weights, path, options)
