"""Edges of the losses of preferences against TRL: small and uneven batches, answers of one kind, equal answers."""

from __future__ import annotations

import pytest
from test_preference import LOSSES, base, compare, labelled, rows_of

assert base  # the fixture

OF_PAIRS = [loss for loss in LOSSES if loss != "kto"]


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_pair_and_odd_batches(loss, count, base, tmp_path):
    rows = rows_of("messages", 6)
    compare(loss, base, labelled(rows)[: max(2, count)] if loss == "kto" else rows[:count], tmp_path)


@pytest.mark.parametrize("label", [True, False])
def test_kto_with_answers_of_one_kind(label, base, tmp_path):
    rows = [row for row in labelled(rows_of("messages")) if row["label"] is label]
    options = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    compare("kto", base, rows, tmp_path, options=options)


@pytest.mark.parametrize("shape", ["messages", "text"])
@pytest.mark.parametrize("loss", OF_PAIRS)
def test_equal_answers(loss, shape, base, tmp_path):
    rows = rows_of(shape)
    rows[0]["rejected"] = rows[0]["chosen"]
    measured = compare(loss, base, rows, tmp_path, template=shape != "text")
    assert measured["rewards/accuracies"] < 1  # equal rewards are not more for the chosen answer


@pytest.mark.parametrize("gamma", [0.0, -0.5])
def test_a_margin_of_zero_or_less(gamma, base, tmp_path):
    compare("simpo", base, rows_of("messages"), tmp_path, options={"simpo_gamma": gamma})


@pytest.mark.parametrize("loss", ["cpo", "simpo"])  # TRL from 1.0 on passes over it in dpo
def test_half_of_the_labels_may_be_wrong_but_for_a_little(loss, base, tmp_path):
    compare(loss, base, rows_of("messages"), tmp_path, options={"label_smoothing": 0.49})
