"""Adapters on a model: attach, extract, mount, unmount.

An adapter never touches a base weight here; merging it into the weights is ``fusing.py``, models come and go in
``loading.py`` and ``saving.py``. Nothing prints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..adapter import SHARED, Adapter, explicit_config, raise_faults, saved_whole, split_layer
from ..base.modules import dims, is_quantized, layer_paths, model_dtype
from ..base.origin import base_of
from ..base.vera import draw_projections, shared_dims
from ..config import AdapterConfig
from ..errors import AdapterError
from ..fast import accelerate
from ..init import SUBTRACTED
from ..init.start import start_layer, starts_of, with_ranks
from ..layers import AdapterLayer, TokenRows, check_rank, make_layers
from .compatibility import misfits, own_arrays, token_misfits, whole_misfits
from .full_parameters import biased, make_whole, unfreeze_layers, whole_modules
from .state import State, bare_modules, forget, state_of, wrappers
from .targets import select, select_named


def attach(
    model: nn.Module, config: AdapterConfig, batches: Iterable | None = None, reference: nn.Module | None = None
) -> list[str]:
    """Freeze the base and put fresh, trainable adapters on the modules that ``config`` chooses. The identity at first.

    Whole modules, biases and rows of embeddings that ``config`` names become trainable too; ``unmount`` puts back what
    they were. Draws from ``mx.random``: seed it for a run that can be repeated. Under ``method="full"`` nothing is
    attached: the chosen layers' own parameters become trainable.

    Args:
        batches: what ``init`` "eva" and "lora_ga" look at: with ``tokens`` [B, T] and ``mask`` [B, T-1], as
            ``mlx_lora.data.train_batches`` yields them.
        reference: the model before it was quantized, for ``init`` "loftq". (That start is not the identity: it makes
            up for what quantizing lost.)

    Returns: the adapted paths. Raises: AdapterError, ConfigError.
    """
    if adapters_on(model) or state_of(model) is not None:
        raise AdapterError("the model has adapters already", "Take them off with unmount(model), or fuse them.")
    bare = bare_modules(model)
    if config.method == "full":
        return unfreeze_layers(model, config)
    whole, tokens = whole_modules(model, config), select_named(model, config.trainable_token_indices)
    chosen = select(model, config)
    both = [path for path in chosen if path in whole or path in tokens]
    if config.keys is None:
        chosen = {path: module for path, module in chosen.items() if path not in both}
    elif both:
        raise AdapterError(f"{', '.join(both)}: adapted and trained whole at once", "Leave one of the two out.")
    ranks = {path: config.rank_of(path) for path in chosen}
    if config.method != "vera":
        for path, module in chosen.items():
            try:
                check_rank(module, ranks[path])
            except AdapterError as error:
                raise AdapterError(f"{path}: {error.message}", error.hint) from None
    starts = starts_of(model, config, chosen, ranks, batches, reference)
    if config.init == "eva":  # layers whose inputs tell least are left out, others got their ranks
        chosen = {path: module for path, module in chosen.items() if path in starts}
        config = with_ranks(config, ranks, {path: len(pair[0]) for path, pair in starts.items()})
        ranks = {path: config.rank_of(path) for path in chosen}
    state = State(config)
    if config.method == "vera" and chosen:
        state.shared = _projections(config, chosen)
    difference = config.init.startswith(SUBTRACTED)
    layers: dict[str, nn.Module] = make_layers(
        chosen, config, ranks, model_dtype(model), shared=state.shared, difference=difference
    )
    for path, (a, b) in starts.items():
        start_layer(layers[path], a, b)
    layers |= {path: TokenRows(bare[path], ids, model_dtype(model)) for path, ids in tokens.items()}
    model.freeze()
    _place(model, layers)
    names = [(path, leaf) for path in whole for leaf in own_arrays(bare[path])]
    names += [(path, "bias") for path in biased(bare, config, list(chosen)) if (path, "bias") not in names]
    make_whole(model, state, names)
    return list(chosen)


def extract(model: nn.Module) -> Adapter:
    """The adapter on ``model`` as a value; the arrays are shared, not copied.

    After ``attach(model, AdapterConfig(method="full"))`` these are the trainable parameters themselves.
    """
    layers, state = adapters_on(model), state_of(model)
    base = base_of(model)
    name = base.name if base else None
    if state is None and not layers:
        weights = dict(tree_flatten(model.trainable_parameters()))
        if not weights or len(weights) == len(tree_flatten(model.parameters())):
            raise AdapterError("the model has no adapter", "Put one on with attach(model, config) or mount(...).")
        indices = [split_layer(path)[0] for path in weights]
        return Adapter(AdapterConfig(method="full", num_layers=_count(model, indices)), weights, base=name)
    if state is None:  # layers that were not put there by attach or mount
        first = next(iter(layers.values()))
        state = State(AdapterConfig(method=first.method, dropout=round(1 - first.dropout._p_1, 6)))
    weights, ranks, scales = {}, {}, {}
    for path, layer in layers.items():
        ranks[path], scales[path] = layer.rank, layer.scale
        weights.update({f"{path}.{leaf}": array for leaf, array in layer.adapter_weights().items()})
    tokens = {path: m for path, m in model.named_modules() if isinstance(m, TokenRows)}
    weights |= {f"{path}.trainable_tokens": module.trainable_tokens for path, module in tokens.items()}
    bare = bare_modules(model)
    weights |= {f"{path}.{leaf}": bare[path][leaf] for path, leaf in state.whole}
    config = state.config
    if config.method == "vera" and config.save_projection:
        weights |= dict(zip(SHARED, state.shared, strict=True))
    plain = replace(
        config,
        num_layers=_count(model, [split_layer(path)[0] for path in layers]),
        keys=None if layers else config.keys,
        modules_to_save=tuple(sorted({path for path, leaf in state.whole if saved_whole(config, path)})) or None,
        trainable_token_indices={path: module.ids for path, module in tokens.items()},
    )
    return Adapter(explicit_config(plain, ranks, scales), weights, base=name)


def mount(model: nn.Module, adapter: Adapter, *, difference: bool = False) -> None:
    """Put ``adapter`` on ``model``, in place of whichever is there. The base is untouched, and frozen.

    Args:
        difference: the adapter came from a start such as PiSSA's: its second half is the frozen pair that the base
            gives up, and stays frozen. Only a training run that goes on needs this.

    Raises:
        AdapterError: the adapter does not fit; the model is then as it was.
    """
    adapter.check()
    config, bare = adapter.config, bare_modules(model)
    faults = [] if config.method == "full" else misfits(bare, adapter)
    faults += token_misfits(bare, adapter) + whole_misfits(bare, adapter)
    if faults:
        raise_faults(faults, f"This adapter was made for {adapter.base or 'another model'}: put it on that one.")
    state, layers, dtype = State(config), {}, model_dtype(model)
    if config.method != "full":
        bases = {path: bare[path] for path in adapter.modules}
        if config.method == "vera" and bases:
            own = SHARED[0] in adapter.weights
            state.shared = tuple(adapter.weights[n] for n in SHARED) if own else _projections(config, bases)
        ranks = {path: adapter.rank_of(path) for path in bases}
        if difference:
            ranks = {path: rank // 2 for path, rank in ranks.items()}
        layers = make_layers(
            bases, config, ranks, dtype, shared=state.shared, difference=difference, key=mx.random.key(0)
        )
        for path, layer in layers.items():
            if difference:
                layer.split(adapter.weights[f"{path}.lora_a"], adapter.weights[f"{path}.lora_b"])
                continue
            for leaf, initial in layer.adapter_weights().items():
                setattr(layer, leaf, adapter.weights[f"{path}.{leaf}"].astype(initial.dtype))
    for path, (ids, rows) in adapter.tokens.items():
        layers[path] = TokenRows(bare[path], ids, dtype)
        layers[path].trainable_tokens = rows.astype(layers[path].trainable_tokens.dtype)
    unmount(model)
    model.freeze()
    _place(model, layers)
    whole = {tuple(name.rpartition(".")[::2]): array for name, array in adapter.whole.items()}
    make_whole(model, state, list(whole), whole)


def unmount(model: nn.Module) -> None:
    """Take every adapter off ``model``; it computes as it was loaded. Does nothing where there is none."""
    layers, state = wrappers(model), forget(model)
    if layers:
        model.update_modules(tree_unflatten([(path, layer.base) for path, layer in layers.items()]))
    if state is not None:
        if state.modules:
            model.update_modules(tree_unflatten(list(state.modules.items())))
        modules = dict(model.named_modules())
        for (path, leaf), array in state.arrays.items():
            modules[path][leaf] = array


def adapters_on(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers of ``model`` by path, in the model's order."""
    return {path: m for path, m in reversed(model.named_modules()) if isinstance(m, AdapterLayer)}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a quantized weight counts as the numbers it stands for."""
    trainable = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    total = 0
    for module in model.modules():
        own = {n: a for n, a in module.items() if isinstance(a, mx.array) and not n.startswith("_")}
        if is_quantized(module):
            total += math.prod(dims(module)) * (module.weight.shape[0] if module.weight.ndim == 3 else 1)
            own = {n: a for n, a in own.items() if n == "bias"}
        total += sum(array.size for array in own.values())
    return trainable, total


def _place(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for layer in layers.values():
        layer.train(model.training)
    model.update_modules(tree_unflatten(list(layers.items())))
    accelerate(model)


def _projections(config: AdapterConfig, bases: dict[str, nn.Module]) -> tuple[mx.array, mx.array]:
    """VeRA's shared pair, drawn for the modules it adapts."""
    return draw_projections(config.rank, *shared_dims(map(dims, bases.values())), config.projection_prng_key)


def _count(model: nn.Module, indices: list[int | None]) -> int:
    """The last how many layers hold all of ``indices``; all where some lie outside the layers alone."""
    known = [i for i in indices if i is not None]
    total = len(layer_paths(model))
    return total - min(known) if known else total
