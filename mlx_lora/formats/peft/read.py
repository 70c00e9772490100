"""PEFT's adapter folder, read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from ...adapter import FINGERPRINT, Adapter, raise_faults
from ...config import AdapterConfig
from ...errors import FormatError
from ..files import read_json, read_safetensors, safetensors_metadata, stored_fingerprint
from ..options import EMBEDDINGS, ReadOptions, is_embedding
from ..torch.read import read_torch
from . import experts
from .as_lora import as_lora
from .config import adapter_config, check_config, method_of, rank_and_scale_rules
from .fields import unused_fields
from .init import changes_base, for_published_base
from .names import CONFIG, PICKLE, SHARED_KEYS, WEIGHTS, split_name

_OTHER_TENSORS = "Convert adapters of linear layers and embeddings; merge others in PEFT (model.merge_and_unload())."
_TENSORS_ONLY = "Save only the adapter's state dict, a dict of names and tensors."
_VECTORS = ("m", "vera_lambda_d", "vera_lambda_b")


def has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).exists() or (folder / PICKLE).exists()


def named_adapters(folder: Path) -> list[str]:
    """The names of adapters in subfolders."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and (p / CONFIG).exists() and has_weights(p))


def _adapter_folder(folder: Path, adapter: str | None) -> Path:
    if adapter is None and has_weights(folder):
        return folder
    names = named_adapters(folder)
    # PEFT's name for the adapter without a subfolder
    if adapter == "default" and adapter not in names and has_weights(folder):
        return folder
    if adapter is not None:
        names += ["default"] * has_weights(folder)
        if adapter not in names:
            raise FormatError(f"{folder}: has no adapter {adapter!r}", f"It has: {', '.join(names) or 'none'}.")
        return folder / adapter
    if len(names) > 1:
        raise FormatError(f"{folder}: has the adapters {', '.join(names)}", "Name one: --adapter, or adapter=.")
    if not names:
        raise FormatError(f"{folder}: has no PEFT adapter", "Leave --from (format=) out, or name the adapter's folder.")
    return folder / names[0]


def read(path: Path, options: ReadOptions) -> Adapter:
    folder = _adapter_folder(path, options.adapter)
    if not (folder / CONFIG).exists():
        raise FormatError(f"{folder}: has no {CONFIG}", "It stores the rank and alpha: copy it into the folder.")
    raw = read_json(folder / CONFIG)
    check_config(raw, folder / CONFIG)
    pickled = not (folder / WEIGHTS).exists()
    tensors = _read_pickle(folder / PICKLE) if pickled else read_safetensors(folder / WEIGHTS)
    adapter = from_tensors(tensors, raw, folder, options)
    if not pickled:
        adapter.metadata.update(stored_fingerprint(safetensors_metadata(folder / WEIGHTS).get(FINGERPRINT)))
    return adapter


def _read_pickle(path: Path) -> dict[str, mx.array]:
    state = read_torch(path)
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise FormatError(f"{path}: holds a {type(state).__name__}, not a state dict", _TENSORS_ONLY)
    other = [f"{path}: {k} is a {type(v).__name__}, not a tensor" for k, v in state.items() if type(v) is not mx.array]
    raise_faults(other, _TENSORS_ONLY, FormatError)
    return state


