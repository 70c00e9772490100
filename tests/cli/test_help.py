"""What keeps the command line easy to read: short functions, help with examples, options in sections."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import mlx_lora.cli
from mlx_lora.cli.main import COMMANDS, cli
from mlx_lora.config import (
    MEMORY,
    SAMPLING,
    SECTIONS,
    AdapterConfig,
    DataConfig,
    OptimizerConfig,
    ServeConfig,
    TrainConfig,
)

MOST = 60  # lines in a function, without decorators and docstring
COMMON = [
    *("--model", "--data", "--mask-prompt", "--adapter-path", "--fine-tune-type", "--rank", "--alpha"),
    *("--num-layers", "--learning-rate", "--iters", "--epochs", "--batch-size", "--config"),
]


def long_functions(text: str) -> list[tuple[str, int]]:
    """(name, lines) of the functions in a file that are too long."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            if lines > MOST:
                found.append((node.name, lines))
    return found


def commands(group: click.Group, name: str = "mlx-lora"):
    """(name on the command line, command) of all commands."""
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        yield f"{name} {word}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {word}")


@pytest.mark.parametrize("path", sorted(Path(mlx_lora.cli.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_functions_are_short(path):
    assert long_functions(path.read_text()) == []


def test_a_long_function_is_found():
    body = "    x = 1\n" * MOST
    assert long_functions(f"@decorator(\n\n)\ndef f():\n    'docstring'\n{body}") == [("f", MOST + 1)]
    assert long_functions(f"@decorator(\n\n)\ndef f():\n    '''a\n\nb'''\n{body[10:]}") == []


@pytest.mark.parametrize(("name", "command"), [pytest.param(*pair, id=pair[0]) for pair in commands(cli)])
def test_help_has_examples_and_explains_every_option(name, command):
    text = inspect.cleandoc(command.help)
    assert f"\n\b\n{name}" in text, f"{name} --help has no block of examples"
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden:
            assert param.help and param.help.endswith("."), f"{name}: {param.opts[0]}"


def examples(command: click.Command) -> list[list[str]]:
    """The words of each command of mlx-lora in a help text, without pipes and files."""
    block = inspect.cleandoc(command.help).partition("\b\n")[2].replace("\\\n", " ")
    lines = [line[line.index("mlx-lora ") :] for line in block.splitlines() if "mlx-lora " in line]
    lines = [re.split(r" [<>|] ", line)[0] for line in lines]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize(("name", "command"), [pytest.param(*pair, id=pair[0]) for pair in commands(cli)])
def test_every_example_is_a_command_with_valid_options(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in examples(command):
        for file in (word for word in words if word.endswith(".yaml")):
            (tmp_path / file).write_text("model: some/model\ndata: data\n")
        found, arguments = cli, words
        while isinstance(found, click.Group):
            word, *arguments = arguments
            found = found.get_command(click.Context(found), word)
            assert found is not None, f"{name}: {words}"
        params = found.make_context(name, arguments).params
        assert params or not arguments
        if name == "mlx-lora serve":
            ServeConfig(**{field.name: params[field.name] for field in dataclasses.fields(ServeConfig)})


def test_the_overview_lists_every_command():
    out = CliRunner().invoke(cli, ["--help"]).output
    assert all(text in " ".join(out.split()) for _, text in COMMANDS.values())


def sections(out: str) -> dict[str, list[str]]:
    """Flags by section of a help text."""
    found: dict[str, list[str]] = {}
    for line in out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            title = line[:-1]
        elif line.startswith("  -"):
            flag = next(word for word in line.replace(",", " ").split() if word.startswith("--"))
            found.setdefault(title, []).append(flag)
    return found


def test_serve_lists_what_belongs_together():
    found = sections(CliRunner().invoke(cli, ["serve", "--help"]).output)
    assert {"--adapter", "--adapters-dir", "--pin", "--merge"} < set(found[SECTIONS[0]]) and "Run" not in found


def test_train_lists_its_options_in_sections():
    found = sections(CliRunner().invoke(cli, ["train", "--help"]).output)
    generation = {"Server", "Limits", "Generation", SAMPLING, MEMORY}
    assert tuple(found) == (*(title for title in SECTIONS if title not in generation), "Other options")
    assert found[SECTIONS[0]] == COMMON and found["Other options"] == ["--help"]
    flags = [flag for section in found.values() for flag in section]
    assert len(flags) == len(set(flags))
    for config in (AdapterConfig, DataConfig, OptimizerConfig, TrainConfig):
        assert config.help_section in SECTIONS
        for field in dataclasses.fields(config):
            flag = "--" + {"method": "fine_tune_type"}.get(field.name, field.name).replace("_", "-")
            if field.name != "hf_dataset":  # YAML only
                assert flag in found[field.metadata.get("section", config.help_section)]
