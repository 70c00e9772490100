"""Plans: what they say without a weight, verdicts, the written configuration, and what train makes of them."""

from __future__ import annotations

import json
import subprocess

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

import mlx_lora
from mlx_lora import device
from mlx_lora.base.names import BaseModel
from mlx_lora.cli.main import main
from mlx_lora.cli.plan import plan as plan_command
from mlx_lora.cli.train import train as train_command
from mlx_lora.config import AdapterConfig, OptimizerConfig, TrainConfig
from mlx_lora.errors import ConfigError, TrainingError
from mlx_lora.planning import speed
from mlx_lora.planning.bare import bare_model, base_named, flops_per_token, quantization_of, stored_dtype
from mlx_lora.planning.estimate import estimate
from mlx_lora.planning.machines import MACS, Variant, variants, verdicts, working_set
from mlx_lora.runs import run
from mlx_lora.runs.settings import Settings
from mlx_lora.tiny_base import PATH, skill

QWEN3 = dict(
    model_type="qwen3", hidden_size=1024, num_hidden_layers=28, intermediate_size=3072, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, vocab_size=151936, max_position_embeddings=40960,
    rope_theta=1e6, tie_word_embeddings=True, torch_dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 40), ("valid", 8)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, count)))
    return folder


@pytest.fixture
def config_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    return tmp_path


def test_a_plan_needs_no_more_than_a_config_and_takes_no_memory(config_only):
    before = mx.get_active_memory()
    found = mlx_lora.plan(config_only, adapter={"rank": 8}, train={"batch_size": 1}, max_seq_length=256, machines=False)
    assert mx.get_active_memory() - before < 1e6
    assert found.trainable == 16 * 8 * (3072 + 2 * 2048 + 3072 + 3 * 4096)  # (in + out) of seven linears
    assert found.parameters - found.trainable == pytest.approx(596e6, rel=0.01) and found.epoch is None
    assert "256 tokens" in found.notes[0] and found.memory.peak > found.memory.weights > 2.3e9


def test_random_numbers_are_as_without_a_plan(config_only):
    mx.random.seed(3)
    expected = mx.random.normal((4,)).tolist()
    mx.random.seed(3)
    estimate(BaseModel(PATH), OptimizerConfig(), Variant(AdapterConfig(), TrainConfig(), length=16), gpu=False)
    assert mx.random.normal((4,)).tolist() == expected


