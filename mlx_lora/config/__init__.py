"""Every option of mlx-lora, with its default, its help text and its section of ``--help``.

A field's name is the Python argument, the YAML key and, with dashes, the flag. Names and defaults are mlx-lm's
wherever mlx-lm has the option. Validation raises one ``ConfigError`` that lists every fault. This room imports the
standard library only, so that ``--help`` is fast.
"""

from .adapter import (
    BIASES,
    DEFAULT_LAYERS,
    DEFAULT_RANK,
    DEFAULT_SCALE,
    FEEDFORWARD,
    INITS,
    LARGEST_SCALE,
    LEAVES,
    METHODS,
    UNSCALED,
    VERA_RANK,
    AdapterConfig,
    ignored_alpha,
    match_pattern,
)
from .data import HOLD_OUT, HOLD_OUT_FROM, HOLD_OUT_MOST, DataConfig
from .generate import GenerateConfig
from .optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig, chooses_own_rate, first_rate
from .options import COMMON, MEMORY, MORE, SAMPLING, SECTIONS, as_config
from .preference import LABELS, PAIRS, PREFERENCE_OPTIONS, PREFERENCES, TOKENS, preference_of
from .serve import LOCAL_NAMES, ServeConfig
from .train import ITERS, METRIC_ROWS, REPORTERS, VAL_LOSS, TrainConfig, metric_name

__all__ = [
    "AdapterConfig",
    "BIASES",
    "COMMON",
    "MEMORY",
    "DEFAULT_LAYERS",
    "DEFAULT_RANK",
    "DEFAULT_SCALE",
    "DataConfig",
    "FEEDFORWARD",
    "GenerateConfig",
    "LOCAL_NAMES",
    "HOLD_OUT",
    "HOLD_OUT_FROM",
    "HOLD_OUT_MOST",
    "INITS",
    "ITERS",
    "LARGEST_SCALE",
    "LEAVES",
    "LABELS",
    "METHODS",
    "METRIC_ROWS",
    "MORE",
    "OPTIMIZERS",
    "OptimizerConfig",
    "PAIRS",
    "PREFERENCES",
    "PREFERENCE_OPTIONS",
    "REPORTERS",
    "SCHEDULES",
    "SAMPLING",
    "SECTIONS",
    "ServeConfig",
    "TOKENS",
    "TrainConfig",
    "UNSCALED",
    "VAL_LOSS",
    "VERA_RANK",
    "as_config",
    "chooses_own_rate",
    "first_rate",
    "ignored_alpha",
    "match_pattern",
    "metric_name",
    "preference_of",
]
