"""Losses of preferences: their formulas, gradients, metrics, reference, accumulation and resuming."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_lora
from conftest import assert_close, make_model, shake
from mlx_lora import AdapterConfig, OptimizerConfig, TrainConfig
from mlx_lora.config import PREFERENCES, preference_of
from mlx_lora.data import Dataset, Example
from mlx_lora.data.preferences import LabelDataset, Labelled, Pair, PairDataset
from mlx_lora.errors import ConfigError, TrainingError
from mlx_lora.training import (
    TrainingState,
    TrainReport,
    ValReport,
    build_optimizer,
    evaluate,
    head,
    referenced,
    train,
)
from mlx_lora.training.losses import loss_named, means

LOSSES = tuple(PREFERENCES)
OPTIONS = {  # none of them the default
    "dpo": {"beta": 0.4, "label_smoothing": 0.1},
    "ipo": {"beta": 0.3},
    "orpo": {"beta": 0.4},
    "kto": {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.1, "cpo_alpha": 0.5},
    "cpo": {"beta": 0.2, "label_smoothing": 0.2, "cpo_alpha": 0.3},
}


def answer(random, prompt) -> Example:
    tokens = np.concatenate([prompt, random.integers(1, 96, random.integers(2, 12))]).astype(np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt))


def rows(loss: str, number: int = 12, seed: int = 0):
    """A data set of the kind that the loss takes."""
    random, found = np.random.default_rng(seed), []
    for k in range(number):
        prompt = random.integers(1, 96, random.integers(2, 8))
        first, second = answer(random, prompt), answer(random, prompt)
        if preference_of(loss).rows == "pairs":
            found.append(Pair(*first, second))
        else:
            found.append(Labelled(*first, k % 3 == 0, len(prompt), first.tokens[len(prompt) :]))
    return (PairDataset if preference_of(loss).rows == "pairs" else LabelDataset)(found)


def adapted(seed: int = 1, **changes) -> nn.Module:
    model = make_model()
    mlx_lora.attach(model, AdapterConfig(**{"rank": 4, "num_layers": -1, **changes}))
    if seed:
        shake(model, seed, 0.2)
    return model


def prepared(loss: str, number: int = 12):
    """(data set with the log-probabilities of another adapter, model, one batch of all rows)."""
    data = referenced(adapted(seed=9), rows(loss, number), loss, number)
    return data, adapted(), data.collate(np.argsort(data.lengths, kind="stable"), number + 2)


def by_hand(loss: str, model, batch, beta, label_smoothing=0.0, simpo_gamma=0.5, cpo_alpha=0.0, **weights) -> float:
    """The mean loss in NumPy, from the model's logits in float64."""

    def token_log_probabilities(tokens):
        logits = np.array(model(mx.array(tokens[:, :-1])).astype(mx.float32)).astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        every = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return np.take_along_axis(every, tokens[:, 1:, None], -1)[..., 0]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    each = token_log_probabilities(batch.tokens)
    there = batch.mask.any(1)
    sums, counts = np.where(batch.mask, each, 0).sum(1), np.maximum(batch.mask.sum(1), 1)
    if loss == "kto":
        others = np.where(batch.other_mask, token_log_probabilities(batch.other_tokens), 0).sum(1)
        kl = max(0, (others - batch.reference[:, 1])[there].mean())
        ratio = sums - batch.reference[:, 0]
        good = weights["desirable_weight"] * (1 - sigmoid(beta * (ratio - kl)))
        bad = weights["undesirable_weight"] * (1 - sigmoid(beta * (kl - ratio)))
        return np.where(batch.label, good, bad)[there].mean()
    half = len(sums) // 2
    pair = there[:half]
    ratios = sums - batch.reference
    mean = sums / counts
    smoothed = lambda m: -np.log(sigmoid(m)) * (1 - label_smoothing) - np.log(sigmoid(-m)) * label_smoothing  # noqa: E731
    chosen_tokens = batch.mask[:half]
    if loss == "dpo":
        found = smoothed(beta * (ratios[:half] - ratios[half:]))
    elif loss == "ipo":
        per = ratios / counts
        found = (per[:half] - per[half:] - 1 / (2 * beta)) ** 2
    elif loss == "orpo":
        odds = mean - np.log(1 - np.exp(np.where(there, mean, -1)))
        found = -beta * np.log(sigmoid(odds[:half] - odds[half:]))
        cpo_alpha, chosen_tokens = 1.0, np.arange(each.shape[1]) < batch.lengths[:half, None] - 1
    else:
        log_p = mean if loss == "simpo" else sums
        gamma = simpo_gamma if loss == "simpo" else 0.0
        found = smoothed(beta * (log_p[:half] - log_p[half:]) - gamma)
    return found[pair].mean() - cpo_alpha * each[:half][chosen_tokens].mean()


