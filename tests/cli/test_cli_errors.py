"""Invalid input: every command exits with 1 or 2 and one message, without a traceback, and changes no files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_lora.adapter import Adapter
from mlx_lora.cli.main import main
from mlx_lora.config import AdapterConfig
from mlx_lora.errors import ConfigError
from mlx_lora.formats import save_adapter
from mlx_lora.tiny_base import PATH, skill


def run(args: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    return end.value.code


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with invalid models, data sets and adapters, and a few valid ones."""
    root = tmp_path_factory.mktemp("world")
    _models(root)
    _data(root)
    _adapters(root)
    (root / "a_file").write_text("hello")
    (root / "empty_folder").mkdir()
    (root / "occupied").mkdir()
    (root / "occupied" / "thesis.txt").write_text("do not lose me")
    for name, text in {
        "broken": "model: [",
        "list": "- 1\n- 2",
        "unknown": "learning_rat: 1e-4\nlora_parameters: {rank: 4, wrank: 8}",
        "nested": "lora_parameters: 8",
        "kinds": "lora_parameters: {rank: {a: 1}}\niters: 2020-01-01",
        "optimizer": "optimizer_config: 5",
        "type": "iters: many",
    }.items():
        (root / f"{name}.yaml").write_text(text)
    return root


def _models(root: Path) -> None:
    def copy(name: str) -> Path:
        folder = root / f"model_{name}"
        shutil.copytree(PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        return folder

    def edit(folder: Path, **changes) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    (copy("no_config") / "config.json").unlink()
    (copy("broken_config") / "config.json").write_text("{")
    (copy("list_config") / "config.json").write_text("[]")
    edit(copy("no_type"), model_type=None)
    edit(copy("unknown_type"), model_type="perceptron")
    edit(copy("other_shape"), hidden_size=192)
    edit(copy("own_code"), model_file="evil.py")
    (root / "model_own_code" / "evil.py").write_text(f"open({str(root / 'HACKED')!r}, 'w')")
    (copy("no_weights") / "model.safetensors").unlink()
    (copy("no_tokenizer") / "tokenizer.json").unlink()
    weights = copy("cut_weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    for field in ("no_type",):
        config = json.loads((root / f"model_{field}" / "config.json").read_text())
        config.pop("model_type")
        (root / f"model_{field}" / "config.json").write_text(json.dumps(config))


def _data(root: Path) -> None:
    def write(name: str, lines: list, split: str = "train") -> None:
        folder = root / f"data_{name}"
        folder.mkdir(exist_ok=True)
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / f"{split}.jsonl").write_text(text)

    good = skill.rows("train", 8)
    for split in ("train", "valid", "test"):
        write("good", good, split)
    write("empty", [])
    write("bad_json", [good[0], "{not json", good[1], "]"])
    write("no_keys", [{"wibble": 1}, good[0]])
    write("wrong_types", [{"messages": "hi"}, {"messages": []}, {"messages": [{"content": "x"}]}])
    write("mixed", [good[0], {"text": "hello"}])
    write("text", [{"text": "Once upon a time there was a kite."}] * 4)
    write("text", [{"text": "Once upon a time."}] * 4, "test")
    write("only_test", good, "test")
    write("half", [{"prompt": "p"}])
    (root / "data_binary").mkdir()
    (root / "data_binary" / "train.jsonl").write_bytes(b"\xff\xfe\x00\x81\x82")


def _adapters(root: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    config = json.loads((PATH / "config.json").read_text())
    size, heads = config["hidden_size"], config["num_attention_heads"]
    out = heads * config.get("head_dim", size // heads)

    def make(name: str, rows=size, columns=out, fill=0.1, module=path, format="mlx-lm") -> Path:
        weights = {f"{module}.lora_a": mx.full((rows, 4), fill), f"{module}.lora_b": mx.full((4, columns), 0.1)}
        return save_adapter(Adapter(AdapterConfig(rank=4), weights), root / f"adapter_{name}", format)

    make("good")
    make("other_model", rows=size + 64)
    make("other_names", module="transformer.h.0.attn")
    for name, text in {"config_broken": "{", "config_list": "[1]", "config_empty": "{}"}.items():
        (make(name) / "adapter_config.json").write_text(text)
    (make("no_config") / "adapter_config.json").unlink()
    cut = make("cut") / "adapters.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    lying = make("lying") / "adapters.safetensors"
    lying.write_bytes((2**60).to_bytes(8, "little") + lying.read_bytes()[8:])
    for name, arrays in {
        "nan": {f"{path}.lora_a": mx.full((size, 4), float("nan")), f"{path}.lora_b": mx.zeros((4, out))},
        "half": {f"{path}.lora_a": mx.zeros((size, 4))},
        "leftover": {
            f"{path}.lora_a": mx.zeros((size, 4)),
            f"{path}.lora_b": mx.zeros((4, out)),
            f"{path}.lora_c": mx.zeros((1,)),
        },
        "integers": {f"{path}.lora_a": mx.zeros((size, 4), mx.int32), f"{path}.lora_b": mx.zeros((4, out))},
        "wrong_rank": {f"{path}.lora_a": mx.zeros((size, 2)), f"{path}.lora_b": mx.zeros((2, out))},
        "empty": {},
    }.items():
        folder = make(name)
        mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    peft = make("peft", format="peft")
    for name, change in {
        "loha": {"peft_type": "LOHA"},
        "no_type": {"peft_type": None},
        "pissa": {"init_lora_weights": "pissa_niter_16"},
        "modules": {"modules_to_save": ["lm_head"]},
        "dora_flag": {"use_dora": True},
    }.items():
        folder = root / f"adapter_peft_{name}"
        shutil.copytree(peft, folder)
        raw = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**raw, **change}))
    both = root / "adapter_both"
    shutil.copytree(root / "adapter_good", both)
    shutil.copy(peft / "adapter_model.safetensors", both)
    cut = root / "resume_cut.safetensors"
    cut.write_bytes(b"nothing")


