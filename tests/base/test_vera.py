"""VeRA's shared projections, bit for bit as PEFT draws them."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np

from mlx_lora.base.vera import draw_projections


def test_projections_are_those_of_torch():
    """The first values of torch.Generator().manual_seed(key) and uniform_; tests/judge compares all of them."""
    a, b = draw_projections(4, 6, 5, key=0)
    assert a.shape == (4, 6) and b.shape == (5, 4)
    # torch.rand(2, generator=torch.Generator().manual_seed(0)) -> 0.4962565899, 0.7682217956
    bound = (6 / 6) ** 0.5
    assert np.allclose(np.array(a)[0, :2], [(2 * 0.4962565899 - 1) * bound, (2 * 0.7682217956 - 1) * bound], atol=1e-6)
    assert mx.abs(b).max().item() <= (6 / 4) ** 0.5
    a7, b7 = draw_projections(8, 33, 17, key=7)  # digests of PEFT's projections
    digests = [hashlib.sha256(np.array(x).tobytes()).hexdigest()[:16] for x in (a7, b7)]
    assert digests == ["85392efd74f3cf91", "4302bb734830c0cb"]
    again, _ = draw_projections(4, 6, 5, key=2**32)
    assert mx.array_equal(a, again).item() and not mx.array_equal(a, draw_projections(4, 6, 5, key=1)[0]).item()
