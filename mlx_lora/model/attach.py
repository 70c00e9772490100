"""Adapters on a model: attach, extract, mount, unmount, disable_adapter.

Merging an adapter into the base's weights is in ``merge/fuse.py``, loading and saving models in ``loading.py``. Nothing
prints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapter import FINGERPRINT, SHARED, Adapter, explicit_config, in_modules_to_save, raise_faults, split_layer
from ..base import older_mlx_lm
from ..base.fingerprint import Fingerprint
from ..base.modules import (
    dims,
    frozen_parameters,
    is_quantized,
    kind,
    layer_paths,
    model_dtype,
    restore_frozen,
    unique,
)
from ..base.origin import base_of, checked
from ..base.vera import draw_projections, shared_dims
from ..config import UNSCALED, AdapterConfig, as_config
from ..errors import AdapterError
from ..fast import accelerate, undo
from ..fast.swap import is_traced_only
from ..formats import load_adapter
from ..formats.options import EMBEDDINGS
from ..init import Request, init_of, initial_pairs, set_initial_pair, with_ranks
from ..layers import AdapterLayer, TokenRows, check_rank, make_layers
from .compatibility import has_token_rows, incompatibilities, own_parameters, warn_of_another_base
from .full_parameters import modules_to_save, train_full_parameters, trained_biases, unfreeze_layers
from .state import (
    HEAD,
    Removed,
    State,
    bare_modules,
    named_modules,
    place,
    put_back,
    set_mode,
    set_state,
    split_head,
    split_of,
    state_of,
    take_off,
    tied_embedding,
)
from .targets import check_patterns, check_side, names_head, select, select_named

# Hints for token rows of a tied embedding whose head is trained separately: before training, and for trained adapters.
_TRAIN_ONE = "Leave out trainable_token_indices, or do not train the head or the embedding."
_BOTH_TRAINED = "Use this adapter in PEFT, and do not merge it there: PEFT's merge of such an adapter is wrong."


def attach(
    model: nn.Module,
    config: AdapterConfig | dict | None = None,
    batches: Iterable | None = None,
    reference: nn.Module | None = None,
) -> list[str]:
    """Freeze the base and add new, trainable adapters to the modules that ``config`` selects.

    The model computes the same as before until the adapters are trained (except with ``init`` "loftq"). Modules to
    save, biases and rows of embeddings that ``config`` names become trainable, too. With ``method="full"`` no layers
    are added: the parameters of the selected layers become trainable. ``unmount`` undoes all of this. Random numbers
    come from ``mx.random``: seed it for reproducible runs.

    Args:
        config: the settings, or a dict of them.
        batches: training data for ``init`` "eva" and "lora_ga": objects with ``tokens`` [B, T] and ``mask`` [B, T-1],
            such as ``mlx_lora.data.train_batches`` yields.
        reference: the model before quantization, for ``init`` "loftq".

    Returns: the adapted paths. Raises: AdapterError, ConfigError, DataError; the model is then unchanged.
    """
    older_mlx_lm.patch_mlx()
    checked(model)
    config = as_config(AdapterConfig, config, "config")
    config.check_used()
    if adapters_on(model) or state_of(model) is not None:
        raise AdapterError("the model has an adapter already", "Call unmount(model) or fuse(model) first.")
    state = State(config, frozen_parameters(model))
    with _replacing(model, state):
        if config.method == "full":
            return unfreeze_layers(model, config, state)
        return _attach_layers(model, config, state, batches, reference)


def _attach_layers(
    model: nn.Module, config: AdapterConfig, state: State, batches: Iterable | None, reference: nn.Module | None
) -> list[str]:
    if names_head(config):
        split_head(model)
    saved, tokens = modules_to_save(model, config), select_named(model, config.trainable_token_indices)
    chosen = select(model, config)
    _set_sides(model, state, {*chosen, *saved}, set(tokens), _TRAIN_ONE)
    asked, config, bare = config, state.config, bare_modules(model)
    both = [path for path in chosen if path in saved or path in tokens]
    if config.keys is None:
        chosen = {path: module for path, module in chosen.items() if path not in both}
    elif both:
        raise AdapterError(f"{', '.join(both)}: both adapted and trained in full", "Choose one of the two.")
    raise_faults(
        [
            f"{p}: is not an embedding or head, so it has no token rows"
            for p in tokens
            if not has_token_rows(p, bare[p])
        ],
        "Name an embedding in trainable_token_indices, such as embed_tokens.",
    )
    check_patterns(config, chosen)
    check_side(asked, [path for path in (*chosen, *saved, *tokens) if has_token_rows(path, bare[path])])
    ranks = {path: config.rank_of(path) for path in chosen}
    for path, module in chosen.items() if config.method not in UNSCALED else ():
        try:
            check_rank(module, ranks[path])
        except AdapterError as error:
            raise AdapterError(f"{path}: {error.message}", error.hint) from None
    trained_biases(bare, config, list(chosen))  # raises before the costly part
    init, pairs = init_of(config), initial_pairs(Request(model, config, chosen, ranks, batches, reference))
    if init.chooses_ranks:
        chosen = {path: module for path, module in chosen.items() if path in pairs}
        ranks = {path: len(a) for path, (a, _) in pairs.items()}
        config = state.config = with_ranks(config, ranks)
    if config.method == "vera" and chosen:
        state.projections = _projections(config, chosen)
    dtype = model_dtype(model)
    layers: dict[str, nn.Module] = make_layers(
        chosen, config, ranks, dtype, shared=state.projections, difference=init.subtracted
    )
    for path, (a, b) in pairs.items():
        set_initial_pair(layers[path], a, b)
    layers |= {path: TokenRows(bare[path], ids, dtype) for path, ids in tokens.items()}
    names = [(path, leaf) for path in saved for leaf in own_parameters(bare[path])]
    names += [(path, "bias") for path in trained_biases(bare, config, list(chosen)) if (path, "bias") not in names]
    _place(model, state, layers, names)
    return list(chosen)


def extract(model: nn.Module) -> Adapter:
    """Return the adapter on ``model`` as a value. Its arrays are shared with the model, not copied.

    If the model has no adapter but some trainable parameters, these are the adapter (method "full").
    Raises: AdapterError: the model has no adapter.
    """
    checked(model)
    layers, state = adapters_on(model), state_of(model)
    base = base_of(model)
    name = base.name if base else None
    if state is None and not layers:
        weights = dict(tree_flatten(model.trainable_parameters()))
        if not weights or len(weights) == len(tree_flatten(model.parameters())):
            raise AdapterError("the model has no adapter", "Add one with attach(model, config) or mount(...).")
        indices = [split_layer(path)[0] for path in weights]
        return Adapter(AdapterConfig(method="full", num_layers=_last_layers(model, indices)), weights, base=name)
    if state is None:  # layers that neither attach nor mount added
        first = next(iter(layers.values()))
        state = State(AdapterConfig(method=first.method, dropout=round(1 - first.dropout._p_1, 6)), [])
    weights, ranks, scales = {}, {}, {}
    for path, layer in layers.items():
        ranks[path], scales[path] = layer.rank, layer.scale
        weights.update({f"{path}.{leaf}": array for leaf, array in layer.adapter_weights().items()})
    tokens = {path: m for path, m in named_modules(model) if isinstance(m, TokenRows)}
    weights |= {f"{path}.trainable_tokens": module.trainable_tokens for path, module in tokens.items()}
    bare = bare_modules(model)
    weights |= {f"{path}.{leaf}": bare[path][leaf] for path, leaf in state.full_parameters}
    config = state.config
    if state.projections is not None and config.save_projection:
        weights |= dict(zip(SHARED, state.projections, strict=True))
    trained = [path for path, _ in state.full_parameters] if config.method == "full" else layers
    saved = {path for path, _ in state.full_parameters if in_modules_to_save(config, path)}
    plain = replace(
        config,
        num_layers=_last_layers(model, [split_layer(path)[0] for path in trained]),
        layers_to_transform=None,
        keys=None if layers else config.keys,
        modules_to_save=tuple(sorted(saved)) or None,
        trainable_token_indices={path: module.ids for path, module in tokens.items()},
    )
    metadata = {EMBEDDINGS: [path for path in layers if kind(bare[path]) == "embedding"]}
    metadata |= {FINGERPRINT: state.fingerprint.stored()} if state.fingerprint else {}
    return Adapter(explicit_config(plain, ranks, scales), weights, base=name, metadata=metadata)


def mount(model: nn.Module, adapter: Adapter | str | Path, *, difference: bool = False) -> None:
    """Put ``adapter`` on ``model``, replacing any present adapter. The base is frozen and otherwise unchanged.

    Warns if the adapter was trained on a base with other weights.

    Args:
        adapter: the adapter, or a path to read it from.
        difference: the adapter was extracted from a run with ``init`` "pissa", "olora" or "lora_ga". The second half of
            its rank is the subtracted initial pair, which stays frozen. Only needed to continue such a run.

    Raises: AdapterError: the adapter cannot be mounted on this model; the model is then unchanged.
    """
    base = base_of(model)
    if isinstance(adapter, (str, Path)):
        adapter = load_adapter(adapter, base=base.folder if base else None)
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"mount takes an Adapter or a path, not {type(adapter).__name__}", "Read one with load_adapter(path)."
        )
    adapter.check()
    state = State(adapter.config, frozen_parameters(model))
    with _replacing(model, state) as previous:
        if previous is not None:  # base layers keep their class and thus their dequantized weights
            state.frozen = previous.frozen
            state.accelerated = [module for module in previous.accelerated if kind(module)]
            undo([module for module in previous.accelerated if not kind(module)])
        layers = _layers_of(model, adapter, state, difference)
        values = {tuple(name.rpartition(".")[::2]): array for name, array in adapter.full_parameters.items()}
        _place(model, state, layers, list(values), values)
    warn_of_another_base(adapter, state.fingerprint, base)


def _layers_of(model: nn.Module, adapter: Adapter, state: State, difference: bool) -> dict[str, nn.Module]:
    """New layers for ``model``, which has no adapter, with the arrays of ``adapter``."""
    trained = {name.rpartition(".")[0] for name in adapter.full_parameters}
    if HEAD in (*adapter.modules, *trained, *adapter.tokens):
        split_head(model)
    _set_sides(model, state, {*adapter.modules, *trained}, set(adapter.tokens), _BOTH_TRAINED)
    config, bare, dtype = adapter.config, bare_modules(model), model_dtype(model)
    raise_faults(*incompatibilities(model, adapter))
    layers: dict[str, nn.Module] = {}
    if config.method != "full":
        bases = {path: bare[path] for path in adapter.modules}
        if config.method == "vera" and bases:
            stored = SHARED[0] in adapter.weights
            state.projections = (
                tuple(adapter.weights[name] for name in SHARED) if stored else _projections(config, bases)
            )
        ranks = {path: adapter.rank_of(path) // (2 if difference else 1) for path in bases}
        # A separate key, so that the initial values, which are replaced, do not advance mx.random's state.
        key = mx.random.key(0)
        layers = make_layers(bases, config, ranks, dtype, shared=state.projections, difference=difference, key=key)
        for path, layer in layers.items():
            if difference:
                layer.split(adapter.weights[f"{path}.lora_a"], adapter.weights[f"{path}.lora_b"])
                continue
            for leaf, initial in layer.adapter_weights().items():
                array = adapter.weights[f"{path}.{leaf}"]
                if array.shape != initial.shape:
                    message = f"{path}: {leaf} {list(array.shape)}, expected {list(initial.shape)}"
                    raise AdapterError(message, "Give the model that the adapter was trained on.")
                setattr(layer, leaf, array.astype(initial.dtype))
    for path, (ids, rows) in adapter.tokens.items():
        layers[path] = TokenRows(bare[path], ids, dtype)
        layers[path].trainable_tokens = rows.astype(layers[path].trainable_tokens.dtype)
    return layers


def unmount(model: nn.Module) -> None:
    """Undo ``attach`` or ``mount``: restore adapters, trained parameters, frozen parameters and classes.

    Does nothing on a model without an adapter.
    """
    checked(model)
    state = take_off(model).state
    if state is not None:
        undo(state.accelerated)
        restore_frozen(state.frozen)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """A context in which ``model`` computes as its base; afterwards the adapter is active again.

    Covers everything that ``attach`` and ``mount`` add: adapter layers, trained token rows, ``modules_to_save``, biases
    and full fine-tuning. Can be nested, and used in functions that ``mx.value_and_grad`` or ``mx.compile`` trace. An
    adapter that is mounted inside the context is unmounted at its end.

    Raises: AdapterError: the model has several adapters (MultiLoRA).
    """
    bare_modules(model)
    removed, dtype = take_off(model), model_dtype(model)
    accelerated = removed.state.accelerated if removed.state is not None else []
    outside = {id(inner) for wrapper in removed.modules.values() for inner in wrapper.modules()}
    # Remove the classes for modules with adapters (MLPs, attention); base layers keep theirs.
    classes = [(m, type(m)) for m in accelerated if not kind(m) and id(m) not in outside]
    undo([module for module, _ in classes])
    try:
        yield
    finally:
        unmount(model)
        if (now := model_dtype(model)) != dtype:  # model.set_dtype does not reach the removed arrays
            _cast(removed, now)
        put_back(model, removed)
        for module, changed in classes:
            module.__class__ = changed


def _cast(removed: Removed, dtype: mx.Dtype) -> None:
    """Cast the floats that ``take_off`` removed, as ``Module.set_dtype`` does."""
    for wrapper in removed.modules.values():
        wrapper.set_dtype(dtype)
    floats = mx.floating
    removed.arrays = [(m, n, a.astype(dtype) if mx.issubdtype(a.dtype, floats) else a) for m, n, a in removed.arrays]


def adapters_on(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers of ``model`` by path, in the model's order."""
    return {path: m for path, m in named_modules(model) if isinstance(m, AdapterLayer)}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. A quantized weight counts its values; a shared array counts once."""
    trainable = unique(array for _, array in tree_flatten(model.trainable_parameters()))
    packed, arrays = 0, []
    for module in unique(model.modules()):
        own = {n: a for n, a in module.items() if isinstance(a, mx.array) and not n.startswith("_")}
        if is_quantized(module):
            packed += math.prod(dims(module)) * (module.weight.shape[0] if module.weight.ndim == 3 else 1)
            own = {n: a for n, a in own.items() if n == "bias"}
        arrays += own.values()
    return sum(array.size for array in trainable), packed + sum(array.size for array in unique(arrays))


@contextmanager
def _replacing(model: nn.Module, state: State) -> Iterator[State | None]:
    """A context in which ``state`` replaces the current state, which it yields. An error restores the model."""
    bare_modules(model)  # raises for MultiLoRA
    frozen, classes = frozen_parameters(model), [(module, type(module)) for module in model.modules()]
    removed = take_off(model)
    known = removed.state.fingerprint if removed.state is not None else None
    state.fingerprint = known or (None if is_traced_only() else Fingerprint.of(bare_modules(model)))
    set_state(model, state)
    try:
        yield removed.state
    except BaseException:
        take_off(model)
        put_back(model, removed)
        for module, before in classes:
            if type(module) is not before:
                undo([module])
                module.__class__ = before
        restore_frozen(frozen)
        raise


def _place(
    model: nn.Module,
    state: State,
    layers: dict[str, nn.Module],
    names: list[tuple[str, str]],
    values: dict[tuple[str, str], mx.array] | None = None,
) -> None:
    """Freeze the model, add ``layers`` and make the full parameters ``names`` trainable."""
    model.freeze()
    for layer in layers.values():
        set_mode(layer, model.training)
    place(model, layers)
    train_full_parameters(model, state, names, values)
    state.accelerated += accelerate(model)


def _set_sides(model: nn.Module, state: State, trained: set[str], tokens: set[str], hint: str) -> None:
    """Split a tied embedding if head and embedding are trained differently; refuse contradicting settings.

    ``embedding_side`` of ``state`` becomes "input" if the head has its own adapter or weights.

    Args:
        trained: paths of the modules that are adapted or saved. tokens: paths of the embeddings with trained rows.
        hint: for the error if the head is trained and also has trained rows.
    """
    bare = bare_modules(model)
    if split_of(model) is None:
        one_sided = state.config.embedding_side == "input" and any(
            kind(bare.get(p, {})) == "embedding" for p in trained
        )
        if not one_sided or not (tied_embedding(model) in trained and split_head(model)):
            return
    path = split_of(model)[0]
    if path in tokens and HEAD not in tokens:
        message = f"{path}: trained token rows also act on the tied output head, which is trained separately here"
        raise AdapterError(message, hint)
    if HEAD in trained and path in trained and state.config.embedding_side == "both":
        message = f"{HEAD} and {path} are one matrix, and embedding_side both trains them together"
        raise AdapterError(message, f"Set embedding_side to input to train them separately, or leave {HEAD} out.")
    state.config = replace(state.config, embedding_side="input")


def _projections(config: AdapterConfig, bases: dict[str, nn.Module]) -> tuple[mx.array, mx.array]:
    """VeRA's shared pair for these modules, drawn from the config's seed."""
    return draw_projections(config.rank, *shared_dims(map(dims, bases.values())), config.projection_prng_key)


def _last_layers(model: nn.Module, indices: list[int | None]) -> int:
    """The smallest N such that the last N layers contain all of ``indices``; all layers if none is given."""
    known = [i for i in indices if i is not None]
    total = len(layer_paths(model))
    return total - min(known) if known else total