TRAIN = ["train", "--model", PATH, "--data", "data_good", "--adapter-path", "new", "--iters", "2"]
GENERATE = ["generate", "--model", PATH, "--prompt", "hello", "--max-tokens", "2"]
FUSE = ["fuse", "--model", PATH, "--adapter-path", "adapter_good", "--save-path", "new"]


def train(**options) -> list:
    """TRAIN with options replaced; None takes one away, True is a flag."""
    merged = {TRAIN[i][2:]: TRAIN[i + 1] for i in range(1, len(TRAIN), 2)} | {
        k.replace("_", "-"): v for k, v in options.items()
    }
    args = ["train"]
    for name, value in merged.items():
        args += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", value]
    return args


CASES = {
    # models
    "model: nowhere": (train(model="./nowhere"), "no such folder"),
    "model: not in the hub": (train(model="no-such-owner/no-such-model"), "no such folder"),
    "model: empty name": (train(model=""), "no such folder"),
    "model: a file": (train(model="a_file"), "is a file"),
    "model: empty folder": (train(model="empty_folder"), "no config.json"),
    **{
        f"model: {name}": (train(model=f"model_{name}"), fragment)
        for name, fragment in {
            "no_config": "config.json",
            "broken_config": "cannot be read",
            "list_config": "model_type",
            "no_type": "model_type",
            "unknown_type": "perceptron",
            "other_shape": "cannot be loaded",
            "own_code": "own code",
            "no_weights": "safetensors",
            "cut_weights": "cut off or damaged",
            "no_tokenizer": "cannot be loaded",
        }.items()
    },
    # data
    "data: nowhere": (train(data="nowhere"), "nowhere"),
    "data: a file of another kind": (train(data="a_file"), "a_file"),
    "data: empty folder": (train(data="empty_folder"), "train"),
    "data: no training set": (train(data="data_only_test"), "train"),
    **{
        f"data: {name}": (train(data=f"data_{name}"), fragment)
        for name, fragment in {
            "empty": "no rows",
            "bad_json": "train.jsonl:4",
            "no_keys": "train.jsonl:1",
            "wrong_types": "train.jsonl:3",
            "mixed": "train.jsonl:2",
            "half": "completion",
            "binary": "train.jsonl",
        }.items()
    },
    "data: masked text": (train(data="data_text", mask_prompt=True), "mask_prompt"),
    "data: nothing left to learn": (train(max_seq_length=2, mask_prompt=True), "othing to learn"),
    # flags
    "rank 0": (train(rank=0), "rank"),
    "rank beyond the layer": (train(rank=100000), "100000"),
    "scale nan": (train(scale="nan"), "scale"),
    "scale 0": (train(scale=0), "scale is 0"),
    "dropout 1.5": (train(dropout=1.5), "dropout"),
    "negative learning rate": (train(learning_rate=-1), "learning_rate"),
    "no iterations": (train(iters=0), "iters"),
    "an empty batch": (train(batch_size=0), "batch_size"),
    "a length of one": (train(max_seq_length=1), "max_seq_length"),
    "keys that match nothing": (train(keys="q_porj"), "q_proj"),
    "more layers than there are": (train(num_layers=99), "99"),
    "fewer layers than none": (train(num_layers=-7), "num_layers"),
    "rslora without alpha": (train(rslora=True), "alpha"),
    "a pattern without a number": (train(rank_pattern="q_proj"), "REGEX=NUMBER"),
    "a pattern that is not a regular expression": (train(rank_pattern="(=4"), "regular expression"),
    "an unknown optimizer": (train(optimizer="adamz"), "adamz"),
    "an optimizer's unknown argument": (train(optimizer_config='{"adam": {"wibble": 1}}'), "wibble"),
    "an unknown schedule": (train(lr_schedule="sawtooth"), "sawtooth"),
    "an unknown method": (train(fine_tune_type="qora"), "qora"),
    "a negative seed": (train(seed=-1), "seed"),
    "a size without a number": (train(clear_cache_threshold="much"), "much"),
    "text instead of a number": (train(iters="many"), "many"),
    "several at once": (train(rank=0, dropout=7), "dropout"),
    "an unknown reporter": (train(report_to="fax"), "fax"),
    "a project without a tracker": (train(project_name="x"), "project_name"),
    "neither train nor test": (train(no_train=True), "nothing to do"),
    "an adapter path that is a file": (train(adapter_path="a_file"), "is a file"),
    "resuming without a run": (train(resume=True), "resume"),
    "resuming in two ways": (train(resume=True, resume_adapter_file="a_file"), "contradict"),
    "an initial adapter that does not exist": (train(resume_adapter_file="nowhere.safetensors"), "no such file"),
    "an initial adapter in a truncated file": (train(resume_adapter_file="resume_cut.safetensors"), "safetensors"),
    "an initial adapter with other modules": (
        train(resume_adapter_file="adapter_good/adapters.safetensors"),
        "in this run",
    ),
    "an unknown flag": (["train", "--wibble"], "wibble"),
    "an unknown command": (["trian"], "train"),
    "yaml: nowhere": (["train", "-c", "nowhere.yaml"], "nowhere.yaml"),
    "yaml: broken": (["train", "-c", "broken.yaml"], "YAML"),
    "yaml: a list": (["train", "-c", "list.yaml"], "list"),
    "yaml: unknown keys": (["train", "-c", "unknown.yaml"], "learning_rate"),
    "yaml: nested": (["train", "-c", "nested.yaml"], "lora_parameters"),
    "yaml: kinds": (["train", "-c", "kinds.yaml"], "iters must be one value"),
    "yaml: optimizer": (["train", "--train", "-c", "optimizer.yaml"], "optimizer_config must be a mapping"),
    "yaml: a type": (["train", "-c", "type.yaml"], "many"),
    # adapters in use
    "adapter: nowhere": ([*GENERATE, "--adapter-path", "nowhere"], "does not exist"),
    "adapter: a file": ([*GENERATE, "--adapter-path", "a_file"], "is a file"),
    "adapter: empty folder": ([*GENERATE, "--adapter-path", "empty_folder"], "no adapter"),
    **{
        f"adapter: {name}": ([*GENERATE, "--adapter-path", f"adapter_{name}"], fragment)
        for name, fragment in {
            "other_model": "do not fit",
            "other_names": "no such layer",
            "config_broken": "not JSON",
            "config_list": "list",
            "config_empty": "lora_parameters",
            "no_config": "adapter_config.json",
            "cut": "safetensors",
            "lying": "safetensors",
            "nan": "NaN",
            "half": "lora_b",
            "leftover": "lora_c",
            "integers": "int32",
            "wrong_rank": "rank",
            "empty": "no arrays",
            "peft_loha": "LOHA",
            "peft_no_type": "peft_type",
            "peft_pissa": "pissa",
            "peft_modules": "modules_to_save",
            "peft_dora_flag": "use_dora",
            "both": "mlx-lm and peft",
        }.items()
    },
    "an empty prompt": (["generate", "--model", PATH, "--prompt", "  "], "empty"),
    "no prompt": (["generate", "--model", PATH], "prompt"),
    "a negative temperature": ([*GENERATE, "--temp", "-1"], "temp"),
    "no tokens": (["generate", "--model", PATH, "--prompt", "x", "--max-tokens", "0"], "max_tokens"),
    "top_p of 2": ([*GENERATE, "--top-p", "2"], "top_p"),
    # fuse, convert, inspect, test, demo
    "fuse: into what is there": ([*FUSE[:-1], "occupied"], "already exists"),
    "fuse: into a file": ([*FUSE[:-1], "a_file"], "already exists"),
    "fuse: 4 bits": ([*FUSE, "--bits", "4"], "4 bits"),
    "fuse: 7 bits": ([*FUSE, "--bits", "7"], "bits"),
    "fuse: both": ([*FUSE, "--bits", "8", "--dequantize"], "contradict"),
    "fuse: bits of a dense base": ([*FUSE, "--bits", "8"], "quantized"),
    "fuse: no adapter": (
        ["fuse", "--model", PATH, "--adapter-path", "nowhere", "--save-path", "new"],
        "does not exist",
    ),
    "convert: an unknown format": (["convert", "adapter_good", "new", "--to", "zip"], "zip"),
    "convert: from an unknown format": (["convert", "adapter_good", "new", "--to", "peft", "--from", "zip"], "zip"),
    "convert: no format": (["convert", "adapter_good", "new"], "--to"),
    "convert: nowhere": (["convert", "nowhere", "new", "--to", "peft"], "does not exist"),
    "convert: over another": (["convert", "adapter_peft", "adapter_good", "--to", "mlx-lm"], "already holds"),
    "convert: into a file": (["convert", "adapter_good", "a_file", "--to", "peft"], "is a file"),
    "inspect: empty folder": (["inspect", "empty_folder"], "no adapter"),
    "inspect: a file": (["inspect", "a_file"], "is a file"),
    "test: no test set": (["test", "--model", PATH, "--data", "data_mixed"], "test"),
    "test: exact match of text": (
        ["test", "--model", PATH, "--data", "data_text", "--exact-match", "2"],
        "no answer to compare",
    ),
    "demo: into what is there": (["demo", "--output", "occupied"], "is not from an earlier demo"),
}


