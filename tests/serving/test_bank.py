"""Named adapters of which one is mounted."""

from __future__ import annotations

import mlx.core as mx

from conftest import make_model, shake
from mlx_lora.config import AdapterConfig
from mlx_lora.model.attach import adapters_on, attach, extract, unmount
from mlx_lora.serving.bank import AdapterBank


def test_a_name_in_the_bank_may_get_another_adapter():
    model = make_model()
    bank, adapters = AdapterBank(model), []
    for seed in (1, 2):
        attach(model, AdapterConfig(rank=4, num_layers=-1))
        shake(model, seed)
        adapters.append(extract(model))
        unmount(model)
    for adapter in adapters:
        bank.add("name", adapter)
        bank.use("name")
        bank.use("name")
        got = extract(model).weights
        assert all(mx.array_equal(got[name], array).item() for name, array in adapter.weights.items())
    unmount(model)
    bank.use("name")
    assert adapters_on(model), "use() must mount again after an unmount()"
    bank.use(None)
    assert bank.adapter is bank.current is None and not adapters_on(model)
