"""The report of ``bench check``: written, read back, shown and gathered; estimates and kernels chosen from it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_lora import device
from mlx_lora.bench import Report, assumptions_of, gathered, markdown, read_report, table, verdicts, write_report
from mlx_lora.bench.chips import BANDWIDTH
from mlx_lora.bench.estimate import EXTRA_LAUNCHES, Assumptions, token_seconds
from mlx_lora.bench.markdown import USED_BY
from mlx_lora.bench.models import base_bytes, random_model, random_nf4_model, with_same_weights
from mlx_lora.bench.report import DONE, Failure, Figure, KernelTests, Part, figure
from mlx_lora.bench.timing import Clock, OutOfTime, in_turn
from mlx_lora.cli.main import cli
from mlx_lora.errors import FormatError
from mlx_lora.kernels import registry

ROOT = Path(__file__).resolve().parents[2]
CHIP = "Apple M3 Pro"


def report(efficiency: float = 0.6, microseconds: float = 4.0, **changes) -> Report:
    """A report of a GPU that reaches this share of its bandwidth and takes this long for a launch."""
    given, figures = Assumptions(efficiency, microseconds), []
    for model in ("Llama-3.2-1B", "Qwen3-4B"):
        for path in EXTRA_LAUNCHES:
            speed = 1 / token_seconds(model, path, BANDWIDTH[CHIP], given)
            expected = 1 / token_seconds(model, path, BANDWIDTH[CHIP], Assumptions())
            figures.append(figure([speed], "decoding", model, "a token", path, "tokens/s", estimate=expected))
        for part in {part for parts in USED_BY.values() for part in parts}:
            for path, time in (("kernels", 10.0), ("plain", 12.0)):
                figures.append(figure([time - 1, time, time + 1], "kernels", model, part, path, "us"))
    fields = {
        "machine": dataclasses.replace(device.describe(), chip=CHIP, backend="Metal"),
        "advice": ["Close other programs."],
        "versions": {"mlx": "0.32.4"},
        "started": "2026-01-02T03:04:05+00:00",
        "minutes": 6.0,
        "emulated": False,
        "seconds": 340.0,
        "ended": "finished",
        "parts": [Part("kernels", DONE, 12.0, ["a note"], ["nominal", "fair"])],
        "tests": KernelTests("Metal", 3, 2, 50.0, [], {"counted by the emulator": 1}),
        "figures": figures,
    }
    return Report(**{**fields, **changes})


# ------------------------------------------------------------------------------------------------------- its schema


def test_read_back(tmp_path):
    made = report(
        tests=KernelTests("Metal", 3, 1, 50.0, [Failure("t.py::test[metal-1]", "301", "no", "pytest t.py")], {"a": 1})
    )
    write_report(made, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == made
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_every_report_in_the_repository_is_read():
    for path in (ROOT / "scripts" / "benchmarks" / "reports").glob("*.json"):
        assert not read_report(path).emulated, path


def test_all_faults_are_named_at_once(tmp_path):
    path = tmp_path / "report.json"
    write_report(report(), path)
    found = json.loads(path.read_text())
    del found["machine"]["chip"]
    found["figures"][3]["median"] = "fast"
    found["tests"]["passed"] = 1.5
    found["color"] = "red"
    path.write_text(json.dumps(found))
    with pytest.raises(FormatError) as error:
        read_report(path)
    lines = error.value.message.splitlines()
    assert sorted(line.removeprefix(f"{path}: ") for line in lines) == [
        "report.color is unknown",
        "report.figures[3].median is 'fast', not a float",
        "report.machine.chip is missing",
        "report.tests.passed is 1.5, not a int",
    ]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99}'])
def test_what_is_no_report_is_refused(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(FormatError, match="is not a report"):
        read_report(tmp_path / "report.json")


def test_spread_stays_within_the_samples():
    for samples in ([3.0], [1.0, 2.0], [1.0, 2.0, 9.0], list(map(float, range(1, 12)))):
        f = figure(samples, "p", "m", "w", "base", "ms")
        assert min(samples) <= f.low <= f.median <= f.high <= max(samples) and f.samples == len(samples)
    assert (f.low, f.median, f.high) == (3, 6, 9)


def test_a_figure_of_more_samples_takes_the_place_of_the_earlier_one():
    r = report(figures=[])
    for samples in ([1.0], [1.0, 3.0]):
        r.put(figure(samples, "decoding", "m", "a token", "base", "ms"))
    assert [(f.median, f.samples) for f in r.figures] == [(2.0, 2)]


# -------------------------------------------------------------------------------------------------------- as a table


def test_markdown_shows_the_estimate_and_how_far_off_it_was():
    text = markdown(
        report(tests=KernelTests("Metal", 3, 1, 5.0, [Failure("t.py::t[metal]", "301", "a | b", "pytest t")], {"x": 1}))
    )
    made = report().find("decoding", "Qwen3-4B", "a token", "base", "tokens/s")
    assert f"{made.off:+.0%}".replace("%", " %") == "+33 %" and "| +33 % |" in text
    for part in (
        "Apple M3 Pro, Metal",
        "| measured |",
        "1 passed, 1 failed, 1 skipped",
        "- 1 skipped: x",
        "a \\| b",
        "301",
    ):
        assert part in text, part
    assert "nominal -> fair" in text and "a note" in text and "- Close other programs." in text


def test_markdown_of_a_dry_run_claims_nothing():
    text = markdown(report(emulated=True))
    assert "A dry run" in text and "| no: a dry run measures nothing |" in text


def test_gathered_takes_the_newest_report_of_a_chip():
    old = report(0.1, started="2025-01-01T00:00:00+00:00")
    other = report(machine=dataclasses.replace(report().machine, chip="Apple M1"))
    text = gathered([report(), old, other, report(emulated=True, started="2027-01-01T00:00:00+00:00")])
    assert [line.split(" | ")[0] for line in text.splitlines()[4:]] == ["| Apple M1"] * 2 + ["| Apple M3 Pro"] * 2
    assert text.startswith("Decoding:")
    speed = report().find("decoding", "Qwen3-4B", "a token", "kernels", "tokens/s").median
    assert text.splitlines()[-1].split(" | ")[5] == f"{speed:.3g} tokens/s"
    assert gathered([]) == "No report yet."


# -------------------------------------------------------------------------------------------------------- estimates


def test_estimates_made_again_from_a_report():
    """A report whose figures follow from two constants gives these constants back."""
    given = assumptions_of([report(0.6, 4.0)])
    assert given.efficiency == pytest.approx(0.6) and given.microseconds == pytest.approx(4.0)
    assert CHIP in given.source
    assert assumptions_of([]) == Assumptions() == assumptions_of([report(emulated=True)])
    cuda = report(machine=dataclasses.replace(report().machine, backend="CUDA"))
    assert assumptions_of([cuda]) == Assumptions(), "the table is about Macs"
    unknown = assumptions_of([report(machine=dataclasses.replace(report().machine, chip="Apple M9"))])
    assert unknown.efficiency == 0.8 and unknown.microseconds == pytest.approx(4.0)


def test_estimate_command(tmp_path):
    write_report(report(0.6, 4.0), tmp_path / "report.json")
    run = CliRunner().invoke
    default, made = (
        run(cli, ["bench", "estimate"]),
        run(cli, ["bench", "estimate", "--report", str(tmp_path / "report.json")]),
    )
    assert default.stdout == table() + "\n"
    assert made.stdout == table(Assumptions(0.6, 4.0)) + "\n" != default.stdout
    assert "60 % of the bandwidth" in made.stderr and "measured on Apple M3 Pro" in made.stderr
    assert run(cli, ["bench", "estimate", "--efficiency", "0.6", "--microseconds", "4"]).stdout == made.stdout


def test_the_documents_say_what_the_reports_say():
    gather = [sys.executable, str(ROOT / "scripts" / "benchmarks" / "gather.py"), "--check"]
    done = subprocess.run(gather, capture_output=True, text=True)
    assert done.returncode == 0, f"run ./scripts/bench gather: {done.stdout}{done.stderr}"


def test_gathering_writes_both_documents(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    import gather

    found = gather.documents([report(0.6, 4.0)])
    text = "\n".join(gather.with_block(path.read_text(), *next(iter(blocks.items()))) for path, blocks in found.items())
    assert "| Apple M3 Pro | 2 of 3 | Llama-3.2-1B | a token |" in text and "60 % of the bandwidth" in text
    with pytest.raises(AssertionError, match="marks of"):
        gather.with_block("", "gathered", "text")


def test_sizes_of_the_models():
    """Counted from the config, the bytes are those of the arrays."""
    model = random_model("tiny", mx.float16)
    linear = [m for m in model.modules() if hasattr(m, "scales")]
    assert base_bytes("tiny") == sum(a.nbytes for m in linear for a in m.parameters().values())
    assert base_bytes("Qwen3-4B") == pytest.approx(2.26e9, rel=1e-2)


def test_models_over_the_same_arrays_take_no_more_memory():
    tokens = mx.array([[1, 2, 3]])
    model = random_model("tiny", mx.float32)
    mx.synchronize()
    before = mx.get_active_memory()
    other = with_same_weights("tiny", model)
    mx.eval(other.parameters())
    assert mx.get_active_memory() - before < 0.05 * base_bytes("tiny")
    assert mx.array_equal(model(tokens), other(tokens)).item()
    assert mx.isfinite(random_nf4_model("tiny", mx.float32)(tokens)).all().item()


# ----------------------------------------------------------------------------------------------- which kernels to take


def slower(kernel: str) -> list[Figure]:
    figures = report().figures
    part = USED_BY[kernel][-1]
    return [
        dataclasses.replace(f, median=12.5) if (f.model, f.what, f.path) == ("Qwen3-4B", part, "kernels") else f
        for f in figures
    ]


def test_a_kernel_is_taken_where_all_tests_pass_and_it_is_never_slower():
    assert set(verdicts(report()).values()) == {""}
    found = verdicts(report(figures=slower("dora_norm")))
    assert found.pop("dora_norm") == "slower than plain operations: norms, DoRA of Qwen3-4B"
    assert set(found.values()) == {""}
    failing = KernelTests("CUDA", 3, 2, 5.0, [Failure("t", "", "", "")], {})
    assert set(verdicts(report(tests=failing)).values()) == {"1 kernel tests fail"}
    assert set(verdicts(report(tests=KernelTests("CUDA", 3, 2))).values()) == {"2 of 3 kernel tests have run"}
    assert set(verdicts(report(parts=[])).values()) == {"some of its parts are not measured"}
    without = [f for f in report().figures if f.what != "MLP"]
    assert [k for k, why in verdicts(report(figures=without)).items() if why] == ["lora_swiglu"]


def test_every_kernel_that_cuda_takes_has_its_evidence():
    assert set(USED_BY) >= registry.TAKEN_ON_CUDA.keys()
    for kernel, path in registry.TAKEN_ON_CUDA.items():
        evidence = read_report(ROOT / path)
        assert evidence.machine.backend == "CUDA" and verdicts(evidence)[kernel] == "", kernel


# ------------------------------------------------------------------------------------------------------------- timing


def test_ways_take_turns():
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    rounds = [{k: len(v) for k, v in samples.items()} for samples in in_turn(ways, Clock(60), most=2)]
    assert order == [*"ab", *"ab", *"ba"], "a warm-up, then every other round backwards"
    assert rounds == [{"a": 1, "b": 1}, {"a": 2, "b": 2}]


def test_no_round_begins_without_time():
    ways = {"a": lambda: 1.0}
    with pytest.raises(OutOfTime, match="before a had run"):
        next(in_turn(ways, Clock(-1), most=2))


def test_thermal_state(monkeypatch):
    from mlx_lora.bench import thermal

    said = {
        "osascript": "1",
        "pmset -g therm": "Note: no warning\n CPU_Speed_Limit \t= 80",
        "pmset -g": " lowpowermode   1",
    }
    monkeypatch.setattr(thermal, "_output", lambda *c: said.get(" ".join(c), said.get(c[0], "")))
    monkeypatch.setattr(thermal.sys, "platform", "darwin")
    assert thermal.thermal_state() == "fair; CPU_Speed_Limit = 80; low power mode"
    said.clear()
    assert thermal.thermal_state() == "unknown"
    monkeypatch.setattr(thermal.sys, "platform", "linux")
    said["nvidia-smi"] = "61, 1980 MHz, 0x0000000000000000"
    assert thermal.thermal_state() == "61 C, 1980 MHz, throttle reasons 0x0000000000000000"
