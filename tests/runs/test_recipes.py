"""Each recipe of examples/recipes trains and measures on twenty rows with the columns of its data set.

The rows are made up, and stand in for ``datasets.load_dataset``; the model is the tiny base.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml

import mlx_lora
from mlx_lora.cli.main import main
from mlx_lora.config import DataConfig
from mlx_lora.data import questions
from mlx_lora.tiny_base import PATH

RECIPES = Path(mlx_lora.__file__).parents[1] / "examples" / "recipes"
LINE = "the cat sat on a mat and saw red birds fly over green hills while rain fell "


def text(i: int, words: int = 6) -> str:
    return " ".join((LINE * 5).split()[3 * i % 17 :][:words])


def turns(i: int, answer: str) -> list[dict]:
    return [{"role": "user", "content": f"Say {text(i, 2)}"}, {"role": "assistant", "content": answer}]


def call(i: int) -> str:
    return "<tool_call>\n" + json.dumps({"name": "find", "arguments": {"what": text(i, 1)}}) + "\n</tool_call>"


TOOL = {"type": "function", "function": {"name": "find", "description": "Find", "parameters": {"type": "object"}}}
ULTRA = ("train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen")
# (path, config): the splits, a row, and the names of its label, as on the Hub.
SETS = {
    ("nyu-mll/glue", "sst2"): (
        ("train", "validation", "test"),
        lambda i: {"sentence": text(i) + " ", "label": i % 2, "idx": i},
        ["negative", "positive"],
    ),
    ("nyu-mll/glue", "cola"): (
        ("train", "validation", "test"),
        lambda i: {"sentence": text(i), "label": i % 2, "idx": i},
        ["unacceptable", "acceptable"],
    ),
    ("nyu-mll/glue", "mrpc"): (
        ("train", "validation", "test"),
        lambda i: {"sentence1": text(i), "sentence2": text(i + 1), "label": i % 2, "idx": i},
        ["not_equivalent", "equivalent"],
    ),
    ("nyu-mll/glue", "rte"): (
        ("train", "validation", "test"),
        lambda i: {"sentence1": text(i, 9), "sentence2": text(i), "label": i % 2, "idx": i},
        ["entailment", "not_entailment"],
    ),
    ("mlx-community/WikiSQL", None): (
        ("train", "valid", "test"),
        lambda i: {"text": f"table: 1-{i}\ncolumns: A, B\nQ: {text(i)}\nA: SELECT A FROM 1-{i} WHERE B = 'x'"},
        None,
    ),
    ("knkarthick/samsum", None): (
        ("train", "validation", "test"),
        lambda i: {"id": str(i), "dialogue": f"Ann: {text(i)}\r\nBob: {text(i + 1)}", "summary": text(i, 3)},
        None,
    ),
    ("HuggingFaceTB/smoltalk", "everyday-conversations"): (
        ("train", "test"),
        lambda i: {"full_topic": text(i, 2), "messages": turns(i, "Hello.") + turns(i + 1, text(i))},
        None,
    ),
    ("NousResearch/hermes-function-calling-v1", "func_calling_singleturn"): (
        ("train",),
        lambda i: {
            "id": str(i),
            "conversations": [
                {"from": "system", "value": f"You call functions. <tools>[{json.dumps(TOOL)}]</tools>"},
                {"from": "human", "value": text(i)},
                {"from": "gpt", "value": call(i)},
            ],
            "tools": json.dumps([TOOL]),
            "category": "Search",
            "subcategory": "Birds",
            "task": "Find a bird",
        },
        None,
    ),
    ("HuggingFaceH4/ultrafeedback_binarized", None): (
        ULTRA,
        lambda i: {
            "prompt": f"Say {text(i, 2)}",
            "prompt_id": str(i),
            "chosen": turns(i, text(i)),
            "rejected": turns(i, text(i + 5)),
            "messages": turns(i, text(i)),
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        },
        None,
    ),
}


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """Serve twenty rows for the data sets of the recipes, and refuse whatever the Hub would refuse."""
    import datasets

    def load_dataset(path, split=None, name=None):
        splits, row, names = SETS[path, name]
        assert re.fullmatch(r"(\w+)(\[(\d+%)?:(\d+%)?\])?", split)[1] in splits, split
        rows = datasets.Dataset.from_list([row(i) for i in range(20)])
        if names and split.startswith("test"):
            rows = rows.map(lambda _: {"label": -1})
        return rows.cast_column("label", datasets.ClassLabel(names=names)) if names else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def run(*words: object, capsys) -> list[dict]:
    """The reports of a command."""
    with pytest.raises(SystemExit) as exit:
        main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert exit.value.code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def settings(recipe: Path) -> dict:
    return yaml.safe_load(recipe.read_text())


def short(recipe: Path, folder: Path) -> list:
    """The flags that make a recipe quick. Everything about the data and the loss is left as it is."""
    given = settings(recipe)
    flags = {"--model": PATH, "--adapter-path": folder, "--batch-size": 10, "--epochs": 1, "--steps-per-eval": 2}
    flags |= {"--warmup": 1, "--steps-per-report": 1, "--save-every": 9, "--num-layers": 1, "--val-batches": 1}
    if "metric" in given:
        flags |= {"--metric-rows": 2, "--metric-max-tokens": 4}
    if "patience" in given:
        flags |= {"--patience": 1, "--batch-size": 4}
    return ["-c", recipe, *(word for flag in flags.items() for word in flag)]


NAMES = [recipe.stem for recipe in sorted(RECIPES.glob("*.yaml"))]


def test_the_tasks_are_there():
    assert set(NAMES) == {"wikisql", "samsum", "sst2", "mrpc", "cola", "rte", "chat", "tools", "dpo"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_measures(name, tmp_path, capsys):
    recipe, folder = RECIPES / f"{name}.yaml", tmp_path / "adapters"
    given = settings(recipe)
    reports = run("train", *short(recipe, folder), capsys=capsys)
    trained = [report for report in reports if report["event"] == "TrainReport"]
    validated = [report for report in reports if report["event"] == "ValReport"]
    assert trained[-1]["trained_tokens"] > 0 and validated
    assert all(math.isfinite(report["train_loss"]) for report in trained)
    for metric in filter(None, given.get("metric", "").split(",")):
        assert math.isfinite(validated[-1]["metrics"][metric])
    assert (folder / "adapters.safetensors").is_file()
    flags = ["--model", PATH, "--adapter-path", folder, "--test-batches", 1]
    flags += ["--metric-rows", 2, "--max-tokens", 4] if "metric" in given else []
    (measured,) = [r for r in run("test", "-c", recipe, *flags, capsys=capsys) if r["event"] == "TestReport"]
    assert math.isfinite(measured["loss"]) and measured["tokens"] > 0


LABELS = {
    "sst2": {"negative", "positive"},
    "cola": {"unacceptable", "acceptable"},
    "mrpc": {"yes", "no"},
    "rte": {"yes", "no"},
}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dpo", "wikisql")])
def test_prompts_and_answers_are_well_formed(name):
    from mlx_lora.model.loading import load

    _, tokenizer = load(PATH)
    section = settings(RECIPES / f"{name}.yaml")["hf_dataset"]
    asked = questions(DataConfig(hf_dataset=section, mask_prompt=True), tokenizer, "test")
    assert len(asked) == 20
    for number, question in enumerate(asked):
        assert question.answer.strip() and "{" not in question.text.replace(json.dumps(TOOL), "")
        if name in LABELS:
            assert question.answer in LABELS[name] and text(number) in question.text
    if name in LABELS:
        assert {question.answer for question in asked} == LABELS[name]
    if name == "tools":
        assert all(json.loads(q.answer.strip().splitlines()[1])["name"] == "find" for q in asked)
    if name == "rte":
        assert asked[0].answer == "yes"  # 0 is entailment
