"""Mixtures of experts in PEFT's folders: keys for each expert, or one pair of matrices over a parameter of all experts.

PEFT packs a parameter's experts into two-dimensional matrices: A [experts * r, in], where the expert is the slow index,
and B [out, r * experts], where it is the fast one. PEFT 0.17 and 0.18 swapped in and out for parameters stored
[experts, out, in] (huggingface/peft#3083): A [experts * r, out], B [in, r * experts]. ``gate_up_proj`` is one parameter
in PEFT and two modules in mlx-lm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx

from ...base.names import BaseModel
from ...errors import FormatError

SINGLE = re.compile(r"^(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<name>\w+)$")
PACKED = re.compile(r"^(?P<block>.+)\.experts(?P<inner>\.base_layer)?$")
NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
MIXTRAL = {ours: theirs for theirs, ours in NAMES.items()}
_LARGEST_STACK = 1 << 16  # experts


@dataclass(frozen=True)
class Packed:
    """One parameter's matrices as PEFT packs them."""

    a: mx.array  # [experts * r, in]
    b: mx.array  # [out, r * experts]
    rank: int

    @property
    def experts(self) -> int:
        return self.a.shape[0] // self.rank

    def fault(self) -> str | None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] % self.rank or self.a.shape[0] != self.b.shape[1]:
            shapes = f"lora_A {list(self.a.shape)} and lora_B {list(self.b.shape)}"
            return f"{shapes} are not packed experts of rank {self.rank}"
        return None

    def unpack(self, exchanged: bool) -> tuple[mx.array, mx.array]:
        """lora_a [experts, r, in] and lora_b [experts, out, r]. ``exchanged``: PEFT 0.17 or 0.18 packed them."""
        a = self.a.reshape(self.experts, self.rank, -1)
        b = self.b.reshape(self.b.shape[0], self.rank, self.experts).transpose(2, 0, 1)
        return (b.swapaxes(1, 2), a.swapaxes(1, 2)) if exchanged else (a, b)


def pack(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """The inverse of ``Packed.unpack``: a [experts, r, in], b [experts, out, r] -> PEFT's A and B."""
    experts, rank, columns = a.shape
    return a.reshape(experts * rank, columns), b.transpose(1, 2, 0).reshape(b.shape[1], rank * experts)


def exchanged(
    gate_up: Packed | None,
    down: Packed | None,
    hidden: int | None,
    version: str | None,
    in_out: bool,
) -> bool:
    """Whether PEFT 0.17 or 0.18 packed a block: by the shapes if they differ, else by PEFT's version.

    Args:
        hidden: the model's hidden size, if known: the input of gate_up and the output of down.
        version: the config's ``peft_version``, which PEFT writes since 0.18.
        in_out: the model stores experts [experts, in, out]; PEFT never exchanged those.
    """
    if in_out:
        return False
    new, old = [], []  # whether the shapes match the current packing, and the old one
    if gate_up and down:
        reads, writes = gate_up.a.shape[1], gate_up.b.shape[0]
        inner, outer = down.a.shape[1], down.b.shape[0]
        new.append(reads == outer and writes == 2 * inner)
        old.append(writes == inner and reads == 2 * outer)
    if hidden and gate_up:
        new.append(gate_up.a.shape[1] == hidden)
        old.append(gate_up.b.shape[0] == hidden)
    if hidden and down:
        new.append(down.b.shape[0] == hidden)
        old.append(down.a.shape[1] == hidden)
    if new and all(new) != all(old):
        return all(old)
    number = re.match(r"(\d+)\.(\d+)", version or "")
    return not number or (int(number[1]), int(number[2])) < (0, 19)


def split_gate_up(a: mx.array, b: mx.array, interleaved: bool) -> dict[str, tuple[mx.array, mx.array]]:
    """``gate_up_proj`` as gate_proj and up_proj, which share A and have half of B's rows each.

    If ``fuse_gate_up`` made a block-diagonal B of twice the rank, each gets its own half of the ranks back.
    """
    rows = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    if not interleaved:
        half = b.shape[1] // 2
        rows = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
    gate, up = b[:, rows["gate_proj"]], b[:, rows["up_proj"]]
    rank = a.shape[1] // 2
    block_diagonal = a.shape[1] % 2 == 0 and not (gate[..., rank:].any().item() or up[..., :rank].any().item())
    if block_diagonal and (gate.any().item() or up.any().item()):
        return {"gate_proj": (a[:, :rank], gate[..., :rank]), "up_proj": (a[:, rank:], up[..., rank:])}
    return {"gate_proj": (a, gate), "up_proj": (a, up)}


def fuse_gate_up(
    gate: tuple[mx.array, mx.array], up: tuple[mx.array, mx.array], interleaved: bool
) -> tuple[mx.array, mx.array]:
    """The inverse of ``split_gate_up``: one A if both share it, else both A and a block-diagonal B."""
    (gate_a, gate_b), (up_a, up_b) = gate, up
    if gate_a.shape == up_a.shape and mx.array_equal(gate_a, up_a).item():
        a, halves = gate_a, (gate_b, up_b)
    else:
        a = mx.concatenate([gate_a, up_a], axis=1)
        zeros = [mx.zeros((*b.shape[:2], other.shape[2]), b.dtype) for b, other in ((gate_b, up_b), (up_b, gate_b))]
        halves = (mx.concatenate([gate_b, zeros[0]], axis=2), mx.concatenate([zeros[1], up_b], axis=2))
    if interleaved:
        b = mx.stack(halves, axis=2)
        return a, b.reshape(b.shape[0], -1, b.shape[-1])
    return a, mx.concatenate(halves, axis=1)


def stack_experts(parts: dict[int, mx.array], name: str) -> mx.array:
    """Stack one array per expert, all of the same shape, into one array [experts, ...]."""
    if sorted(parts) != list(range(len(parts))) or len(parts) > _LARGEST_STACK:
        missing = sorted(set(range(min(max(parts) + 1, _LARGEST_STACK))) - set(parts))[:4]
        raise FormatError(f"{name}: experts {', '.join(map(str, missing))} are missing", "Download the adapter again.")
    if len({part.shape for part in parts.values()}) != 1:
        raise FormatError(
            f"{name}: the experts' arrays differ in shape",
            "Save or download the adapter again; all experts of a layer must have one rank.",
        )
    return mx.stack([parts[i] for i in range(len(parts))])


def block_path(block: str, base: BaseModel | None) -> str:
    """mlx-lm's path of a block's experts, from transformers' path of the block."""
    if base is not None:
        return f"{base.to_mlx(block)}.{base.experts_name}"
    return f"{block}.experts" if block.endswith("feed_forward") else f"{block}.switch_mlp"
