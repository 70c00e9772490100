"""Losses of preferences in small batches, with answers of one kind, and with equal answers."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_preference_losses import LOSSES, OPTIONS, adapted, by_hand, rows

from mlx_lora.config import preference_of
from mlx_lora.data.preferences import LabelDataset, PairDataset
from mlx_lora.training import referenced
from mlx_lora.training.losses import loss_named

OF_PAIRS = [loss for loss in LOSSES if preference_of(loss).rows == "pairs"]


def batch_of(loss: str, data, fill: int = 0):
    """One batch of all rows, with the log-probabilities of another adapter, and ``fill`` empty rows."""
    data = referenced(adapted(seed=9), data, loss, len(data))
    return data.collate(np.argsort(data.lengths, kind="stable"), len(data) + fill)


def mean_and_gradients(loss: str, batch, **options):
    function = loss_named(loss, options)

    def mean(model):
        total, count, measured = function(model, *(mx.array(array) for array in batch))
        return total / count, measured

    model = adapted()
    (value, measured), gradients = nn.value_and_grad(model, mean)(model)
    return value.item(), dict(tree_flatten(gradients)), measured, model


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.alternate
def test_one_row_and_odd_batches(loss, number):
    batch = batch_of(loss, rows(loss, number, seed=3), fill=1)
    value, gradients, _, model = mean_and_gradients(loss, batch, **OPTIONS[loss])
    assert abs(value - by_hand(loss, model, batch, **OPTIONS[loss])) < 2e-5 * max(1, abs(value))
    assert all(mx.isfinite(g).all().item() for g in gradients.values())


@pytest.mark.parametrize("label", [True, False])
def test_kto_with_answers_of_one_kind(label):
    data = LabelDataset([row._replace(label=label) for row in rows("kto", 6)])
    batch = batch_of("kto", data, fill=2)
    value, gradients, measured, model = mean_and_gradients("kto", batch, **OPTIONS["kto"])
    assert abs(value - by_hand("kto", model, batch, **OPTIONS["kto"])) < 2e-5
    assert max(mx.abs(g).max().item() for g in gradients.values()) > 1e-4
    counts = [measured[f"rewards/{side}"][1].item() for side in ("chosen", "rejected")]
    assert counts == ([6, 0] if label else [0, 6])


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_equal_answers_have_no_preference(loss):
    pairs = [row._replace(rejected=row.sequences[0]) for row in rows(loss, 4)]
    options = {**OPTIONS[loss], **({"cpo_alpha": 0.0} if "cpo_alpha" in OPTIONS[loss] else {})}
    batch = batch_of(loss, PairDataset(pairs), fill=1)
    value, gradients, measured, _ = mean_and_gradients(loss, batch, **options)
    gamma = options.get("simpo_gamma", 0.0)
    smoothing = options.get("label_smoothing", 0.0)
    margin = math.log1p(math.exp(gamma)) * (1 - smoothing) + math.log1p(math.exp(-gamma)) * smoothing
    cross_entropy = (measured["nll_loss"][0] / measured["nll_loss"][1]).item() if loss == "orpo" else 0.0
    expected = {"ipo": (1 / (2 * options["beta"])) ** 2, "orpo": cross_entropy + options["beta"] * math.log(2)}
    assert value == pytest.approx(expected.get(loss, margin), rel=1e-5)
    assert measured["rewards/accuracies"][0].item() == 0
    if loss != "orpo":  # which imitates the chosen answer besides
        assert max(mx.abs(g).max().item() for g in gradients.values()) < 1e-4
