"""Packed rows in every attention-only family of mlx-lm: loss and gradients equal those of each row alone."""

from __future__ import annotations

import importlib
import importlib.util

import mlx_lora  # noqa: F401  isort: skip  (before MLX: it opens a real BLAS)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from attention_families import COMMON, FAMILIES, WRONG
from mlx.utils import tree_flatten

from mlx_lora.base import older_mlx_lm
from mlx_lora.data import Example
from mlx_lora.errors import ConfigError
from mlx_lora.training import packing_checks
from mlx_lora.training.losses import cross_entropy
from mlx_lora.training.packing_checks import check_model, check_rows

LENGTHS = (17, 5, 31, 12)
TOLERANCE = 5e-6


def make(family: str, config: dict) -> nn.Module:
    """A model whose parameters are all random, so that each of them matters."""
    name = f"mlx_lm.models.{family}"
    if older_mlx_lm.is_used() and importlib.util.find_spec(name) is None:
        pytest.skip("not in mlx-lm 0.31")
    older_mlx_lm.patch_mlx()
    module = importlib.import_module(name)
    mx.random.seed(0)  # biases keep what their class draws
    model = module.Model(module.ModelArgs.from_dict({**COMMON, "model_type": family, **config}))
    random, drawn = np.random.default_rng(0), []
    for path, array in tree_flatten(model.parameters()):
        if array.ndim > 1:
            array = mx.array(random.normal(0, 0.6 / np.sqrt(array.shape[-1]), array.shape), mx.float32)
        elif mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(mx.float32) + mx.array(random.normal(0, 0.05, array.shape), mx.float32)
        drawn.append((path, array))
    model.load_weights(drawn, strict=False)
    return model


def rows() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, 97, length).astype(np.int32) for length in LENGTHS]


def packed() -> tuple[mx.array, mx.array, mx.array]:
    """The tokens, mask and segments of all rows in one sequence with padding."""
    tokens = np.concatenate([*rows(), np.zeros(4, np.int32)])[None]
    segments = np.repeat([1, 2, 3, 4, 0], [*LENGTHS, 4])[None]
    return mx.array(tokens), mx.array((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)), mx.array(segments)


def padded() -> tuple[mx.array, mx.array]:
    tokens, mask = np.zeros((4, 32), np.int32), np.zeros((4, 31), bool)
    for i, row in enumerate(rows()):
        tokens[i, : len(row)], mask[i, : len(row) - 1] = row, True
    return mx.array(tokens), mx.array(mask)


def alone(model: nn.Module) -> mx.array:
    every = ((mx.array(row)[None], mx.ones((1, len(row) - 1), mx.bool_)) for row in rows())
    return sum(cross_entropy.loss(model, *batch)[0] for batch in every)


def measured(model, function):
    loss, gradients = nn.value_and_grad(model, function)(model)
    return loss.item(), dict(tree_flatten(gradients))


def distance(one, other) -> float:
    """The largest difference of losses and gradients, relative to the loss and to the largest gradient."""
    (loss, gradients), (loss_too, gradients_too) = one, other
    largest = max(g.abs().max().item() for g in gradients.values() if g.size)
    worst = max((g - gradients_too[path]).abs().max().item() for path, g in gradients.items() if g.size)
    return max(abs(loss - loss_too) / loss, worst / largest)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_as_each_alone(family):
    """To 5e-6, or to three times the rounding of float32 that shows when the rows are only padded."""
    model = make(family, FAMILIES[family])
    expected = measured(model, alone)
    found = distance(expected, measured(model, lambda model: cross_entropy.loss(model, *packed())[0]))
    leaked = abs(cross_entropy.loss(model, *packed()[:2])[0].item() - expected[0]) / expected[0]
    assert leaked > 10 * TOLERANCE, "attending to other rows would not show"
    if older_mlx_lm.is_used() and family in older_mlx_lm.NOT_PACKED:
        assert found > 0.1
        with pytest.raises(ConfigError, match=rf"pack: {family} is not known"):
            check_model(model, 64)
        return
    if found > TOLERANCE:
        rounding = distance(expected, measured(model, lambda model: cross_entropy.loss(model, *padded())[0]))
        assert found < 3 * rounding, f"{found:.1e}, and rounding makes {rounding:.1e}"
    check_model(model, 64)


def test_the_table_has_the_families_that_are_tested():
    assert set(FAMILIES) == packing_checks.FAMILIES and not set(WRONG) & packing_checks.FAMILIES


@pytest.mark.parametrize("family", WRONG)
def test_other_families_are_refused_by_name_and_absolute_positions_by_measuring(family):
    model = make(family, WRONG[family][1])
    with pytest.raises(ConfigError, match=rf"pack: {family} is not known") as error:
        check_model(model, 64)
    assert "Leave --pack out" in error.value.hint
    if WRONG[family][0] != "absolute positions":
        return
    examples = [Example(row, np.ones(len(row), bool)) for row in rows()[:3:2]]
    with pytest.raises(ConfigError, match="differs from its loss as a single row"):
        check_rows(model.eval(), examples)
