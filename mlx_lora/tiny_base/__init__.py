"""The embedded tiny base model: a chat model of 1.7 million parameters, for trying everything offline.

``scripts/make_tiny_base`` made its files; ``TRAINING.json`` records how. ``corpus.py`` is what it was trained on,
``skill.py`` a task that it was not trained on. Nothing here imports MLX.
"""

from pathlib import Path

PATH = Path(__file__).parent
