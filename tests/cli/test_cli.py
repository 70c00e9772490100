"""The commands with the built-in tiny model: training, resuming, mlx-lm's YAML, generation, chat, conversion."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_lora.cli import main as commands
from mlx_lora.cli.main import main
from mlx_lora.errors import ConfigError, LostProcessError
from mlx_lora.tiny_base import PATH, skill


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 64), ("valid", 8), ("test", 12)):
        text = "".join(json.dumps(row) + "\n" for row in skill.rows(split, count))
        (folder / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The folder of a short run of the train command."""
    folder = tmp_path_factory.mktemp("trained") / "adapters"
    with pytest.raises(SystemExit) as end:
        main([*train_args(data, folder), "--iters", "12", "--save-every", "6"])
    assert end.value.code == 0
    return folder


def train_args(data: Path, folder: Path) -> list[str]:
    args = ["train", "--model", str(PATH), "--data", str(data), "--adapter-path", str(folder), "--mask-prompt"]
    return [*args, "--batch-size", "4", "--num-layers", "-1", "--learning-rate", "2e-3", "--steps-per-report", "3"]


def run(args: list, capsys, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    out, err = capsys.readouterr()
    assert end.value.code == code, err
    return out, err


def events(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_train_writes_its_checkpoints(trained):
    names = {p.name for p in trained.iterdir()}
    assert names == {
        "log.jsonl",
        "report.html",
        "adapters.safetensors",
        "adapter_config.json",
        "best",
        "0000006_adapters.safetensors",
        "0000012_adapters.safetensors",
        "training_state.safetensors",
    }
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["lora_parameters"]["rank"] == 8
    assert (trained / "adapters.safetensors").read_bytes() == (trained / "0000012_adapters.safetensors").read_bytes()


def test_train_prints_json(data, tmp_path, capsys):
    out, _ = run([*train_args(data, tmp_path / "a"), "--iters", "4", "--json", "--steps-per-eval", "2"], capsys)
    found = events(out)
    kinds = [e["event"] for e in found]
    assert kinds[0] == "ValReport" and kinds[-1] == "Done" and "TrainReport" in kinds and "Checkpoint" in kinds
    first, last = [e for e in found if e["event"] == "ValReport"][:: len(kinds) and -1][::-1][0], found[-1]
    assert first["iteration"] == 0 and last["iteration"] == 4 and last["stopped"] is False
    report = next(e for e in found if e["event"] == "TrainReport")
    wanted = {"iteration", "train_loss", "learning_rate", "tokens_per_second", "trained_tokens", "peak_memory"}
    assert wanted <= report.keys()


def test_an_earlier_run_is_kept(data, tmp_path, capsys):
    run([*train_args(data, tmp_path / "a"), "--iters", "1"], capsys)
    first = (tmp_path / "a" / "adapters.safetensors").read_bytes()
    _, err = run([*train_args(data, tmp_path / "a"), "--iters", "2"], capsys)
    assert "earlier-1" in err
    assert (tmp_path / "a" / "earlier-1" / "adapters.safetensors").read_bytes() == first
    assert not (tmp_path / "a" / "0000001_adapters.safetensors").exists()


def test_resume_is_exact(data, tmp_path, capsys):
    common = ["--dropout", "0.1", "--grad-accumulation-steps", "2", "--lr-schedule", "constant"]
    run([*train_args(data, tmp_path / "one"), *common, "--iters", "9"], capsys)
    run([*train_args(data, tmp_path / "two"), *common, "--iters", "5"], capsys)
    run([*train_args(data, tmp_path / "two"), *common, "--iters", "9", "--resume"], capsys)
    one, two = ((tmp_path / n / "adapters.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


def test_resume_of_another_run_is_refused(trained, data, capsys):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    _, err = run([*train_args(data, trained), "--rank", "4", "--iters", "20", "--resume"], capsys, code=1)
    assert "another run" in err
    _, err = run([*train_args(data, trained), "--iters", "12", "--resume"], capsys, code=2)
    assert "Raise --iters" in err
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before


def test_starting_from_an_adapter_file(trained, data, tmp_path, capsys):
    start = trained / "adapters.safetensors"
    args = [*train_args(data, tmp_path / "a"), "--iters", "1", "--json", "--resume-adapter-file", start]
    out, _ = run(args, capsys)
    began = events(out)[0]["val_loss"]
    out, _ = run(
        ["test", "--model", PATH, "--adapter-path", trained, "--data", data, "--mask-prompt", "--json"], capsys
    )
    fresh = events(run([*train_args(data, tmp_path / "b"), "--iters", "1", "--json"], capsys)[0])[0]["val_loss"]
    assert began < fresh - 0.05


def test_ctrl_c_saves_and_says_how_to_resume(data, tmp_path):
    args = [*train_args(data, tmp_path / "a"), "--iters", "100000", "--json", "--steps-per-report", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_lora", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    for line in process.stdout:
        if '"TrainReport"' in line:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "--resume" in err and "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["stopped"] is True
    assert (tmp_path / "a" / "adapters.safetensors").exists() and (
        tmp_path / "a" / "training_state.safetensors"
    ).exists()


def test_a_killed_run_leaves_a_complete_checkpoint(data, tmp_path):
    args = [*train_args(data, tmp_path / "a"), "--iters", "100000", "--json", "--save-every", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_lora", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    for line in process.stdout:
        if '"Checkpoint"' in line and json.loads(line)["iteration"] >= 3:
            break
    time.sleep(0.05)
    process.kill()
    process.wait()
    from mlx_lora import load_adapter
    from mlx_lora.training import TrainingState

    assert load_adapter(tmp_path / "a").modules
    assert TrainingState.load(tmp_path / "a" / "training_state.safetensors").iteration >= 2


def test_mlx_lms_yaml_runs_unchanged(data, tmp_path, capsys, monkeypatch):
    """The file that mlx-lm ships as its example, with the paths filled in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.yaml").write_text(f"""
model: "{PATH}"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
data: "{data}"
seed: 0
num_layers: 2
batch_size: 4
iters: 3
val_batches: 2
learning_rate: 1e-5
steps_per_report: 1
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "my_adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: true
clear_cache_threshold: 0
mask_prompt: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 4
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 1
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
""")
    out, _ = run(["train", "-c", "lora.yaml", "--iters", "2", "--json"], capsys)
    assert events(out)[-1]["iteration"] == 2, "a flag wins over the file"
    from mlx_lora import load_adapter

    adapter = load_adapter("my_adapters")
    assert adapter.config.rank == 4 and len(adapter.modules) == 4


def test_test_and_exact_match(trained, data, capsys):
    args = ["test", "--model", PATH, "--data", data, "--mask-prompt", "--json"]
    base = events(run(args, capsys)[0])[0]
    found = events(run([*args, "--adapter-path", trained, "--exact-match", "6", "--max-tokens", "48"], capsys)[0])[0]
    assert found["loss"] < base["loss"] and found["answered"] == 6 and 0 <= found["exact_match"] <= 1
    out, _ = run(args[:-1], capsys)
    assert "perplexity" in out


def test_generate(trained, capsys):
    args = ["generate", "--model", PATH, "--prompt", "Who left the kite?", "--max-tokens", "8"]
    plain, err = run(args, capsys)
    assert plain.strip() and "tokens/s" in err
    answer = events(run([*args, "--json"], capsys)[0])[0]
    assert answer["text"].strip() == plain.strip() and answer["generation_tokens"] <= 8
    run([*args, "--adapter-path", trained, "--temp", "0.8", "--seed", "3"], capsys)
    one, two = (run([*args, "--temp", "0.8", "--seed", "3"], capsys)[0] for _ in range(2))
    assert one == two
    run(["generate", "--model", PATH, "--prompt", "Once", "--ignore-chat-template", "-m", "4"], capsys)


def test_generate_reads_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello there"))
    out, _ = run(["generate", "--model", PATH, "--prompt", "-", "-m", "4"], capsys)
    assert out.strip()


def test_chat(trained, capsys, monkeypatch):
    lines = ["Hello", "/adapter", "/adapters", "/adapter none", "And now?", "/compare", "/compare What is it?"]
    lines += [
        "/adapter nowhere",
        "/adapter adapters",
        "/reset",
        "/compare",
        "/system Be brief.",
        "Hi",
        "/wibble",
        "/help",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, "/quit"]) + "\n"))
    out, err = run(["chat", "--model", PATH, "--adapter-path", trained, "--max-tokens", "6"], capsys)
    assert out.count("[base]\n") == 2 and out.count("[adapters]\n") == 2
    assert "no adapter named 'nowhere'" in err and "/wibble is not a command" in err and "no question yet" in err
    assert "ms)" in err and len(out.strip().splitlines()) >= 7


def test_the_prompt_cache_of_chat_does_not_change_answers(trained):
    """A conversation that reuses the prompt cache gets the same answers as one that does not."""
    from mlx_lora import load
    from mlx_lora.config import GenerateConfig
    from mlx_lora.serving.engine import Engine
    from mlx_lora.serving.requests import Request

    engine = Engine(*load(PATH))
    engine.bank.add("a", trained)
    config = GenerateConfig(max_tokens=12)

    def talk(fresh: bool) -> list[str]:
        messages, said = [], []
        for turn, adapter in enumerate(["a", "a", None, "a"]):
            if fresh:
                engine.prompt_cache.trim_to(n_sequences=0)
            messages.append({"role": "user", "content": f"Question {turn}: where is the red kite?"})
            pieces = list(engine.stream(Request(engine.prompt(messages), config, adapter)))
            assert (pieces[-1].cached_tokens > 0) == (not fresh and turn != 0 and adapter is not None)
            said.append("".join(p.text for p in pieces))
            messages.append({"role": "assistant", "content": said[-1]})
        return said

    assert talk(fresh=False) == talk(fresh=True)


def test_fuse_convert_inspect(trained, data, tmp_path, capsys):
    out, err = run(["fuse", "--model", PATH, "--adapter-path", trained, "--save-path", tmp_path / "fused"], capsys)
    assert "cosine" in out and "Saved" in err
    assert not list(tmp_path.glob(".fused*"))
    out, _ = run(["convert", trained, tmp_path / "peft", "--to", "peft", "--model", "some/base", "--json"], capsys)
    assert events(out)[0]["target"] == "peft"
    out, _ = run(["inspect", tmp_path / "peft", "--json"], capsys)
    facts = events(out)[0]
    assert facts["format"] == "peft" and facts["base"] == "some/base" and facts["problems"] == []
    assert facts["rank"] == [8] and facts["scale"] == [20.0]
    run(["convert", tmp_path / "peft", tmp_path / "back", "--to", "mlx-lm"], capsys)
    assert (tmp_path / "back" / "adapters.safetensors").stat().st_size > 0
    out, _ = run(["inspect", trained], capsys)
    assert "parameters" in out
    args = ["--data", data, "--mask-prompt", "--json"]
    live = events(run(["test", "--model", PATH, "--adapter-path", trained, *args], capsys)[0])[0]["loss"]
    fused = events(run(["test", "--model", tmp_path / "fused", *args], capsys)[0])[0]["loss"]
    assert abs(live - fused) < 2e-2, "bfloat16 or float16 weights round, but not more than this"


def test_doctor(capsys, monkeypatch):
    out, _ = run(["doctor"], capsys)
    assert "backend" in out
    found = events(run(["doctor", "--json"], capsys)[0])[0]
    assert found["backend"] in ("CPU", "Metal", "CUDA") and found["matmul_gflops"] > 0
    assert found["kernels"] == ("used" if found["backend"] == "Metal" else "not used")
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    found = events(run(["doctor", "--json"], capsys)[0])[0]
    assert found["kernels"] == "used" and any("on" in note for note in found["advice"]) == (found["backend"] == "CPU")


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "mlx_lora", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and "mlx-lora" in done.stdout


@pytest.mark.parametrize(
    ("rank", "error", "waits"),
    [
        ("0", ConfigError("wrong", "Mend it."), 0),
        ("1", ConfigError("wrong", "Mend it."), 1),
        ("1", LostProcessError("rank 0 has died", "Look at it.", 0), 0),  # rank 0 says nothing any more
        ("1", LostProcessError("rank 2 has died", "Look at it.", 2), 1),
    ],
)
def test_rank_0_alone_shows_an_error_of_all_processes(rank, error, waits, monkeypatch, capsys):
    """The others wait until ``mlx.launch`` has ended them, and show the error where it has not."""

    def fails(*args, **options):
        raise error

    slept = []
    monkeypatch.setenv("MLX_RANK", rank)
    monkeypatch.setattr(commands.cli, "main", fails)
    monkeypatch.setattr(commands.time, "sleep", slept.append)
    with pytest.raises(SystemExit):
        main(["inspect"])
    assert slept == [commands._LAUNCHER] * waits and error.message in capsys.readouterr().err
