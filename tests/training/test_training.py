"""Training: the loss, the step, its optimizers and schedules, exact resume, and what happens when things go wrong."""

from __future__ import annotations

import math
import sys
import types
from typing import NamedTuple

import mlx_lora  # noqa: F401  isort: skip  (before MLX: it opens a real BLAS)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.config import SCHEDULES, OptimizerConfig, TrainConfig
from mlx_lora.errors import ConfigError, FormatError, TrainingError
from mlx_lora.training import (
    Checkpoint,
    Done,
    MasterWeights,
    Progress,
    SkippedStep,
    TrainingState,
    TrainReport,
    ValReport,
    build_optimizer,
    evaluate,
    loss_fn,
    train,
)
from mlx_lora.training.loss import token_losses
from mlx_lora.training.schedules import SHAPES, build_schedule

VOCAB, DIM = 23, 8


# --- a stand-in for the data room: the same contract in its plainest form -------------------------------------------


class Example(NamedTuple):
    tokens: np.ndarray
    mask: np.ndarray


class Batch(NamedTuple):
    tokens: np.ndarray
    mask: np.ndarray


def pad(rows, pad_to=4):
    width = 1 + pad_to * math.ceil((max(len(row.tokens) for row in rows) - 1) / pad_to)
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width - 1), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
        mask[i, : len(row.tokens) - 1] = row.mask[1:]
    return Batch(tokens, mask)


def train_batches(dataset, batch_size, *, seed, start=0, rank=0, world=1):
    size, number = min(batch_size, len(dataset)), 0
    for epoch in range(10**6):
        order = np.random.default_rng([seed, epoch]).permutation(len(dataset))
        for i in range(0, len(order) - size + 1, size):
            if number >= start:
                yield pad([dataset[j] for j in order[i : i + size]][rank::world])
            number += 1


def eval_batches(dataset, batch_size, limit=-1, rank=0, world=1):
    for number, i in enumerate(range(0, len(dataset), batch_size)):
        if number == limit:
            return
        yield pad(list(dataset)[i : i + batch_size][rank::world])


@pytest.fixture(autouse=True)
def data_room(monkeypatch):
    room = types.SimpleNamespace(train_batches=train_batches, eval_batches=eval_batches)
    monkeypatch.setitem(sys.modules, "mlx_lora.data", room)
    return room


@pytest.fixture
def uncompiled():
    """On the CPU MLX compiles fused kernels with the system's compiler, seconds each; not every test is about that."""
    mx.disable_compile()
    yield
    mx.enable_compile()


# --- small models and data -----------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Looks back over the sequence (a causal mean), so that padding or order would show."""

    def __init__(self, dropout):
        super().__init__()
        self.mix, self.dropout = nn.Linear(DIM, DIM), nn.Dropout(dropout)

    def __call__(self, x):
        past = mx.cumsum(x, axis=1) / mx.arange(1, x.shape[1] + 1)[:, None].astype(x.dtype)
        return x + mx.tanh(self.mix(self.dropout(past)))


class Model(nn.Module):
    """Embedding (frozen), two layers and a head. `traces` counts the runs of its Python code."""

    def __init__(self, dropout=0.0, dtype=mx.float32):
        super().__init__()
        mx.random.seed(3)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = [Layer(dropout) for _ in range(2)]
        self.head = nn.Linear(DIM, VOCAB)
        self.embed.freeze()
        self.set_dtype(dtype)
        self.traces = 0
        mx.eval(self.parameters())
        self.eval()

    def __call__(self, tokens):
        self.traces += 1
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def examples(number=12, seed=0, least=3, most=14):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        length = int(rng.integers(least, most))
        mask = rng.random(length) < 0.7
        mask[0], mask[-1] = False, True
        rows.append(Example(rng.integers(1, VOCAB, length).astype(np.int32), mask))
    return rows


def weights(model):
    return {path: np.array(p.astype(mx.float32)) for path, p in tree_flatten(model.trainable_parameters())}


def difference(a, b):
    assert a.keys() == b.keys()
    worst = {path: float(np.abs(a[path] - b[path]).max()) for path in a}
    return max(worst.values())


def same(a, b):
    worst = difference(a, b)
    assert worst == 0, f"max difference {worst}"


def close(a, b, tolerance):
    worst = difference(a, b)
    assert worst < tolerance, f"max difference {worst}"


