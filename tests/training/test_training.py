"""Training: the losses, the step, optimizers and schedules, exact resume, memory limits, and failures."""

from __future__ import annotations

import math
import threading

import mlx_lora  # noqa: F401  isort: skip  (before MLX: it opens a real BLAS)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora import device
from mlx_lora.config import SCHEDULES, OptimizerConfig, TrainConfig
from mlx_lora.data import Dataset, Example, eval_batches, train_batches
from mlx_lora.errors import ConfigError, FormatError, TrainingError
from mlx_lora.training import (
    LOSSES,
    Checkpoint,
    Done,
    MasterWeights,
    NewBest,
    Progress,
    SkippedStep,
    TrainingState,
    TrainReport,
    ValReport,
    build_optimizer,
    evaluate,
    train,
)
from mlx_lora.training.losses import cross_entropy
from mlx_lora.training.recompute import recomputed_layers
from mlx_lora.training.schedules import SHAPES, build_schedule

VOCAB, DIM = 23, 8


@pytest.fixture
def uncompiled():
    """Without mx.compile: on the CPU it takes seconds a kernel, and not every test is about that."""
    mx.disable_compile()
    yield
    mx.enable_compile()


# --- small models and data -----------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Averages over the tokens so far, so that errors in padding or order show."""

    def __init__(self, dropout):
        super().__init__()
        self.mix, self.dropout = nn.Linear(DIM, DIM), nn.Dropout(dropout)

    def __call__(self, x):
        past = mx.cumsum(x, axis=1) / mx.arange(1, x.shape[1] + 1)[:, None].astype(x.dtype)
        return x + mx.tanh(self.mix(self.dropout(past)))


class Model(nn.Module):
    """A frozen embedding, two layers and a head. `traces` counts the runs of its Python code."""

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
    return Dataset(rows)


def row(*tokens, learned=True):
    """A row whose tokens are all learned, or none of them."""
    mask = np.full(len(tokens), learned)
    mask[0] = False
    return Example(np.array(tokens, np.int32), mask)


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
    loss = changes.pop("loss", "cross_entropy")
    made = TrainConfig(**{**settings, **changes})
    object.__setattr__(made, "loss", loss)
    return made


def fit(model, optimizer, rows, **changes):
    """Run to the end; returns the reports by kind, and the list of them."""
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
    total, tokens = cross_entropy.loss(model, *next(eval_batches(rows, len(rows))))
    assert tokens.item() == count
    assert abs(total.item() / count - mean) < 1e-5


def test_losses_of_half_precision_logits_are_computed_in_float32():
    logits = (mx.random.normal((2, 5, 300), key=mx.random.key(1)) * 4).astype(mx.bfloat16)
    targets = mx.arange(10).reshape(2, 5)
    losses = cross_entropy.token_losses(logits, targets)
    exact = np.array(logits.astype(mx.float32), np.float64)
    wanted = np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, np.array(targets)[..., None], -1)[..., 0]
    assert losses.dtype == mx.float32
    assert np.abs(np.array(losses) - wanted).max() < 1e-4


def test_an_uncounted_position_cannot_spoil_the_loss():
    logits = mx.zeros((1, 2, VOCAB)).at[0, 1, 0].add(mx.array(math.inf))
    total, tokens = cross_entropy.loss(lambda _: logits, mx.array([[1, 2, 3]]), mx.array([[True, False]]))
    assert tokens.item() == 1 and abs(total.item() - math.log(VOCAB)) < 1e-5


def test_evaluate_is_the_mean_over_tokens_and_changes_neither_modes_nor_random_state():
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
    first = next(eval_batches(rows, 2, limit=1))
    assert evaluate(model, rows, batch_size=2, limit=1).tokens == int(first.mask.sum())
    with pytest.raises(TrainingError, match="nothing to evaluate"):
        evaluate(model, Dataset([row(1, 2, learned=False)]))


