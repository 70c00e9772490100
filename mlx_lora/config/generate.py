"""How to generate text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .options import check_types, option, raise_all


@dataclass(frozen=True)
class GenerateConfig:
    """How to generate text."""

    help_section = "Generation"

    max_tokens: int = option(256, "Maximum number of tokens to generate.")
    temp: float = option(0.0, "Sampling temperature; 0 is greedy.")
    top_p: float = option(1.0, "Sample from the most likely tokens that together have this probability.")
    min_p: float = option(0.0, "Drop tokens whose probability is below this fraction of the most likely token's.")
    top_k: int = option(0, "Sample from this many most likely tokens; 0 for all.")
    seed: int | None = option(None, "Seed of the sampling (default: a new one each time).")

    def __post_init__(self):
        check_types(self)
        faults = []
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            faults.append(f"max_tokens must be at least 1, not {self.max_tokens!r}")
        if not 0 <= self.temp < math.inf:
            faults.append(f"temp must be 0 or more, not {self.temp!r}")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p must be in (0, 1], not {self.top_p!r}")
        if not 0 <= self.min_p <= 1:
            faults.append(f"min_p must be in [0, 1], not {self.min_p!r}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            faults.append(f"top_k must be 0 or more, not {self.top_k!r}")
        raise_all(faults, self)
