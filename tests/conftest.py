"""Shared helpers: tiny random models made on the spot, and a comparison whose failure says how far off it is."""

from __future__ import annotations

import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# Before MLX is imported: on CUDA and on an M5 it rounds the inputs of float32 products to 10 bits by default.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

os.environ.pop("MLX_LORA_DEBUG", None)  # it shows tracebacks in place of the messages that tests look for

import mlx_lora

assert mlx_lora  # keep the import above mlx

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from mlx_compiler import PrecompiledHeader  # noqa: E402

from mlx_lora.base import older_mlx_lm  # noqa: E402
from mlx_lora.device import cache_folder  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SHARED = Path(__file__).resolve().parents[1].parent / "shared"

LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    num_hidden_layers=3,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    vocab_size=96,
    max_position_embeddings=256,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
QWEN3_MOE = dict(
    model_type="qwen3_moe",
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    vocab_size=96,
    max_position_embeddings=256,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
)


needs_mlx_lm_0_32 = pytest.mark.skipif(
    older_mlx_lm.is_used(), reason="mlx-lm 0.31, the newest for Python 3.10, lacks what is tested or is wrong in it"
)


def make_model(config: dict | None = None, *, seed: int = 0, quantize: dict | None = None, **changes) -> nn.Module:
    """A random model of mlx-lm's from a config; ``quantize`` are arguments of ``nn.quantize``."""
    import importlib

    config = {**(config or LLAMA), **changes}
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    if quantize:
        nn.quantize(model, **quantize)
    mx.eval(model.parameters())
    return model.eval()


def shake(model: nn.Module, seed: int = 1, size: float = 0.05) -> None:
    """Give every adapter on ``model`` an update that matters."""
    from mlx_lora.model.attach import adapters_on

    mx.random.seed(seed)
    for layer in adapters_on(model).values():
        shake_layer(layer, size)


def shake_layer(layer: nn.Module, size: float = 0.05) -> None:
    """The same for one layer: what starts at zero is drawn anew, magnitudes are changed by a fifth."""
    for leaf in ("lora_b", "lora_bias", "vera_lambda_b"):
        if leaf in layer:
            layer[leaf] = (size * mx.random.normal(layer[leaf].shape)).astype(layer[leaf].dtype)
    if "m" in layer:
        layer.m = layer.m * (1 + 0.2 * mx.random.normal(layer.m.shape))


def plainly(model: nn.Module, monkeypatch) -> nn.Module:
    """``model`` itself, computing by its formulas from now on: no kernels, and nothing of ``fast`` on it."""
    from mlx_lora import fast

    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    fast.restore(model)
    return model


def numbers(array) -> np.ndarray:
    return np.array(array.astype(mx.float32)) if isinstance(array, mx.array) else np.asarray(array)


def relative(got, expected) -> float:
    """Largest difference over the largest expected number."""
    got, expected = numbers(got), numbers(expected)
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))


def assert_close(got, expected, tolerance: float, what: str = "") -> None:
    error = relative(got, expected)
    mean = float(np.abs(numbers(got) - numbers(expected)).mean())
    assert error <= tolerance, (
        f"{what}: relative error {error:.2e} (mean difference {mean:.2e}), allowed {tolerance:.0e}"
    )


@pytest.fixture
def tokens() -> mx.array:
    return mx.array([[1, 5, 9, 33, 7, 60, 64, 2, 3, 90]])


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real inputs; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared here")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """A cache folder of this session, where runs write their speed. It has the fast BLAS of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    for library in cache_folder().glob("openblas-*"):
        (folder / library.name).symlink_to(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LORA_CACHE", str(folder))
        yield


def killed_at(reports: Iterator, when: Callable, folder: Path, left: Path) -> None:
    """Follow a run in ``folder`` until ``when(report)``, and put what SIGKILL would leave then in ``left``.

    No process is needed for that: its files are all that the system keeps.
    """
    for report in reports:
        if when(report):
            shutil.copytree(folder, left)
            return reports.close()
    raise AssertionError("the run did not come to this")


GPU = "cuda" if mx.cuda.is_available() and not mx.metal.is_available() else "metal"


@pytest.fixture(params=["emulated", GPU, "reference"])
def backend(request, monkeypatch):
    """The product's functions with their Metal source run by the emulator, by Metal or CUDA, or as their reference."""
    import mslemu

    which = request.param
    if which == GPU and not (mx.metal.is_available() or mx.cuda.is_available()):
        pytest.skip("neither Metal nor CUDA here")
    if which == "emulated" and (why := mslemu.unavailable()):
        pytest.skip(why)
    monkeypatch.setenv("MLX_LORA_KERNELS", "off" if which == "reference" else "on")
    if which != "emulated":
        yield which
        return
    mslemu.log.clear()
    with mslemu.installed():
        print(f"MSLEMU_SEED={mslemu.options.seed} repeats this run")  # shown where a test fails
        yield which


# Rooms whose tests run once with acceleration on and once off: the same numbers either way.
BOTH_WAYS = ("layers", "training", "formats")


@pytest.fixture(autouse=True)
def fast_setting(request, monkeypatch) -> None:
    """MLX_LORA_FAST for this test; on unless the test's room is among ``BOTH_WAYS``."""
    monkeypatch.setenv("MLX_LORA_FAST", getattr(request, "param", "on"))


# Files whose runs answer held-out prompts and write report.html; of these, files with long answers and real charts.
RECORDED = ("test_recording.py", "test_report_page.py", "test_cli_report.py", "test_distributed_runs.py")
LIKE_USERS = ("test_report_page.py", "test_cli_report.py")


@pytest.fixture(autouse=True)
def without_report(request) -> Iterator[None]:
    """Runs in other files write their log alone: hundreds of runs would take half a second more each."""
    with pytest.MonkeyPatch.context() as patch:  # a test may undo the patches of its own monkeypatch
        if request.path.name not in RECORDED:
            patch.setattr("mlx_lora.runs.held_out._obstacle", lambda *_: "not in this test")
            patch.setattr("mlx_lora.runs.recorder.Recorder._write_page", lambda self: None)
        elif request.path.name not in LIKE_USERS:
            patch.setattr("mlx_lora.runs.report.panels.draw", lambda *_: "<svg></svg>")
            patch.setattr("mlx_lora.runs.held_out.MAX_TOKENS", 6)
        yield


def pytest_collection_finish(session):
    """On a busy machine an answer may take longer than the 5 seconds that httpx waits."""
    if httpx := sys.modules.get("httpx"):
        for step in ("connect", "read", "write", "pool"):
            setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, step, 240.0)


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):  # the process that starts workers, for many tests
        header = PrecompiledHeader()
        config.add_cleanup(header.remove)
    config.addinivalue_line("markers", "alternate: each case runs with acceleration on or off, about half of them each")


def pytest_generate_tests(metafunc):
    if metafunc.definition.path.parent.name in BOTH_WAYS:
        metafunc.parametrize("fast_setting", ["on", "off"], indirect=True, ids=["fast", "plain"])


def pytest_collection_modifyitems(config, items):
    """Keep one of the two ways of each case that is marked ``alternate``: chosen by its name, the same in each run."""
    left_out = []
    for item in items:
        if item.get_closest_marker("alternate"):
            way, _, case = item.callspec.id.partition("-")
            if way != ("fast", "plain")[zlib.crc32(case.encode()) % 2]:
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        dropped = set(left_out)
        items[:] = [item for item in items if item not in dropped]
