"""How an update starts. ``weights.py``: from chance or from W alone; ``eva.py``, ``lora_ga.py``: from data;
``loftq.py``: from what quantizing lost. Everything here makes arrays; ``model.attach`` puts them into layers."""

from __future__ import annotations

from .eva import Eva, eva
from .loftq import loftq_pair
from .lora_ga import lora_ga
from .weights import from_weight

# Those that the base must give up at the start, see layers/difference.py; and those that need batches of data.
SUBTRACTED = ("pissa", "olora", "lora_ga")
FROM_DATA = ("eva", "lora_ga")

__all__ = ["FROM_DATA", "SUBTRACTED", "Eva", "eva", "from_weight", "loftq_pair", "lora_ga"]
