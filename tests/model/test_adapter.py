"""Adapter as a value: equality and hash."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_lora import Adapter, AdapterConfig


def make(**changes) -> Adapter:
    config = AdapterConfig(rank=2, rank_pattern={"x": 3}, trainable_token_indices={"e": (1,)})
    weights = {"a.lora_a": mx.ones((4, 2)), "a.lora_b": mx.array([[1.0, float("nan")], [0.0, 2.0]])}
    return replace(Adapter(config, weights, "base"), **changes)


def test_equal_adapters():
    one, other = make(), make(metadata={"read": "elsewhere"})
    other.weights["a.lora_a"] = other.weights.pop("a.lora_a")  # order does not matter
    assert one == other and hash(one) == hash(other) and len({one, other}) == 1
    assert one in [other] and one != "adapter"
    assert Adapter(AdapterConfig(), {}) == Adapter(AdapterConfig(), {})


@pytest.mark.parametrize(
    "change",
    [
        dict(base=None),
        dict(config=AdapterConfig(rank=2)),
        dict(weights={}),
        dict(weights={"a.lora_a": mx.ones((4, 2))}),
        dict(weights={**make().weights, "a.lora_a": mx.ones((4, 2), mx.float16)}),
        dict(weights={**make().weights, "a.lora_a": mx.ones((2, 4))}),
        dict(weights={**make().weights, "a.lora_a": mx.ones((4, 2)).at[3, 1].add(1e-6)}),
    ],
    ids=range(7),
)
def test_adapters_that_differ(change):
    assert make() != make(**change)
    assert isinstance(hash(make(**change)), int)
