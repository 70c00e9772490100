"""Training on packed rows: the same loss and gradients as with each row alone, over every base, method and option."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import mlx_lora  # isort: skip  (before MLX: it opens a real BLAS)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conftest import make_model, needs_mlx_lm_0_32, shake
from mlx_lora import AdapterConfig, DataConfig, TrainConfig
from mlx_lora.base.quantizing import quantize
from mlx_lora.data import Dataset, Example, packed_batches
from mlx_lora.errors import ConfigError, TrainingError
from mlx_lora.fast import accelerate
from mlx_lora.tiny_base import PATH, skill
from mlx_lora.training import LOSSES, Done, Progress, TrainingState, TrainReport, evaluate, head, train
from mlx_lora.training.losses import cross_entropy
from mlx_lora.training.packed_cache import PackedCache
from mlx_lora.training.packing_checks import check_model, check_rows
from mlx_lora.training.recompute import recomputed_layers
from mlx_lora.training.step import Step

GEMMA3 = dict(
    model_type="gemma3_text", hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=96, sliding_window=8, sliding_window_pattern=2,
    query_pre_attn_scalar=16, rms_norm_eps=1e-5,
)  # fmt: skip


def rows(number=24, limit=64, most=40) -> Dataset:
    random, found = np.random.default_rng(0), []
    for length in random.integers(3, most, number):
        mask = random.random(length) < 0.7
        mask[0], mask[-1] = False, True
        found.append(Example(random.integers(1, 96, length).astype(np.int32), mask))
    data = Dataset(found)
    data.summary = dataclasses.replace(data.summary, limit=limit)
    return data


def config(**changes) -> TrainConfig:
    settings = dict(iters=6, batch_size=2, steps_per_report=1, steps_per_eval=100, save_every=100, pack=True)
    return TrainConfig(**{**settings, **changes})


def adapted(base=None, method="lora", **changes) -> nn.Module:
    model = make_model(base, quantize={"group_size": 32, "bits": 4} if changes.pop("bits", None) else None)
    if changes.pop("nf4", False):
        quantize(model, "nf4", group_size=32)
    accelerate(model)
    ranks = {} if method in ("full", "ia3") else {"rank": 4}
    mlx_lora.attach(model, AdapterConfig(method=method, num_layers=-1, **ranks, **changes))
    shake(model)
    return model.train()


def weights(model) -> dict:
    return {path: np.array(p.astype(mx.float32)) for path, p in tree_flatten(model.trainable_parameters())}


def rows_alone(model, data, batch) -> tuple[float, float, dict]:
    """Sum of the losses, number of learned tokens and gradients of a packed batch's rows, each read from it alone."""
    found = []
    for tokens, mask, segments in zip(batch.tokens, np.pad(batch.mask, ((0, 0), (1, 0))), batch.segments, strict=True):
        found += [(tokens[segments == k], mask[segments == k]) for k in range(1, segments.max() + 1)]

    def total(model):
        sums = [cross_entropy.loss(model, tokens[None], mask[None, 1:]) for tokens, mask in found]
        return sum(loss for loss, _ in sums), sum(count for _, count in sums)

    (loss, count), gradients = nn.value_and_grad(model, total)(model)
    return loss.item(), count.item(), dict(tree_flatten(gradients))


def assert_same(model, data, batch, tolerance=5e-6):
    loss, count, gradients = rows_alone(model, data, batch)
    (packed, packed_count), found = nn.value_and_grad(model, cross_entropy.loss)(model, *batch)
    assert packed_count.item() == count and packed.item() == pytest.approx(loss, rel=tolerance)
    largest = max(g.abs().max().item() for g in gradients.values())
    worst = max((g - gradients[path]).abs().max().item() for path, g in tree_flatten(found))
    assert worst <= tolerance * largest, f"gradients differ by {worst / largest:.1e}"


# --- loss and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [{}, {"bits": 4}, {"nf4": True}], ids=["dense", "4 bits", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3"])
@pytest.mark.alternate
def test_every_method_over_every_base(base, method):
    model, data = adapted(method=method, **base), rows()
    assert_same(model, data, next(packed_batches(data, 2, seed=0)), tolerance=2e-5 if base else 5e-6)


def test_full_fine_tuning_and_modules_trained_besides():
    data = rows()
    for model in (adapted(method="full"), adapted(modules_to_save=("lm_head", "norm"))):
        assert_same(model, data, next(packed_batches(data, 2, seed=0)))


