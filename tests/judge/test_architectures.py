"""Every architecture that transformers and mlx-lm share: a checkpoint saved by transformers, and PEFT adapters of
them, give the same logits here. ``architectures.md`` is the table of the results (scripts/make_architecture_table).

Run by scripts/judge; skipped where torch and peft are not installed.
"""

from __future__ import annotations

import architectures as a
import pytest

from judges import torch

# What mlx-lm itself cannot do is expected, with its reason. A test fails when mlx-lm has learnt it.


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("model_type", a.shared())
def test_architecture(model_type, tmp_path):
    result = a.compare(model_type, tmp_path)
    print(f"\n{a.row(result)}", end="")
    if reason := a.NOT_MADE.get(model_type):
        assert result.error.startswith("transformers:"), "it can be made now"
        pytest.skip(reason)
    if reason := a.REFUSED.get(model_type):
        assert result.error, "it loads now: take it out of REFUSED"
        pytest.xfail(f"mlx-lm: {reason}")
    assert not result.error
    assert bool(result.adapter_error) == (model_type in a.NO_ADAPTER), result.adapter_error
    assert bool(result.experts_error) == (model_type in a.NO_EXPERTS), result.experts_error
    if reason := a.DIFFERENT.get(model_type):
        assert result.base > 100 * a.TOLERANCE, "it is equal now: take it out of DIFFERENT"
        pytest.xfail(f"mlx-lm: {reason}")
    allowed = a.CLOSE.get(model_type, (a.TOLERANCE, ""))[0]
    measured = {name: getattr(result, name) for name in ("base", "cached", "adapter", "experts")}
    wrong = {name: value for name, value in measured.items() if value is not None and not value <= allowed}
    assert not wrong, f"differences above {allowed:.0e}: {wrong}"
    assert result.adapter_effect > 100 * allowed or result.adapter is None, "the adapter changes nothing"