def config(**changes):
    settings = {"iters": 8, "batch_size": 3, "steps_per_report": 4, "steps_per_eval": 100, "save_every": 100}
    return TrainConfig(**{**settings, **changes})


def fit(model, optimizer, rows, **changes):
    """Run to the end; the reports by kind."""
    extra = {name: changes.pop(name) for name in ("checkpoint", "resume", "stop", "valid_set") if name in changes}
    reports = list(train(model, optimizer, rows, config=config(**changes), **extra))
    return {kind: [r for r in reports if type(r) is kind] for kind in {type(r) for r in reports}}, reports


def reference_gradients(model, rows):
    """Token-mean loss and gradient in plain float32: one unpadded row at a time, the formula written out."""

    def row_loss(parameters, row):
        model.update(parameters)
        logits = model(mx.array(row.tokens[None, :-1]))[0].astype(mx.float32)
        probabilities = mx.exp(logits) / mx.exp(logits).sum(axis=-1, keepdims=True)
        chosen = mx.take_along_axis(probabilities, mx.array(row.tokens[1:, None]), axis=-1)[:, 0]
        return -(mx.log(chosen) * mx.array(row.mask[1:])).sum()

    total, sums = 0.0, None
    count = sum(int(row.mask[1:].sum()) for row in rows)
    start = model.trainable_parameters()
    for row in rows:
        loss, gradients = mx.value_and_grad(row_loss)(start, row)
        flat = {path: np.array(g, np.float64) for path, g in tree_flatten(gradients)}
        total += loss.item()
        sums = flat if sums is None else {path: sums[path] + flat[path] for path in flat}
    model.update(start)
    return total / count, {path: g / count for path, g in sums.items()}, count


# --- loss ----------------------------------------------------------------------------------------------------------


def test_loss_is_that_of_unpadded_rows():
    model, rows = Model(), examples(6)
    mean, _, count = reference_gradients(model, rows)
    total, tokens = loss_fn(model, *pad(rows, pad_to=16))
    assert tokens.item() == count
    assert abs(total.item() / count - mean) < 1e-5


def test_losses_of_half_precision_logits_are_computed_in_float32():
    logits = (mx.random.normal((2, 5, 300), key=mx.random.key(1)) * 4).astype(mx.bfloat16)
    targets = mx.arange(10).reshape(2, 5)
    losses = token_losses(logits, targets)
    exact = np.array(logits.astype(mx.float32), np.float64)
    wanted = np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, np.array(targets)[..., None], -1)[..., 0]
    assert losses.dtype == mx.float32
    assert np.abs(np.array(losses) - wanted).max() < 1e-4


def test_an_uncounted_position_cannot_spoil_the_loss():
    logits = mx.zeros((1, 2, VOCAB)).at[0, 1, 0].add(mx.array(math.inf))
    total, tokens = loss_fn(lambda _: logits, mx.array([[1, 2, 3]]), mx.array([[True, False]]))
    assert tokens.item() == 1 and abs(total.item() - math.log(VOCAB)) < 1e-5


def test_evaluate_weighs_tokens_and_leaves_modes_and_random_numbers_alone():
    model, rows = Model(dropout=0.5), examples(7)
    mean, _, count = reference_gradients(model, rows)
    model.train()
    model.layers[0].eval()
    before = mx.array(mx.random.state[0])
    measured = evaluate(model, rows, batch_size=2)
    assert abs(measured.loss - mean) < 1e-5 and measured.tokens == count
    assert measured.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    assert model.training and model.layers[1].dropout.training and not model.layers[0].dropout.training
    assert mx.array_equal(before, mx.random.state[0])
    assert evaluate(model, rows, batch_size=2, limit=1).tokens == sum(int(r.mask.sum()) for r in rows[:2])
    with pytest.raises(TrainingError, match="nothing to evaluate"):
        evaluate(model, [])


# --- the step against formulas written out -------------------------------------------------------------------------


def test_sgd_step_and_clipping_are_the_formula(uncompiled):
    rows, rate = examples(3), 0.1
    for limit in (None, 0.05, 1e3):
        model = Model()
        loss, gradient, _ = reference_gradients(model, rows)
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        shrink = min(1.0, limit / norm) if limit else 1.0
        wanted = {path: w - rate * shrink * gradient[path] for path, w in weights(model).items()}
        kinds, _ = fit(model, opt.SGD(rate), rows, iters=1, max_grad_norm=limit)
        close(weights(model), wanted, 1e-6)
        report = kinds[TrainReport][0]
        assert report.train_loss == pytest.approx(loss, abs=1e-5)
        assert report.grad_norm == pytest.approx(norm, rel=1e-4)  # before clipping


