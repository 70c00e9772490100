"""The papers' figures computed from shapes, and the known misprints."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from conftest import LLAMA, make_model
from mlx_lora import AdapterConfig, attach
from mlx_lora.cli.tables import tables
from mlx_lora.model.attach import parameter_counts
from mlx_lora.planning.tables import (
    ALL,
    GPT2_M,
    GPT3,
    LLAMA3_8B,
    LLAMA_7B,
    LLAMA_13B,
    LLAMA_65B,
    ROBERTA_BASE,
    ROBERTA_LARGE,
    Shape,
    dora,
    lora,
    rows,
    vera,
)

QV = ("q", "v")


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (lora(GPT3, QV, 1), 4_718_592),
        (lora(GPT3, QV, 8), 37_748_736),
        (lora(GPT3, QV, 4), 18_874_368),
        (lora(ROBERTA_BASE, QV, 8), 294_912),
        (lora(ROBERTA_LARGE, QV, 8), 786_432),
        (lora(GPT2_M, QV, 4), 393_216),
        (vera(LLAMA_7B, ALL, 256), 1_417_216),
        (vera(LLAMA_7B, ALL, 1024), 1_589_248),
        (vera(LLAMA_13B, ALL, 1024), 2_416_640),
        (lora(LLAMA_7B, ALL, 64), 159_907_840),
        (lora(LLAMA_13B, ALL, 64), 250_347_520),
        (LLAMA_7B.parameters(), 6_738_415_616),
        (LLAMA_13B.parameters(), 13_015_864_320),
        (LLAMA_65B.parameters(), 65_285_660_672),
        (LLAMA3_8B.parameters(), 8_030_261_248),
    ],
)
def test_counts(got, expected):
    assert got == expected


def test_each_figure_agrees_or_says_why_not():
    for row in rows():
        inexact = row.note.startswith(("a round", "a bound", "37.7 MB", "24.6 %"))
        assert row.agrees or row.note, row
        assert inexact or row.agrees != row.note.startswith("misprint"), row
    assert sum(row.note.startswith("misprint") for row in rows()) == 6


@pytest.mark.parametrize(("method", "count"), [("lora", lora), ("dora", dora), ("vera", vera)])
def test_the_same_count_as_a_real_model(method, count):
    shape = Shape(LLAMA["num_hidden_layers"], 64, 128, 32, 96)
    model = make_model()
    assert parameter_counts(model)[1] == shape.parameters()
    attach(model, AdapterConfig(method=method, rank=4, num_layers=-1))
    assert parameter_counts(model)[0] == count(shape, ALL, 4)


def test_the_command():
    done = CliRunner().invoke(tables, ["--json"])
    found = [json.loads(line) for line in done.output.splitlines()]
    assert len(found) == len(rows()) and all(row["event"] == "TableRow" for row in found)
    assert "37,748,736" in CliRunner().invoke(tables, []).output