def test_a_new_loss_is_a_row_of_the_table(monkeypatch, uncompiled):
    """Half the cross entropy: SGD takes half the step; evaluations and reports show half the loss."""

    def half(model, tokens, mask):
        total, count = cross_entropy.loss(model, tokens, mask)
        return total / 2, count

    monkeypatch.setitem(LOSSES, "half", half)
    rows, models = examples(3), [Model(), Model()]
    start, (mean, _, _) = weights(models[0]), reference_gradients(models[0], rows)
    found = [
        fit(m, opt.SGD(0.1), rows, iters=1, valid_set=rows, loss=name)[0]
        for m, name in zip(models, ("cross_entropy", "half"), strict=True)
    ]
    for kinds, factor in zip(found, (1, 0.5), strict=True):
        assert kinds[TrainReport][0].train_loss == pytest.approx(factor * mean, abs=1e-5)
        assert kinds[ValReport][0].val_loss == pytest.approx(factor * mean, abs=1e-5)
    whole, halved = ({path: w - start[path] for path, w in weights(m).items()} for m in models)
    close({path: w / 2 for path, w in whole.items()}, halved, 1e-6)
    assert evaluate(Model(), rows, loss="half").loss == pytest.approx(mean / 2, abs=1e-5)


def test_an_unknown_loss_is_refused_before_training():
    with pytest.raises(ConfigError, match="no loss 'mse'") as caught:
        train(Model(), opt.SGD(0.1), examples(3), config=config(loss="mse"))
    assert "cross_entropy" in caught.value.hint
    with pytest.raises(ConfigError, match="no loss 'mse'"):
        evaluate(Model(), examples(3), loss="mse")


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


def test_accumulation_is_one_big_batch():
    """An epoch as one batch or as three. The rows differ in length: a mean of means would be another number."""
    rows = Dataset([*examples(2, seed=1, least=3, most=4), *examples(4, seed=2, least=12, most=14)])
    big, small = Model(), Model()
    fit(big, opt.SGD(0.1), rows, iters=2, batch_size=6)
    kinds, _ = fit(small, opt.SGD(0.1), rows, iters=6, batch_size=2, grad_accumulation_steps=3)
    close(weights(big), weights(small), 1e-6)
    assert kinds[Done][0].trained_tokens == 2 * sum(int(r.mask.sum()) for r in rows)


def test_the_last_partial_window_is_applied():
    rows = examples(4)
    short, straight = Model(), Model()
    fit(straight, opt.SGD(0.1), rows, iters=1, batch_size=2)
    fit(short, opt.SGD(0.1), rows, iters=1, batch_size=2, grad_accumulation_steps=4)
    close(weights(straight), weights(short), 1e-6)


def test_reports_come_in_order_and_are_means_over_tokens():
    model, rows = Model(), examples(9)
    kinds, reports = fit(
        model, opt.SGD(0.0), rows, iters=7, steps_per_report=3, steps_per_eval=3, save_every=5, valid_set=rows,
        checkpoint=lambda state: f"at {state.iteration}",
    )  # fmt: skip
    mean, _, count = reference_gradients(model, rows)
    assert [r.iteration for r in kinds[Progress]] == [1, 2, 3, 4, 5, 6, 7]
    assert [r.iteration for r in kinds[TrainReport]] == [3, 6, 7]
    assert [r.iteration for r in kinds[ValReport]] == [0, 3, 6, 7]
    assert [(r.iteration, r.path) for r in kinds[Checkpoint]] == [(3, "at 3"), (5, "at 5"), (7, "at 7")]
    assert [r.iteration for r in kinds[NewBest]] == [3]
    assert type(reports[0]) is ValReport and type(reports[-1]) is Done
    assert kinds[TrainReport][0].train_loss == pytest.approx(mean, abs=1e-5)  # nine rows in three batches
    assert kinds[TrainReport][1].trained_tokens == 2 * count
    assert [r.val_loss for r in kinds[ValReport]] == pytest.approx([mean] * 4, abs=1e-5)
    assert kinds[Done][0].stopped is False and not model.training
    kinds, _ = fit(model, opt.SGD(0.0), rows, valid_set=rows, val_batches=0, steps_per_eval=200)
    assert ValReport not in kinds


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_step_is_traced_once_for_each_shape(accumulation):
    model, rows = Model(), examples(40)
    shapes = {batch.tokens.shape for batch, _ in zip(train_batches(rows, 3, seed=0), range(24), strict=False)}
    fit(model, opt.Adam(1e-3), rows, iters=24, grad_accumulation_steps=accumulation)
    assert len(shapes) > 1 and model.traces == len(shapes)