@pytest.mark.parametrize("chosen_options", ["defaults", "options"])
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_its_formula(loss, chosen_options):
    _, model, batch = prepared(loss)
    options = TrainConfig(loss=loss, **(OPTIONS[loss] if chosen_options == "options" else {})).preference_options()
    total, count, _ = loss_named(loss, options)(model, *(mx.array(array) for array in batch))
    assert count.item() == 12  # the empty rows at the end of the batch do not count
    assert abs((total / count).item() - by_hand(loss, model, batch, **options)) < 2e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_every_adapter_weight_has_a_gradient(loss):
    _, model, batch = prepared(loss)
    function = loss_named(loss, TrainConfig(loss=loss).preference_options())
    _, gradients = nn.value_and_grad(model, lambda m: function(m, *(mx.array(a) for a in batch))[0])(model)
    for name, gradient in tree_flatten(gradients):
        largest = mx.abs(gradient).max().item()
        assert 0 < largest < np.inf, name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.alternate
def test_only_answers_and_no_padding_count(loss):
    """Other tokens after an answer, and a wider batch, change nothing; another token in the answer does."""
    _, model, batch = prepared(loss)
    function = loss_named(loss, TrainConfig(loss=loss).preference_options())

    def value(**changes):
        return function(model, *(mx.array(array) for array in batch._replace(**changes)))[0].item()

    tokens = batch.tokens.copy()
    for k, row in enumerate(batch.tokens):
        end = np.flatnonzero(np.pad(batch.mask[k], (1, 0))).max(initial=0) + 1
        tokens[k, end:] = 7 if batch.mask[k].any() else row[end:]
    assert abs(value(tokens=tokens) - value()) < 1e-5
    tokens = batch.tokens.copy()
    tokens[0, np.flatnonzero(batch.mask[0])[-1] + 1] += 1
    assert abs(value(tokens=tokens) - value()) > 1e-5


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.alternate
def test_the_head_in_chunks_gives_the_same(loss, tied, monkeypatch):
    _, _, batch = prepared(loss)
    model = make_model(tie_word_embeddings=tied)
    mlx_lora.attach(model, AdapterConfig(rank=4, num_layers=-1, modules_to_save=None if tied else ["lm_head"]))
    shake(model)
    function = loss_named(loss, TrainConfig(loss=loss).preference_options())

    def both():
        return nn.value_and_grad(model, lambda m: function(m, *(mx.array(array) for array in batch))[0])(model)

    whole, gradients = both()
    calls = []
    chunked = head.chunked_losses
    monkeypatch.setattr(head, "WHOLE", 0)
    monkeypatch.setattr(head, "PIECE", 64 * 4 * 96)
    monkeypatch.setattr(head, "chunked_losses", lambda *arguments: calls.append(1) or chunked(*arguments))
    parts, gradients_of_parts = both()
    assert len(calls) == (2 if loss == "kto" else 1)
    assert_close(parts, whole, 1e-5)
    expected = dict(tree_flatten(gradients))
    for name, gradient in tree_flatten(gradients_of_parts):
        assert_close(gradient, expected[name], 1e-4, name)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_compiled_steps_with_the_head_in_chunks_and_activations_recomputed(loss, monkeypatch):
    whole = run(loss, adapted(), rows(loss), iters=3)
    monkeypatch.setattr(head, "WHOLE", 0)
    monkeypatch.setattr(head, "PIECE", 64 * 4 * 96)
    chunked = run(loss, adapted(), rows(loss), iters=3, grad_checkpoint=True)
    assert chunked[0].train_loss == pytest.approx(whole[0].train_loss, abs=1e-5)
    assert chunked[0].metrics == pytest.approx(whole[0].metrics, rel=1e-3, abs=1e-4)


def run(loss, model, data, valid=None, resume=None, states=None, stop=lambda: False, **changes):
    settings = {"iters": 6, "batch_size": 4, "steps_per_report": 3, "steps_per_eval": 3, "save_every": 100}
    config = TrainConfig(loss=loss, **{**settings, **changes})
    optimizer = build_optimizer(OptimizerConfig(learning_rate=5e-3), config.iters)
    reports = train(
        model, optimizer, data, valid, config, checkpoint=(states if states is not None else []).append, resume=resume,
        stop=stop,
    )  # fmt: skip
    return [report for report in reports if isinstance(report, (TrainReport, ValReport))]


