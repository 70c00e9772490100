"""Checkpoints whose weights have other names or shapes than mlx-lm's ``sanitize`` expects.

mlx-lm reads the names that a model's authors published. transformers 5 saves some architectures under other names,
with a layer's experts in one tensor, or without the prefix of a text model inside a vision-language model. Each
possible layout is tried in turn; the first layout that gives exactly the model's names and shapes is used. Arrays are
lazy, so this reads no weights. A quantized checkpoint matches no layout and is passed to mlx-lm unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import ModelError

Weights = dict[str, mx.array]
Renames = tuple[tuple[str, str], ...]

# Pairs of a pattern and its replacement, all applied to each name; each tuple is one layout. The empty one comes first.
_RENAMES: tuple[Renames, ...] = (
    (),
    ((r"^transformer\.", ""),),  # GPT-2
    ((r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head.")),
    ((r"^model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head.")),
    ((r"^model\.", "model.language_model."),),  # the text part of Gemma 3n
    (
        (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
    ),  # Kimi K2.5, as transformers 5.24 saves it
    ((r"\.attention_layer_norm\.", ".input_layernorm."), (r"\.feedforward_layer_norm\.", ".post_attention_layernorm.")),
    ((r"\.attention\.dense\.", ".attention.o_proj."),),  # Bailing's hybrid models
    ((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),),  # dense layers of Kimi Linear
    (  # nanochat
        (r"^model\.embed_tokens\.", "transformer.wte."),
        (r"^model\.layers\.", "transformer.h."),
        (r"\.self_attn\.(q|k|v)_proj\.", r".attn.c_\1."),
        (r"\.self_attn\.o_proj\.", ".attn.c_proj."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    ),
)
_FUSED = re.compile(r"^(?P<block>.+)\.experts\.(?P<name>gate_up_proj|gate_proj|up_proj|down_proj)$")
_VISION = re.compile(r"(^|[._])(vision|visual|audio|image|mm_projector|multi_modal_projector)")
# Saved by transformers, unused by mlx-lm's models: constants of the rotary embedding and of the causal mask.
_CONSTANTS = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_EMBEDDINGS = ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight")


def fit(model: nn.Module, weights: Weights) -> Weights:
    """Rename ``weights`` to ``model``'s names with mlx-lm's ``sanitize`` and, if that is not enough, a layout."""
    sanitize = getattr(model, "sanitize", lambda found: found)
    try:
        plain = sanitize(dict(weights))
    except (KeyError, IndexError, ValueError, AttributeError):  # sanitize expects another layout
        plain = dict(weights)
    if _fits(model, plain) or any(_is_packed(name, array) for name, array in weights.items()):
        return plain
    for layout in _layouts(weights):
        try:
            found = complete(model, sanitize(layout))
        except (KeyError, IndexError, ValueError, AttributeError):  # not this layout
            continue
        if _fits(model, found) or _resize_mlps(model, found):
            return found
    return plain


def _is_packed(name: str, array: mx.array) -> bool:
    """Whether this is a quantized weight."""
    return not mx.issubdtype(array.dtype, mx.floating) and name.endswith(("weight", "_blocks"))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tree_flatten(model.parameters())}


def _fits(model: nn.Module, weights: Weights) -> bool:
    return {name: array.shape for name, array in weights.items()} == _shapes(model)


def _layouts(weights: Weights) -> Iterator[Weights]:
    """``weights`` in every layout that changes something."""
    seen = set()
    for renames in _RENAMES:
        renamed = rename(weights, renames)
        for experts in _EXPERTS:
            layout = experts(renamed)
            key = (experts if layout is not renamed else None, *sorted(layout))
            if key not in seen:
                seen.add(key)
                yield dict(layout)


def rename(weights: Weights, renames: Renames) -> Weights:
    """``weights`` under the names that ``renames`` gives them."""
    found = {}
    for name, array in weights.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        found[name] = array
    return found


def _new_names(name: str) -> Iterator[str]:
    """``name`` as each layout renames it."""
    return (new for renames in _RENAMES for new in rename({name: None}, renames))


# -- experts ---------------------------------------------------------------------------------------------------------


def _split_experts(weights: Weights) -> Weights:
    """Experts stacked in one tensor, [experts, out, in], as tensors for each expert."""
    return _each_fused(
        weights,
        lambda block, name, stacked: {
            f"{block}.experts.{i}.{part}.weight": half
            for i, expert in enumerate(stacked)
            for part, half in _halves(name, expert)
        },
    )


def _transpose_experts(weights: Weights) -> Weights:
    """Transpose experts from [experts, out, in] to [experts, in, out], the order of published checkpoints."""
    return _each_fused(weights, lambda block, name, stacked: {f"{block}.experts.{name}": stacked.swapaxes(-1, -2)})


def _halves(name: str, weight: mx.array) -> list[tuple[str, mx.array]]:
    if name != "gate_up_proj":
        return [(name, weight)]
    return list(zip(("gate_proj", "up_proj"), mx.split(weight, 2, axis=0), strict=True))


def _each_fused(weights: Weights, change: Callable[[str, str, mx.array], Weights]) -> Weights:
    """Change the tensors of fused experts. ``weights`` itself if it has none."""
    found: Weights = {}
    changed = False
    for name, array in weights.items():
        fused = _FUSED.match(name)
        if fused and array.ndim == 3:
            found |= change(fused["block"], fused["name"], array)
            changed = True
        else:
            found[name] = array
    return found if changed else weights


_EXPERTS: tuple[Callable[[Weights], Weights], ...] = (lambda weights: weights, _split_experts, _transpose_experts)


# -- after sanitize --------------------------------------------------------------------------------------------------


def complete(model: nn.Module, weights: Weights) -> Weights:
    """Drop or add ``weights`` after ``sanitize`` where this cannot change the model.

    Dropped: weights of the parts that read images and sounds, constants, and surplus experts (those that return their
    input). A missing output head is the embedding. A missing bias becomes zeros if no such module in the checkpoint has
    a bias. Experts get mlx-lm's name ``.weight`` and orientation.
    """
    shapes, found = _shapes(model), dict(weights)
    for name in [name for name in found if name not in shapes]:
        array = found.pop(name)
        wanted = shapes.get(f"{name}.weight")
        if wanted is not None and array.ndim == 3:
            array = array if array.shape == wanted else array.swapaxes(-1, -2)
            found[f"{name}.weight"] = array
        elif new := next((n for n in _new_names(name) if n not in found and n in shapes), None):
            found[new] = array
        elif not (_VISION.search(name) or _CONSTANTS.search(name) or _is_beyond(name, shapes)):
            found[name] = array
    for name, array in found.items():  # PyTorch's convolutions are [out, in, width], MLX's [out, width, in]
        if "conv" in name and array.ndim == 3 and shapes.get(name) == array.swapaxes(1, 2).shape:
            found[name] = array.swapaxes(1, 2)
    for name in [name for name in shapes if name not in found]:
        if name in _HEADS:
            embedding = next((e for e in _EMBEDDINGS if e in found), None)
            if embedding is not None:
                found[name] = found[embedding]
        elif name.endswith(".bias") and not _has_leaf(weights, name) and f"{name[:-5]}.weight" in found:
            found[name] = mx.zeros(shapes[name], found[f"{name[:-5]}.weight"].dtype)
    _stack_experts(found, shapes)
    _divide_again(found, shapes)
    return found


def _is_beyond(name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether ``name`` is a weight of an expert that the model does not have."""
    one = re.match(r"(.+)\.experts\.(\d+)\.(\w+\.weight)$", name)
    stacked = shapes.get(f"{one[1]}.switch_mlp.{one[3]}") if one else None
    return stacked is not None and int(one[2]) >= stacked[0]