def test_adam_is_the_published_formula():
    model, rows, rate = Model(), examples(3), 0.01
    wanted, m, v = weights(model), 0.0, 0.0
    shadow = Model()
    for t in range(1, 4):
        shadow.update(mlx_tree(wanted))
        _, gradient, _ = reference_gradients(shadow, rows)
        m = {p: 0.9 * (m[p] if m else 0) + 0.1 * g for p, g in gradient.items()}
        v = {p: 0.999 * (v[p] if v else 0) + 0.001 * g**2 for p, g in gradient.items()}
        wanted = {
            p: w - rate * (m[p] / (1 - 0.9**t)) / (np.sqrt(v[p] / (1 - 0.999**t)) + 1e-8) for p, w in wanted.items()
        }
    fit(model, build_optimizer(OptimizerConfig(learning_rate=rate), 3), rows, iters=3)
    close(weights(model), wanted, 3e-5)


def mlx_tree(flat):
    from mlx.utils import tree_unflatten

    return tree_unflatten([(path, mx.array(w, mx.float32)) for path, w in flat.items()])


def test_accumulation_is_one_big_batch(data_room):
    """Rows of very different lengths: a mean of means would show."""
    rows = examples(2, seed=1, least=3, most=4) + examples(4, seed=2, least=12, most=14)
    data_room.train_batches = lambda rows, size, **_: iter([pad(rows[i : i + size]) for i in range(0, 6, size)] * 9)
    big, small = Model(), Model()
    fit(big, opt.SGD(0.1), rows, iters=2, batch_size=6)
    kinds, _ = fit(small, opt.SGD(0.1), rows, iters=6, batch_size=2, grad_accumulation_steps=3)
    close(weights(big), weights(small), 1e-6)
    assert kinds[Done][0].trained_tokens == 2 * sum(int(r.mask.sum()) for r in rows)


def test_trailing_window_is_applied(data_room):
    rows = examples(4)
    data_room.train_batches = lambda rows, size, **_: iter([pad(rows[i : i + 2]) for i in (0, 2)] * 9)
    short, straight = Model(), Model()
    fit(straight, opt.SGD(0.1), rows, iters=1, batch_size=2)
    fit(short, opt.SGD(0.1), rows, iters=1, batch_size=2, grad_accumulation_steps=4)
    close(weights(straight), weights(short), 1e-6)


def test_reports_come_in_order_and_weigh_tokens():
    model, rows = Model(), examples(9)
    kinds, reports = fit(
        model, opt.SGD(0.0), rows, iters=7, steps_per_report=3, steps_per_eval=3, save_every=5, valid_set=rows,
        checkpoint=lambda state: f"at {state.iteration}",
    )  # fmt: skip
    mean, _, count = reference_gradients(model, rows)
    assert [r.iteration for r in kinds[Progress]] == [1, 2, 3, 4, 5, 6, 7]
    assert [r.iteration for r in kinds[TrainReport]] == [3, 6, 7]
    assert [r.iteration for r in kinds[ValReport]] == [0, 3, 6, 7]
    assert [(r.iteration, r.path) for r in kinds[Checkpoint]] == [(5, "at 5"), (7, "at 7")]
    assert type(reports[0]) is ValReport and type(reports[-1]) is Done
    assert kinds[TrainReport][0].train_loss == pytest.approx(mean, abs=1e-5)  # nine rows in three batches
    assert kinds[TrainReport][1].trained_tokens == 2 * count
    assert [r.val_loss for r in kinds[ValReport]] == pytest.approx([mean] * 4, abs=1e-5)
    assert kinds[Done][0].stopped is False and not model.training
    kinds, _ = fit(model, opt.SGD(0.0), rows, valid_set=rows, val_batches=0)
    assert ValReport not in kinds


@pytest.mark.parametrize("accumulation", [1, 4])
def test_traces_are_as_few_as_shapes(accumulation):
    model, rows = Model(), examples(40)
    shapes = {batch.tokens.shape for batch, _ in zip(train_batches(rows, 3, seed=0), range(24), strict=False)}
    fit(model, opt.Adam(1e-3), rows, iters=24, grad_accumulation_steps=accumulation)
    assert len(shapes) > 1 and model.traces == len(shapes)


