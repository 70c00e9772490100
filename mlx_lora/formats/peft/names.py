"""What PEFT calls its files and tensors; shared by ``peft.py``, which reads, and ``peft_write.py``."""

from __future__ import annotations

import re

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# PEFT's leaf -> (ours, whether the array is transposed).
LEAVES = {
    "lora_A.weight": ("lora_a", True),
    "lora_B.weight": ("lora_b", True),
    "lora_B.bias": ("lora_bias", False),
    "lora_magnitude_vector": ("m", False),
    "lora_embedding_A": ("lora_a", True),
    "lora_embedding_B": ("lora_b", True),
    "vera_lambda_d": ("vera_lambda_d", False),
    "vera_lambda_b": ("vera_lambda_b", False),
    "token_adapter.trainable_tokens_delta": ("trainable_tokens", False),
}
OTHER_LEAVES = {
    "lora_magnitude_vector.weight": ("m", False),
    "weight_m_wdecomp.weight": ("m", False),  # NVlabs/DoRA
    "trainable_tokens_delta": ("trainable_tokens", False),
}
SHARED_KEYS = {"base_model.vera_A": "vera_a", "base_model.vera_B": "vera_b"}
OURS = {ours: theirs for theirs, (ours, _) in reversed(LEAVES.items()) if "embedding" not in theirs}
EMBEDDING = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
EMBEDDING_NAME = re.compile(r"(^|\.)(wte|wpe|\w*embed\w*)$")
