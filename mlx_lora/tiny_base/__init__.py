"""The embedded tiny base: a chat model of 1.7 million parameters with which everything can be tried offline.

Files made by ``scripts/make_tiny_base``; ``TRAINING.json`` records how. ``corpus`` is what it was taught, ``skill``
what it was not. Nothing here imports MLX.
"""

from pathlib import Path

PATH = Path(__file__).parent
