"""mlx-lm's model class for a config, prepared for checkpoints that transformers 5 saved.

The class and its settings are subclassed for loading only: the settings get the fields that ``fields.py`` fills in, and
the weights the names that ``layouts.py`` finds. A loaded model is of mlx-lm's own class. Nothing of mlx-lm is changed.
"""

from __future__ import annotations

import inspect
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError
from .config import missing_fields
from .differences import not_computed
from .fields import as_known_type, class_fields
from .heads import is_head, stated_tie
from .layouts import check_names, fit
from .nf4_checkpoint import replace_with_nf4


def model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """The classes of the model and of its settings, as mlx-lm's ``load_model`` takes them. Raises: ModelError."""
    if faults := not_computed({**config, **missing_fields(config)}):
        raise ModelError(
            f"mlx-lm cannot compute this {config['model_type']} model: {'; '.join(faults)}",
            "Use this model with transformers and PEFT, or try a newer mlx-lm.",
        )
    model_class, args_class = _mlx_lm_classes(as_known_type(config))

    class Model(model_class):
        def __init__(self, args: Any):
            nn.Module.__init__(self)  # some classes leave this out (RecurrentGemma)
            model_class.__init__(self, args)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            self.__class__ = model_class
            if stated_tie(config) and not any("scales" in name for name in weights):  # a copy of the embedding
                weights = {name: array for name, array in weights.items() if not is_head(name)}
            try:
                return fit(self, weights)
            finally:
                self.__class__ = Model

        def load_weights(self, weights: Any, strict: bool = True):
            self.__class__ = model_class
            weights = replace_with_nf4(self, weights)
            if strict and isinstance(weights, list):
                check_names(self, dict(weights), config["model_type"])
            return self.load_weights(weights, strict=strict)

    class Arguments(args_class):
        @classmethod
        def from_dict(cls, params: dict[str, Any]):
            known = inspect.signature(args_class).parameters
            params = as_known_type(params)
            params = {**params, **class_fields(params, known)}
            missing = [n for n, p in known.items() if p.default is p.empty and n not in params]
            try:  # a class may read configs of other forms: Qwen2-VL's with text fields next to image fields
                return args_class.from_dict(params)
            except TypeError:
                if not missing:
                    raise
                raise ModelError(
                    f"mlx-lm's class for {config['model_type']} needs config fields that are missing: "
                    f"{', '.join(missing)}",
                    "mlx-lm does not read this version of the architecture; try a newer mlx-lm.",
                ) from None

    Model.__name__, Model.__module__ = model_class.__name__, model_class.__module__
    return Model, Arguments


def _mlx_lm_classes(config: dict[str, Any]) -> tuple[type, type]:
    from mlx_lm import utils

    printed = StringIO()
    try:
        with redirect_stdout(printed):
            return utils._get_classes(config)
    except SystemExit:  # a class that needs another package prints a message and exits
        raise ModelError(
            f"mlx-lm's class for {config['model_type']} cannot be imported ({printed.getvalue().strip()})",
            "Install the package that it names, and try again.",
        ) from None
    except ValueError:  # raised by mlx-lm for an unknown type
        raise _unknown(config) from None


def _unknown(config: dict[str, Any]) -> ModelError:
    kind, hint = config["model_type"], "Try a newer mlx-lm (pip install -U mlx-lm)."
    text = config.get("text_config")
    if isinstance(text, dict) and isinstance(text.get("model_type"), str):
        return ModelError(
            f"mlx-lm has no {kind}, a model of several parts whose language model is a {text['model_type']}",
            "Save the language model alone with transformers, or try a newer mlx-lm (pip install -U mlx-lm).",
        )
    if "vision_config" in config:
        hint = "For some of these, mlx-lm has only the language model. Name a language model."
        return ModelError(f"mlx-lm has no {kind}, a model with images", hint)
    if "auto_map" in config:
        return ModelError(f"mlx-lm has no {kind}; the code that comes with the model is for PyTorch", hint)
    return ModelError(f"mlx-lm has no {kind}", hint)
