"""``scripts/check_gpu`` and ``bench check``: a dry run of all of it, and what may go wrong on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import mslemu
from mlx_lora import device
from mlx_lora.bench import Check, check, read_report
from mlx_lora.bench.kernel_tests import run_kernel_tests
from mlx_lora.bench.report import CUT_SHORT, DONE, FAILED, NOT_REACHED
from mlx_lora.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ASKED = ("prepare", "add", "remove")  # functions of environment.sh
LINUX = 'case "$1" in -s) echo Linux ;; *) echo x86_64 ;; esac\n'


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


@pytest.fixture
def scripts(tmp_path) -> Path:
    """A copy of the script, with an ``environment.sh`` that installs nothing and notes what it was asked for."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    shutil.copy(ROOT / "scripts" / "check_gpu", folder)
    program(tmp_path / "venv" / "bin" / "python", f'PYTHONPATH="{ROOT}" exec "{sys.executable}" "$@"\n')
    (folder / "environment.sh").write_text(
        f'cd "{ROOT}"\nVENV="{tmp_path}/venv"\n'
        + "".join(
            f'{name}() {{ echo "{name} $*" "${{WHEELS:-}}" >> "{tmp_path}/asked"; }}\n'
            for name in ("prepare", "add", "remove")
        )
    )
    return folder


