"""Options shared by commands. Most are made from the fields in ``config.py``, the others are defined here.

A YAML file sets click's ``default_map``: flags win over the file, and the file over the defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError

# Fields whose flag has another name, mlx-lm's.
_FLAGS = {"method": "fine_tune_type"}
# Fields of mlx-lm's nested lora_parameters section.
_NESTED = ("rank", "scale", "alpha", "rslora", "dropout", "keys", "rank_pattern", "scale_pattern", "alpha_pattern")
_PATTERNS = ("rank_pattern", "scale_pattern", "alpha_pattern")
_LISTS = ("keys", "target_parameters", "modules_to_save", "layers_to_transform")
_LINES = "Write one option per line, such as iters: 100. --help lists them; in YAML they have underscores."


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


def config_options(config: type, *names: str) -> Callable:
    """Options for the fields ``names`` of a config class, or for all fields."""

    def decorate(command):
        hints = typing.get_type_hints(config)
        for field in reversed([f for f in dataclasses.fields(config) if not names or f.name in names]):
            section = field.metadata.get("section", config.help_section)
            command = _option(field, hints[field.name], section)(command)
        return command

    return decorate


def _option(field: dataclasses.Field, hint: Any, section: str) -> Callable:
    name = _FLAGS.get(field.name, field.name)
    flag = "--" + name.replace("_", "-")
    default = field.default if field.default is not dataclasses.MISSING else None
    extra: dict[str, Any] = {"help": field.metadata["help"], "default": default, "show_default": default is not None}
    options = [t for t in typing.get_args(hint) if t is not type(None)] if _is_union(hint) else [hint]
    kind = options[0]
    if "choices" in field.metadata:
        extra["type"] = click.Choice(field.metadata["choices"])
    elif kind is bool:
        flag, extra["show_default"] = f"{flag}/--no-{flag[2:]}", default
    elif field.name in _PATTERNS:
        extra |= {"type": Pattern(typing.get_args(kind)[1]), "multiple": True, "default": (), "show_default": False}
    elif field.name == "trainable_token_indices":
        extra |= {"type": Tokens(), "multiple": True, "default": (), "show_default": False}
    elif field.name in _LISTS:
        metavar = "NUMBER" if field.name == "layers_to_transform" else "NAME"
        extra |= {"multiple": True, "default": (), "show_default": False, "metavar": metavar}
    elif field.name == "clear_cache_threshold":
        extra["type"] = Bytes()
    elif kind in (int, float, str):
        extra["type"] = kind
    else:
        extra["type"] = Structure()
    return click.option(flag, name, cls=FieldOption, section=section, **extra)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def build(config: type, params: dict[str, Any], **changes: Any) -> Any:
    """A config from a command's parameters. Parameters that are not fields of it are left out."""
    values = {}
    for field in dataclasses.fields(config):
        name = _FLAGS.get(field.name, field.name)
        if name not in params:
            continue
        value = params[name]
        if field.name in (*_PATTERNS, "trainable_token_indices"):
            value = dict(value)
        elif field.name in _LISTS:
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
    try:
        return config(**{**values, **changes})
    except TypeError as error:
        raise ConfigError(
            str(error), "Correct the type of that value in the YAML file; --help shows what each option takes."
        ) from None


def given_only(ctx: click.Context, name: str, value: Any) -> Any:
    """``value`` of the option ``name``, or the fields of a config, as far as a flag or the YAML file gave them.

    Returns: None for an option that was not given; a dict of fields for a config.
    """

    def given(option: str) -> bool:
        source = ctx.get_parameter_source(option)
        return option in (ctx.default_map or {}) or source not in (None, click.core.ParameterSource.DEFAULT)

    if not dataclasses.is_dataclass(value):
        return value if given(name) else None
    names = [field.name for field in dataclasses.fields(value)]
    return {n: getattr(value, n) for n in names if given(_FLAGS.get(n, n))}


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


def save_path_option(default: str, what: str) -> Callable:
    return click.option(
        "--save-path", default=default, show_default=True, metavar="FOLDER", help=f"Folder to write the {what} to."
    )


def check_free(folder: str, force: bool, *, model: bool = False) -> None:
    """Raise a ConfigError unless ``folder`` can be written: it is new or empty, or a folder and ``force`` is set."""
    from ..base.saving import check_target

    check_target(folder, force, ConfigError, model=model)


trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Allow the model's repository to run its own Python code."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line on stdout.")
force_option = click.option("--force", is_flag=True, help="Overwrite existing files.")


def yaml_option(*names: str) -> Callable:
    """``-c/--config FILE.yaml``. A file may set the command's options and ``names``, which have no flag."""
    return click.option(
        "-c",
        "--config",
        callback=lambda ctx, _param, value: _read_defaults(ctx, value, names),
        is_eager=True,
        expose_value=False,
        metavar="FILE",
        help="YAML file with options, as for mlx-lm. Flags override it.",
    )


def _read_defaults(ctx: click.Context, file: str | None, names: tuple[str, ...]) -> None:
    if not file:
        return
    params = {param.name: param for param in ctx.command.params}
    options = read_yaml(Path(file), {*params, *names})
    single = {n for n, p in params.items() if not isinstance(p.type, Structure) and not getattr(p, "multiple", False)}
    faults = [
        f"{file}: {name} must be one value, not {options[name]!r}"
        for name in sorted(single & set(options))
        if not isinstance(options[name], (str, int, float))
    ]
    if faults:
        raise ConfigError("\n".join(faults), "Write a number or text, such as rank: 8.")
    ctx.default_map = {**(ctx.default_map or {}), **options}


def read_yaml(path: Path, allowed: set[str]) -> dict[str, Any]:
    """Options from a YAML file by parameter name, with ``lora_parameters`` flattened. Unknown keys are an error."""
    import yaml

    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _yaml_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})", "Name a readable YAML file with -c.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})", _LINES) from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, not a mapping of options", _LINES)
    nested = raw.pop("lora_parameters", None) or {}
    if not isinstance(nested, dict):
        raise ConfigError(
            f"{path}: lora_parameters must be a mapping", "Write lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0}."
        )
    faults = []
    for section, entries, names in (("", raw, allowed - {"config"}), ("lora_parameters.", nested, set(_NESTED))):
        for key in entries:
            if key not in names:
                near = difflib.get_close_matches(str(key), sorted(names), n=1)
                faults.append(
                    f"{path}: {section}{key} is not an option" + (f"; did you mean {near[0]}?" if near else "")
                )
    if faults:
        raise ConfigError("\n".join(faults), "--help lists the options; in YAML they have underscores.")
    options = {**raw, **nested}
    for key in _PATTERNS:
        if isinstance(options.get(key), dict):
            options[key] = list(options[key].items())
    if isinstance(tokens := options.get("trainable_token_indices"), dict):
        options["trainable_token_indices"] = [(k, v if isinstance(v, int) else tuple(v)) for k, v in tokens.items()]
    for key in _LISTS:
        if isinstance(options.get(key), (str, int)):
            options[key] = [options[key]]
    return {key: value for key, value in options.items() if value is not None}


def _yaml_loader():
    """YAML 1.1 reads 1e-5 as text; in mlx-lm's files it is a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
    return Loader