# --- seeds and resume ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_whatever_the_caller_draws():
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
    other.update(mx_noise(other))  # the weights of the new process must not matter
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


def test_resume_of_a_finished_run_applies_its_last_partial_window():
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
    with pytest.raises(TrainingError, match="but iters is"):
        train(Model(), opt.Adam(1e-2), rows, config=config(iters=1), resume=states[0])
    with pytest.raises(TrainingError, match="another optimizer's state"):
        list(train(Model(), opt.Adam(1e-2), rows, config=config(), resume=stateless(states[0])))


def stateless(state):
    return TrainingState(state.parameters, {}, {}, state.tally, state.fingerprint)


@pytest.mark.parametrize("change", ["a token", "a mask", "the order"])
def test_resume_is_refused_with_other_data_of_the_same_shape(change):
    rows, states = examples(6, least=5, most=6), []
    fit(Model(), opt.Adam(1e-2), rows, iters=2, checkpoint=states.append)
    same_rows = Dataset([Example(r.tokens.copy(), r.mask.copy()) for r in rows])
    fit(Model(), opt.Adam(1e-2), same_rows, iters=3, resume=states[0])
    first = Example(rows[0].tokens.copy(), rows[0].mask.copy())
    if change == "a token":
        first.tokens[1] = (first.tokens[1] + 1) % VOCAB
    elif change == "a mask":
        first.mask[-1] = not first.mask[-1]
    other = [first, *rows[1:]] if change != "the order" else rows[::-1]
    with pytest.raises(TrainingError, match="training data: other rows"):
        train(Model(), opt.Adam(1e-2), Dataset(other), config=config(), resume=states[0])


