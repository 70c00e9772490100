"""PEFT, transformers, PyTorch, loralib and gguf as judges of everything beside linear LoRA: what PEFT saves against its
own logits, what we write against PEFT's loader, files against the libraries that read them.

Run by scripts/judge; skipped where torch and peft are not installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_lora
from judges import IDS, TOLERANCE, difference, hf, make_bases, maker, peft, told, torch, transformers
from mlx_lora import load_adapter, mount, save_adapter
from mlx_lora.formats.torch.read import read_torch
from mlx_lora.formats.torch.write import write_torch
from mlx_lora.merge.export import export_merged

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SEED = 2000  # not one of the fixtures'
MODELS = ("llama", "qwen2", "gpt2", "mixtral", "qwen3_moe")
ALL_EXPERTS, GATE_UP = maker.EXPERTS, maker.EXPERTS[:1]
MORE = {
    ("llama", "all_biases"): {"r": 2, "target_modules": ["q_proj"], "bias": "all"},
    ("llama", "embedding_and_head"): {"r": 4, "target_modules": ["embed_tokens", "lm_head"]},
    ("qwen2", "embedding_saved"): {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ("gpt2", "dora"): {"r": 4, "target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True, "fan_in_fan_out": True},
    ("mixtral", "rslora"): {"r": 4, "target_modules": ["q_proj"], "target_parameters": ALL_EXPERTS, "use_rslora": True},
    ("mixtral", "router_rank"): {
        "r": 4,
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.gate.weight"],
        "rank_pattern": {"mlp.gate.weight": 2},
        "alpha_pattern": {"mlp.gate.weight": 5},
    },
    ("qwen3_moe", "gate_up"): {"r": 4, "target_modules": ["q_proj"], "target_parameters": GATE_UP},
}
for _settings in MORE.values():
    _settings["lora_alpha"] = 6
CASES = {key: value for key, value in {**maker._SPECIAL, **MORE}.items() if key[0] in MODELS}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"), MODELS, SEED)


def ours(folder: Path, adapter=None) -> np.ndarray:
    model = mlx_lora.load(folder, dtype="float32")[0]
    if adapter is not None:
        mount(model, adapter)
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def loaded_by_peft(base: Path, folder: Path) -> np.ndarray:
    """Logits with the adapter, as PEFT loads it; no key may be missing or unexpected."""
    model = peft.PeftModel.from_pretrained(hf(base), folder).eval()
    answer = maker.logits(model, IDS)
    state = peft.utils.load_peft_weights(str(folder), device="cpu")
    result = peft.set_peft_model_state_dict(model, peft_ready(model, state))
    assert not result.unexpected_keys, result.unexpected_keys
    return answer


def peft_ready(model, state):
    """Keys as PEFT's own loader converts them for transformers 5."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as convert

    return convert(model, model.peft_config["default"], state)


