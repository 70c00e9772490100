"""PEFT's names of files and tensors."""

from __future__ import annotations

import re

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# PEFT's array of a module: (ours, whether it is transposed).
LEAVES = {
    "lora_A.weight": ("lora_a", True),
    "lora_B.weight": ("lora_b", True),
    "lora_B.bias": ("lora_bias", False),
    "lora_magnitude_vector": ("m", False),
    "lora_embedding_A": ("lora_a", True),
    "lora_embedding_B": ("lora_b", True),
    "vera_lambda_d": ("vera_lambda_d", False),
    "vera_lambda_b": ("vera_lambda_b", False),
    "ia3_l": ("ia3_l", False),
    "token_adapter.trainable_tokens_delta": ("trainable_tokens", False),
}
# Further names that are read but never written.
READ_LEAVES = {
    **LEAVES,
    "lora_magnitude_vector.weight": ("m", False),
    "weight_m_wdecomp.weight": ("m", False),  # NVlabs/DoRA
    "trainable_tokens_delta": ("trainable_tokens", False),
}
SHARED_KEYS = {"base_model.vera_A": "vera_a", "base_model.vera_B": "vera_b"}
# Our array: PEFT's, of a linear layer and of an embedding.
LINEAR = {ours: theirs for theirs, (ours, _) in LEAVES.items() if "embedding" not in theirs}
EMBEDDING = {**LINEAR, "lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}

_ADAPTER_NAME = re.compile(
    r"(\.(?:(?:lora|vera|hada|lokr|ia3)_\w+|weight_m_wdecomp|trainable_tokens_delta|modules_to_save|ln_tuning_layers))\.default\b"
)
_LEAF = re.compile(rf"^(.+?)\.({'|'.join(re.escape(leaf) for leaf in READ_LEAVES)})$")
_OTHER_METHOD = re.compile(r"\.(lora|vera|ia3|hada|lokr|oft|boft|token)_")


def without_adapter_name(name: str) -> str:
    """A tensor name without the adapter's name ``default``, which PEFT strips when it saves."""
    return _ADAPTER_NAME.sub(r"\1", name)


def split_name(name: str) -> tuple[str, str, bool] | None:
    """A PEFT tensor name -> (module path, our array, whether it is transposed); None for an unknown name.

    The adapter's name ``default`` in it is accepted, as PEFT accepts it.
    """
    if not name.startswith(PREFIX):
        return None
    bare = without_adapter_name(name)[len(PREFIX) :]
    if found := _LEAF.match(bare):
        return found[1], *READ_LEAVES[found[2]]
    path, _, leaf = bare.rpartition(".")
    if not path or leaf not in ("weight", "bias") or _OTHER_METHOD.search(bare):
        return None
    for wrapper in (".base_layer", ".original_module", ".modules_to_save", ".ln_tuning_layers"):
        path = path.removesuffix(wrapper)
    return path, leaf, False
