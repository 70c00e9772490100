"""The preference losses: which rows each one takes, whether it needs a reference, and its options.

Names and defaults are TRL's. In TRL, simpo is a loss of the CPO trainer, and needs ``cpo_alpha`` 0 to leave out the
cross entropy.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from .options import is_set, option

# kinds of rows: to imitate; two answers; labelled
TOKENS, PAIRS, LABELS = "tokens", "pairs", "labels"


class Preference(NamedTuple):
    """What a loss needs. A loss that is not in ``PREFERENCES`` takes rows to imitate, and no options."""

    rows: str = TOKENS  # TOKENS, PAIRS or LABELS
    reference: bool = False  # whether it needs log-probabilities of the model before training
    options: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()  # names of its further metrics


_SIDES = tuple(f"{what}/{side}" for what in ("rewards", "logps") for side in ("chosen", "rejected"))
_OF_LABELS = (*_SIDES, "rewards/margins")
_OF_PAIRS = (*_OF_LABELS, "rewards/accuracies")
PREFERENCES = {
    "dpo": Preference(PAIRS, True, ("beta", "label_smoothing"), _OF_PAIRS),
    "ipo": Preference(PAIRS, True, ("beta",), _OF_PAIRS),
    "orpo": Preference(PAIRS, False, ("beta",), (*_OF_PAIRS, "nll_loss", "log_odds_ratio", "log_odds_chosen")),
    "kto": Preference(LABELS, True, ("beta", "desirable_weight", "undesirable_weight"), (*_OF_LABELS, "kl")),
    "simpo": Preference(
        PAIRS, False, ("beta", "label_smoothing", "simpo_gamma", "cpo_alpha"), (*_OF_PAIRS, "nll_loss")
    ),
    "cpo": Preference(PAIRS, False, ("beta", "label_smoothing", "cpo_alpha"), (*_OF_PAIRS, "nll_loss")),
}
_CPO_ALPHA = {"cpo": 1.0}  # 0 for the others


def preference_of(loss: str) -> Preference:
    """What the loss of this name needs."""
    return PREFERENCES.get(loss, Preference())


def _for(text: str, name: str) -> str:
    return f"{', '.join(loss for loss, needs in PREFERENCES.items() if name in needs.options)}: {text}"


def _option(name: str, default: float | None, text: str):
    return option(default, _for(text, name), section="Preferences")


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """Fields of ``TrainConfig`` that only some of the ``PREFERENCES`` use."""

    beta: float = _option("beta", 0.1, "Strength of the pull towards the reference (ipo's tau, orpo's lambda).")
    label_smoothing: float = _option(
        "label_smoothing", 0.0, "Expected share of pairs with chosen and rejected swapped."
    )
    simpo_gamma: float = _option("simpo_gamma", 0.5, "Target reward margin.")
    cpo_alpha: float | None = _option(
        "cpo_alpha", None, "Weight of the cross entropy of the chosen answers (default: 1 for cpo, 0 for simpo)."
    )
    desirable_weight: float = _option("desirable_weight", 1.0, "Weight of the loss on good answers.")
    undesirable_weight: float = _option("undesirable_weight", 1.0, "Weight of the loss on bad answers.")

    def preference_options(self) -> dict[str, float]:
        """The arguments of this config's loss, by name."""
        found = {name: getattr(self, name) for name in preference_of(self.loss).options}
        if found.get("cpo_alpha", 0) is None:
            found["cpo_alpha"] = _CPO_ALPHA.get(self.loss, 0.0)
        return found

    def preference_faults(self) -> list[str]:
        """A fault for each of these fields that is out of its range, or that this config's loss does not use."""
        used, faults = preference_of(self.loss).options, []
        for name in PREFERENCE_OPTIONS:
            value = getattr(self, name)
            if name not in used:
                if is_set(self, name):
                    losses = ", ".join(loss for loss, needs in PREFERENCES.items() if name in needs.options)
                    faults.append(f"{name} has no effect with loss {self.loss!r} (it is for {losses})")
                continue
            low, high, what = _RANGES.get(name, (0.0, math.inf, "of at least 0"))
            if value is not None and not (math.isfinite(value) and low <= value < high and (value or name != "beta")):
                faults.append(f"{name} must be a number {what}, not {value!r}")
        if preference_of(self.loss).rows == LABELS and self.batch_size == 1:
            faults.append(
                f"batch_size must be at least 2 with loss {self.loss!r}, which compares with other rows' answers"
            )
        return faults


_RANGES = {
    "beta": (0.0, math.inf, "above 0"),
    "label_smoothing": (0.0, 0.5, "of at least 0 and below 0.5"),
    "simpo_gamma": (-math.inf, math.inf, "that is finite"),
}

PREFERENCE_OPTIONS = tuple(known.name for known in dataclasses.fields(PreferenceOptions))
