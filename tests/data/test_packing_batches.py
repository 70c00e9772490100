"""Packed batches: every row whole and once an epoch, little padding, the same order for the same seed."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

import mlx_lora
from mlx_lora.config import DataConfig
from mlx_lora.data import Dataset, Example, packed_batches
from mlx_lora.data.packing import capacity, first_fit_decreasing
from mlx_lora.errors import ConfigError, DataError


def made(lengths, limit=64) -> Dataset:
    """Row i has the tokens i + 1; about half are learned."""
    random, rows = np.random.default_rng(0), []
    for i, length in enumerate(lengths):
        mask = random.random(length) < 0.5
        mask[0], mask[-1] = False, True
        rows.append(Example(np.full(length, i + 1, np.int32), mask))
    data = Dataset(rows)
    data.summary = dataclasses.replace(data.summary, limit=limit)
    return data


def lengths_of(count, most=60):
    return np.random.default_rng(1).integers(2, most + 1, count)


def take(dataset, count, batch_size=4, **options):
    return list(itertools.islice(packed_batches(dataset, batch_size, **{"seed": 0, **options}), count))


def epochs(dataset, number, batch_size=4, **options):
    """The batches of each epoch, which ends when every row has been seen once more."""
    batches, found = packed_batches(dataset, batch_size, **{"seed": 0, **options}), []
    for _ in range(number):
        epoch, seen = [], 0
        while seen < len(dataset):
            epoch.append(next(batches))
            seen += len(rows_in(epoch[-1]))
        found.append(epoch)
    return found


def rows_in(batch):
    """(number of the row, its tokens, their mask) of all rows, read from the segments."""
    found = []
    mask = np.pad(batch.mask, ((0, 0), (1, 0)))
    for tokens, learned, segments in zip(batch.tokens, mask, batch.segments, strict=True):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1)), "a row is in one piece"
            found.append((int(tokens[at[0]]) - 1, tokens[at], learned[at]))
        assert not tokens[segments == 0].any() and not learned[segments == 0].any()
    return found


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)
    )


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (1, 4), (3, 4), (37, 1), (37, 8), (300, 4), (9000, 16)])
def test_every_row_is_whole_and_comes_once_an_epoch(count, batch_size):
    dataset = made(lengths_of(count))
    for epoch in epochs(dataset, 3 if count < 1000 else 1, batch_size):
        for batch in epoch:
            assert batch.tokens.dtype == batch.segments.dtype == np.int32 and batch.mask.dtype == bool
            assert batch.tokens.shape == batch.segments.shape == (batch_size, batch.mask.shape[1] + 1)
        rows = [row for batch in epoch for row in rows_in(batch)]
        assert sorted(number for number, _, _ in rows) == list(range(count))
        for number, tokens, mask in rows:
            assert np.array_equal(tokens, dataset[number].tokens) and np.array_equal(mask, dataset[number].mask)


@pytest.mark.parametrize("lengths", [lengths_of(300, most=20), np.arange(2, 302)], ids=["alike", "all different"])
def test_epochs_pack_other_rows_together(lengths):
    first, second = epochs(made(lengths, limit=400), 2, batch_size=1)
    together = [{frozenset(number for number, _, _ in rows_in(batch)) for batch in epoch} for epoch in (first, second)]
    assert len(together[0] & together[1]) < len(first) / 4


def test_the_order_depends_on_the_seed_alone():
    dataset = made(lengths_of(50))
    before = np.random.get_state()[1].tolist()
    first = take(dataset, 40, seed=5)
    assert np.random.get_state()[1].tolist() == before
    assert same(first, take(dataset, 40, seed=5)) and not same(first, take(dataset, 40, seed=6))


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7, 30, 500])
def test_a_resumed_run_continues_where_it_stopped(start):
    dataset = made(lengths_of(50))
    assert same(take(dataset, 30, start=start), take(dataset, start + 30)[start:])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_sequences_of_each_batch(world):
    dataset = made(lengths_of(43))
    whole = take(dataset, 20, 8, start=1)
    ranks = [take(dataset, 20, 8, start=1, rank=rank, world=world) for rank in range(world)]
    for alone, *shares in zip(whole, *ranks, strict=True):
        assert {share.tokens.shape for share in shares} == {(8 // world, alone.tokens.shape[1])}
        assert sorted(n for share in shares for n, _, _ in rows_in(share)) == sorted(n for n, _, _ in rows_in(alone))
    with pytest.raises(ConfigError, match="divided equally among 3"):
        packed_batches(dataset, 8, seed=0, world=3)
    with pytest.raises(DataError, match="empty"):
        packed_batches(Dataset([]), 8, seed=0)


def test_rows_are_placed_first_fit_from_the_longest():
    """By hand, in sequences of 60: 50 + 10, 40 + 20, 30 + 30, 5 + 5."""
    lengths = np.array([5, 50, 30, 10, 20, 5, 40, 30])
    assert first_fit_decreasing(range(8), lengths, 60) == [[1, 3], [6, 4], [2, 7], [0, 5]]


def test_a_batch_that_is_not_full_is_narrower():
    """Eleven rows of 20 in four sequences: 64 tokens each are enough, of 512."""
    (batch,) = epochs(made([20] * 11, limit=512), 1)[0]
    assert batch.tokens.shape == (4, 65) and len(rows_in(batch)) == 11


@pytest.mark.parametrize("limit", [64, 100, 2048, 30000])
def test_few_shapes(limit):
    dataset = made(lengths_of(500), limit)
    widths = {batch.tokens.shape[1] for batch in take(dataset, 400)}
    assert len(widths) <= 8 and all((width - 1) % 4 == 0 for width in widths) and max(widths) <= limit + 4


def test_a_sequence_is_as_long_as_max_seq_length_or_the_longest_row():
    assert capacity(made([5, 8], limit=64)) == 64
    assert capacity(Dataset([Example(np.ones(9, np.int32), np.ones(9, bool))])) == DataConfig().max_seq_length
    assert capacity(made([5, 80], limit=64)) == 80  # a data set that was made in another way


def test_a_row_as_long_as_a_sequence_and_rows_of_one_token():
    (epoch,) = epochs(made([64, 2, 2, 64], limit=64), 1, batch_size=2)
    assert sorted(number for batch in epoch for number, _, _ in rows_in(batch)) == [0, 1, 2, 3]


def test_the_first_token_of_a_row_is_never_learned_from_the_row_before():
    data = Dataset([Example(np.full(4, i + 1, np.int32), np.ones(4, bool)) for i in range(6)])
    batch = next(packed_batches(data, 1, seed=0))
    assert batch.mask.sum() == 6 * 3
    assert (batch.segments[:, 1:] == batch.segments[:, :-1])[batch.mask].all()


def test_rows_longer_than_max_seq_length_are_cut_as_without_packing():
    class Words:
        eos_token_id = 0

        def encode(self, text, **_):
            return [len(word) for word in text.split()]

    data = mlx_lora.tokenize([{"text": "a bb ccc dddd " * 5}], Words(), DataConfig(max_seq_length=12))
    assert any("were cut to 12 tokens" in line for line in data.summary.warnings())
    ((batch,),) = epochs(data, 1, batch_size=1)
    assert [len(tokens) for _, tokens, _ in rows_in(batch)] == [12]


def test_wikisql_has_under_three_percent_of_padding(shared):
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    file, folder = shared / "data" / "wikisql" / "train.jsonl", shared / "data" / "tokenizers" / "minimind"
    if not file.exists() or not folder.exists():
        pytest.skip("no WikiSQL or no tokenizer here")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    dataset = mlx_lora.tokenize(rows, AutoTokenizer.from_pretrained(folder), DataConfig(max_seq_length=2048))
    (epoch,) = epochs(dataset, 1)
    padding = 1 - dataset.lengths.sum() / sum(batch.tokens.size for batch in epoch)
    print(f"padding: {padding:.2%}")
    assert padding < 0.03
