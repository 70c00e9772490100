"""VeRA's projections, LoRA+'s groups and the starts from W, against PEFT and torch, live."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_lora
from judges import maker, peft, torch, transformers
from mlx_lora import AdapterConfig, OptimizerConfig
from mlx_lora.base.decompositions import olora_pair, pissa_pair
from mlx_lora.layers.vera import draw_projections
from mlx_lora.training import MasterWeights


@pytest.mark.parametrize("key", [0, 1234, 2**31 + 5])
@pytest.mark.parametrize(("rank", "columns", "rows"), [(4, 16, 16), (8, 33, 17), (256, 1024, 512), (16, 100, 300)])
def test_projections_bit_for_bit(rank, columns, rows, key):
    from peft.tuners.vera.model import _kaiming_init

    generator = torch.Generator(device="cpu").manual_seed(key)
    expected = [_kaiming_init(shape, generator=generator).numpy() for shape in ((rank, columns), (rows, rank))]
    for got, want in zip(draw_projections(rank, columns, rows, key), expected, strict=True):
        assert np.array_equal(np.array(got), want)


def test_lora_plus_groups(tmp_path):
    from peft.optimizers import create_loraplus_optimizer

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(1)
    maker.save_base(transformers.LlamaForCausalLM(config), tmp_path / "base")
    settings = peft.LoraConfig(
        r=4,
        use_dora=True,
        bias="all",
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        modules_to_save=["model.norm"],
    )
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings)
    made = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_lr_embedding=3e-6, loraplus_weight_decay=0.1
    )
    group = {id(p): (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"]}
    expected = {}
    for name, parameter in theirs.named_parameters():
        if id(parameter) in group:
            path = name.removeprefix("base_model.model.").replace(".default", "").replace(".base_layer", "")
            path = path.replace(".modules_to_save", "").replace("lora_embedding_", "lora_").removesuffix(".weight")
            path = path.replace("lora_magnitude_vector", "m").replace("lora_A", "lora_a").replace("lora_B", "lora_b")
            expected[path] = group[id(parameter)]

    model, _ = mlx_lora.load(tmp_path / "base")
    keys = ["q_proj", "down_proj", "embed_tokens"]
    mlx_lora.attach(model, AdapterConfig(method="dora", rank=4, keys=keys, bias="all", modules_to_save=["model.norm"]))
    built = MasterWeights(
        mlx_lora.build_optimizer(
            OptimizerConfig(
                optimizer="adamw", learning_rate=1e-3, loraplus_lr_ratio=8.0, loraplus_lr_embedding=3e-6,
                loraplus_weight_decay=0.1,
            ),
            10,
            model,
        )
    )  # fmt: skip
    found = {}
    for member, share in built._shares(dict(tree_flatten(model.trainable_parameters()))):
        for path in share:
            name = path.replace(".linear.", ".").replace(".embedding.", ".").removesuffix(".weight")
            found[name] = (pytest.approx(member.learning_rate.item(), rel=1e-6), member.weight_decay)
    assert set(found) == set(expected)
    assert all(expected[name] == found[name] for name in found), {n for n in found if expected[n] != found[n]}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_w(init):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(40, 24)

    torch.manual_seed(0)
    net = Net()
    weight = net.lin.weight.detach().numpy().copy()
    settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["lin"], init_lora_weights=init)
    layer = peft.get_peft_model(net, settings).base_model.model.lin
    theirs = [layer.lora_A["default"].weight.detach().numpy(), layer.lora_B["default"].weight.detach().numpy()]
    a, b = pissa_pair(weight, 4, 3.0) if init == "pissa" else olora_pair(weight, 4)
    assert np.abs(b @ a - theirs[1] @ theirs[0]).max() < 1e-6
    left = weight - 3.0 * (b @ a)
    assert np.abs(left - layer.base_layer.weight.detach().numpy()).max() < 2e-6
    assert np.abs(np.abs(a) - np.abs(theirs[0])).max() < 1e-5


def test_random_pissa_is_near(tmp_path):
    random = np.random.default_rng(0)
    weight = ((random.normal(size=(48, 32)) * 0.7 ** np.arange(32)) @ random.normal(size=(32, 32))).astype(np.float32)
    mx.random.seed(0)
    a, b = pissa_pair(weight, 4, 1.0, iterations=16)
    exact_a, exact_b = pissa_pair(weight, 4, 1.0)
    assert np.abs(b @ a - exact_b @ exact_a).max() < 0.01 * np.abs(weight).max()
