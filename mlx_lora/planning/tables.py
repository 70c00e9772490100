"""The papers' tables of parameters and memory, recomputed from model shapes and compared with the printed figures.

A printed figure agrees if the computed one, rounded or truncated to the printed digits, is the same. If not, ``note``
says why. Standard library only.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder or encoder. ``kv``: output size of k and v; ``inner``: width of the MLP."""

    layers: int
    width: int
    inner: int = 0
    kv: int = 0
    vocabulary: int = 0

    def sizes(self, name: str) -> tuple[int, int]:
        """(in, out) of the projection ``name``."""
        d, m = self.width, self.inner
        table = {"q": (d, d), "k": (d, self.kv or d), "v": (d, self.kv or d), "o": (d, d)}
        return (table | {"gate": (d, m), "up": (d, m), "down": (m, d)})[name]

    def parameters(self) -> int:
        """Parameters of a Llama model: embeddings, head, projections and norms."""
        inside = sum(math.prod(self.sizes(n)) for n in ("q", "k", "v", "o", "gate", "up", "down"))
        return 2 * self.vocabulary * self.width + self.layers * (inside + 2 * self.width) + self.width


GPT3 = Shape(96, 12288)
ROBERTA_BASE, ROBERTA_LARGE, DEBERTA_XXL = Shape(12, 768), Shape(24, 1024), Shape(48, 1536)
GPT2_M, GPT2_L = Shape(24, 1024), Shape(36, 1280)
LLAMA_7B, LLAMA_13B = Shape(32, 4096, 11008, vocabulary=32000), Shape(40, 5120, 13824, vocabulary=32000)
LLAMA_65B = Shape(80, 8192, 22016, vocabulary=32000)
LLAMA3_8B = Shape(32, 4096, 14336, 1024, 128256)
ALL = ("q", "k", "v", "o", "gate", "up", "down")


def lora(shape: Shape, names: tuple[str, ...], rank: int) -> int:
    """r (in + out) for each adapted matrix."""
    return shape.layers * sum(rank * sum(shape.sizes(name)) for name in names)


def dora(shape: Shape, names: tuple[str, ...], rank: int) -> int:
    """LoRA's parameters and one magnitude per output."""
    return lora(shape, names, rank) + shape.layers * sum(shape.sizes(name)[1] for name in names)


def vera(shape: Shape, names: tuple[str, ...], rank: int) -> int:
    """r + out for each adapted matrix; the shared projections are not trained."""
    return shape.layers * sum(rank + shape.sizes(name)[1] for name in names)


@dataclass(frozen=True)
class Row:
    """One figure of a paper."""

    paper: str
    what: str
    computed: float  # parameters, bytes, bits, percent or a ratio, without a prefix such as M
    printed: str
    note: str = ""  # why the two differ, or what the figure assumes

    @property
    def agrees(self) -> bool:
        """Whether the computed figure, rounded or truncated to the printed digits, is the printed one."""
        number, decimals, unit = _parse(self.printed)
        value = self.computed / unit
        step = 10.0**-decimals
        return (
            abs(round(value, decimals) - number) < step / 2 or abs(math.floor(value / step) * step - number) < step / 2
        )


_UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "%": 1, "x": 1, "MB": 1e6, "GB": 1e9, "TB": 1e12, "bits": 1}


def _parse(printed: str) -> tuple[float, int, float]:
    """(number, decimals, unit) of a figure such as "37.7M"; the sign of a bound such as "<48GB" is ignored."""
    match = re.fullmatch(r"[<>~]?\s*([\d,]*\.?\d+)\s*([A-Za-z%]*)", printed)
    number = match[1].replace(",", "")
    return float(number), len(number.partition(".")[2]), _UNITS[match[2]]


def _percent(trained: int, shape: Shape) -> float:
    return 100 * trained / (shape.parameters() + trained)


