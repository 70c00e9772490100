"""How to generate text: one set of options for ``generate``, ``chat`` and ``serve``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .options import MEMORY as _CACHE
from .options import SAMPLING as _SAMPLING
from .options import check_types, common, option, raise_all, without_effect

# Arguments of apply_chat_template that the engine sets itself, or that a request must not set.
_OF_MESSAGES = ("self", "conversation", "messages", "tools", "chat_template")
_OF_TOKENS = ("tokenize", "padding", "truncation", "max_length", "tokenizer_kwargs")
_OF_RESULTS = ("return_dict", "return_tensors", "return_assistant_tokens_mask")
TEMPLATE_ARGUMENTS = frozenset(
    (*_OF_MESSAGES, *_OF_TOKENS, *_OF_RESULTS, "add_generation_prompt", "continue_final_message")
)


@dataclass(frozen=True)
class GenerateConfig:
    """How to generate text."""

    help_section = "Generation"

    max_tokens: int = common(256, "Maximum number of tokens to generate.")
    temp: float = common(0.0, "Sampling temperature; 0 is greedy.", section=_SAMPLING)
    top_p: float = option(
        1.0, "Sample from the most likely tokens that together have this probability.", section=_SAMPLING
    )
    min_p: float = option(
        0.0, "Drop tokens less probable than this fraction of the most likely token's probability.", section=_SAMPLING
    )
    min_tokens_to_keep: int = option(1, "With min_p: keep at least this many tokens.", section=_SAMPLING)
    top_k: int = option(0, "Sample from this many most likely tokens; 0 for all.", section=_SAMPLING)
    xtc_probability: float = option(
        0.0, "XTC: probability of dropping all likely tokens but the least likely of them.", section=_SAMPLING
    )
    xtc_threshold: float = option(
        0.1, "XTC: a token counts as likely from this probability on, at most 0.5.", section=_SAMPLING
    )
    repetition_penalty: float | None = option(
        None, "Divide the logits of recent tokens by this factor (arXiv:1909.05858), such as 1.1.", section=_SAMPLING
    )
    repetition_context_size: int = option(
        20, "Number of tokens that count as recent for this penalty.", section=_SAMPLING
    )
    presence_penalty: float | None = option(
        None, "Subtract this from the logit of every recent token.", section=_SAMPLING
    )
    presence_context_size: int = option(
        20, "Number of tokens that count as recent for this penalty.", section=_SAMPLING
    )
    frequency_penalty: float | None = option(
        None, "Subtract this from a logit for each time its token is among the recent ones.", section=_SAMPLING
    )
    frequency_context_size: int = option(
        20, "Number of tokens that count as recent for this penalty.", section=_SAMPLING
    )
    logit_bias: dict[int, float] | None = option(
        None, 'Add to the logits of these tokens, as JSON: {"15043": -5}.', section=_SAMPLING
    )
    seed: int | None = option(None, "Seed of the sampling (default: a new one each time).", section=_SAMPLING)
    stop: tuple[str, ...] = option((), "Stop before this text; repeat the option for several.")
    extra_eos_token: tuple[str, ...] = option((), "Also stop at this token; repeat the option for several.")
    prefill_response: str | None = option(None, "Beginning of the answer, which the model continues.")
    chat_template_config: dict[str, Any] | None = option(
        None, 'Variables for the chat template, as JSON: {"enable_thinking": false}.'
    )
    prefill_step_size: int = option(2048, "Prompt tokens to process at a time; fewer take less memory.", section=_CACHE)
    max_kv_size: int | None = option(
        None, "Keep the keys and values of this many tokens at most; older ones are forgotten.", section=_CACHE
    )
    kv_bits: int | None = option(None, "Quantize the keys and values to this many bits.", section=_CACHE)
    kv_group_size: int = option(64, "With kv_bits: number of values that share a scale.", section=_CACHE)
    quantized_kv_start: int = option(5000, "With kv_bits: quantize from this token on.", section=_CACHE)
    draft_model: str | None = option(
        None,
        "A small model with the same tokenizer; the model checks its tokens (speculative decoding).",
        section=_CACHE,
    )
    num_draft_tokens: int = option(3, "With draft_model: tokens to draft at a time.", section=_CACHE)

    def __post_init__(self):
        for name in ("stop", "extra_eos_token"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                object.__setattr__(self, name, (value,) if value else ())
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        check_types(self)
        faults = []

        def demand(good: bool, name: str, what: str) -> None:
            if not good:
                faults.append(f"{name} must be {what}, not {getattr(self, name)!r}")

        at_least = {
            **dict.fromkeys(("max_tokens", "min_tokens_to_keep", "prefill_step_size", "num_draft_tokens"), 1),
            **{f"{name}_context_size": 1 for name in ("repetition", "presence", "frequency")},
            "top_k": 0,
            "max_kv_size": 1,
            "quantized_kv_start": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            demand((value is None and name == "max_kv_size") or (whole and value >= least), name, f"at least {least}")
        demand(0 <= self.temp < math.inf, "temp", "0 or more")
        demand(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        for name, most in (("min_p", 1), ("xtc_probability", 1), ("xtc_threshold", 0.5)):
            demand(0 <= getattr(self, name) <= most, name, f"in [0, {most}]")
        penalty = self.repetition_penalty
        demand(penalty is None or 0 < penalty < math.inf, "repetition_penalty", "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            demand(value is None or math.isfinite(value), name, "a finite number")
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        demand(self.seed is None or (whole and 0 <= self.seed < 2**64), "seed", "a whole number from 0 to 2^64 - 1")
        demand(self.kv_bits in (None, 2, 3, 4, 5, 6, 8), "kv_bits", "2, 3, 4, 5, 6 or 8")
        demand(self.kv_group_size in (32, 64, 128), "kv_group_size", "32, 64 or 128")
        demand(all(isinstance(text, str) and text for text in self.stop), "stop", "texts that are not empty")
        demand(
            all(isinstance(text, str) and text for text in self.extra_eos_token), "extra_eos_token", "names of tokens"
        )
        self._check_bias(demand)
        if self.prefill_response == "":
            faults.append("prefill_response is empty")
        if taken := sorted((self.chat_template_config or {}).keys() & TEMPLATE_ARGUMENTS):
            faults.append(f"chat_template_config cannot set {', '.join(taken)}")
        if self.draft_model is not None and self.kv_bits is not None:
            faults.append(
                "draft_model and kv_bits contradict each other: quantized keys cannot be removed again when a "
                "drafted token is rejected"
            )
        raise_all(faults + without_effect(self, _RULES), self)

    def _check_bias(self, demand: Any) -> None:
        """Convert the token ids of ``logit_bias`` to integers; in JSON they are strings."""
        if self.logit_bias is None:
            return
        try:
            bias = {int(token): float(value) for token, value in self.logit_bias.items()}
        except (AttributeError, TypeError, ValueError):
            return demand(False, "logit_bias", 'a mapping of token ids to numbers, such as {"15043": -5}')
        object.__setattr__(self, "logit_bias", bias)
        finite = all(token >= 0 and not math.isnan(value) for token, value in bias.items())
        demand(finite, "logit_bias", "a mapping of token ids to numbers")


def _penalized(name: str) -> tuple:
    return ((f"{name}_context_size",), lambda c: getattr(c, f"{name}_penalty") is not None, f"needs {name}_penalty")


_RULES = (
    (
        ("top_p", "min_p", "top_k", "xtc_probability"),
        lambda c: c.temp > 0,
        "has no effect where temp is 0, which is greedy",
    ),
    (("min_tokens_to_keep",), lambda c: c.min_p > 0, "needs min_p"),
    (("xtc_threshold",), lambda c: c.xtc_probability > 0, "needs xtc_probability"),
    *(_penalized(name) for name in ("repetition", "presence", "frequency")),
    (("kv_group_size", "quantized_kv_start"), lambda c: c.kv_bits is not None, "needs kv_bits"),
    (("num_draft_tokens",), lambda c: c.draft_model is not None, "needs draft_model"),
)
