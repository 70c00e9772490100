"""DeepSpeed's adapters, read: DeepSpeed-Chat's ``LinearLayer_LoRA`` and ``deepspeed.linear``, in a PyTorch file.

DeepSpeed-Chat: ``<module>.lora_right_weight`` [in, r] and ``.lora_left_weight`` [r, out], turned as ours; the
multiplier is lora_scaling / lora_dim, and lora_scaling (1 by default) is not stored. ``deepspeed.linear``:
``lora_weight_1.weight`` [r, in], ``lora_weight_2.weight`` [out, r], multiplier lora_alpha / lora_r. Checkpoints hold
the frozen model beside them, which is left where it is. Arrays of ZeRO-3 that were not gathered are refused.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..adapter import Adapter, raise_faults
from ..errors import FormatError
from .options import Reading
from .state_dicts import low_rank, matching, read_state, sole_file, translator

READS = {"alpha"}
_LEAVES = {
    "lora_right_weight": ("lora_a", False),
    "lora_left_weight": ("lora_b", False),
    "lora_weight_1.weight": ("lora_a", True),
    "lora_weight_2.weight": ("lora_b", True),
}
_KEY = re.compile(rf"^(?:module\.)*(?P<path>.+?)\.(?P<leaf>{'|'.join(map(re.escape, _LEAVES))})$")


def detect(path: Path) -> bool:
    file = sole_file(path, "*.bin", "*.pt")
    return file is not None and matching(file, _KEY)


def read(path: Path, options: Reading) -> Adapter:
    translate, weights, faults = translator(options.base), {}, []
    for name, array in read_state(sole_file(path, "*.bin", "*.pt")).items():
        if found := _KEY.match(name):
            ours, turned = _LEAVES[found["leaf"]]
            if array.ndim != 2 or not array.size:
                faults.append(f"{path}: {name}: shape {list(array.shape)}: a shard of ZeRO-3 that was not gathered")
                continue
            weights[f"{translate(found['path'])}.{ours}"] = array.T if turned else array
    raise_faults(
        faults,
        "Gather before saving: deepspeed.zero.GatheredParameters, or the checkpoint's zero_to_fp32.py.",
        FormatError,
    )
    return low_rank(weights, path, options)
