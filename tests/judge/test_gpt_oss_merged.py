"""Merged gpt-oss models whose experts have an adapter, as transformers reads them."""

from __future__ import annotations

from architectures import load_again, make_checkpoint

from judges import IDS, difference, maker, told
from mlx_lora import load_adapter
from mlx_lora.merge.export import export_merged

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_merged_experts_are_packed_again(tmp_path):
    base = tmp_path / "base"
    make_checkpoint("gpt_oss", base)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
    tuned = maker.add_adapter(load_again(base), settings, seed=1)
    expected = maker.logits(tuned, IDS)
    tuned.save_pretrained(tmp_path / "adapter")
    export_merged(base, load_adapter(tmp_path / "adapter", base=base), tmp_path / "merged")
    merged, plain = (maker.logits(load_again(folder), IDS) for folder in (tmp_path / "merged", base))
    told("merged gpt-oss", merged=difference(merged, expected), control=difference(plain, expected))