def test_a_file_that_is_not_a_training_state_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FormatError, match="cannot be read"):
        TrainingState.load(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(FormatError, match="cannot be read"):
        TrainingState.load(path)
    mx.save_safetensors(str(path), {"a": mx.ones(2)})
    with pytest.raises(FormatError, match="is not a training state"):
        TrainingState.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    rows, states, path = examples(6), [], tmp_path / "x.safetensors"
    fit(Model(), opt.Adam(1e-2), rows, iters=1, checkpoint=states.append)
    states[0].save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(FormatError, match="disk full"):
        states[0].save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- things that go wrong ------------------------------------------------------------------------------------------


class Fragile(Model):
    """A token of the last id makes everything infinite."""

    def __call__(self, tokens):
        bad = (tokens == VOCAB - 1).any()
        return super().__call__(tokens) * mx.where(bad, mx.array(math.inf), mx.array(1.0))


GOOD, BAD = row(1, 2, 3), row(1, VOCAB - 1, 2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_non_finite_step_changes_nothing(accumulation):
    """One bad row among equal good ones, a row a batch: the run is that of the good rows with one step less."""
    rows = Dataset([*[GOOD] * 5, BAD])
    bad = next(i for i, b in enumerate(train_batches(rows, 1, seed=0), 1) if (b.tokens == VOCAB - 1).any())
    model, clean = Fragile(), Fragile()
    settings = {"batch_size": 1, "grad_accumulation_steps": accumulation}
    kinds, _ = fit(model, opt.Adam(1e-2), rows, iters=6, **settings)
    fit(clean, opt.Adam(1e-2), Dataset([GOOD] * 6), iters=6 - accumulation, **settings)
    same(weights(model), weights(clean))  # Adam's step counter and moments did not move either
    assert kinds[SkippedStep] == [SkippedStep(iteration=math.ceil(bad / accumulation) * accumulation, in_a_row=1)]
    assert kinds[Done][0].skipped_steps == 1
    assert all(math.isfinite(r.train_loss) for r in kinds[TrainReport])
    assert [r.loss for r in kinds[Progress]].count(None) == 1


def test_too_many_skipped_steps_save_and_fail():
    rows, states, model = Dataset([BAD] * 3), [], Fragile()
    before, seen = weights(model), []
    with pytest.raises(TrainingError, match="3 steps in a row") as caught:
        for report in train(model, opt.Adam(1e-2), rows, None, config(max_skipped_steps=3), checkpoint=states.append):
            seen.append(report)
    assert caught.value.hint and type(seen[-1]) is Checkpoint and len(states) == 1
    same({p: np.array(a) for p, a in states[0].parameters.items()}, before)
    same(weights(model), before)


def test_a_batch_without_learned_tokens_is_no_step():
    """One row to learn among rows without learned tokens: an epoch is one step, wherever that row comes."""
    model, once = Model(), Model()
    empty = row(1, 2, 3, learned=False)
    fit(once, opt.Adam(1e-2), Dataset([GOOD]), iters=1, batch_size=1)
    kinds, _ = fit(model, opt.Adam(1e-2), Dataset([GOOD, empty, empty]), iters=3, batch_size=1)
    assert SkippedStep not in kinds
    same(weights(model), weights(once))


def test_nothing_to_train_or_learn_from():
    model = Model()
    with pytest.raises(TrainingError, match="set is empty"):
        train(model, opt.Adam(1e-2), Dataset([]))
    model.freeze()
    with pytest.raises(TrainingError, match="no trainable parameters") as caught:
        train(model, opt.Adam(1e-2), examples(3))
    assert "attach" in caught.value.hint
    model.count = mx.array([1, 2])
    with pytest.raises(TrainingError, match="count"):
        train(model, opt.Adam(1e-2), examples(3))


@pytest.mark.parametrize("end", ["close", "data fails", "model fails"])
def test_the_model_is_usable_however_a_run_ends(end):
    class Failing(Dataset):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index if self.reads < 7 or end != "data fails" else 1 // 0)

    model = Model(dropout=0.2)
    run = train(model, opt.Adam(1e-2), Failing(examples(9)), None, config(grad_checkpoint=True))
    if end == "close":
        next(run)
        assert type(model.layers[0]) is not Layer and model.training
        run.close()
    elif end == "data fails":
        with pytest.raises(ZeroDivisionError):
            list(run)
    else:
        model.layers[1].dropout = lambda x: x @ mx.ones((3, 3))
        with pytest.raises(ValueError, match="matmul"):
            list(run)
        model.layers[1].dropout = nn.Identity()
    assert all(type(layer) is Layer for layer in model.layers) and not model.training
    assert all(type(layer.dropout) in (nn.Dropout, nn.Identity) for layer in model.layers)
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()
    assert np.isfinite(np.array(mx.random.uniform(shape=(2,)))).all()
    assert all(np.isfinite(w).all() for w in weights(model).values())


# --- half precision ------------------------------------------------------------------------------------------------


def test_master_weights_learn_where_bfloat16_rounds_updates_away():
    rows, rate = examples(6), 1e-5
    exact, half, plain = Model(), Model(dtype=mx.bfloat16), Model(dtype=mx.bfloat16)
    exact.update({"embed": half.embed.parameters()})
    exact.update(mlx_tree(weights(half)))  # the same initial weights
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

    plain_adam, grads = (
        opt.Adam(rate, bias_correction=True),
        nn.value_and_grad(plain, lambda b: cross_entropy.loss(plain, *b)[0]),
    )
    for batch, _ in zip(train_batches(rows, 3, seed=0), range(30), strict=False):
        plain_adam.update(plain, grads(batch)[1])
    large = {p: np.abs(w) > 0.1 for p, w in start.items()}
    stuck = [np.abs(weights(plain)[p] - w)[large[p]].sum() for p, w in start.items()]
    shifted = [np.abs(np.array(masters[p]) - w)[large[p]].sum() for p, w in start.items()]
    assert sum(stuck) == 0 and sum(shifted) > 0


def test_master_weights_work_with_a_multi_optimizer():
    """Parameter groups that end in different layers: MultiOptimizer's own merging fails on them."""
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


def test_recomputed_dropout_draws_the_same_mask():
    """loss = sum of dropout(w), so that with one mask w . gradient = loss."""
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


def test_recomputing_changes_no_draw_of_others():
    """Inside a checkpointed layer, the caller's functions, another thread and another model draw as they always do."""
    mx.random.seed(7)
    wanted, other, found = mx.random.uniform(shape=(4,)), nn.Dropout(0.5), {}
    mx.random.seed(8)
    wanted_mask = other(mx.ones(64))
    draws = {name: getattr(mx.random, name) for name in ("bernoulli", "normal", "uniform")}

    def in_a_thread():
        mx.random.seed(7)
        found["thread"] = mx.random.uniform(shape=(4,))
        mx.random.seed(8)
        found["model"] = other(mx.ones(64))
        mx.eval(found["thread"], found["model"])

    class Asks(Drops):
        def __call__(self, x):
            thread = threading.Thread(target=in_a_thread)
            thread.start()
            thread.join()
            found["unchanged"] = all(getattr(mx.random, name) is draw for name, draw in draws.items())
            return super().__call__(x)

    model = Two()
    model.layers = [Asks()]
    with recomputed_layers(model):
        mx.eval(nn.value_and_grad(model, lambda x: model(x).sum())(mx.ones(64)))
    assert found["unchanged"]
    assert mx.array_equal(found["thread"], wanted) and mx.array_equal(found["model"], wanted_mask)
    assert type(model.layers[0].dropout) is nn.Dropout and not hasattr(model.layers[0].dropout, "mask_keys")


# --- memory limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["end", "close", "error"])
@pytest.mark.parametrize("metal", [True, False])
def test_a_run_puts_the_memory_limits_back(monkeypatch, end, metal):
    """MLX's functions return the limit that they replace; here they are stand-ins on a machine with a GPU."""
    limits = {"wired": 1, "cache": 2}

    def setter(name):
        def set_limit(value):
            old, limits[name] = limits[name], value
            return old

        return set_limit

    monkeypatch.setattr(device, "is_cpu", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 400})
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(mx, "set_wired_limit", setter("wired"))
    monkeypatch.setattr(mx, "set_cache_limit", setter("cache"))
    run = train(Model(), opt.SGD(0.1), examples(6), None, config(iters=3))
    assert limits == {"wired": 1, "cache": 2}
    next(run)
    assert limits == {"wired": 400 if metal else 1, "cache": 100}
    if end == "error":
        with pytest.raises(RuntimeError, match="mine"):
            run.throw(RuntimeError("mine"))
    elif end == "close":
        run.close()
    else:
        list(run)
    assert limits == {"wired": 1, "cache": 2}


# --- optimizers and schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adafactor", "muon", "lion"])
def test_every_optimizer_lowers_the_loss_at_the_learning_rate_asked_for(uncompiled, name):
    model, rows = Model(), examples(6)
    before = evaluate(model, rows).loss
    rate = {"sgd": 0.3, "lion": 3e-3}.get(name, 2e-2)
    kinds, _ = fit(model, build_optimizer(OptimizerConfig(optimizer=name, learning_rate=rate), 20), rows, iters=20)
    assert evaluate(model, rows).loss < before - 0.1
    assert kinds[TrainReport][-1].learning_rate == pytest.approx(rate)


def test_muon_trains_matrices_only():
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
        build_optimizer(OptimizerConfig(optimizer="muon", optimizer_config=wrong), 9)
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
def test_a_schedule_mapping_means_the_same_as_in_mlx_lm(spec):
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


def test_the_cache_is_cleared_above_the_threshold(monkeypatch):
    emptied = []
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 1000)
    monkeypatch.setattr(mx, "clear_cache", lambda: emptied.append(1))
    for threshold, times in ((None, 0), (1000, 0), (999, 3)):
        emptied.clear()
        list(train(Model(), opt.SGD(0.1), examples(), config=config(iters=3, clear_cache_threshold=threshold)))
        assert len(emptied) == times