def run(scripts: Path, *args: str, path: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": os.pathsep.join(filter(None, [path, os.environ["PATH"]]))}
    command = [str(scripts / "check_gpu"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=900)


# ---------------------------------------------------------------------------------------------------------- the script


@pytest.mark.skipif(mslemu.unavailable() is not None, reason=str(mslemu.unavailable()))
def test_dry_run(scripts, tmp_path):
    """Everything, with the emulator in the GPU's place."""
    done = run(scripts, "--emulate", "--tests", "3", "--minutes", "10", "--out", "found", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "found" / "report.json")
    assert [(part.name, part.state, part.notes) for part in report.parts] == [
        (name, DONE, []) for name in ("doctor", *check.SHARES)
    ]
    assert report.emulated and report.ended == "finished"
    assert (report.tests.selected, report.tests.passed, report.tests.failures) == (3, 3, [])
    assert {f.how for f in report.figures} == {"dry run"} and all(f.median > 0 for f in report.figures)
    paths: dict[str, set[str]] = {}
    for f in report.figures:
        paths.setdefault(f.part, set()).add(f.path)
    assert paths == {
        "kernels": {"base", "kernels", "plain", "mlx-lm"},
        "decoding": {"base", "kernels", "plain", "mlx-lm", "fused", "mlx-lm / kernels", "plain / kernels"},
        "training": {
            *("LoRA", "DoRA", "LoRA on NF4", "LoRA, mlx-lm", "DoRA, mlx-lm"),
            *("LoRA: mlx-lora / mlx-lm", "DoRA: mlx-lora / mlx-lm"),
        },
        "prompts": {"base", "kernels", "mlx-lm", "kernels / base"},
        "swaps": {"mlx-lora"},
    }
    assert {f.model for f in report.figures if f.part == "decoding"} == {"tiny", "tiny Qwen3"}
    assert len({f.what for f in report.figures if f.part == "training"}) == 4, "two lengths: times and peaks"
    assert done.stdout == (tmp_path / "found" / "report.md").read_text() and "# mlx-lora on" in done.stdout
    assert "3 passed" in (tmp_path / "found" / "kernel-tests.log").read_text()


def test_a_machine_without_a_gpu_is_refused_in_one_line(scripts, tmp_path):
    program(tmp_path / "bin" / "uname", LINUX)
    program(tmp_path / "bin" / "nvidia-smi", "exit 9\n")
    done = run(scripts, path=str(tmp_path / "bin"))
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "neither Metal nor CUDA" in done.stderr and not (tmp_path / "asked").exists()


@pytest.mark.parametrize(("driver", "extra"), [("12.4", "cuda12"), ("13.0", "cuda13")])
def test_cuda_gets_an_environment_of_its_own(driver, extra, scripts, tmp_path):
    """MLX's files for CUDA and for CPUs have the same names, so one package takes the other's place."""
    program(tmp_path / "bin" / "uname", LINUX)
    program(
        tmp_path / "bin" / "nvidia-smi",
        f'echo "| NVIDIA-SMI 575.1   Driver Version: 575.1   CUDA Version: {driver} |"\n',
    )
    (tmp_path / "wheels").mkdir()
    here = scripts / "environment.sh"
    here.write_text(here.read_text().replace(f'cd "{ROOT}"', f'cd "{tmp_path}"'))
    python = '[ "$1" != -m ] || { echo "$MLX_LORA_KERNELS $*"; exit; }\n'
    python += 'case "$2" in *cuda*) exit 1 ;; *) echo 0.32.4 ;; esac\n'
    program(tmp_path / ".venv-cuda" / "bin" / "python", python)
    done = run(scripts, "--wheels", "wheels", "--minutes", "3", path=str(tmp_path / "bin"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wheels = tmp_path / "wheels"
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"prepare test {wheels}",
        f"remove mlx-cpu mlx-cuda-12 mlx-cuda-13 {wheels}",
        f"add mlx[{extra}]==0.32.4 {wheels}",
    ]
    assert done.stdout == "on -m mlx_lora bench check --minutes 3\n"


@pytest.mark.parametrize("uv", [False, True])
@pytest.mark.parametrize("wheels", ["", "a folder"])
def test_installing_from_a_folder_asks_no_index(wheels, uv, tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "environment.sh", tmp_path / "scripts")
    log = tmp_path / "log"
    note = f'printf "<%s>" "$@" >> "{log}"; echo >> "{log}"\n'
    program(tmp_path / ".venv" / "bin" / "python", note)
    (tmp_path / "pyproject.toml").touch()
    if uv:
        program(tmp_path / "bin" / "uv", note)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", **({"WHEELS": wheels} if wheels else {})}
    script = f'set -euo pipefail; source "{tmp_path}/scripts/environment.sh"; prepare test'
    subprocess.run(["bash", "-c", script], check=True, env=environment, capture_output=True)
    (line,) = log.read_text().splitlines()
    assert line.endswith("<-e><.[test]>") and line.startswith("<pip>" if uv else "<-m><pip>")
    assert ("<--no-index><--find-links=a folder>" in line) == bool(wheels)


# ---------------------------------------------------------------------------------------------------- what may go wrong


def test_refused(tmp_path):
    if device.is_cpu():
        with pytest.raises(ConfigError, match="neither Metal nor CUDA"):
            Check(tmp_path)
    with pytest.raises(ConfigError, match="above 0"):
        Check(tmp_path, minutes=0, emulate=True)


def test_no_time_leaves_a_whole_report(tmp_path):
    done = Check(tmp_path, minutes=1e-4, emulate=True)
    names = [part.name for part in done.run()]
    report = read_report(tmp_path / "report.json")
    assert report == done.report and report.ended == "out of time" and names[0] == "doctor"
    assert {part.state for part in report.parts[2:]} == {NOT_REACHED}
    assert "not reached" in (tmp_path / "report.md").read_text()


def test_an_interrupted_run_leaves_a_whole_report(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "WORKER", worker(tmp_path, "time.sleep(60)"))
    monkeypatch.setattr(check.Check, "_tests", lambda self: iter(()))
    running = Check(tmp_path / "out", emulate=True)
    parts = running.run()
    while next(parts).name != "kernels":
        pass
    with pytest.raises(KeyboardInterrupt):
        parts.throw(KeyboardInterrupt)
    report = read_report(tmp_path / "out" / "report.json")
    assert report.ended == "interrupted" and [p.state for p in report.parts][2] == "running"


def worker(folder: Path, fault: str) -> tuple[str, ...]:
    """A worker that has one figure for each part, and does ``fault`` amid the first one, once."""
    path = folder / "worker.py"
    path.write_text(
        textwrap.dedent("""
        import json, os, pathlib, sys, time
        fig = dict(model="m", what="w", path="base", unit="ms", median=1.0, low=1.0, high=1.0, samples=1)
        say = lambda event, part, **more: print(json.dumps({"event": event, "part": part, **more}), flush=True)
        for part in json.loads(sys.argv[1])["shares"]:
            say("begin", part, seconds=0.5, thermal="nominal")
            say("figure", part, **fig)
            if part == "kernels":
                FAULT
            say("end", part, state="done", thermal="fair")
        """).replace("FAULT", fault)
    )
    return sys.executable, str(path)


@pytest.mark.parametrize(
    ("fault", "state", "note"), [("os.abort()", FAILED, "code -6"), ("time.sleep(60)", CUT_SHORT, "too long")]
)
def test_a_part_that_ends_or_stops_its_process_does_not_end_the_others(fault, state, note, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "WORKER", worker(tmp_path, fault))
    monkeypatch.setattr(check, "GRACE", 4)
    monkeypatch.setattr(check.Check, "_tests", lambda self: iter(()))
    done = Check(tmp_path / "out", emulate=True)
    list(done.run())
    report = read_report(tmp_path / "out" / "report.json")
    states = {part.name: part.state for part in report.parts[2:]}
    assert states == {**dict.fromkeys(states, DONE), "kernels": state}
    assert note in report.parts[2].notes[0] and len(report.figures) == 5
    assert report.parts[3].thermal == ["nominal", "fair"]


KERNEL_TESTS = """
import os, time
import mlx.core as mx, pytest

@pytest.fixture(params=["metal", "reference"])
def backend(request):
    return request.param

@pytest.mark.parametrize("n", range(3))
def test_passes(backend, n):
    mx.random.seed(n)

@pytest.mark.parametrize("n", range(2))
def test_fails(backend, n):
    mx.random.seed(300 + n)
    assert n == 1, "relative error 2"

def test_ends_the_process(backend):
    mx.random.seed(7)
    os.abort()

def test_stops(backend):
    time.sleep(600)

def test_is_skipped(backend):
    pytest.skip("counted by the emulator")

def test_of_no_backend():
    assert False
"""


def test_kernel_tests_go_on_whatever_one_of_them_does(tmp_path):
    """Failures are listed with seed and command, and the tests of one backend only are run, in turn."""
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(KERNEL_TESTS)
    shutil.copy(ROOT / "tests" / "kernel_run.py", tmp_path / "tests")
    log = tmp_path / "kernel-tests.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    *_, tests = run_kernel_tests(tmp_path, log, "metal", 120, environment, folders=("tests/kernels",), patience=6)
    assert (tests.backend, tests.selected, tests.passed, tests.ran) == ("Metal", 8, 4, 8)
    assert tests.skipped == {"counted by the emulator": 1}
    found = {f.test.rpartition("::")[2]: f for f in tests.failures}
    assert set(found) == {"test_fails[metal-0]", "test_ends_the_process[metal]", "test_stops[metal]"}
    failed = found["test_fails[metal-0]"]
    assert failed.seed == "300" and "relative error 2" in failed.message
    assert failed.command.endswith("-m pytest 'tests/kernels/test_some.py::test_fails[metal-0]'")
    assert "code -6" in found["test_ends_the_process[metal]"].message
    assert "did not end in its time" in found["test_stops[metal]"].message
    order = [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines()]
    begun = [line["test"].rpartition("::")[2] for line in order if "begins" in line]
    assert begun[:3] == ["test_passes[metal-0]", "test_fails[metal-0]", "test_ends_the_process[metal]"]
    assert sorted(set(begun)) == sorted(begun), "none runs twice"


def test_kernel_tests_keep_to_their_time(tmp_path):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(KERNEL_TESTS)
    shutil.copy(ROOT / "tests" / "kernel_run.py", tmp_path / "tests")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    *_, tests = run_kernel_tests(tmp_path, tmp_path / "log", "metal", 0.1, environment, folders=("tests/kernels",))
    assert tests.ran < 8
