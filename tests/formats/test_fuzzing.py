"""Readers under random damage: they read, or raise one of our own errors. Needs hypothesis (in the `test` extra)."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from test_hostile_files import BASE, FILES, OPTIONS, archive, copy_of

from mlx_lora import load_adapter
from mlx_lora.errors import FormatError, MLXLoRAError
from mlx_lora.formats import detect_format
from mlx_lora.formats.torch.read import read_torch

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
SETTINGS = dict(max_examples=25, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True)


def reads_or_raises(path: Path, format: str) -> None:
    """Reading works or raises one of our own errors; anything else is a defect."""
    with contextlib.suppress(MLXLoRAError):
        detect_format(path)
        load_adapter(path, format, base=BASE, **OPTIONS.get(format, {}))


@pytest.mark.parametrize("format", FILES)
@hypothesis.settings(**SETTINGS)
@hypothesis.given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6), front=st.booleans()
)
def test_fuzzed_bytes(format, edits, front, tmp_path_factory):
    data = bytearray(FILES[format].read_bytes())
    reach = min(len(data), 3000) if front else len(data)  # the front holds what is declared
    for place, value in edits:
        data[min(int(place * reach), reach - 1)] = value
    folder = tmp_path_factory.mktemp("fuzz")
    reads_or_raises(copy_of(format, folder, bytes(data)), format)
    shutil.rmtree(folder)


@hypothesis.settings(**{**SETTINGS, "max_examples": 120})
@hypothesis.given(
    program=st.binary(max_size=120), start=st.sampled_from([b"\x80\x02", b"\x80\x02}", b"\x80\x04]", b""])
)
def test_fuzzed_programs(program, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with contextlib.suppress(FormatError):
        read_torch(archive(start + program + b".", folder / "x.pt"))
    shutil.rmtree(folder)


LIKELY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(allow_nan=True),
    st.text(max_size=12),
    st.lists(st.text(max_size=8), max_size=3),
    st.dictionaries(st.text(max_size=8), st.integers(-2, 9), max_size=3),
)
KNOBS = ["r", "lora_alpha", "peft_type", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"]
KNOBS += ["bias", "modules_to_save", "trainable_token_indices", "init_lora_weights", "lora_bias", "lora_dropout"]
KNOBS += ["ensure_weight_tying", "peft_version", "base_model_name_or_path", "fan_in_fan_out", "token_indices"]


@hypothesis.settings(**{**SETTINGS, "max_examples": 80})
@hypothesis.given(changes=st.dictionaries(st.sampled_from(KNOBS), LIKELY, max_size=4))
def test_fuzzed_peft_configs(changes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    path = copy_of("peft", folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    reads_or_raises(path, "peft")
    shutil.rmtree(folder)


@hypothesis.settings(**{**SETTINGS, "max_examples": 50})
@hypothesis.given(
    changes=st.dictionaries(
        st.sampled_from(
            ["fine_tune_type", "num_layers", "lora_parameters", "lora_layers", "use_dora", "model", "mlx_lora"]
        ),
        st.one_of(LIKELY, st.dictionaries(st.sampled_from(["rank", "scale", "alpha", "keys", "dropout"]), LIKELY)),
        max_size=4,
    )
)
def test_fuzzed_mlx_lm_configs(changes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copy(FILES["peft"], folder / "adapters.safetensors")
    told = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps({**told, **changes}))
    reads_or_raises(folder, "mlx-lm")
    shutil.rmtree(folder)