def from_tensors(tensors: dict[str, mx.array], raw: dict[str, Any], source: Path, options: ReadOptions) -> Adapter:
    """An adapter from PEFT's tensors and config; ``source`` names them in errors."""
    original = raw
    tensors, raw = as_lora(tensors, raw, source)
    reader = _Reader(raw, source, options)
    for name, array in tensors.items():
        reader.add(name, array)
    raise_faults([f"{source}: {fault}" for fault in reader.faults], _OTHER_TENSORS, FormatError)
    reader.stack_experts()
    reader.unpack_experts()
    reader.set_ranks_and_scales()
    reader.check_magnitudes()
    reader.drop_tied_copies()
    # Kept so that ``write`` can write them back.
    peft = {"saved": reader.pop_base_weights(), "type": original["peft_type"], "fields": unused_fields(original)}
    if raw.get("fan_in_fan_out"):
        peft["fan_in_fan_out"] = raw["fan_in_fan_out"]
    if reader.moe:
        peft["moe"] = reader.moe
    metadata = {"peft": peft, EMBEDDINGS: sorted(reader.embeddings)}
    sides = reader.embedding_side(metadata)
    paths = reader.peft_paths
    config = adapter_config(raw, reader.weights, reader.ranks, reader.scales, paths, source, options, sides)
    selected = {"modules_to_save": config.modules_to_save, "feedforward_modules": config.feedforward_modules}
    if raw["peft_type"] == "IA3" and not raw.get("exclude_modules"):  # feedforward_modules must be among these
        selected["target_modules"] = [n.removesuffix(".ia3_l") for n in reader.weights if n.endswith(".ia3_l")]
    names = {field: [raw[field], sorted(paths)] for field, paths in selected.items() if raw.get(field) and paths}
    peft |= {"names": names} if names else {}
    adapter = Adapter(config, reader.weights, base=raw.get("base_model_name_or_path"), metadata=metadata)
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and changes_base(init):
        adapter = for_published_base(adapter, init, source, options)
    return adapter


