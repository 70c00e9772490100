"""Many adapters on one model: each row of a batch as if its adapter were alone, decoding and over whole prompts."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

import mlx_lora
import mslemu
from conftest import LLAMA, assert_close, make_model, shake
from kernel_cases import DTYPES, float64, normal
from mlx_lora import AdapterConfig
from mlx_lora.errors import AdapterError
from mlx_lora.kernels import lora_rows
from mlx_lora.kernels.counting import launches
from mlx_lora.model.multi import MultiLoRA

QUANTIZED = {"group_size": 32, "bits": 4}
CONFIGS = {  # of different ranks, scales, and modules
    "one": dict(rank=4, scale=2.0, num_layers=-1),
    "two": dict(rank=8, scale=-1.0, num_layers=1),
    "three": dict(rank=2, scale=3.0, num_layers=-1, keys=("q_proj", "v_proj", "down_proj")),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype):
    mx.random.seed(0)
    M, K, N, R, ranks = 23, 48, 20, 8, [8, 3, 1]
    within = mx.arange(R) < mx.array(ranks)[:, None]
    x, y = normal((M, K), dtype), normal((M, N), dtype)
    a = mx.where(within[:, None, :], normal((3, K, R), dtype, 0.2), 0).astype(dtype)
    b = mx.where(within[:, :, None], normal((3, R, N), dtype), 0).astype(dtype)
    index, scale = mx.random.randint(-1, 3, (M,)).astype(mx.int32), mx.array([1.0, 0.5, -2.0])
    got, expected = lora_rows(y, x, a, b, scale, index, mx.array(ranks, mx.int32)), float64(y)
    for m, i in enumerate(index.tolist()):
        if i >= 0:
            expected[m] += scale[i].item() * float64(x[m]) @ float64(a[i]) @ float64(b[i])
    assert got.dtype == dtype
    assert_close(got, expected, {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.5e-2}[dtype])


def make(quantize=QUANTIZED):
    model, adapters = make_model(LLAMA, quantize=quantize), {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        mlx_lora.attach(model, AdapterConfig(**config))
        shake(model, seed)
        adapters[name] = mlx_lora.extract(model)
        mlx_lora.unmount(model)
    return model.eval(), adapters


def answers(model, tokens) -> mx.array:
    """Logits of a prompt of nine and of two tokens after it."""
    cache = make_prompt_cache(model)
    parts = [model(tokens[:, :9], cache=cache)]
    return mx.concatenate(parts + [model(tokens[:, i : i + 1], cache=cache) for i in (9, 10)], axis=1)


@pytest.mark.parametrize("quantize", [None, QUANTIZED], ids=["dense", "4bit"])
def test_each_row_as_if_alone(backend, quantize):
    model, adapters = make(quantize)
    names = ["two", None, "one", "three", "one", "two", "three", None, "two"]
    tokens = mx.random.randint(0, 96, (len(names), 11))
    expected = []
    for row, name in enumerate(names):
        if name:
            mlx_lora.mount(model, adapters[name])
        expected.append(answers(model.eval(), tokens[row : row + 1]))
        mlx_lora.unmount(model)
    mslemu.log.clear()
    many = MultiLoRA(model, adapters)
    many.choose(names)
    assert_close(answers(model, tokens), mx.concatenate(expected), 2e-4)
    if backend == "emulated":
        # Launches beside the seven linears: q and v share one, as do gate and up; k has other ranks ("three" has none).
        assert len(mslemu.log) == 2 * 3 * (7 + 5)
    many.choose(["three"])
    assert_close(answers(model, tokens[3:4]), expected[3], 2e-4, "one name for all rows")
    many.unmount()
    assert_close(answers(model, tokens[1:2]), expected[1], 1e-5, "unmounted")


@pytest.mark.parametrize("rows", [4, 9, 16, 32])
def test_launches(monkeypatch, rows):
    """As many as one adapter takes, however many adapters and rows there are."""
    model, adapters = make()
    del adapters["three"]
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    base = launches(lambda t: model(t), mx.zeros((rows, 1), mx.int32)).total()
    MultiLoRA(model, adapters).choose((["one", "two", None, "one"] * 8)[:rows])
    assert launches(lambda t: model(t), mx.zeros((rows, 1), mx.int32)).total() - base == 3 * 4


def test_what_does_not_fit_is_named():
    model, adapters = make()
    mlx_lora.attach(model, AdapterConfig(method="dora", rank=2))
    dora = mlx_lora.extract(model)
    with pytest.raises(AdapterError, match="already"):
        MultiLoRA(model, adapters)
    mlx_lora.unmount(model)
    with pytest.raises(AdapterError, match="x: its method is dora, not lora"):
        MultiLoRA(model, {**adapters, "x": dora})
    other = make_model(LLAMA, hidden_size=32)
    with pytest.raises(AdapterError, match=r"one: model.layers.0.mlp.down_proj: lora_a .* do not fit .*\(128 x 32\)"):
        MultiLoRA(other, adapters)
    many = MultiLoRA(model, adapters)
    with pytest.raises(AdapterError, match="no adapter named four"):
        many.choose(["one", "four"])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ("lm_head",)}, "full parameters"),
        ({"trainable_token_indices": {"model.embed_tokens": (1, 2)}}, "trained tokens"),
        ({"method": "dora"}, "dora"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_refused(config, says):
    model = make_model(LLAMA)
    mlx_lora.attach(model, AdapterConfig(rank=4, num_layers=-1, keys=("q_proj",), **config))
    adapter = mlx_lora.extract(model)
    mlx_lora.unmount(model)
    with pytest.raises(AdapterError, match=says):
        MultiLoRA(model, {"one": adapter})
    assert not [m for m in model.modules() if type(m).__name__ == "MultiLoRALinear"]


def test_what_does_not_fit_is_refused():
    model, adapters = make()
    many = MultiLoRA(model, adapters)
    for change in (
        lambda: mlx_lora.attach(model, AdapterConfig(rank=2)),
        lambda: mlx_lora.mount(model, adapters["one"]),
        lambda: MultiLoRA(model, adapters),
    ):
        with pytest.raises(AdapterError, match="several adapters"):
            change()
    with pytest.raises(AdapterError, match="no adapter is chosen"):
        many.choose([])
    many.choose(["one", "two"])
    with pytest.raises(AdapterError, match="2 rows, and the batch has 3"):
        model(mx.zeros((3, 4), mx.int32))
    many.unmount()
    mlx_lora.mount(model, adapters["one"])


def test_adapters_wider_than_the_model(monkeypatch):
    """Float32, as PEFT trains them, over half precision: they take the model's dtype, and the kernels take them."""
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    counts = []
    for dtype in (mx.float32, mx.bfloat16):
        model, adapters = make()
        model.set_dtype(dtype)
        assert adapters["one"].weights["model.layers.0.self_attn.q_proj.lora_a"].dtype == mx.float32
        MultiLoRA(model, adapters).choose(["one"])
        counts.append(launches(lambda t, model=model: model(t), mx.zeros((1, 1), mx.int32))["CustomKernel"])
    assert counts[0] == counts[1] > 30
