"""Options shared by commands. Most are made from the fields in ``config.py``, the others are defined here."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..config import as_config
from ..errors import ConfigError

# Fields whose flag has mlx-lm's name.
_FLAGS = {"method": "fine_tune_type"}
PATTERNS = ("rank_pattern", "scale_pattern", "alpha_pattern")
LISTS = ("keys", "target_parameters", "modules_to_save", "layers_to_transform", "metric")


class Pattern(click.ParamType):
    """``REGEX=NUMBER``, or a mapping from YAML."""

    name = "regex=number"

    def __init__(self, number: type):
        self.number = number

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        key, equals, number = str(value).rpartition("=")
        if not equals or not key:
            self.fail(f"{value!r} is not of the form REGEX=NUMBER", param, ctx)
        try:
            return key, self.number(number)
        except ValueError:
            self.fail(f"{number!r} is not a number", param, ctx)


class Tokens(click.ParamType):
    """``MODULE=ID,ID,..``, or a mapping from YAML."""

    name = "module=id,.."

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        module, equals, ids = str(value).rpartition("=")
        try:
            numbers = tuple(int(part) for part in ids.split(",") if part.strip())
        except ValueError:
            numbers = ()
        if not equals or not module or not numbers:
            self.fail(f"{value!r} is not of the form MODULE=ID,ID", param, ctx)
        return module, numbers


class Bytes(click.ParamType):
    """A size in bytes: 1500000, 500MB or 1.5G. Units are powers of 1000, as in mlx-lm."""

    name = "bytes"

    def convert(self, value, param, ctx):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[MG]B?)", str(value).strip(), re.IGNORECASE)
        if not match:
            self.fail(f"{value!r} is not a size such as 500MB or 2GB", param, ctx)
        return int(float(match[1]) * {"": 1, "M": 10**6, "G": 10**9}[match[2][:1].upper()])


class FieldOption(click.Option):
    """An option made from a field; ``section`` is its place in ``--help``."""

    def __init__(self, *args: Any, section: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.section = section


class Structure(click.ParamType):
    """A name, a JSON object, or a value from YAML."""

    name = "name or json"

    def convert(self, value, param, ctx):
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            try:
                return json.loads(value)
            except json.JSONDecodeError as error:
                self.fail(f"not JSON: {error}", param, ctx)
        return value


def config_options(config: type, *names: str, **defaults: Any) -> Callable:
    """Options for the fields ``names`` of a config class, or for all fields; ``defaults`` replace the fields' own."""

    def decorate(command):
        hints = typing.get_type_hints(config)
        for field in reversed([f for f in dataclasses.fields(config) if not names or f.name in names]):
            section = field.metadata.get("section", config.help_section)
            default = defaults.get(field.name, field.default)
            command = _option(field, hints[field.name], section, default)(command)
        return command

    return decorate


def _option(field: dataclasses.Field, hint: Any, section: str, default: Any) -> Callable:
    name = _FLAGS.get(field.name, field.name)
    flag = "--" + name.replace("_", "-")
    default = None if default is dataclasses.MISSING else default
    extra: dict[str, Any] = {"help": field.metadata["help"], "default": default, "show_default": default is not None}
    options = [t for t in typing.get_args(hint) if t is not type(None)] if _is_union(hint) else [hint]
    kind = options[0]
    if "choices" in field.metadata:
        extra["type"] = click.Choice(field.metadata["choices"])
    elif kind is bool:
        flag, extra["show_default"] = f"{flag}/--no-{flag[2:]}", default
    elif field.name in PATTERNS:
        extra |= {"type": Pattern(typing.get_args(kind)[1]), "multiple": True, "default": (), "show_default": False}
    elif field.name == "trainable_token_indices":
        extra |= {"type": Tokens(), "multiple": True, "default": (), "show_default": False}
    elif field.name in LISTS:
        metavar = "NUMBER" if field.name == "layers_to_transform" else "NAME"
        extra |= {"multiple": True, "default": (), "show_default": False, "metavar": metavar}
    elif field.default == ():  # repeated texts, never split at commas
        extra |= {"multiple": True, "default": (), "show_default": False, "metavar": "TEXT"}
    elif field.name == "clear_cache_threshold":
        extra["type"] = Bytes()
    elif kind in (int, float, str):
        extra["type"] = kind
    else:
        extra |= {"type": Structure(), "metavar": "JSON" if str(kind).startswith("dict") else None}
    return click.option(flag, name, cls=FieldOption, section=section, **extra)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def build(config: type, params: dict[str, Any], **changes: Any) -> Any:
    """A config made from a command's parameters; other parameters are ignored."""
    return as_config(config, {**values_of(config, params), **changes}, config.__name__)