class _Reader:
    """Collects an adapter's arrays, ranks and scales (by our names and paths) from PEFT's tensors."""

    def __init__(self, raw: dict[str, Any], source: Path, options: ReadOptions):
        self.raw, self.source, self.options = raw, source, options
        self.rank_of, self.scale_of = rank_and_scale_rules(raw, source)
        self.weights: dict[str, mx.array] = {}
        self.ranks: dict[str, int] = {}
        self.scales: dict[str, float] = {}
        self.peft_paths: dict[str, str] = {}  # PEFT's module path by ours
        self.embeddings: set[str] = set()  # our paths of the adapted embeddings
        self.moe: str | None = None  # the layout of the experts
        self.faults: list[str] = []
        self._single: dict[tuple[str, str, str], dict[int, mx.array]] = {}  # (block, name, leaf): {expert: array}
        self._packed: dict[str, dict[bool, dict[str, mx.array]]] = {}  # block: {below base_layer?: {leaf: array}}

    def add(self, name: str, array: mx.array) -> None:
        """Add one of PEFT's tensors, or record why it cannot be converted."""
        if name in SHARED_KEYS:
            return self._put(SHARED_KEYS[name], array, name)
        if ".lora_velora_" in name:  # VeLoRA's, for the backward pass
            return
        parts = split_name(name)
        if parts is None:
            self.faults.append(f"{name}: {self._why_unknown(name)}")
            return
        path, leaf, transposed = parts
        if transposed and array.ndim != 2:
            self.faults.append(f"{name}: shape {list(array.shape)}, expected two dimensions")
        elif leaf in ("lora_a", "lora_b") and (found := experts.SINGLE.match(path)):
            arrays = self._single.setdefault((found["block"], found["name"], leaf), {})
            if int(found["expert"]) in arrays:
                self.faults.append(f"{name}: a second array for expert {found['expert']}")
            arrays[int(found["expert"])] = array
        elif leaf in ("lora_a", "lora_b") and (found := experts.PACKED.match(path)):
            self._packed.setdefault(found["block"], {}).setdefault(bool(found["inner"]), {})[leaf] = array
        else:
            ours = self.options.to_mlx(path)
            self.peft_paths[ours] = path
            if ".lora_embedding_" in name:
                self.embeddings.add(ours)
            array = array.reshape(-1) if leaf in _VECTORS else array
            self._put(f"{ours}.{leaf}", array.T if transposed else array, name)

    def _why_unknown(self, name: str) -> str:
        saved = self.raw.get("modules_to_save") or []
        if any(f".{module}." in name for module in saved):
            return (
                "trained in full (modules_to_save), but not the weight or bias of a layer: parameters that hold all "
                "experts are not converted"
            )
        return "not an array of LoRA, DoRA, VeRA or (IA)^3"

    def _put(self, key: str, array: mx.array, name: str) -> None:
        if key in self.weights:
            self.faults.append(f"{name}: a second array for {key}")
        self.weights[key] = array

    def stack_experts(self) -> None:
        """Keys for each expert -> one array for all."""
        for (block, name, leaf), arrays in self._single.items():
            ours = f"{experts.block_path(block, self.options.known_base)}.{experts.NAMES.get(name, name)}"
            path = f"{block}.experts.{next(iter(arrays))}.{name}"
            self.ranks[ours], self.scales[ours] = self.rank_of(path), self.scale_of(path)
            arrays_name = f"{self.source}: {block}.experts.*.{name}.{leaf}"
            self.weights[f"{ours}.{leaf}"] = experts.stack_experts(arrays, arrays_name)
            self.moe = "per_expert"

    def unpack_experts(self) -> None:
        """Matrices over the parameters of all experts -> gate_proj, up_proj and down_proj."""
        base = self.options.known_base
        hidden = base.hidden_size if base else self._hidden_size()
        for block, layers in self._packed.items():
            self.moe = "target_parameters"
            packed = {}
            for kind, pair in self._parameters(block, layers).items():
                path = f"{block}.experts.{kind}"
                packed[kind] = experts.Packed(pair["lora_a"], pair["lora_b"], self.rank_of(path))
                if fault := packed[kind].fault():
                    raise FormatError(f"{self.source}: {path}: {fault}", "Gather sharded weights before saving.")
            exchanged = experts.exchanged(
                packed.get("gate_up_proj"),
                packed.get("down_proj"),
                hidden,
                self.raw.get("peft_version"),
                in_out=bool(base and base.experts_in_out),
            )
            for kind, matrices in packed.items():
                modules = {kind: matrices.unpack(exchanged)}
                if kind == "gate_up_proj":
                    modules = experts.split_gate_up(*modules[kind], bool(base and base.model_type == "gpt_oss"))
                for name, (a, b) in modules.items():
                    ours = f"{experts.block_path(block, base)}.{name}"
                    self.weights[f"{ours}.lora_a"], self.weights[f"{ours}.lora_b"] = a, b
                    self.ranks[ours], self.scales[ours] = a.shape[1], self.scale_of(f"{block}.experts.{kind}")

    def _parameters(self, block: str, layers: dict[bool, dict[str, mx.array]]) -> dict[str, dict[str, mx.array]]:
        """The packed matrices of a block, keyed by the parameter that they belong to.

        PEFT wraps the parameters in the order of ``gate_up_proj``, ``down_proj``: the last one is outermost, the other
        one below ``base_layer``.
        """
        targets = self.raw.get("target_parameters") or []
        names = [n for n in ("gate_up_proj", "down_proj") if any(_covers([n], target) for target in targets)]
        names = [n for n in names if _covers(targets, f"{block}.experts.{n}")] or names
        kinds = dict(zip([len(names) == 2, False], names, strict=False))  # below base_layer? -> the parameter
        if layers.keys() != kinds.keys() or any(pair.keys() != {"lora_a", "lora_b"} for pair in layers.values()):
            raise FormatError(
                f"{self.source}: {block}.experts: target_parameters does not name the parameters of its matrices",
                "Write there what was trained: mlp.experts.gate_up_proj, mlp.experts.down_proj or both.",
            )
        return {kinds[inner]: pair for inner, pair in layers.items()}

    def _hidden_size(self) -> int | None:
        """The input size of the adapter's attention modules."""
        ends = ("q_proj.lora_a", "k_proj.lora_a", "v_proj.lora_a")
        found = {w.shape[0] for n, w in self.weights.items() if n.endswith(ends)}
        return found.pop() if len(found) == 1 else None

    def set_ranks_and_scales(self) -> None:
        """PEFT's rank and multiplier of each module. For a target parameter PEFT matches the path with ``.weight``."""
        targets = self.raw.get("target_parameters") or []
        for ours, path in self.peft_paths.items():
            if f"{ours}.lora_b" in self.weights and ours not in self.ranks:
                path += ".weight" * _covers(targets, f"{path}.weight")
                self.ranks[ours], self.scales[ours] = self.rank_of(path), self.scale_of(path)

    def embedding_side(self, metadata: dict[str, Any]) -> str:
        """The side on which the update of a tied embedding acts: both, or only the input.

        PEFT adapts and trains the embedding and the head separately, except with ``ensure_weight_tying``.
        """
        base, weights = self.options.known_base, self.weights
        if base is not None and not base.tied:
            return "both"
        probe = Adapter(AdapterConfig(), weights, metadata=metadata)
        paths = {name.rpartition(".")[0] for name in weights if name.endswith((".lora_a", ".weight", *_VECTORS))}
        if any(_is_head(path) for path in paths):
            return "input"
        tied = self.raw.get("ensure_weight_tying")
        return "input" if not tied and any(is_embedding(path, probe, base) for path in paths) else "both"

    def check_magnitudes(self) -> None:
        method, present = method_of(self.raw), any(key.endswith(".m") for key in self.weights)
        if (method == "lora" and present) or (method == "dora" and self.weights and not present):
            raise FormatError(
                f"{self.source}: use_dora is {method == 'dora'} but magnitudes are {'' if present else 'not '}there",
                f"Write use_dora with its value during training into {CONFIG}, or save or download the adapter again.",
            )

        if both := sorted(path for path in self.embeddings if f"{path}.m" in self.weights):
            raise FormatError(
                f"{self.source}: {', '.join(both)}: PEFT's DoRA of an embedding has one magnitude per dimension, ours "
                "one per token",
                "Merge it in PEFT (model.merge_and_unload()), or train the embedding with LoRA.",
            )

    def drop_tied_copies(self) -> None:
        """Drop tensors that PEFT repeats for an output head tied to the embedding.

        These are the trained rows of tokens and, with ``ensure_weight_tying``, the matrices of the embedding, exchanged
        and transposed, and its weight.
        """
        weights, copies = self.weights, set()
        rows = [n for n in weights if n.endswith(".trainable_tokens")]
        for head in [n for n in rows if "lm_head" in n]:
            if any(n != head and mx.array_equal(weights[n], weights[head]).item() for n in rows):
                copies.add(head)
        heads = {n.rpartition(".")[0] for n in weights if _is_head(n.rpartition(".")[0])}
        for head in heads if self.raw.get("ensure_weight_tying") else ():
            own = {n.rpartition(".")[2]: array for n, array in weights.items() if n.rpartition(".")[0] == head}
            exchanged = {"lora_a": own.get("lora_b"), "lora_b": own.get("lora_a")}
            same = {
                f"lora_{k}": v.T for k, v in (("a", exchanged["lora_a"]), ("b", exchanged["lora_b"])) if v is not None
            }
            if "weight" in own:
                same["weight"] = own["weight"]
            others = {n.rpartition(".")[0] for n in weights} - heads
            if any(
                all(_equal(weights.get(f"{path}.{leaf}"), array) for leaf, array in same.items()) for path in others
            ):
                self.ranks.pop(head, None), self.scales.pop(head, None)
                copies |= {f"{head}.{leaf}" for leaf in own}
        self.weights = {n: w for n, w in weights.items() if n not in copies}

    def pop_base_weights(self) -> dict[str, mx.array]:
        """Remove and return saved embeddings that equal the base's.

        PEFT saves the weight of an adapted embedding too, changed or not.
        """
        base, found = self.options.base, {}
        if base is not None and base.folder is not None:
            for name in [n for n in self.weights if n.endswith(".weight") and f"{n[:-7]}.lora_a" in self.weights]:
                path = self.peft_paths[name[:-7]]
                own = base.tensor(base.weight_name(name[:-7]) or f"{path}.weight")
                if own is None and _is_head(path) and base.tied:
                    own = base.embedding_weight()
                if own is not None and _equal(own, self.weights[name].astype(own.dtype)):
                    found[name] = self.weights.pop(name)
        return found


def _is_head(path: str) -> bool:
    return path.rpartition(".")[2] == "lm_head"


def _equal(one: mx.array | None, other: mx.array) -> bool:
    return one is not None and one.shape == other.shape and mx.array_equal(one, other).item()


def _covers(targets: list[str], path: str) -> bool:
    """Whether one of ``targets`` is ``path`` or the end of it."""
    return any(path == name or path.endswith("." + name) for name in targets)
