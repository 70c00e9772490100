"""NF4 against bitsandbytes and transformers, live: the same bytes, the same folders, the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mlx_lora
from judges import IDS, maker, torch, transformers
from mlx_lora.base.nf4 import dequantize_nf4, dynamic_map, quantize_nf4
from mlx_lora.base.nf4_linear import NF4Linear

bnb = pytest.importorskip("bitsandbytes.functional")

import mlx.core as mx  # noqa: E402


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 64), (128, 256), (100, 200), (31, 33), (3, 5), (512, 704)], ids=str)
def test_the_same_bytes(shape, dtype, double):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.05).to(getattr(torch, dtype))
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double, blocksize=64)
    ours = quantize_nf4(mx.array(weight.float().numpy()).astype(getattr(mx, dtype)), double)
    assert np.array_equal(np.array(ours.codes), packed.numpy()[:, 0])
    if double:
        assert np.array_equal(dynamic_map(), state.state2.code.numpy())
        # torch's float32 mean may be a rounding off the mean, according to the processor.
        assert abs(ours.nested[2].item() - state.offset.item()) <= 2e-7 * state.offset.item()
        same = ours.nested[2].item() == state.offset.item()
        assert not same or np.array_equal(np.array(ours.absmax), state.absmax.numpy())
        assert not same or np.array_equal(np.array(ours.nested[0]), state.state2.absmax.numpy())
    else:
        same = True
        assert np.array_equal(np.array(ours.absmax), state.absmax.numpy())
    expected = bnb.dequantize_4bit(packed, state).float().numpy()
    got = np.array(dequantize_nf4(ours, getattr(mx, dtype)).astype(mx.float32))
    assert np.array_equal(got, expected) if same else np.allclose(got, expected, rtol=1e-2)


def small_llama(folder: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(1)
    maker.save_base(transformers.LlamaForCausalLM(config).eval(), folder)


def packed_layers(model) -> dict:
    """bitsandbytes' layers by path, as numbers."""
    found = {}
    for path, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            found[path] = bnb.dequantize_4bit(module.weight.data, state).float().numpy()
    return found


@pytest.mark.parametrize("double", [False, True])
def test_folders_go_both_ways(double, tmp_path):
    base = tmp_path / "base"
    small_llama(base)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(base, quantization_config=settings, dtype=torch.float32, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    for file in base.iterdir():
        if "token" in file.name:
            (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    expected = packed_layers(theirs)
    model, _ = mlx_lora.load(tmp_path / "theirs", dtype="float32")
    layers = {path: m for path, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert set(layers) == set(expected) and len(layers) == 14
    assert all(np.array_equal(np.array(layers[path].unpacked()), expected[path]) for path in layers)
    assert all("bias" in layers[path] for path in layers if path.endswith("q_proj"))

    ours, _ = mlx_lora.load(base, dtype="float32")
    assert mlx_lora.quantize(ours, "nf4", double_quant=double).layers == 14
    mlx_lora.save_model(ours, tmp_path / "ours")
    again = packed_layers(load(tmp_path / "ours", dtype=torch.float32, device_map="cpu"))
    layers = {path: m for path, m in ours.named_modules() if isinstance(m, NF4Linear)}
    assert set(layers) == set(again)
    assert all(np.array_equal(np.array(layers[path].unpacked()), again[path]) for path in layers)
    mine, _ = mlx_lora.load(tmp_path / "ours", dtype="float32")
    tokens = mx.array(IDS)
    assert mx.array_equal(mine(tokens), ours(tokens)).item()