def values_of(config: type, params: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config in a command's parameters, as the config takes them."""
    values = {}
    for field in dataclasses.fields(config):
        name = _FLAGS.get(field.name, field.name)
        if name not in params:
            continue
        value = params[name]
        if field.name in (*PATTERNS, "trainable_token_indices"):
            value = dict(value)
        elif field.name in LISTS:
            # --keys a --keys b, or --keys a,b; a regular expression with a comma goes through YAML.
            parts = [part.strip() for key in value or () for part in re.split(r",(?![^{}\[\]()]*[}\])])", str(key))]
            value = tuple(part for part in parts if part) or None
            if field.name == "layers_to_transform" and value:
                value = tuple(int(part) if part.isdecimal() else part for part in value)
            elif field.name == "keys" and value == ("none",):
                value = ()
        elif value is None and field.default is dataclasses.MISSING:
            continue
        values[field.name] = value
    return values


def given_only(ctx: click.Context, name: str, value: Any) -> Any:
    """``value`` of the option ``name``, or the fields of a config, if a flag or the YAML file gave them.

    Returns: None for an option that was not given; a dict of fields for a config, or for a dict of its fields.
    """

    def given(option: str) -> bool:
        source = ctx.get_parameter_source(option)
        return option in (ctx.default_map or {}) or source not in (None, click.core.ParameterSource.DEFAULT)

    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not isinstance(value, dict):
        return value if given(name) else None
    return {n: field for n, field in value.items() if given(_FLAGS.get(n, n))}


def given_flags(ctx: click.Context) -> list[str]:
    """The names of the parameters given on the command line, not in a YAML file."""
    own = [p.name for p in ctx.command.params if p.expose_value]  # --config itself is not exposed
    return [name for name in own if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE]


def flag_of(ctx: click.Context, name: str) -> str:
    """The flag of the parameter ``name``, such as ``--num-layers``."""
    return next(p.opts[-1] for p in ctx.command.params if p.name == name)


def model_option(**extra: Any) -> Callable:
    return click.option(
        "--model",
        help="Base model: a local folder or a Hugging Face repository.",
        metavar="PATH_OR_REPO",
        **extra,
    )


def adapter_option(default: str | None = None, **extra: Any) -> Callable:
    extra.setdefault("help", "Folder of the adapter, in any supported format.")
    return click.option("--adapter-path", default=default, show_default=default is not None, metavar="FOLDER", **extra)


checkpoint_option = click.option(
    "--checkpoint",
    metavar="last|best|N",
    help="Of a run's folder: the checkpoint to use; N is an iteration (default: best, if there is one).",
)


def chosen(path: str | None, checkpoint: str | None) -> str | None:
    """The checkpoint to use for the adapter at ``path``: a folder or file. Prints which one if the user chose none."""
    if path is None:
        if checkpoint is not None:
            raise ConfigError(
                "--checkpoint has no effect without --adapter-path", "Name the run's folder, or leave it out."
            )
        return None
    from ..formats.checkpoints import choose, said_of
    from . import console

    found = choose(path, checkpoint)
    said = click.get_current_context().meta.setdefault("mlx_lora.said", set())  # merge may name a folder twice
    if (text := said_of(path, checkpoint, found)) and text not in said:
        console.note(text)
        said.add(text)
    return str(found)


def save_path_option(default: str, what: str) -> Callable:
    return click.option(
        "--save-path", default=default, show_default=True, metavar="FOLDER", help=f"Folder to write the {what} to."
    )


def check_free(folder: str, force: bool, *, model: bool = False) -> None:
    """Raise a ConfigError unless ``folder`` can be written: it is new or empty, or is a folder and ``force`` is set."""
    from ..base.saving import check_target

    check_target(folder, force, ConfigError, model=model)


def is_quantized_base(model: str) -> bool:
    """Whether the config of ``model`` says that its weights are quantized. No weights are loaded."""
    from ..base.config import read_config
    from ..base.loading import resolve

    config = read_config(resolve(model))
    return bool(config.get("quantization") or config.get("quantization_config"))


trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Allow the model's repository to run its own Python code."
)
system_option = click.option("--system-prompt", help="System message.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line on stdout.")
force_option = click.option("--force", is_flag=True, help="Overwrite existing files.")


def yaml_option(*names: str, passes: Callable[[], set[str]] = set) -> Callable:
    """``-c/--config FILE.yaml``. The file may set the command's options and the keys ``names``, which have no flag.

    Args:
        passes: options of another command, which the file may hold and this command ignores.
    """

    def read(ctx: click.Context, _param: click.Parameter, file: str | None) -> None:
        if file:
            from .yaml_files import read_defaults

            read_defaults(ctx, Path(file), set(names), passes())

    return click.option(
        "-c",
        "--config",
        callback=read,
        is_eager=True,
        expose_value=False,
        metavar="FILE",
        help="YAML file with options, as for mlx-lm. Flags override it.",
    )