def test_the_verdicts_hold_when_planned_with_their_flags(tmp_path):
    wide = {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 6, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    asked = Variant(AdapterConfig(rank=8), TrainConfig(batch_size=8), length=2048)
    found = mlx_lora.plan(tmp_path, adapter={"rank": 8}, train={"batch_size": 8})
    assert [v.machine for v in found.verdicts] == list(MACS) and working_set(16) < 12e9 < working_set(24)
    helped = next(v for v in found.verdicts if v.flags)
    assert not helped.fits and helped.flags[0] == "a 4-bit base"
    variant = next(v for v in variants(asked, False, 6) if v.flags == helped.flags)
    again = estimate(BaseModel(tmp_path), OptimizerConfig(), variant, gpu=True)
    assert again.parts.peak == pytest.approx(helped.peak, rel=1e-5)  # constants that a model keeps are counted once
    assert all(1.15 * v.peak <= v.working_set for v in found.verdicts if v.flags is not None)
    assert found.verdicts[-1].fits and found.verdicts[-1].flags == ()


def test_what_harms_least_is_tried_first():
    asked = Variant(AdapterConfig(num_layers=-1), TrainConfig(batch_size=4), length=2000)
    new = [v.flags[-1].split()[0] for v in variants(asked, False, 28)[1:]]
    assert list(dict.fromkeys(new)) == [
        *("a", "--grad-checkpoint", "--grad-accumulation-steps", "--max-seq-length", "--num-layers")
    ]
    last = variants(asked, True, 28)[-1]
    assert last.flags == ("--grad-checkpoint", "--batch-size 1", "--grad-accumulation-steps 4",
                          "--max-seq-length 256", "--num-layers 4")  # fmt: skip
    kto = Variant(AdapterConfig(), TrainConfig(batch_size=8, loss="kto"), length=64)
    assert min(v.train.batch_size for v in variants(kto, True, 28)) == 2


def test_a_machine_is_given_the_first_variant_that_fits_with_room_for_the_error():
    asked = Variant(AdapterConfig(num_layers=-1), TrainConfig(batch_size=8), length=256)
    options = variants(asked, True, 8)
    sizes = [working_set(64) / 1.16, working_set(64) / 1.14, *(working_set(8) / 1.14 - n for n in range(9))]
    for peak in sizes[:2]:
        found = {v.machine: v for v in verdicts(options, lambda v, p=peak: p if v is asked else 1.0)}
        assert found[64].fits == (peak == sizes[0]) and found[512].fits
    found = {v.machine: v for v in verdicts(options, lambda v: sizes[2] - options.index(v))}
    assert not found[8].fits and found[8].flags is None and found[16].fits


@pytest.mark.parametrize(("largest", "unasked"), [(6e9, 1), (30e9, 1), (90e9, 0)])  # in the last, each fits some Mac
def test_few_variants_are_planned_and_the_first_that_fits_is_found(largest, unasked):
    options = variants(Variant(AdapterConfig(num_layers=-1), TrainConfig(batch_size=8), length=2048), False, 36)
    peaks, asked = {v.flags: largest * 0.7**k for k, v in enumerate(options)}, set()

    def peak(variant):
        asked.add(variant.flags)
        return peaks[variant.flags]

    for found in verdicts(options, peak):
        first = next((v for v in options if 1.15 * peaks[v.flags] <= found.working_set), None)
        assert found.flags == (first.flags if first else None) and found.fits == (first is options[0])
        assert found.peak == peaks[(first or options[-1]).flags]
    assert len(asked) <= len(options) - unasked


def test_smaller_batches_keep_the_rows_of_a_step():
    asked = Variant(AdapterConfig(), TrainConfig(batch_size=8), length=512)
    for variant in variants(asked, True, 28):
        assert variant.train.batch_size * variant.train.grad_accumulation_steps == 8


def test_several_processes_divide_the_batch(config_only):
    def peak(processes, size):
        settings = {"train": {"batch_size": size}, "max_seq_length": 128, "machines": False}
        return mlx_lora.plan(config_only, processes=processes, **settings).memory.peak

    assert peak(2, 4) == peak(1, 2) < peak(1, 4)
    with pytest.raises(ConfigError, match="divided equally among 3"):
        peak(3, 4)


def test_quantization_is_read_from_any_config():
    assert quantization_of({}) is None and quantization_of({"quantization": {"bits": 4}}) == {"bits": 4}
    assert quantization_of({"quantization_config": {"quant_method": "bitsandbytes"}}) == "nf4"
    assert quantization_of({"quantization_config": {"quant_method": "mxfp4"}})["mode"] == "mxfp4"


def test_operations_of_a_token_are_two_for_each_weight(config_only):
    base = BaseModel(config_only)
    assert flops_per_token(base.model, base.config) == pytest.approx(2 * 596e6, rel=0.01)  # the tied head counts once


def test_the_command_says_everything(data, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", "--model", str(PATH), "--data", str(data), "--iters", "20", "--batch-size", "4"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for word in ("trainable", "weights", "adapter", "optimizer", "activations", "logits", "peak", "40 rows", "padding",
                 "10 batches", "20 iterations, 2 epochs", "unknown on this", "512 GB", "estimated"):  # fmt: skip
        assert word in out, word


def test_the_command_prints_json(data, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--model", str(PATH), "--data", str(data), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["event"] == "Plan" and found["memory"]["peak"] > 0 and len(found["verdicts"]) == len(MACS)


def test_the_written_configuration_trains_as_it_is(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["plan", "--model", str(PATH), "--data", str(data), "--write", "run.yaml"])
    assert end.value.code == 0, capsys.readouterr().err
    text = (tmp_path / "run.yaml").read_text()
    for line in (
        "learning_rate: 0.0002",
        'lr_schedule: "cosine_decay"',
        "mask_prompt: true",
        "num_layers: -1",
        "rank: 8",
    ):
        assert line in text
    assert "warmup: " in text and "steps_per_eval: " in text
    assert (
        "\nepochs: 5 " in text and "# passes over the 40 rows, 25 iterations in all" in text and "\niters" not in text
    )
    capsys.readouterr()
    (tmp_path / "run.yaml").write_text(text.replace("\nsave_every", "\nsteps_per_report: 5\nsave_every"))
    with pytest.raises(SystemExit) as end:
        main(["train", "-c", "run.yaml"])
    err = capsys.readouterr().err
    assert end.value.code == 0 and (tmp_path / "adapters" / "adapters.safetensors").exists(), err
    assert "Plan: " in err and "is too low for" not in err and "Warning" not in err
    assert speed.measured(1e9) > 0
    assert mlx_lora.plan(PATH, data, machines=False).seconds > 0


def test_time_is_that_of_runs_with_steps_of_like_size(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_file", lambda: tmp_path / "speed.json")
    assert speed.measured(1e9) is None
    speed.keep(1e12, 100, 10.0)
    speed.keep(1e7, 100, 1.0)  # a tiny run, which says nothing about a large one
    assert speed.measured(3e11) == speed.measured(1e15) == 1e13 and speed.measured(2e7) == 1e9
    for broken in ('{"x": 1}', "[]", "{", json.dumps({speed._device(): 5e9})):
        (tmp_path / "speed.json").write_text(broken)
        assert speed.measured(1e9) is None


def test_write_refuses_a_file_that_is_there(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(["plan", "--model", str(PATH), "--data", str(data), "--write", "run.yaml"])
    assert end.value.code == 2 and "exists already" in capsys.readouterr().err
    assert (tmp_path / "run.yaml").read_text() == "mine"


def reports_of(folder, data, **options):
    options.setdefault("train", {"iters": 1, "val_batches": 0})
    return {type(r).__name__: r for r in run(folder, model=PATH, data=data, **options)}


def test_train_refuses_what_does_not_fit_unless_forced(tmp_path, data, monkeypatch):
    monkeypatch.setattr("mlx_lora.planning.plan.memory_limit", lambda: 20_000_000)
    train = {"iters": 1, "val_batches": 0, "batch_size": 8}
    with pytest.raises(TrainingError, match="this run needs about") as caught:
        reports_of(tmp_path / "a", data, train=train)
    assert "--batch-size" in caught.value.hint and "--force" in caught.value.hint
    assert not (tmp_path / "a" / "adapters.safetensors").exists()
    found = reports_of(tmp_path / "b", data, train=train, force=True)
    assert found["Planned"].peak > 20_000_000 and found["Done"].iteration == 1


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(tmp_path, data, monkeypatch):
    monkeypatch.setattr("mlx_lora.runs.planned.memory_limit", lambda: 1_000)
    with pytest.raises(TrainingError, match="its weights alone are"):
        reports_of(tmp_path / "a", data)


def test_a_plan_that_cannot_be_made_prevents_no_training(tmp_path, data, monkeypatch):
    monkeypatch.setattr("mlx_lora.runs.planned.make_plan", lambda *_: 1 / 0)
    found = reports_of(tmp_path / "a", data)
    assert found["Planned"].peak is None and "division by zero" in found["Planned"].reason
    assert "the plan of this run failed" in found["Warned"].text and "report it" in found["Warned"].text
    assert found["Done"].iteration == 1


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, True),
        ({"optimizer": {}}, True),
        ({"optimizer": {"optimizer": "adamw"}, "adapter": {"method": "dora"}}, True),
        ({"optimizer": {"learning_rate": 1e-5}}, False),
        ({"optimizer": OptimizerConfig(learning_rate=1e-5)}, False),
        ({"optimizer": {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-4, 10]}}}, False),
        ({"adapter": {"method": "full", "num_layers": 1}}, False),
        ({"train": {"loss": "dpo"}}, False),
        ({"train": {"loss": "kto"}}, False),
        ({"resume": True}, False),
    ],
)
def test_only_a_learning_rate_that_nobody_gave_is_warned_of(settings, warned):
    doubts = Settings(model=PATH, data="rows.jsonl", **settings).doubts()
    assert any("is too low for" in text for text in doubts) == warned