def weights(model) -> dict:
    return {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def numbers_of(reports) -> list:
    """What does not depend on the time that the run took."""
    return [(r.iteration, getattr(r, "train_loss", getattr(r, "val_loss", None)), r.metrics) for r in reports]


@pytest.mark.alternate
@pytest.mark.parametrize(("loss", "accumulation"), [(loss, 1 + place % 2) for place, loss in enumerate(LOSSES)])
def test_a_resumed_run_is_the_same_to_the_bit(loss, accumulation, tmp_path):
    """Also in the middle of a window, and with a model that has the trained weights already when it is resumed."""
    settings = {"grad_accumulation_steps": accumulation, "iters": 7, "steps_per_report": 5}
    model = adapted()
    whole = run(loss, model, rows(loss), rows(loss, 5, 3), **settings)
    states, count, resumed = [], iter(range(99)), adapted()
    first = run(loss, resumed, rows(loss), rows(loss, 5, 3), states=states, stop=lambda: next(count) == 2, **settings)
    states[-1].save(tmp_path / "state")
    state = TrainingState.load(tmp_path / "state")
    assert state.iteration == 3 and set(state.reference) == (
        {"train", "valid"} if preference_of(loss).reference else set()
    )
    second = run(loss, resumed, rows(loss), rows(loss, 5, 3), resume=state, **settings)
    assert numbers_of(first + second) == numbers_of(whole)
    got, expected = weights(resumed), weights(model)
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_a_resumed_run_has_no_new_validation_set():
    states = []
    run("dpo", adapted(), rows("dpo"), states=states, iters=2)
    with pytest.raises(TrainingError, match="did not store its results for the valid set"):
        run("dpo", adapted(), rows("dpo"), rows("dpo", 5, 3), resume=states[-1], iters=4)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
@pytest.mark.alternate
def test_accumulated_batches_are_one_large_batch(loss):
    data = rows(loss, 8)
    model, other = adapted(), adapted()
    data = referenced(adapted(seed=9), data, loss, 8)
    (large,) = run(loss, model, data, batch_size=8, iters=1, steps_per_report=1)
    (small,) = run(loss, other, data, batch_size=4, iters=2, steps_per_report=2, grad_accumulation_steps=2)
    assert abs(large.train_loss - small.train_loss) < 1e-5
    assert small.metrics == pytest.approx(large.metrics, rel=1e-4, abs=1e-5)
    for name, expected in weights(model).items():
        assert_close(weights(other)[name], expected, 1e-3, name)


@pytest.mark.parametrize("changes", [{}, {"method": "dora"}, {"init": "pissa"}, {"method": "vera", "rank": 8}])
@pytest.mark.alternate
def test_the_reference_is_the_model_as_training_begins(changes):
    """So the loss begins at log 2, whatever the adapter's start is, also one that was trained before."""
    for seed in (0, 1):
        reports = run("dpo", adapted(seed=seed, **changes), rows("dpo"), rows("dpo", 5, 3), iters=1)
        assert abs(reports[0].val_loss - np.log(2)) < 1e-4
        assert abs(reports[0].metrics["rewards/chosen"]) < 1e-4


def test_full_fine_tuning_has_its_start_as_the_reference():
    model = make_model()
    mlx_lora.attach(model, AdapterConfig(method="full", num_layers=2))
    reports = run("dpo", model, rows("dpo"), rows("dpo", 5, 3), iters=4)
    assert abs(reports[0].val_loss - np.log(2)) < 1e-4 and reports[-1].metrics["rewards/margins"] != 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.alternate
def test_metrics(loss):
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    more = {
        "kto": {"kl"},
        "orpo": {"rewards/accuracies", "nll_loss", "log_odds_ratio", "log_odds_chosen"},
        "cpo": {"rewards/accuracies", "nll_loss"},
    }
    reports = run(loss, adapted(), rows(loss), rows(loss, 6, 3))
    assert all(set(report.metrics) == names | more.get(loss, {"rewards/accuracies"}) for report in reports)
    for report in reports:
        margin = report.metrics["rewards/chosen"] - report.metrics["rewards/rejected"]
        assert report.metrics["rewards/margins"] == pytest.approx(margin)


def test_metrics_are_means_of_all_rows_of_the_window():
    """The last batch of an epoch is smaller, and counts for less."""
    data = referenced(adapted(seed=9), rows("dpo", 10), "dpo", 4)
    model = adapted()
    (report,) = run("dpo", model, data, iters=3, steps_per_report=3, grad_accumulation_steps=3)
    whole = evaluate(adapted(), data, 10, loss="dpo")
    assert report.metrics == pytest.approx(whole.metrics, rel=1e-4)
    assert report.train_loss == pytest.approx(whole.loss, rel=1e-5)
    assert report.trained_tokens == whole.tokens == sum(s.mask.sum() for pair in data for s in pair.sequences)


def test_what_was_not_counted_has_no_mean():
    assert means({"rewards/chosen": (0.0, 0.0), "kl": (3.0, 2.0), "tokens": (8.0, 2.0)}) == {"kl": 1.5}


def test_kto_keeps_the_rows_of_a_batch_together():
    """The other answer of a row is that of the row before it in the batch, in every epoch, on every process."""
    data = rows("kto", 11)
    found = referenced(adapted(), data, "kto", 4, seed=0)
    epochs = [[tuple(batch) for batch in found.epoch(4, 0, epoch)] for epoch in range(3)]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2]) and len({tuple(epoch) for epoch in epochs}) > 1
    for batch in epochs[0]:
        for row, before in zip(batch, np.roll(batch, 1), strict=True):
            assert found.other[row] == before
    batch = np.array(epochs[0][0])
    whole, shares = found.collate(batch, 4), [found.collate(batch, 4, rank, 2) for rank in range(2)]
    for name in whole._fields:
        for rank, share in enumerate(shares):
            assert np.array_equal(getattr(share, name), getattr(whole, name)[rank::2]), name