@pytest.mark.parametrize("base", [None, GEMMA3], ids=["llama", "gemma3 with a window"])
@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_layers_and_windows(base, recompute):
    model, data = adapted(base), rows()
    batch = next(packed_batches(data, 2, seed=0))
    loss, _, gradients = rows_alone(model, data, batch)
    with recomputed_layers(model) if recompute else contextlib.nullcontext():
        (packed, _), found = nn.value_and_grad(model, cross_entropy.loss)(model, *batch)
    assert packed.item() == pytest.approx(loss, rel=5e-6)
    largest = max(g.abs().max().item() for g in gradients.values())
    assert all((g - gradients[path]).abs().max().item() <= 1e-5 * largest for path, g in tree_flatten(found))


@pytest.mark.parametrize("base", [None, GEMMA3], ids=["llama", "gemma3"])
def test_the_head_in_chunks(base, monkeypatch):
    model, data = adapted(base), rows()
    batch, used = next(packed_batches(data, 2, seed=0)), []
    chunked_sum = head.chunked_sum
    monkeypatch.setattr(head, "WHOLE", 0)
    monkeypatch.setattr(head, "PIECE", 4 * 96 * 64)
    monkeypatch.setattr(head, "chunked_sum", lambda *args: used.append(1) or chunked_sum(*args))
    chunked = cross_entropy.loss(model, *batch)[0].item()
    assert used
    monkeypatch.setattr(head, "WHOLE", 1 << 60)
    assert chunked == pytest.approx(rows_alone(model, data, batch)[0], rel=5e-6)