@pytest.mark.parametrize(
    ("options", "yaml", "warned"),
    [
        ("", "", True),
        ("--optimizer adamw", "batch_size: 2", True),
        ("--learning-rate 1e-5", "", False),
        ("", "learning_rate: 1e-5", False),
        ("--loss dpo", "", False),
        ("", "fine_tune_type: full", False),
    ],
)
def test_a_rate_in_a_flag_or_a_file_counts_as_given(options, yaml, warned, tmp_path, monkeypatch):
    def run(folder, **settings):
        asked.append(Settings(**{k: v for k, v in settings.items() if k != "stop"}).doubts())
        raise ConfigError("enough", "Nothing is trained here.")

    asked = []
    monkeypatch.setattr("mlx_lora.runs.run", run)
    (tmp_path / "run.yaml").write_text(yaml)
    with pytest.raises(SystemExit):
        main(["train", "--model", str(PATH), "--data", "d", "-c", str(tmp_path / "run.yaml"), *options.split()])
    assert any("is too low for" in text for text in asked[0]) == warned


def test_epochs_are_planned_by_the_number_of_rows(data, capsys):
    found = mlx_lora.plan(PATH, data, train={"epochs": 2.5, "batch_size": 4}, machines=False)
    assert (found.iters, found.epochs) == (25, 2.5)
    found = mlx_lora.plan(PATH, data, train={"iters": 5, "batch_size": 4}, machines=False)
    assert (found.iters, found.epochs) == (5, 0.5)
    found = mlx_lora.plan(PATH, train={"epochs": 3}, max_seq_length=64, machines=False)
    assert (found.iters, found.epochs, found.seconds) == (None, 3, None)
    with pytest.raises(SystemExit) as end:
        main(["plan", "--model", str(PATH), "--epochs", "3", "--max-seq-length", "64"])
    assert end.value.code == 0 and "3 epochs, rows of up to 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_rows_of_preferences_are_planned(loss, tmp_path):
    pair = {"prompt": "2+2=", "chosen": " 4", "rejected": " five"}
    (tmp_path / "train.jsonl").write_text((json.dumps(pair) + "\n") * 8)
    found = mlx_lora.plan(PATH, tmp_path, train={"loss": loss, "epochs": 2, "batch_size": 4}, machines=False)
    rows = found.epoch.rows
    assert found.iters == 2 * found.epoch.batches and found.memory.peak > 0 and found.epoch.packed_padding is None
    assert rows == (16 if loss == "kto" else 8) - found.epoch.rows % 2 and 0 <= found.epoch.padding < 1