def rows() -> list[Row]:
    """All figures, paper by paper."""
    qv, attention_mlp = ("q", "v"), ("q", "k", "v", "up", "down")
    double = 8 / 64 + 32 / (64 * 256)
    found = [
        ("LoRA 2106.09685, table 2", "RoBERTa-base, q and v, r 8", lora(ROBERTA_BASE, qv, 8), "0.3M", ""),
        ("LoRA 2106.09685, table 2", "RoBERTa-large, q and v, r 8", lora(ROBERTA_LARGE, qv, 8), "0.8M", ""),
        ("LoRA 2106.09685, table 2", "DeBERTa-XXL, q and v, r 16", lora(DEBERTA_XXL, qv, 16), "4.7M", ""),
        (
            "LoRA 2106.09685, table 3",
            "GPT-2 medium, q and v, r 4",
            lora(GPT2_M, qv, 4),
            "0.35M",
            "misprint: by the paper's own formula 2 L d r 0.39M, and the released checkpoint has 393,216",
        ),
        (
            "LoRA 2106.09685, table 3",
            "GPT-2 large, q and v, r 4",
            lora(GPT2_L, qv, 4),
            "0.77M",
            "misprint: 0.74M by the paper's own formula; the row repeats the figure of prefix tuning",
        ),
        ("LoRA 2106.09685, table 4", "GPT-3, q and v, r 1", lora(GPT3, qv, 1), "4.7M", ""),
        ("LoRA 2106.09685, table 4", "GPT-3, q and v, r 8", lora(GPT3, qv, 8), "37.7M", ""),
        ("LoRA 2106.09685, table 5", "GPT-3, q and v, r 4", lora(GPT3, qv, 4), "18M", ""),
        (
            "LoRA 2106.09685, abstract",
            "fewer parameters: 175B / r 4 on q and v",
            175e9 / lora(GPT3, qv, 4),
            "10,000x",
            "a round figure: 9,272 times; r 1 would be 37,087 times",
        ),
        (
            "LoRA 2106.09685, section 4.2",
            "checkpoint of r 4, two bytes each",
            2.0 * lora(GPT3, qv, 4),
            "35MB",
            "37.7 MB are 36.0 MiB; 35 MB is 350 GB / 10,000",
        ),
        ("LoRA 2106.09685, section 4.2", "GPT-3's weights, two bytes each", 2 * 175e9, "350GB", ""),
        ("LoRA 2106.09685, abstract", "less memory: 1.2 TB / 350 GB, both measured", 1.2e12 / 350e9, "3x", ""),
        (
            "LoRA 2106.09685, section 4.2",
            "time saved, from 32.5 to 43.1 tokens/s",
            100 * (1 - 32.5 / 43.1),
            "25%",
            "24.6 % of the time; as throughput it is 32.6 % more",
        ),
        ("VeRA 2310.11454, table 1", "RoBERTa-base, q and v, r 1", vera(ROBERTA_BASE, qv, 1), "18.4K", ""),
        ("VeRA 2310.11454, table 1", "RoBERTa-base, q and v, r 16", vera(ROBERTA_BASE, qv, 16), "18.8K", ""),
        ("VeRA 2310.11454, table 1", "RoBERTa-base, q and v, r 256", vera(ROBERTA_BASE, qv, 256), "24.5K", ""),
        ("VeRA 2310.11454, table 1", "RoBERTa-large, q and v, r 1", vera(ROBERTA_LARGE, qv, 1), "49.2K", ""),
        (
            "VeRA 2310.11454, table 1",
            "RoBERTa-large, q and v, r 16",
            vera(ROBERTA_LARGE, qv, 16),
            "49.5K",
            "misprint: the size of 195 KB in the same row is 49,920 values",
        ),
        ("VeRA 2310.11454, table 1", "RoBERTa-large, q and v, r 256", vera(ROBERTA_LARGE, qv, 256), "61.4K", ""),
        ("VeRA 2310.11454, table 1", "GPT-3, q and v, r 1", vera(GPT3, qv, 1), "2.4M", ""),
        (
            "VeRA 2310.11454, table 1",
            "GPT-3, q and v, r 16",
            vera(GPT3, qv, 16),
            "2.8M",
            "misprint: the formula L (d + r) gives 2.4M",
        ),
        (
            "VeRA 2310.11454, table 1",
            "GPT-3, q and v, r 256",
            vera(GPT3, qv, 256),
            "8.7M",
            "misprint: the formula L (d + r) gives 2.4M",
        ),
        ("VeRA 2310.11454, GLUE", "RoBERTa-base, q and v, r 1024", vera(ROBERTA_BASE, qv, 1024), "0.043M", ""),
        ("VeRA 2310.11454, GLUE", "RoBERTa-large, q and v, r 256", vera(ROBERTA_LARGE, qv, 256), "0.061M", ""),
        ("VeRA 2310.11454, E2E", "GPT-2 medium, q and v, r 1024", vera(GPT2_M, qv, 1024), "0.098M", ""),
        ("VeRA 2310.11454, E2E", "GPT-2 large, q and v, r 1024", vera(GPT2_L, qv, 1024), "0.17M", ""),
        ("VeRA 2310.11454, instructions", "Llama 7B, all linear, r 256", vera(LLAMA_7B, ALL, 256), "1.4M", ""),
        ("VeRA 2310.11454, instructions", "Llama 7B, all linear, r 1024", vera(LLAMA_7B, ALL, 1024), "1.6M", ""),
        ("VeRA 2310.11454, instructions", "Llama 13B, all linear, r 1024", vera(LLAMA_13B, ALL, 1024), "2.4M", ""),
        ("VeRA 2310.11454, instructions", "LoRA: Llama 7B, all linear, r 64", lora(LLAMA_7B, ALL, 64), "159.9M", ""),
        ("VeRA 2310.11454, instructions", "LoRA: Llama 13B, all linear, r 64", lora(LLAMA_13B, ALL, 64), "250.3M", ""),
    ]
    for name, shape, printed in (
        ("7B", LLAMA_7B, ("0.83%", "0.84%", "0.43%")),
        ("13B", LLAMA_13B, ("0.67%", "0.68%", "0.35%")),
        ("3 8B", LLAMA3_8B, ("0.70%", "0.71%", "0.35%")),
    ):
        counts = (lora(shape, attention_mlp, 32), dora(shape, attention_mlp, 32), dora(shape, attention_mlp, 16))
        for what, count, figure in zip(("LoRA r 32", "DoRA r 32", "DoRA r 16"), counts, printed, strict=True):
            short = name == "3 8B" and what == "DoRA r 16"
            note = "misprint: without the magnitudes; with them it is 0.36 %" if short else ""
            what = f"Llama {name}, q k v up down, {what}: share trained"
            found.append(("DoRA 2402.09353, table 1", what, _percent(count, shape), figure, note))
    big = LLAMA_65B.parameters()
    found += [
        ("QLoRA 2305.14314, section 3", "bits for the scales of a block of 64", 32 / 64, "0.5bits", ""),
        ("QLoRA 2305.14314, section 3", "the same, double quantized", double, "0.127bits", ""),
        ("QLoRA 2305.14314, section 3", "bits saved per parameter", 0.5 - double, "0.373bits", ""),
        ("QLoRA 2305.14314, section 3", "65B: memory saved", big * (0.5 - double) / 8, "3GB", ""),
        ("QLoRA 2305.14314, abstract", "65B in full: weights, gradients, Adam: 12 bytes", 12 * big, ">780GB",
         "a bound: 783 GB"),
        ("QLoRA 2305.14314, abstract", "65B: NF4, r 64 on all linear at 12 bytes",
         big * (4 + double) / 8 + 12 * lora(LLAMA_65B, ALL, 64), "<48GB", "a bound: without activations"),
        ("QLoRA 2305.14314, section 2", "7B: an adapter of 0.2 %, two bytes each", 2 * 0.002 * LLAMA_7B.parameters(),
         "26MB", "a round figure: 0.2 % are 13.5M parameters"),
    ]  # fmt: skip
    return [Row(*fields) for fields in found]


def training_bytes(trained: int, half: int = 0) -> dict[str, int]:
    """Bytes that training ``trained`` parameters with Adam needs in addition to the parameters.

    Args:
        half: number of them in half precision; each has a float32 master copy.
    """
    return {"gradients": 4 * trained, "moments": 8 * trained, "master weights": 4 * half}