# --- seeds and resume ----------------------------------------------------------------------------------------------


def test_same_seed_same_bits_whatever_is_drawn_between():
    rows, results = examples(10), []
    for valid, seed in ((None, 5), (rows, 5), (None, 6)):
        model = Model(dropout=0.3)
        settings = config(iters=6, seed=seed, steps_per_eval=2)
        for _ in train(model, opt.Adam(1e-2), rows, valid, settings):
            mx.random.uniform().item()  # the caller's own draws
        results.append(weights(model))
    same(results[0], results[1])
    assert difference(results[0], results[2]) > 1e-3


@pytest.mark.parametrize("how", ["a shorter run", "a stop"])
@pytest.mark.parametrize(
    ("optimizer", "dtype", "accumulation"),
    [("adam", mx.float32, 2), ("adamw", mx.bfloat16, 3), ("muon", mx.bfloat16, 1)],
)
def test_resume_is_exact(request, tmp_path, how, optimizer, dtype, accumulation):
    if dtype == mx.bfloat16:
        request.getfixturevalue("uncompiled")
    rows = examples(10)
    settings = OptimizerConfig(optimizer=optimizer, learning_rate=1e-2, lr_schedule="cosine_decay", warmup=1)
    common = {"grad_accumulation_steps": accumulation, "max_grad_norm": 1.0, "steps_per_report": 4}

    straight = Model(dropout=0.3, dtype=dtype)
    whole, _ = fit(straight, build_optimizer(settings, 6), rows, iters=12, **common)

    file, model, iterations = tmp_path / "state.safetensors", Model(dropout=0.3, dtype=dtype), iter(range(1, 99))
    first, _ = fit(
        model, build_optimizer(settings, 6), rows, iters=5 if how == "a shorter run" else 12, **common,
        checkpoint=lambda state: state.save(file), stop=lambda: next(iterations) == 5 and how == "a stop",
    )  # fmt: skip
    assert first[Done][0].iteration == 5 and first[Done][0].stopped == (how == "a stop")
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]

    other = Model(dropout=0.3, dtype=dtype)
    other.update(mx_noise(other))  # what the new process holds must not matter
    rest, _ = fit(
        other, build_optimizer(settings, 6), rows, iters=12, resume=TrainingState.load(file), **common
    )  # fmt: skip
    same(weights(straight), weights(other))
    a, b = whole[TrainReport][1:], rest[TrainReport]
    assert [(r.iteration, r.train_loss, r.learning_rate, r.trained_tokens, r.grad_norm) for r in a] == [
        (r.iteration, r.train_loss, r.learning_rate, r.trained_tokens, r.grad_norm) for r in b
    ]


def mx_noise(model):
    from mlx.utils import tree_map

    return tree_map(lambda p: mx.random.normal(p.shape).astype(p.dtype), model.trainable_parameters())


def test_resume_of_a_finished_run_applies_its_trailing_window():
    rows, states, model = examples(6), [], Model()
    fit(model, opt.Adam(1e-2), rows, iters=5, grad_accumulation_steps=2, checkpoint=states.append)
    other = Model()
    kinds, _ = fit(other, opt.Adam(1e-2), rows, iters=5, grad_accumulation_steps=2, resume=states[-1])
    assert Progress not in kinds
    same(weights(model), weights(other))


def test_resume_takes_a_new_constant_learning_rate_but_no_other_run():
    rows, states = examples(6), []
    fit(Model(), opt.Adam(1e-2), rows, iters=2, checkpoint=states.append)
    kinds, _ = fit(Model(), opt.Adam(1e-3), rows, iters=4, resume=states[0])
    assert kinds[TrainReport][-1].learning_rate == pytest.approx(1e-3)
    thinner = Model()
    thinner.head.freeze()
    with pytest.raises(
        TrainingError, match=r"(?s)batch_size: 3 in the checkpoint, 2 here.*Adam .*head.weight"
    ) as caught:
        train(thinner, opt.Lion(1e-2), rows, config=config(batch_size=2), resume=states[0])
    assert "seed" not in caught.value.message
    with pytest.raises(TrainingError, match="beyond"):
        train(Model(), opt.Adam(1e-2), rows, config=config(iters=1), resume=states[0])
    with pytest.raises(TrainingError, match="another optimizer's state"):
        list(train(Model(), opt.Adam(1e-2), rows, config=config(), resume=stateless(states[0])))