def _stack_experts(weights: Weights, shapes: dict[str, tuple[int, ...]]) -> None:
    """Stack the weights of single experts into the model's one weight [experts, out, in]."""
    for name in [name for name in shapes if name not in weights and ".switch_mlp." in name]:
        block, _, leaf = name.partition(".switch_mlp.")
        names = [f"{block}.experts.{i}.{leaf}" for i in range(shapes[name][0])]
        if all(n in weights for n in names):
            weights[name] = mx.stack([weights.pop(n) for n in names])


def _divide_again(weights: Weights, shapes: dict[str, tuple[int, ...]]) -> None:
    """Split a convolution's q, k and v as the model does: transformers 5.24 saves them in three equal parts."""
    for name in [name for name in weights if name.endswith(".q_conv1d.weight")]:
        names = [name.replace(".q_conv1d.", f".{part}_conv1d.") for part in "qkv"]
        if all(n in weights and n in shapes for n in names) and weights[name].shape != shapes[name]:
            joined = mx.concatenate([weights[n] for n in names])
            ends = [shapes[names[0]][0], shapes[names[0]][0] + shapes[names[1]][0]]
            weights |= dict(zip(names, mx.split(joined, ends), strict=True))


def _has_leaf(weights: Weights, name: str) -> bool:
    """Whether a module of this name in any layer has this parameter."""
    leaf = re.sub(r"\.\d+\.", ".*.", name)
    return any(re.sub(r"\.\d+\.", ".*.", other) == leaf for other in weights)


def _resize_mlps(model: nn.Module, weights: Weights) -> bool:
    """Give MLP layers the checkpoint's width if mlx-lm's class supports only one width (GPT-NeoX, GPT-2, GPT-J).

    Returns whether the weights then fit the model; if not, the model is unchanged.
    """
    shapes, modules, new = _shapes(model), dict(model.named_modules()), {}
    if weights.keys() != shapes.keys():
        return False
    for name, array in weights.items():
        path = name.rpartition(".")[0]
        if array.shape != shapes[name]:
            if ".mlp." not in name or type(modules[path]) is not nn.Linear:
                return False
            rows, columns = weights[f"{path}.weight"].shape
            new[path] = nn.Linear(columns, rows, bias="bias" in modules[path])
    model.update_modules(tree_unflatten(list(new.items())))
    return True


# -- errors ----------------------------------------------------------------------------------------------------------


def check_names(model: nn.Module, weights: Weights, model_type: str) -> None:
    """Refuse weights whose names or shapes differ from the model's, and list them. Raises: ModelError."""
    shapes = _shapes(model)
    left = [name for name in weights if name not in shapes]
    missing = [name for name in shapes if name not in weights]
    wrong = [
        f"{name} (is {list(array.shape)}, must be {list(shapes[name])})"
        for name, array in weights.items()
        if name in shapes and array.shape != shapes[name]
    ]
    parts = [(left, "left over"), (missing, "missing"), (wrong, "of another shape")]
    faults = [f"{len(names)} {kind}: {_shortened(names)}" for names, kind in parts if names]
    if faults:
        lines = "\n".join(faults)
        raise ModelError(
            f"the weights do not match mlx-lm's model for {model_type}\n{lines}",
            "mlx-lm does not read this layout: use a newer mlx-lm, or a converted copy, such as one from "
            "mlx-community.",
        )


def _shortened(names: list[str], most: int = 4) -> str:
    """Names with the numbers of layers as ``*``, each once; the first few."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in sorted(names)))
    return ", ".join(kinds[:most]) + (f" and {len(kinds) - most} more" if len(kinds) > most else "")