@pytest.mark.parametrize(("model", "name"), CASES, ids=["-".join(key) for key in CASES])
def test_from_peft_and_back(model, name, bases, tmp_path):
    tuned = maker.add_adapter(hf(bases[model]), CASES[model, name], seed=SEED)
    expected = maker.logits(tuned, IDS)
    tuned.save_pretrained(tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft", base=bases[model])
    folder = save_adapter(adapter, tmp_path / "again", "peft", base=bases[model])
    native = load_adapter(save_adapter(adapter, tmp_path / "native"))
    told(
        f"{model} {name}",
        live=difference(ours(bases[model], adapter), expected),
        native=difference(ours(bases[model], native), expected),
        back=difference(loaded_by_peft(bases[model], folder), expected),
        control_base=difference(ours(bases[model]), expected),
    )


@pytest.mark.parametrize("options", [{"moe": "per_expert"}, {"profile": "serving"}])
@pytest.mark.parametrize("name", ["experts", "router", "down", "gate_up"])
def test_keys_for_each_expert(name, options, bases, tmp_path):
    model = "mixtral" if name == "router" or name == "experts" else "qwen3_moe"
    tuned = maker.add_adapter(hf(bases[model]), CASES[model, name], seed=SEED)
    expected = maker.logits(tuned, IDS)
    tuned.save_pretrained(tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft", base=bases[model])
    folder = save_adapter(adapter, tmp_path / "again", "peft", base=bases[model], **options)
    told(f"{model} {name} {options}", back=difference(loaded_by_peft(bases[model], folder), expected))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base(start, bases, tmp_path):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": maker.LINEARS, "init_lora_weights": start}
    tuned = maker.add_adapter(hf(bases["llama"]), settings, seed=SEED)
    expected = maker.logits(tuned, IDS)
    tuned.save_pretrained(tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft", base=bases["llama"])
    got = difference(ours(bases["llama"], adapter), expected)
    print(f"\n{start}: {got:.1e}", end="")
    assert got < 5e-5  # two float32 decompositions


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("model", MODELS)
def test_merged_model_in_transformers(model, dtype, bases, tmp_path):
    name = {"llama": "head_saved", "qwen2": "token_rows", "gpt2": "dora", "mixtral": "router", "qwen3_moe": "experts"}[
        model
    ]
    tuned = maker.add_adapter(hf(bases[model]), CASES[model, name], seed=SEED)
    expected = maker.logits(tuned, IDS)
    tuned.save_pretrained(tmp_path / "peft")
    export_merged(bases[model], load_adapter(tmp_path / "peft", base=bases[model]), tmp_path / "merged", dtype=dtype)
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert merged.dtype == (torch.float16 if dtype else torch.float32)
    got = difference(maker.logits(merged.float().eval(), IDS), expected)
    print(f"\n{model} {name} {dtype}: {got:.1e}", end="")
    assert got < (TOLERANCE if dtype is None else 0.05)


def test_our_pytorch_files_in_pytorch_and_its_in_ours(tmp_path):
    """Both layouts; every type of number; views, parameters, empty and scalar tensors."""
    import collections

    made = collections.OrderedDict(
        f32=torch.randn(3, 4),
        turned=torch.randn(4, 3).bfloat16().T,
        sliced=torch.randn(8, 8)[2:5, ::2],
        parameter=torch.nn.Parameter(torch.randn(2).half()),
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(2.5),
        whole=torch.arange(5),
        flags=torch.tensor([True, False]),
        double=torch.randn(2, 2).double(),
        small=torch.tensor([1, 2], dtype=torch.int8),
    )
    told_too = {"state_dict": made, "module": torch.nn.Linear(3, 2).state_dict(), "list": [1, 2.5, "x", None, (True,)]}
    for zipped in (True, False):
        torch.save(told_too, tmp_path / "theirs.pt", _use_new_zipfile_serialization=zipped)
        read = read_torch(tmp_path / "theirs.pt")
        assert read["list"] == told_too["list"]
        for key, tensor in made.items():
            got = np.array(read["state_dict"][key].astype(mx.float32))
            assert np.array_equal(got, tensor.detach().float().numpy()), key
        write_torch(tmp_path / "ours.pt", read)
        again = torch.load(tmp_path / "ours.pt", weights_only=True)
        mapped = torch.load(tmp_path / "ours.pt", weights_only=True, mmap=True)
        for key, tensor in made.items():
            expected = tensor.detach().float() if key == "double" else tensor.detach()
            assert torch.equal(again["state_dict"][key], expected) and torch.equal(mapped["state_dict"][key], expected)
        assert again["list"] == told_too["list"]


def test_loralib_loads_what_we_write(tmp_path):
    loralib = pytest.importorskip("loralib")
    adapter = load_adapter(FIXTURES / "formats/loralib/lora.pt", base=FIXTURES / "peft/llama/base", alpha=6)
    save_adapter(adapter, tmp_path / "out.pt", "loralib", base=FIXTURES / "peft/llama/base")
    model = torch.nn.ModuleDict({"q": loralib.Linear(32, 64, r=4, lora_alpha=6, bias=False)})
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    wanted = {f"q.{leaf}": state[f"model.layers.0.self_attn.q_proj.{leaf}"] for leaf in ("lora_A", "lora_B")}
    missing, unexpected = model.load_state_dict(wanted, strict=False)
    assert missing == ["q.weight"] and not unexpected


def test_gguf_package_reads_what_we_write(tmp_path):
    gguf = pytest.importorskip("gguf")
    folder, base = FIXTURES / "peft/mixtral/experts", FIXTURES / "peft/mixtral/base"
    adapter = load_adapter(folder, base=base)
    path = save_adapter(adapter, tmp_path / "a.gguf", "gguf", base=base)
    read = gguf.GGUFReader(path)
    assert read.get_field("general.type").contents() == "adapter"
    assert read.get_field("adapter.type").contents() == "lora"
    assert read.get_field("general.architecture").contents() == "llama"
    assert read.get_field("adapter.lora.alpha").contents() == 6.0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    known = {names.get_name(f"model.layers.{i}.{m}") for i in range(2) for m in ("self_attn.q_proj", "mlp.gate")}
    known |= {f"blk.{i}.ffn_{kind}_exps" for i in range(2) for kind in ("gate", "up", "down")}
    for tensor in read.tensors:
        stem, leaf = tensor.name.split(".weight.")
        assert stem in known and leaf in ("lora_a", "lora_b")
        assert tensor.data.ndim == (3 if "exps" in stem else 2)
        if "exps" in stem:  # [experts, r, in] and [experts, out, r], the slowest first
            assert tensor.data.shape[0] == 4 and 4 in tensor.data.shape[1:]


def test_peft_config_is_accepted_without_a_warning_of_unknown_keys(tmp_path):
    folder = save_adapter(load_adapter(FIXTURES / "peft/llama/patterns"), tmp_path / "out", "peft")
    raw = json.loads((folder / "adapter_config.json").read_text())
    known = set(peft.LoraConfig().to_dict())
    assert raw.keys() <= known | {"peft_type"}