def stateless(state):
    return TrainingState(state.parameters, {}, {}, state.tally, state.fingerprint)


def test_a_file_that_is_no_state_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FormatError, match="cannot be read"):
        TrainingState.load(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(FormatError, match="cannot be read"):
        TrainingState.load(path)
    mx.save_safetensors(str(path), {"a": mx.ones(2)})
    with pytest.raises(FormatError, match="no training state"):
        TrainingState.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    rows, states, path = examples(6), [], tmp_path / "x.safetensors"
    fit(Model(), opt.Adam(1e-2), rows, iters=1, checkpoint=states.append)
    states[0].save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        states[0].save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- things that go wrong ------------------------------------------------------------------------------------------


class Fragile(Model):
    """A token of the last id makes everything infinite."""

    def __call__(self, tokens):
        bad = (tokens == VOCAB - 1).any()
        return super().__call__(tokens) * mx.where(bad, mx.array(math.inf), mx.array(1.0))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_non_finite_step_changes_nothing(data_room, accumulation):
    good, bad = examples(2, seed=1), [Example(np.array([1, VOCAB - 1, 2], np.int32), np.array([False, True, True]))]
    good = [Example(row.tokens % (VOCAB - 2) + 1, row.mask) for row in good]

    def batches(kinds):
        return lambda rows, size, **_: iter([pad(good if kind == "g" else bad) for kind in kinds])

    model, clean = Fragile(), Fragile()
    data_room.train_batches = batches("gg" * accumulation + "gb"[-accumulation:] + "gg" * accumulation)
    iters = 5 * accumulation
    kinds, _ = fit(model, opt.Adam(1e-2), good, iters=iters, grad_accumulation_steps=accumulation)
    data_room.train_batches = batches("g" * 99)
    fit(clean, opt.Adam(1e-2), good, iters=4 * accumulation, grad_accumulation_steps=accumulation)
    same(weights(model), weights(clean))  # Adam's step counter and moments did not move either
    assert kinds[SkippedStep] == [SkippedStep(iteration=3 * accumulation, in_a_row=1)]
    assert kinds[Done][0].skipped_steps == 1
    assert all(math.isfinite(r.train_loss) for r in kinds[TrainReport])
    assert [r.loss for r in kinds[Progress]].count(None) == 1


def test_too_many_skipped_steps_save_and_fail(data_room):
    rows, states, model = examples(3), [], Fragile()
    bad = pad([Example(np.array([1, VOCAB - 1, 2], np.int32), np.array([False, True, True]))])
    data_room.train_batches = lambda *_, **__: iter([bad] * 9)
    before, seen = weights(model), []
    with pytest.raises(TrainingError, match="3 steps in a row") as caught:
        for report in train(model, opt.Adam(1e-2), rows, None, config(max_skipped_steps=3), checkpoint=states.append):
            seen.append(report)
    assert caught.value.hint and type(seen[-1]) is Checkpoint and len(states) == 1
    same({p: np.array(a) for p, a in states[0].parameters.items()}, before)
    same(weights(model), before)


def test_a_batch_without_tokens_is_no_step(data_room):
    rows, model = examples(3), Model()
    full, empty = pad(rows), pad([Example(np.array([1, 2, 3], np.int32), np.zeros(3, bool))])
    data_room.train_batches = lambda *_, **__: iter([full, empty, empty])
    once = Model()
    fit(once, opt.Adam(1e-2), rows, iters=1)
    kinds, _ = fit(model, opt.Adam(1e-2), rows, iters=3)
    assert SkippedStep not in kinds
    same(weights(model), weights(once))


def test_nothing_to_train_or_learn_from():
    model = Model()
    with pytest.raises(TrainingError, match="set is empty"):
        train(model, opt.Adam(1e-2), [])
    model.freeze()
    with pytest.raises(TrainingError, match="no trainable parameters") as caught:
        train(model, opt.Adam(1e-2), examples(3))
    assert "attach" in caught.value.hint
    model.count = mx.array([1, 2])
    with pytest.raises(TrainingError, match="count"):
        train(model, opt.Adam(1e-2), examples(3))


@pytest.mark.parametrize("end", ["close", "data fails", "model fails"])
def test_the_model_is_usable_however_a_run_ends(data_room, end):
    model, rows = Model(dropout=0.2), examples(9)
    run = train(model, opt.Adam(1e-2), rows, None, config(grad_checkpoint=True))
    if end == "close":
        next(run)
        assert type(model.layers[0]) is not Layer and model.training
        run.close()
    elif end == "data fails":
        data_room.train_batches = lambda *_, **__: (pad(rows[: 3 if i < 2 else 1 // 0]) for i in range(9))
        with pytest.raises(ZeroDivisionError):
            list(run)
    else:
        model.layers[1].dropout = lambda x: x @ mx.ones((3, 3))
        with pytest.raises(ValueError, match="matmul"):
            list(run)
        model.layers[1].dropout = nn.Identity()
    assert all(type(layer) is Layer for layer in model.layers) and not model.training
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()
    assert np.isfinite(np.array(mx.random.uniform(shape=(2,)))).all()
    assert all(np.isfinite(w).all() for w in weights(model).values())


# --- half precision ------------------------------------------------------------------------------------------------


def test_master_weights_follow_float32_where_bfloat16_stands_still():
    rows, rate = examples(6), 1e-5
    exact, half, plain = Model(), Model(dtype=mx.bfloat16), Model(dtype=mx.bfloat16)
    exact.update({"embed": half.embed.parameters()})
    exact.update(mlx_tree(weights(half)))  # the same start
    start = weights(half)
    states = []
    for model in (exact, half):
        optimizer = build_optimizer(OptimizerConfig(learning_rate=rate), 30)
        fit(model, optimizer, rows, iters=30, checkpoint=states.append)
    masters = {
        path.removeprefix("masters."): a for path, a in states[1].optimizer.items() if path.startswith("masters")
    }
    assert masters.keys() == start.keys() and all(a.dtype == mx.float32 for a in masters.values())
    assert not any(path.startswith("masters") for path in states[0].optimizer)  # no second copy of float32
    moved = difference(weights(exact), start)
    assert moved > 20 * rate
    close(weights(exact), {p: np.array(a) for p, a in masters.items()}, moved / 5)
    rounded = {p: np.array(a.astype(mx.bfloat16).astype(mx.float32)) for p, a in masters.items()}
    same(weights(half), rounded)
    assert all(p.dtype == mx.bfloat16 for _, p in tree_flatten(half.trainable_parameters()))

    plain_adam, grads = opt.Adam(rate, bias_correction=True), nn.value_and_grad(plain, lambda b: loss_fn(plain, *b)[0])
    for batch, _ in zip(train_batches(rows, 3, seed=0), range(30), strict=False):
        plain_adam.update(plain, grads(batch)[1])
    large = {p: np.abs(w) > 0.1 for p, w in start.items()}
    stuck = [np.abs(weights(plain)[p] - w)[large[p]].sum() for p, w in start.items()]
    shifted = [np.abs(np.array(masters[p]) - w)[large[p]].sum() for p, w in start.items()]
    assert sum(stuck) == 0 and sum(shifted) > 0


def test_master_weights_serve_a_multi_optimizer():
    """Shares that end in different layers, on which MultiOptimizer's own merging fails."""
    parameters = {"layers.0.m": mx.ones(3), "layers.1.w": mx.ones((3, 2), mx.float16), "layers.2.m": mx.ones(3)}
    optimizer = MasterWeights(
        opt.MultiOptimizer([opt.SGD(0.5), opt.SGD(0.25)], [lambda p, w: p.endswith("layers.1.w")])
    )
    optimizer.init(parameters)
    after = optimizer.apply_gradients({p: mx.ones_like(w) for p, w in parameters.items()}, parameters)
    assert after["layers.1.w"].dtype == mx.float16 and mx.all(after["layers.1.w"] == 0.5)
    assert mx.all(after["layers.2.m"] == 0.75)


# --- gradient checkpointing ----------------------------------------------------------------------------------------


def tiny_llama():
    from mlx_lm.models.llama import Model as Llama
    from mlx_lm.models.llama import ModelArgs

    mx.random.seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2}
    llama = Llama(ModelArgs(model_type="llama", rms_norm_eps=1e-5, vocab_size=VOCAB, **sizes))
    llama.freeze()
    for layer in llama.layers[1:]:
        layer.unfreeze()  # one layer with parameters to train, one without
    mx.eval(llama.parameters())
    return llama


def test_recomputing_layers_changes_no_gradient_and_is_undone(uncompiled):
    rows, results = examples(6), []
    for recompute in (False, True):
        model, other = tiny_llama(), tiny_llama()
        kind = type(model.layers[0])
        for report in train(model, opt.SGD(0.5), rows, rows, config(iters=3, grad_checkpoint=recompute)):
            inside = isinstance(report, (Progress, TrainReport))
            assert not inside or (type(model.layers[0]) is not kind) == recompute
            assert type(other.layers[0]) is kind and isinstance(model.layers[0], kind)
        assert type(model.layers[0]) is kind
        results.append(weights(model))
    close(*results, 1e-6)
    assert difference(results[0], weights(tiny_llama())) > 1e-3
    with pytest.raises(TrainingError, match="has no `layers`"):
        list(train(nn.Linear(2, 2), opt.SGD(0.1), rows, config=config(grad_checkpoint=True)))


def test_recomputed_dropout_draws_the_same_mask(data_room):
    """loss = sum of dropout(w): with one mask, w . gradient = loss."""
    from mlx_lora.training.recompute import recomputed_layers

    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.dropout = mx.random.normal((64,), key=mx.random.key(2)), nn.Dropout(0.5)

        def __call__(self, x):
            return self.dropout(self.w * x)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Drops(), Drops()]

        def __call__(self, x):
            return sum(layer(x) for layer in self.layers)

    model, x = Two(), mx.ones(64)
    with recomputed_layers(model):
        step = mx.compile(nn.value_and_grad(model, lambda x: model(x).sum()), mx.random.state, mx.random.state)
        losses = []
        for _ in range(2):
            loss, gradients = step(x)
            parts = [(layer.w * g["w"]).sum() for layer, g in zip(Two().layers, gradients["layers"], strict=True)]
            assert abs(loss.item() - sum(parts).item()) < 1e-4
            assert not mx.array_equal(gradients["layers"][0]["w"], gradients["layers"][1]["w"])
            losses.append(loss.item())
    assert losses[0] != losses[1]


# --- optimizers and schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adafactor", "muon", "lion"])
def test_every_optimizer_lowers_the_loss_at_the_learning_rate_asked_for(uncompiled, name):
    model, rows = Model(), examples(6)
    before = evaluate(model, rows).loss
    rate = {"sgd": 0.3, "lion": 3e-3}.get(name, 2e-2)
    kinds, _ = fit(model, build_optimizer(OptimizerConfig(optimizer=name, learning_rate=rate), 20), rows, iters=20)
    assert evaluate(model, rows).loss < before - 0.1
    assert kinds[TrainReport][-1].learning_rate == pytest.approx(rate)


def test_muon_gets_matrices_only():
    members = build_optimizer(OptimizerConfig(optimizer="muon", optimizer_config={"adamw": {"eps": "1e-6"}}), 9)
    flat = {"m": mx.ones(3), "a": mx.ones((3, 2)), "experts": mx.ones((2, 3, 2))}
    wrapped = MasterWeights(members)
    wrapped.init(flat)
    muon, adamw = wrapped.state["members"]
    assert "a" in muon and "m" in adamw and "experts" in adamw and "a" not in adamw
    assert members.optimizers[1].eps == 1e-6


def test_optimizer_arguments_are_read_and_checked():
    made = build_optimizer(
        OptimizerConfig(optimizer="adamw", optimizer_config={"adamw": {"eps": "1e-6", "betas": ["0.8", 0.9]}}), 9
    )
    assert made.eps == 1e-6 and made.betas == [0.8, 0.9] and made.bias_correction
    off = OptimizerConfig(optimizer_config={"adam": {"bias_correction": False}, "sgd": None})
    assert build_optimizer(off, 9).bias_correction is False
    wrong = {
        "adamw": {"esp": 1, "betas": 0.9, "bias_correction": "yes", "learning_rate": 1},
        "adam8bit": {},
        "muon": {"ns_steps": 2.5, "momentum": "much"},
    }
    with pytest.raises(ConfigError) as caught:
        build_optimizer(OptimizerConfig(optimizer_config=wrong), 9)
    for part in ("'esp'; it has betas, eps", "2 numbers", "true or false", "learning_rate instead", "'adam8bit'"):
        assert part in caught.value.message
    assert "ns_steps of muon must be a whole number" in caught.value.message and "'much'" in caught.value.message
    with pytest.raises(ConfigError, match="beta1"):
        build_optimizer(OptimizerConfig(optimizer_config={"adam": {"betas": [2, 0.9]}}), 9)
    relative = {"adafactor": {"relative_step": True}}
    with pytest.raises(ConfigError, match="its own learning rate"):
        build_optimizer(OptimizerConfig(optimizer="adafactor", optimizer_config=relative, warmup=3), 9)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "cosine_decay", "arguments": [1e-4, 20, 1e-6], "warmup": 5, "warmup_init": 1e-7},
        {"name": "cosine_decay", "arguments": [1e-4, 20]},
        {"name": "linear_schedule", "arguments": [1e-4, 1e-5, 10], "warmup": 3},
        {"name": "exponential_decay", "arguments": [1e-4, 0.9], "warmup": 1},
        {"name": "step_decay", "arguments": [1e-4, 0.5, 7]},
    ],
)
def test_mapping_means_what_it_means_in_mlx_lm(spec):
    from mlx_lm.tuner.utils import build_schedule as theirs

    ours, theirs = build_schedule(spec, 1.0, 999), theirs(spec)
    for step in range(30):
        at = mx.array(step, mx.uint64)
        assert ours(at).item() == theirs(at).item()


