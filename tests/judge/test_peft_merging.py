"""Merged adapters against PEFT's ``add_weighted_adapter`` on the same tensors, live."""

from __future__ import annotations

import numpy as np
import pytest

import mlx_lora
from mlx_lora.merge.combine import MERGES, merge_adapters

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SIZES = {"first": (24, 16), "second": (16, 40)}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.second = torch.nn.Linear(*SIZES["second"])  # defined first: PEFT draws in this order, not the alphabet's
        self.first = torch.nn.Linear(*SIZES["first"])
        self.embed = torch.nn.Embedding(30, 24)

    def forward(self, x):
        return self.second(self.first(self.embed(x)))


def configs(same_rank: bool):
    targets = ["first", "second", "embed"]
    yield peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    yield peft.LoraConfig(r=4 if same_rank else 6, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    yield peft.LoraConfig(r=4, lora_alpha=4, target_modules=["second"], init_lora_weights=False)


def pair(model, name: str, path: str):
    module = getattr(model.base_model.model, path)
    if path == "embed":
        return module.lora_embedding_A[name], module.lora_embedding_B[name]
    return module.lora_A[name].weight, module.lora_B[name].weight


def as_ours(model, name: str) -> mlx_lora.Adapter:
    import mlx.core as mx

    config, weights = model.peft_config[name], {}
    for path in sorted(config.target_modules):
        for leaf, tensor in zip(("lora_a", "lora_b"), pair(model, name, path), strict=True):
            weights[f"{path}.{leaf}"] = mx.array(tensor.detach().numpy().T)
    settings = mlx_lora.AdapterConfig(rank=config.r, alpha=config.lora_alpha, embedding_side="input")
    return mlx_lora.Adapter(settings, weights)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("method", MERGES)
def test_equal_to_peft(method, sign, monkeypatch):
    if sign == "frequency" and "ties" not in method:
        pytest.skip("only ties elects signs")
    torch.manual_seed(3)
    one, two, three = configs(same_rank=not method.endswith("svd") and method != "cat")
    model = peft.get_peft_model(Net(), one, adapter_name="one")
    model.add_adapter("two", two)
    model.add_adapter("three", three)
    names, weights = ["one", "two", "three"], [0.7, -0.4, 1.3]
    ours = [as_ours(model, name) for name in names]
    density = None if method in ("linear", "cat", "svd") else 0.6
    inject = model.base_model.inject_adapter

    def inject_and_seed(*args, **kwargs):
        inject(*args, **kwargs)  # draws the start of the new adapter, which is overwritten
        torch.manual_seed(11)

    monkeypatch.setattr(model.base_model, "inject_adapter", inject_and_seed)
    model.add_weighted_adapter(
        names, weights, "merged", combination_type=method, density=density, majority_sign_method=sign
    )
    # An embedding's product lies transposed in PEFT, and so would its random drops: the embedding is left out there.
    paths = ["second", "first"] + ([] if method.startswith("dare") and method.endswith("svd") else ["embed"])
    seed = {"seed": 11} if method.startswith("dare") else {}  # the others draw nothing
    got = merge_adapters(ours, weights, method, density=density, sign=sign, **seed, order=["second", "first", "embed"])
    worst = 0.0
    for path in paths:
        a, b = (t.detach().numpy() for t in pair(model, "merged", path))
        mine_a, mine_b = (np.array(got.weights[f"{path}.{leaf}"]).T for leaf in ("lora_a", "lora_b"))
        assert (
            got.config.scale_of(path) == 1 and model.peft_config["merged"].lora_alpha == model.peft_config["merged"].r
        )
        difference = np.abs(mine_b @ mine_a - b @ a).max() / np.abs(b @ a).max()
        worst = max(worst, float(difference))
        if not method.endswith("svd"):
            n = mine_a.shape[0]  # PEFT leaves room for the ranks of adapters that lack the module
            assert np.allclose(mine_a, a[:n], atol=1e-6) and np.allclose(mine_b, b[:, :n], atol=1e-6)
            assert not a[n:].any() and not b[:, n:].any()
    print(f"\n{method} {sign}: {worst:.1e}", end="")
    assert worst < 3e-6
