"""What stands in for parts of mlx-lm 0.32 where mlx-lm 0.31 is installed; the tests run with either."""

from __future__ import annotations

import random
from types import SimpleNamespace

import mlx.core as mx
import pytest

from conftest import QWEN3_MOE, make_model, needs_mlx_lm_0_32
from mlx_lora import AdapterConfig, attach
from mlx_lora.base import older_mlx_lm
from mlx_lora.base.batching import why_not_batched

PIECES = ["<think>", "</think>", "<call>", "</call>", "<", "</", "<th", "a", " b"]


@pytest.fixture
def older(monkeypatch):
    """mlx-lm counts as 0.31, and MLX as not yet changed for it."""
    for name in ("argpartition", "put_along_axis"):
        function = getattr(mx, name)
        monkeypatch.setattr(mx, name, getattr(function, "__wrapped__", function))
    monkeypatch.setattr(older_mlx_lm, "is_used", lambda: True)
    older_mlx_lm.patch_mlx.cache_clear()
    yield
    older_mlx_lm.patch_mlx.cache_clear()


def choose(x: mx.array) -> mx.array:
    """The sum of the two largest numbers, as mlx-lm 0.31 chooses experts."""
    return mx.take_along_axis(x, mx.argpartition(-x, kth=1)[:2], axis=0).sum()


def test_attaching_makes_the_choice_of_experts_differentiable(older):
    x = mx.array([1.0, 5.0, 3.0])
    with pytest.raises(ValueError, match="VJP with respect to indices"):
        mx.grad(choose)(x)
    attach(make_model(), AdapterConfig())
    assert mx.grad(choose)(x).tolist() == [0, 1, 1]
    assert mx.put_along_axis(x > 2, mx.array([1]), False, axis=0).tolist() == [False, False, True]


def test_a_mixture_of_experts_trains():
    import mlx.nn as nn

    model = make_model(QWEN3_MOE)
    attach(model, AdapterConfig(num_layers=2))
    tokens = mx.array([[1, 2, 3]])
    assert mx.isfinite(nn.value_and_grad(model, lambda model: model(tokens).square().sum())(model)[0]).item()


def test_families_that_older_versions_batch_wrongly_are_not_batched(older):
    assert "padding" in why_not_batched(type("Model", (), {"__module__": "mlx_lm.models.qwen3_next"})())


@needs_mlx_lm_0_32
@pytest.mark.parametrize("thinks,calls", [(True, True), (True, False), (False, True), (False, False)])
def test_answers_are_split_as_by_mlx_lm(thinks, calls):
    from mlx_lm.generate import make_text_state_machine

    tokenizer = SimpleNamespace(
        **dict(has_thinking=thinks, has_tool_calling=calls, structural_markers=(), response_transitions={}),
        **dict(think_start="<think>", think_end="</think>", tool_call_start="<call>", tool_call_end="</call>"),
    )
    own, theirs, draw = older_mlx_lm.TextStateMachine(tokenizer), make_text_state_machine(tokenizer), random.Random(0)

    def parts(machine, kind: str, pieces: list[str]) -> list[list[str]]:
        state, joined = machine.make_state(kind), []
        for piece in pieces:
            state, found = machine.split(state, piece)
            joined += found
        _, rest, kind = machine.flush(state)
        merged: list[list[str]] = []
        for name, text in [pair for pair in [*joined, (kind, rest)] if pair[1]]:
            if not merged or merged[-1][0] != name:
                merged.append([name, ""])
            merged[-1][1] += text
        return merged

    for kind in ("normal", "reasoning", "tool") * 100:
        pieces = draw.choices(PIECES, k=12)
        assert parts(own, kind, pieces) == parts(theirs, kind, pieces), pieces