def test_named_schedules_fill_the_run():
    assert set(SHAPES) == set(SCHEDULES)
    ends = {"constant": 0.1, "linear_schedule": 0.0, "cosine_decay": 0.0, "exponential_decay": 1e-3, "step_decay": 1e-3}
    for name, end in ends.items():
        for warmup in (0, 4):
            at = build_schedule(name, 0.1, 30, warmup)
            if name == "constant" and not warmup:
                assert at == 0.1
                continue
            rates = [at(mx.array(step, mx.uint64)).item() for step in range(31)]
            last = rates[29] if name == "step_decay" else rates[30]  # step 29 is the last one taken
            assert max(rates) == pytest.approx(0.1) and last == pytest.approx(end, abs=1e-6)
            if warmup:
                assert rates[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert build_schedule({"name": "cosine_decay", "arguments": ["1e-4", "10"]}, 1, 1)(mx.array(0)).item() > 9e-5


@pytest.mark.parametrize(
    ("spec", "warmup", "message"),
    [
        ("cosine", 0, "one of constant, linear_schedule"),
        ({"name": "cosine_decay", "warm_up": 3}, 0, "unknown key 'warm_up'"),
        ({"name": "cosine_decay", "arguments": [1e-4]}, 0, r"\[init, decay_steps, end=0.0\]"),
        ({"name": "cosine_decay", "arguments": [1e-4, 1, 2, 3]}, 0, r"are \[init"),
        ({"name": "cosine_decay", "arguments": [1e-4, 2.5]}, 0, "whole number"),
        ({"name": "cosine_decay", "arguments": [1e-4, 0]}, 0, "greater than 0"),
        ({"name": "step_decay", "arguments": ["x", 0.1, 3]}, 0, "init of step_decay must be a number"),
        ({"name": "constant", "warmup": 3}, 2, "twice"),
        (7, 0, "not 7"),
    ],
)
def test_wrong_schedules_are_refused(spec, warmup, message):
    with pytest.raises(ConfigError, match=message):
        build_schedule(spec, 1e-4, 100, warmup)


def test_the_schedule_counts_optimizer_steps():
    rows = examples(9)
    made = build_optimizer(OptimizerConfig(learning_rate=1.0, lr_schedule="linear_schedule"), 4)
    kinds, _ = fit(Model(), made, rows, iters=8, grad_accumulation_steps=2, steps_per_report=2)
    assert [r.learning_rate for r in kinds[TrainReport]] == [1.0, 0.75, 0.5, 0.25]


def test_the_cache_is_emptied_where_asked(monkeypatch):
    emptied = []
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 1000)
    monkeypatch.setattr(mx, "clear_cache", lambda: emptied.append(1))
    for threshold, times in ((None, 0), (1000, 0), (999, 3)):
        emptied.clear()
        list(train(Model(), opt.SGD(0.1), examples(), config=config(iters=3, clear_cache_threshold=threshold)))
        assert len(emptied) == times
