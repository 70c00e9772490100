"""PEFT's adapter folder, read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from ...adapter import Adapter, raise_faults
from ...errors import FormatError
from ..files import read_json, read_safetensors
from ..options import ReadOptions
from ..torch.read import read_torch
from . import experts
from .config import adapter_config, check_config, method_of, rank_and_scale_rules
from .init import changes_base, for_published_base
from .names import CONFIG, EMBEDDING_NAME, PICKLE, SHARED_KEYS, WEIGHTS, split_name

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
    if adapter is not None:
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
    return from_tensors(tensors, raw, folder, options)


def _read_pickle(path: Path) -> dict[str, mx.array]:
    state = read_torch(path)
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise FormatError(f"{path}: holds a {type(state).__name__}, not a state dict", _TENSORS_ONLY)
    other = [f"{path}: {k} is a {type(v).__name__}, not a tensor" for k, v in state.items() if type(v) is not mx.array]
    raise_faults(other, _TENSORS_ONLY, FormatError)
    return state


def from_tensors(tensors: dict[str, mx.array], raw: dict[str, Any], source: Path, options: ReadOptions) -> Adapter:
    """An adapter from PEFT's tensors and config; ``source`` names them in errors."""
    reader = _Reader(raw, source, options)
    for name, array in tensors.items():
        reader.add(name, array)
    raise_faults([f"{source}: {fault}" for fault in reader.faults], "Convert adapters of linear layers.", FormatError)
    reader.stack_experts()
    reader.unpack_experts()
    reader.set_ranks_and_scales()
    reader.check_magnitudes()
    reader.drop_tied_copies()
    peft = {"saved": reader.pop_base_weights()}  # kept by ``write`` for the way back
    if raw.get("fan_in_fan_out"):
        peft["fan_in_fan_out"] = raw["fan_in_fan_out"]
    if reader.moe:
        peft["moe"] = reader.moe
    config = adapter_config(raw, reader.weights, reader.ranks, reader.scales, reader.peft_paths, source, options)
    adapter = Adapter(config, reader.weights, base=raw.get("base_model_name_or_path"), metadata={"peft": peft})
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
        self.moe: str | None = None  # the layout of the experts
        self.faults: list[str] = []
        self._single: dict[tuple[str, str, str], dict[int, mx.array]] = {}  # (block, name, leaf): {expert: array}
        self._packed: dict[str, dict[bool, dict[str, mx.array]]] = {}  # block: {below base_layer?: {leaf: array}}

    def add(self, name: str, array: mx.array) -> None:
        """Take in one tensor of PEFT's, or note why it cannot be converted."""
        if name in SHARED_KEYS:
            return self._put(SHARED_KEYS[name], array, name)
        parts = split_name(name)
        if parts is None:
            self.faults.append(f"{name}: not an array of LoRA, DoRA or VeRA")
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
            array = array.reshape(-1) if leaf in _VECTORS else array
            self._put(f"{ours}.{leaf}", array.T if transposed else array, name)

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
        """The packed matrices of a block by the parameter that they belong to.

        PEFT wraps the parameters in the order of ``gate_up_proj``, ``down_proj``: the last one is outermost, the other
        one below ``base_layer``.
        """
        targets = self.raw.get("target_parameters") or []
        names = [n for n in ("gate_up_proj", "down_proj") if any(_covers([n], target) for target in targets)]
        names = [n for n in names if _covers(targets, f"{block}.experts.{n}")] or names
        kinds = {False: names[0]} if len(names) == 1 else {}
        if len(layers) == 2:
            kinds = {True: "gate_up_proj", False: "down_proj"}
        if not layers.keys() <= kinds.keys() or any(pair.keys() != {"lora_a", "lora_b"} for pair in layers.values()):
            raise FormatError(
                f"{self.source}: {block}.experts: target_parameters does not say what its matrices belong to",
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

    def check_magnitudes(self) -> None:
        method, present = method_of(self.raw), any(key.endswith(".m") for key in self.weights)
        if (method == "lora" and present) or (method == "dora" and self.weights and not present):
            raise FormatError(
                f"{self.source}: use_dora is {method == 'dora'} but magnitudes are {'' if present else 'not '}there",
                f"Write use_dora as it was trained into {CONFIG}, or save or download the adapter again.",
            )

    def drop_tied_copies(self) -> None:
        """Drop what PEFT repeats on an output that is tied to the embedding.

        These are the trained rows of tokens and, with ``ensure_weight_tying``, the matrices of the embedding, exchanged
        and transposed.
        """
        weights, copies = self.weights, set()
        rows = [n for n in weights if n.endswith(".trainable_tokens")]
        for head in [n for n in rows if "lm_head" in n]:
            if any(n != head and mx.array_equal(weights[n], weights[head]).item() for n in rows):
                copies.add(head)
        adapted = [n[:-7] for n in weights if n.endswith(".lora_a")]
        heads = [path for path in adapted if path.endswith("lm_head")] if self.raw.get("ensure_weight_tying") else []
        for path in [path for path in adapted if EMBEDDING_NAME.search(path)]:
            for head in heads:
                a, b = weights[f"{path}.lora_a"], weights[f"{path}.lora_b"]
                if mx.array_equal(weights[f"{head}.lora_a"], b.T) and mx.array_equal(weights[f"{head}.lora_b"], a.T):
                    self.ranks.pop(head, None), self.scales.pop(head, None)
                    copies |= {n for n in weights if n.startswith(head + ".")}
        self.weights = {n: w for n, w in weights.items() if n not in copies}

    def pop_base_weights(self) -> dict[str, mx.array]:
        """Take out, and return, saved embeddings that are equal to the base's.

        PEFT saves the weight of an adapted embedding too, changed or not.
        """
        base, found = self.options.base, {}
        if base is not None and base.folder is not None:
            for name in [n for n in self.weights if n.endswith(".weight") and f"{n[:-7]}.lora_a" in self.weights]:
                own = base.tensor(f"{self.peft_paths[name[:-7]]}.weight")
                if own is not None and mx.array_equal(own, self.weights[name].astype(own.dtype)).item():
                    found[name] = self.weights.pop(name)
        return found


def _covers(targets: list[str], path: str) -> bool:
    """Whether one of ``targets`` is ``path`` or the end of it."""
    return any(path == name or path.endswith("." + name) for name in targets)
