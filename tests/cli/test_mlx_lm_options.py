"""Every flag and YAML key of mlx-lm's commands: the same default here, or a reason why not."""

from __future__ import annotations

import argparse
import importlib

import click
import pytest

from mlx_lora.base import older_mlx_lm
from mlx_lora.cli.main import cli
from mlx_lora.config import DEFAULT_LAYERS, DEFAULT_RANK, DEFAULT_SCALE

NOT_OFFERED = "not offered: an unknown option is refused by name"
NO_DOWNLOAD = "required here: mlx-lm's default downloads a model of gigabytes that nobody named"
# By command and mlx-lm's name: why it differs here.
DIFFERENCES = {
    "train": {
        "iters": "None stands for 1000, unless epochs are given",
        **dict.fromkeys(("steps_per_eval", "save_every"), "None stands for mlx-lm's, unless epochs are given"),
        "clear_cache_threshold": "mlx-lm's 0 empties the cache after every step; None keeps it up to a bound",
        "optimizer_config": "mlx-lm lists each optimizer without arguments, which is the same as none",
        "num_layers": "None stands for 16, or all layers of a smaller model, which mlx-lm refuses",
        "lora_parameters": "one option for each entry, see test_lora_parameters",
    },
    "generate": {
        "model": NO_DOWNLOAD,
        "prompt": "required here: nobody wants an answer to mlx-lm's default 'hello'",
        **dict.fromkeys(("image", "verbose", "use_default_chat_template", "quantize_activations"), NOT_OFFERED),
    },
    "chat": {
        "model": NO_DOWNLOAD,
        "seed": "mlx-lm seeds every conversation with 0; here sampling differs from one to the next, as in generate",
        "pipeline": NOT_OFFERED,
    },
    "serve": {
        "model": "required here: requests choose an adapter, never another base",
        "adapter_path": "--adapter NAME=PATH, or a path alone; there may be several",
        "allowed_origins": "--allow-origin; mlx-lm's '*' lets every web page that is open use the model",
        "temp": "1.0 for requests without a temperature, as clients of OpenAI and Anthropic expect; 0 on the chat page",
        "max_tokens": "1024; mlx-lm's 512 cuts off the answers of models that reason first",
        "chat_template_args": "--chat-template-config, as generate and chat call it",
        **dict.fromkeys(("decode_concurrency", "prompt_concurrency"), "--batch-size, for both"),
        "prompt_cache_size": "32: several adapters share the cache",
        **dict.fromkeys(("chat_template", "use_default_chat_template", "log_level", "pipeline"), NOT_OFFERED),
    },
    "fuse": {
        "model": "required here: mlx-lm's default 'mlx_model' is the folder of another tool",
        **dict.fromkeys(("upload_repo", "export_gguf", "gguf_path"), "refused, with the command that does it"),
    },
}
if older_mlx_lm.is_used():
    for command in ("generate", "chat"):
        DIFFERENCES[command].pop("image", None)
        DIFFERENCES[command]["xtc_threshold"] = "mlx-lm 0.31's 0.0 excludes all tokens but the least likely"
SOURCES = {"train": "lora", "generate": "generate", "chat": "chat", "serve": "server", "fuse": "fuse"}


class Seen(Exception):
    """Carries a parser out of the function that makes it."""


def parser_of(module, monkeypatch) -> argparse.ArgumentParser:
    for name in ("build_parser", "setup_arg_parser"):
        if hasattr(module, name):
            return getattr(module, name)()

    def seen(self):
        raise Seen(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", seen)
    with pytest.raises(Seen) as caught:
        getattr(module, "parse_arguments", getattr(module, "main", None))()
    return caught.value.args[0]


def theirs(command: str, monkeypatch) -> dict[str, object]:
    """mlx-lm's options and defaults. lora's are in CONFIG_DEFAULTS, which its parser leaves to the YAML file."""
    module = importlib.import_module(f"mlx_lm.{SOURCES[command]}")
    parser = parser_of(module, monkeypatch)
    found = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    return {**found, **getattr(module, "CONFIG_DEFAULTS", {})}


def plain(value: object) -> object:
    """None for every way to say that there is no default; a number stays."""
    nothing = value is False or value == () or value is getattr(click.core, "UNSET", None)
    return None if nothing else value


def ours(command: str) -> dict[str, object]:
    found = cli.get_command(click.Context(cli), command)
    return {param.name: "required" if param.required else param.default for param in found.params}


@pytest.mark.parametrize("command", SOURCES)
def test_every_default_is_mlx_lms(command, monkeypatch):
    here, there, reasons = ours(command), theirs(command, monkeypatch), DIFFERENCES[command]
    differ = {name for name, value in there.items() if name not in here or plain(here[name]) != plain(value)}
    assert differ == {name for name in reasons if name in there}, "each difference has a reason, and each reason a use"
    assert not reasons.keys() - there.keys(), "reasons for options that mlx-lm does not have"


def test_lora_parameters():
    from mlx_lm.lora import CONFIG_DEFAULTS

    from mlx_lora import AdapterConfig

    config = AdapterConfig()
    assert CONFIG_DEFAULTS["lora_parameters"] == {
        "rank": DEFAULT_RANK,
        "scale": DEFAULT_SCALE,
        "dropout": config.dropout,
    }
    assert (config.rank, config.scale) == (DEFAULT_RANK, DEFAULT_SCALE)
    assert CONFIG_DEFAULTS["num_layers"] == DEFAULT_LAYERS == config.last_layers(40) and config.last_layers(3) == 3


def test_every_choice_of_mlx_lm_is_a_choice_here():
    from mlx_lm.lora import build_parser

    train = {param.name: param for param in cli.get_command(click.Context(cli), "train").params}
    choices = {action.dest: action.choices for action in build_parser()._actions if action.choices}
    assert choices, "mlx-lm's parser has choices"
    for name, values in choices.items():
        assert set(values) <= set(train[name].type.choices)