def snapshot(root: Path) -> dict[str, tuple]:
    return {
        str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) if p.is_file() else ()
        for p in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize("case", list(CASES))
def test_bad_input(case, world, monkeypatch, capsys):
    args, fragment = CASES[case]
    monkeypatch.chdir(world)
    before = snapshot(world)
    code = run(args)
    out, err = capsys.readouterr()
    assert code in (1, 2), f"exit code {code}\n{err}"
    assert fragment in err, err
    assert err.count("Error: ") == 1 and err.count("Hint: ") == 1, err
    assert "Traceback" not in err and "Traceback" not in out, err
    assert "This is a bug" not in err, err
    assert snapshot(world) == before, "files were left behind or changed"


@pytest.mark.parametrize(
    "args, expected, hint",
    [
        (["train", "--wibble"], "Usage: mlx-lora train [OPTIONS]\nError: ", "See mlx-lora train --help"),
        (
            ["train", "--iters", "many"],
            "Error: Invalid value for '--iters'",
            "Iterations (batches) to train for (default: 1000). See",
        ),
        (["train", "--iters"], "Error: Option '--iters' requires an argument.", "See mlx-lora train --help"),
        (["convert"], "Error: Missing argument 'SRC'", "See mlx-lora convert --help"),
        (["convert", "a", "b"], "Error: Missing option '--to'", "See mlx-lora convert --help"),
        (["inspect", "a", "b"], "Error: Got unexpected extra argument (b)", "See mlx-lora inspect --help"),
        (["fuse", "--dtype", "f8"], "'f8' is not one of", "See mlx-lora fuse --help"),
        (["trian"], "No such command 'trian'. Did you mean 'train'?", "See mlx-lora --help for the commands."),
        (["--wibble"], "Error: No such option '--wibble'.", "See mlx-lora --help for the commands."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_names_the_help_to_read(args, expected, hint, capsys):
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert not out and expected in err and hint in err[err.index("Hint: ") :], err


def test_bare_command_is_its_help(capsys):
    assert run([]) in (0, 2)  # click 8.2 counts it as misuse
    out, err = capsys.readouterr()
    assert "Commands:" in out + err and "Error: " not in err


@pytest.mark.parametrize(
    "config, fault, hint",
    [
        ({"rank": 0}, "rank must", "(default: 8; vera: 256). Leave it out for the default."),
        (
            {"num_layers": -3},
            "num_layers must",
            "(default: 16, or all of a smaller model). Leave it out for the default.",
        ),
        ({"init": "x"}, "init must", "Leave it out for the default (default)."),
        ({"rslora": True}, "needs alpha", "requires alpha. Or leave it out."),
    ],
)
def test_the_hint_for_an_invalid_option_explains_the_option(config, fault, hint):
    with pytest.raises(ConfigError) as error:
        AdapterConfig(**config)
    name = next(iter(config))
    assert fault in error.value.message and error.value.hint.startswith(f"{name}: ")
    assert error.value.hint.endswith(hint)


def test_there_are_enough_cases():
    assert len(CASES) >= 40