def test_the_mask_is_causal_in_each_row_and_within_the_window():
    segments = [1, 1, 1, 1, 2, 2, 0, 0]
    for window in (None, 2):
        mask = PackedCache(mx.array([segments])).make_mask(8, window_size=window)
        expected = [
            [segments[i] == segments[j] and j <= i and (window is None or i - j < window) for j in range(8)]
            for i in range(8)
        ]
        assert mask.shape == (1, 1, 8, 8) and mask[0, 0].tolist() == expected


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.alternate
def test_the_losses_of_a_run_are_those_computed_by_hand(accumulation, recompute):
    """Plain gradient descent on each row alone, against the compiled run on packed rows."""
    data, rate, by_hand = rows(), 0.002, []
    model = adapted()
    start = weights(model)
    batches = packed_batches(data, 2, seed=0)
    for _ in range(6 // accumulation):
        tokens, sums = 0.0, {}
        for batch in (next(batches) for _ in range(accumulation)):
            loss, count, gradients = rows_alone(model, data, batch)
            by_hand.append(loss / count)
            tokens += count
            sums = {path: sums.get(path, 0) + g for path, g in gradients.items()}
        parameters = dict(tree_flatten(model.trainable_parameters()))
        model.load_weights([(path, p - rate * sums[path] / tokens) for path, p in parameters.items()], strict=False)
    other = adapted()
    settings = config(grad_accumulation_steps=accumulation, grad_checkpoint=recompute)
    reports = list(train(other, opt.SGD(rate), data, None, settings))
    assert [r.loss for r in reports if isinstance(r, Progress)] == pytest.approx(by_hand, rel=2e-5)
    found, expected = weights(other), weights(model)
    moved = max(np.abs(start[path] - expected[path]).max() for path in expected)
    assert max(np.abs(found[path] - expected[path]).max() for path in expected) < 1e-4 * moved
    assert moved > 1e-3


def test_the_step_is_traced_once_for_each_shape(monkeypatch):
    data, traces = rows(), []
    shapes = {batch.tokens.shape for batch, _ in zip(packed_batches(data, 2, seed=0), range(24), strict=False)}
    loss = LOSSES["cross_entropy"]

    def counted(model, tokens, mask, segments=None):
        traces.append(tokens.shape)
        return loss(model, tokens, mask, segments)

    monkeypatch.setitem(LOSSES, "cross_entropy", counted)
    list(train(adapted(), opt.Adam(1e-3), data, None, config(iters=24)))
    assert len(traces) == len(shapes) and 1 < len(shapes) <= 8


def test_the_sums_of_the_processes_are_those_of_the_batch():
    model, data = adapted(), rows()
    whole = cross_entropy.loss(model, *next(packed_batches(data, 4, seed=0)))
    shares = [cross_entropy.loss(model, *next(packed_batches(data, 4, seed=0, rank=r, world=2))) for r in range(2)]
    assert sum(count.item() for _, count in shares) == whole[1].item()
    assert sum(loss.item() for loss, _ in shares) == pytest.approx(whole[0].item(), rel=5e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.alternate
def test_resume_is_exact(tmp_path, accumulation):
    data, file = rows(), tmp_path / "state.safetensors"
    settings = dict(grad_accumulation_steps=accumulation)
    straight = adapted(dropout=0.2)
    whole = list(train(straight, opt.Adam(1e-2), data, None, config(iters=11, **settings)))
    first = adapted(dropout=0.2)
    save = {"checkpoint": lambda state: state.save(file)}
    list(train(first, opt.Adam(1e-2), data, None, config(iters=5, **settings), **save))
    rest = adapted(dropout=0.2)
    state = TrainingState.load(file)
    again = list(train(rest, opt.Adam(1e-2), data, None, config(iters=11, **settings), resume=state))
    a, b = weights(straight), weights(rest)
    assert all(np.array_equal(a[path], b[path]) for path in a)
    losses = [[r.train_loss for r in reports if isinstance(r, TrainReport)] for reports in (whole, again)]
    assert losses[0][5:] == losses[1][: len(losses[0]) - 5]


def test_a_run_that_packs_otherwise_is_another_run(tmp_path):
    states = []
    list(train(adapted(), opt.Adam(1e-2), rows(), None, config(), checkpoint=states.append))
    for data, changes in ((rows(), {"pack": False}), (rows(limit=100), {})):
        with pytest.raises(TrainingError, match="tokens in a packed sequence: 64 in the checkpoint"):
            train(adapted(), opt.Adam(1e-2), data, None, config(iters=9, **changes), resume=states[-1])
    list(train(adapted(), opt.Adam(1e-2), rows(), None, config(pack=False), checkpoint=states.append))
    older = states[-1]
    del older.fingerprint["tokens in a packed sequence"]  # as an older version wrote it
    list(train(adapted(), opt.Adam(1e-2), rows(), None, config(iters=7, pack=False), resume=older))


def test_validation_measures_as_without_packing():
    data, model = rows(), adapted().eval()
    expected = evaluate(model, data, 2).loss
    reports = list(train(model, opt.SGD(0.0), data, data, config(iters=1, val_batches=-1)))
    found = [r.val_loss for r in reports if type(r).__name__ == "ValReport"]
    assert found == pytest.approx([expected] * len(found)) and len(found) == 2


# --- refusals ------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(96, 8), []

    def __call__(self, tokens, cache=None):
        return self.embed(tokens) @ self.embed.weight.T


MAMBA = dict(
    model_type="mamba", vocab_size=96, hidden_size=32, intermediate_size=64, state_size=8, num_hidden_layers=2,
    conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank=8, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("make", [Own, lambda: make_model(MAMBA)], ids=["Own", "mamba"])
def test_models_that_were_not_tried_are_refused_by_name(make, request):
    model = make()
    name = request.node.callspec.id.rpartition("-")[2]
    with pytest.raises(ConfigError, match=f"pack: {name} is not known") as error:
        train(model, opt.Adam(1e-3), rows(), None, config())
    assert "--pack" in error.value.hint


def test_state_that_crosses_rows_is_refused_whatever_the_name(monkeypatch):
    from mlx_lora.training import packing_checks

    monkeypatch.setattr(packing_checks, "FAMILIES", {"mamba"})
    with pytest.raises(ConfigError, match="state that crosses rows"):
        check_model(make_model(MAMBA), 64)


@needs_mlx_lm_0_32
def test_positions_that_count_beyond_a_length_are_refused_there():
    dynamic = make_model(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=64)
    check_model(dynamic, 64)
    with pytest.raises(ConfigError, match="changes with the length of the sequence beyond 64 tokens") as error:
        check_model(dynamic, 65)
    assert "--max-seq-length to 64" in error.value.hint
    rope = {
        "type": "yarn", "factor": 4.0, "rope_theta": 100.0, "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    scaled = make_model(model_type="ministral3", rope_parameters=rope, layer_types=["full_attention"] * 3, head_dim=16)
    check_model(scaled, 64)
    with pytest.raises(ConfigError, match="changes with the position beyond 64 tokens"):
        check_model(scaled, 65)


def test_the_first_rows_are_measured_before_training(monkeypatch):
    """A model whose mask does not look at the cache is refused before the first step."""
    monkeypatch.setattr(PackedCache, "make_mask", lambda self, *_, **__: "causal")
    reports = train(adapted(), opt.Adam(1e-3), rows(), None, config())
    with pytest.raises(ConfigError, match="differs from its loss as a single row"):
        next(reports)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_measuring_allows_for_rounding_and_for_a_single_row(dtype):
    model = make_model()
    model.set_dtype(dtype)
    check_rows(model, [rows()[0], rows()[1]])
    one = Dataset([rows(most=20)[0]])
    model = adapted()
    assert isinstance(list(train(model, opt.Adam(1e-3), one, None, config(iters=1)))[-1], Done)


def test_a_loss_without_segments_is_refused(monkeypatch):
    monkeypatch.setitem(LOSSES, "pairs", lambda model, tokens, mask: cross_entropy.loss(model, tokens, mask))
    with pytest.raises(ConfigError, match="pack: the loss 'pairs' does not take packed rows"):
        train(adapted(), opt.Adam(1e-3), rows(), None, config(loss="pairs"))


def test_a_step_takes_whatever_arrays_a_batch_has():
    """Other kinds of batches, such as pairs of answers, need no change of the step."""
    from mlx_lora.training import MasterWeights

    model, data = adapted(), rows()
    batch = next(packed_batches(data, 2, seed=0))

    def loss(model, tokens, mask, segments, weight):
        total, count = cross_entropy.loss(model, tokens, mask, segments)
        return weight.sum() * total, count

    optimizer = MasterWeights(opt.SGD(0.0))
    optimizer.init(dict(tree_flatten(model.trainable_parameters())))
    step = Step(model, optimizer, loss=loss, seed=0, fused=True)
    step.run(1, *(mx.array(array) for array in batch), mx.array([2.0, 1.0]), ends_window=True)
    assert step.outcome().loss == pytest.approx(3 * rows_alone(model, data, batch)[0], rel=1e-5)


# --- a run in a folder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_of_rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for split, number in (("train", 40), ("valid", 4)):
        text = "".join(json.dumps(row) + "\n" for row in skill.rows(split, number))
        (folder / f"{split}.jsonl").write_text(text)
    return folder


@pytest.mark.alternate
def test_a_packed_run_records_it_and_resumes(tmp_path, folder_of_rows):
    data = DataConfig(data=str(folder_of_rows), max_seq_length=200)
    adapter = {"rank": 4, "keys": "q_proj"}
    settings = {"batch_size": 2, "val_batches": 1, "pack": True, "steps_per_report": 1}
    options = dict(model=PATH, data=data, adapter=adapter)
    whole = list(mlx_lora.run(tmp_path / "whole", **options, train={**settings, "iters": 4}))
    list(mlx_lora.run(tmp_path / "a", **options, train={**settings, "iters": 2}))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["training"]["pack"] is True
    rest = list(mlx_lora.run(tmp_path / "a", resume=True, train={"iters": 4}))
    losses = [[r.train_loss for r in found if isinstance(r, TrainReport)] for found in (whole, rest)]
    assert losses[0][2:] == losses[1]
    with pytest.raises(TrainingError, match="pack: True in the checkpoint, False here"):
        list(mlx_lora.run(tmp_path / "a", resume=True, train={"iters": 6, "pack": False}))


def test_a_run_of_an_older_version_resumes(tmp_path, folder_of_rows):
    options = dict(model=PATH, data=DataConfig(data=str(folder_of_rows)), adapter={"rank": 4, "keys": "q_proj"})
    list(mlx_lora.run(tmp_path / "a", **options, train={"iters": 2, "val_batches": 1}))
    (file,) = (tmp_path / "a").glob("*state*.safetensors")
    state = TrainingState.load(file)
    del state.run["settings"]["train"]["pack"], state.fingerprint["tokens in a packed sequence"]
    state.save(file)
    reports = list(mlx_lora.run(tmp_path / "a", resume=True, train={"iters": 3}))
    assert any(isinstance(report, Done) for report in reports)


def test_a_model_that_cannot_pack_is_refused_before_its_weights_are_read(tmp_path, folder_of_rows, monkeypatch):
    import mlx_lora.model.loading

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(MAMBA))
    monkeypatch.setattr(mlx_lora.model.loading, "load_base", lambda *_, **__: pytest.fail("the model was loaded"))
    data = DataConfig(data=str(folder_of_rows))
    adapter = {"rank": 4, "keys": "in_proj"}
    with pytest.raises(ConfigError, match="pack: mamba is not known"):
        list(mlx_lora.run(tmp_path / "a", model=tmp_path / "base", data=data, adapter=adapter, train={"pack": True}))