def test_the_short_form_of_a_run_of_preferences_is_its_plan(tmp_path):
    pairs = [{"prompt": f"{k}+2=", "chosen": f" {k + 2}", "rejected": " I do not know that"} for k in range(12)]
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train = {"loss": "dpo", "epochs": 1, "batch_size": 4, "val_batches": 0}
    said = reports_of(tmp_path / "a", tmp_path, train=train)["Planned"]
    found = mlx_lora.plan(PATH, tmp_path, train=train, machines=False)
    assert (said.peak, said.trainable) == (found.memory.peak, found.trainable)
    assert (said.iters, said.padding) == (found.iters, found.epoch.padding) == (3, found.epoch.padding)
    single = mlx_lora.plan(PATH, train={"batch_size": 4}, max_seq_length=found.length, machines=False)
    assert said.peak > single.memory.peak  # both answers are in memory


def test_every_option_of_train_is_taken(tmp_path):
    theirs = {(param.name, tuple(param.opts)) for param in train_command.params}
    assert theirs <= {(param.name, tuple(param.opts)) for param in plan_command.params}


def test_a_command_and_a_file_of_train_are_planned_as_they_are(data, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {PATH}\ndata: {data}\ntrain: true\nepochs: 2\nadapter_path: x\nreport_to: wandb\n")
    with pytest.raises(SystemExit) as end:
        main(["plan", "-c", str(file), "--resume-adapter-file", "a.safetensors", "--test", "--batch-size", "4"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and "20 iterations, 2 epochs" in out
    assert "--resume-adapter-file" in err and "no effect on a plan" in err


class Repository:
    """Stands for huggingface_hub: a repository with a config and headers. Downloads of anything else fail."""

    def __init__(self, dtypes: dict[str, str], config: dict, folder):
        self.dtypes, self.asked = dtypes, []
        (folder / "config.json").write_text(json.dumps(config))
        self.folder = folder

    def download(self, name: str, file: str) -> str:
        self.asked.append(file)
        assert name == "me/model" and file == "config.json"
        return str(self.folder / file)

    def get_safetensors_metadata(self, name: str):
        self.asked.append("headers")
        tensors = {path: TensorInfo(dtype, [1], (0, 1)) for path, dtype in self.dtypes.items()}
        files = {"model.safetensors": SafetensorsFileMetadata({}, tensors)}
        return SafetensorsRepoMetadata(None, False, dict.fromkeys(tensors, "model.safetensors"), files)


def test_a_repository_is_planned_from_its_config_and_headers(tmp_path, monkeypatch):
    config = {**QWEN3, "num_hidden_layers": 2, "vocab_size": 1000, "quantization": {"group_size": 64, "bits": 4}}
    scaled = {f"model.layers.{n}.mlp.{p}_proj.scales": "F16" for n in (0, 1) for p in ("gate", "up", "down")}
    hub = Repository({**scaled, "model.norm.weight": "F16"}, config, tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    base = base_named("me/model")
    assert stored_dtype(base) == "float16"  # by the headers, not the config's bfloat16
    quantized = [path for path, m in bare_model(base, False, False).named_modules() if "bits" in vars(m)]
    assert len(quantized) == 6 and all(".mlp." in path for path in quantized)
    found = mlx_lora.plan("me/model", train={"batch_size": 1}, max_seq_length=32, machines=False)
    assert found.memory.peak > 0 and hub.asked.count("config.json") == 2 and hub.asked.count("headers") == 2


def test_the_memory_limit_is_that_of_the_machine():
    total = int(subprocess.run(["getconf", "_PHYS_PAGES"], capture_output=True, text=True).stdout) * 4096
    if device.is_cpu():
        assert device.memory_limit() == pytest.approx(total, rel=0.01)


def test_what_is_written_reads_the_same_rows(tmp_path, monkeypatch, capsys):
    import yaml

    from mlx_lora.cli.main import main
    from mlx_lora.tiny_base import PATH

    monkeypatch.chdir(tmp_path)
    rows = [
        {"q": f"Where is box {n}?", "a": f"In room {n}.", "prompt": "WRONG", "completion": "WRONG"} for n in range(40)
    ]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    features = ["--prompt-feature", "q", "--completion-feature", "a", "--valid-split", "0.25"]

    def call(*args: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["plan", "--model", str(PATH), *args])
        return end.value.code, capsys.readouterr().err

    assert call("--data", "d", *features, "--write", "run.yaml")[0] == 0
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert (written["prompt_feature"], written["completion_feature"], written["valid_split"]) == ("q", "a", 0.25)
    (tmp_path / "mine.yaml").write_text("data: d\nrank: 64\nlearning_rate: 0.5\n")
    assert call("-c", "mine.yaml", "--write", "new.yaml")[0] == 0
    written = yaml.safe_load((tmp_path / "new.yaml").read_text())
    assert (written["rank"], written["learning_rate"]) == (64, 0.5)
    for args, text in (
        (["--data", "d", "--write", ""], "does not end in .yaml"),
        (["--max-seq-length", "-5"], "max_seq_length must be at least 2"),
        (["--processes", "-2"], "processes must be at least 1"),
    ):
        code, err = call(*args)
        assert code and text in err, err