def test_other_batches_need_other_log_probabilities():
    """KTO's other answers depend on the batches, so what was computed for other batches is not used."""
    model, data = adapted(), rows("kto", 11)
    first = referenced(model, data, "kto", 4, seed=0)
    again, other = referenced(model, first, "kto", 4, seed=0), referenced(model, first, "kto", 3, seed=0)
    assert np.array_equal(again.reference, first.reference)
    assert np.allclose(other.reference, referenced(model, data, "kto", 3, seed=0).reference)
    assert not np.allclose(other.reference[:, 1], first.reference[:, 1])


def test_the_other_answer_is_cut_like_any_row():
    tokens = np.arange(1, 9, dtype=np.int32)
    long = Labelled(tokens[:6], np.arange(6) >= 5, True, 5, tokens[5:])  # prompt of 5 tokens, cut to 6
    short = Labelled(tokens[:4], np.arange(4) >= 1, False, 1, tokens[1:4])
    data = LabelDataset([long, short])
    data.summary = dataclasses.replace(data.summary, limit=6)
    batch = data.collate(np.array([0, 1]), 2)
    assert batch.other_tokens[0, :7].tolist() == [1, 2, 3, 4, 5, 2, 0][: batch.tokens.shape[1]] + [0] * max(
        0, 7 - batch.tokens.shape[1]
    )
    assert batch.other_tokens[1].tolist()[:4] == [1, 6, 7, 8]


def test_packing_is_refused_by_name():
    for loss in LOSSES:
        with pytest.raises(ConfigError, match=f"pack: the loss '{loss}' does not take packed rows"):
            train(adapted(), build_optimizer(OptimizerConfig(), 1), rows(loss), None, TrainConfig(loss=loss, pack=True))


def test_rows_of_another_kind_are_refused():
    tokens = Dataset([Example(np.arange(1, 5, dtype=np.int32), np.arange(4) > 1)])
    for loss, data in (("dpo", rows("kto")), ("kto", rows("dpo")), ("dpo", tokens), ("cross_entropy", rows("dpo"))):
        with pytest.raises(ConfigError, match=r"takes .*, and the data set has"):
            train(adapted(), build_optimizer(OptimizerConfig(), 1), data, None, TrainConfig(loss=loss))


def test_an_evaluation_without_a_reference_says_how_to_have_one():
    with pytest.raises(TrainingError, match="referenced"):
        evaluate(adapted(), rows("dpo"), loss="dpo")


def test_options_without_effect_are_refused_by_name():
    for loss in ("cross_entropy", *LOSSES):
        used = preference_of(loss).options
        for name, value in {n: v for options in OPTIONS.values() for n, v in options.items()}.items():
            if name in used:
                TrainConfig(loss=loss, **{name: value})
            else:
                with pytest.raises(ConfigError, match=f"{name} has no effect with loss '{loss}'"):
                    TrainConfig(loss=loss, **{name: value})


@pytest.mark.parametrize(
    "loss, wrong",
    [
        ("dpo", {"beta": 0.0}),
        ("dpo", {"beta": -1.0}),
        ("dpo", {"label_smoothing": 0.5}),
        ("kto", {"desirable_weight": -1.0}),
        ("cpo", {"cpo_alpha": float("nan")}),
        ("simpo", {"simpo_gamma": float("inf")}),
        ("kto", {"batch_size": 1}),
    ],
)
def test_values_out_of_range(loss, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(loss=loss, **wrong)
