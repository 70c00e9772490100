"""Options from a YAML file (``-c``): mlx-lm's, older versions' and forks'. Every key is used or named in a message.

A file sets click's ``default_map``: flags win over the file, and the file over the defaults. If mlx-lm ignores an entry
because of another one, ``settle`` does the same and warns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..config import DEFAULT_RANK, OPTIMIZERS, chooses_own_rate, first_rate, ignored_alpha
from ..errors import ConfigError
from .old_names import NESTED, did_you_mean, translated
from .options import LISTS, PATTERNS

_READINGS = "mlx_lora.alpha_beside_scale"
_LINES = "Write one option per line, such as iters: 100. --help lists them; in YAML they have underscores."


def read_defaults(ctx: click.Context, file: Path, names: set[str], passed: set[str]) -> None:
    """Set the command's defaults from a YAML file.

    Args:
        names: keys that the command takes besides its own options.
        passed: keys of other commands, which are ignored.
    """
    from . import console

    params = {param.name: param for param in ctx.command.params}
    options, warnings, readings = read_yaml(file, {*params, *names}, passed, lambda key: _commands_with(ctx, key))
    ctx.meta[_READINGS] = readings
    faults = []
    for name in sorted(params.keys() & options.keys()):
        options[name], fault = _of_type(options[name], params[name])
        faults += [f"{file}: {name} {fault}"] if fault else []
    if faults:
        raise ConfigError("\n".join(faults), "Write a number or text, such as rank: 8.")
    for text in warnings:
        console.warn(text)
    ctx.default_map = {**(ctx.default_map or {}), **options}


def _of_type(value: Any, param: click.Parameter) -> tuple[Any, str]:
    """``value`` for ``param``, and what is wrong with it. Click itself would read 4.7 as 4 and true as 1."""
    if getattr(param, "multiple", False) or param.type.name == "name or json":
        return value, ""
    if not isinstance(value, (str, int, float)):
        return value, f"must be one value, not {value!r}"
    whole, number = isinstance(param.type, click.types.IntParamType), isinstance(param.type, click.types.FloatParamType)
    if isinstance(value, bool) and (whole or number):
        return value, f"must be a number, not {'true' if value else 'false'}"
    if isinstance(value, float) and whole:
        return (int(value), "") if value.is_integer() else (value, f"must be a whole number, not {value!r}")
    return value, ""


def _commands_with(ctx: click.Context, key: str) -> str:
    """The other commands that have an option, separated by commas; empty if none has it."""
    group = ctx.find_root().command
    if not isinstance(group, click.Group):
        return ""
    commands = [group.get_command(ctx, name) for name in group.list_commands(ctx)]
    return ", ".join(c.name for c in commands if c and c is not ctx.command and key in {p.name for p in c.params})


def read_yaml(
    path: Path,
    allowed: set[str],
    passed: set[str] = frozenset(),
    elsewhere: Callable[[str], str] = lambda _: "",
) -> tuple[dict[str, Any], list[str], Any]:
    """(options by parameter name, warnings, what ``_two_readings`` needs or None). Unknown keys are an error.

    ``lora_parameters`` is flattened. ``elsewhere`` names the commands that have an option which this command lacks.
    """
    raw = _mapping(path)
    nested = raw.pop("lora_parameters", None) or {}
    if not isinstance(nested, dict):
        raise ConfigError(
            f"{path}: lora_parameters must be a mapping", "Write lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0}."
        )
    old = "lora_layers" in raw
    lifted = [key for key in ("use_dora", "num_layers") if key in nested and key not in raw]  # mlx-lm-lora's place
    raw |= {key: nested.pop(key) for key in lifted}
    raw, faults, warnings = translated(raw)
    nested, more, said = translated(nested, "lora_parameters.")
    nested, alpha = ignored_alpha(nested)
    scaled = nested.get("scale") is not None
    if scaled and nested.pop("rslora", None):
        text = "lora_parameters has scale and rslora: as in mlx-lm, scale multiplies the update, and rslora is not used"
        said[text] = "scale"
    readings = (alpha, old) if alpha is not None and "scale" in allowed and _differ(nested, alpha) else None
    known = (allowed | passed) - {"config"}
    for section, entries, names in (("", raw, known), ("lora_parameters.", nested, set(NESTED))):
        for key in (key for key in entries if key not in names):
            others = elsewhere(key)
            where = f" here, but of mlx-lora {others}" if others else ""
            faults.append(f"{section}{key} is not an option{where}{did_you_mean(key, names)}")
    twice = [key for key in nested if key in raw and raw[key] != nested[key]]
    faults += [f"{key} is {raw[key]!r}, and {nested[key]!r} in lora_parameters" for key in twice]
    if more or faults:
        text = "\n".join(f"{path}: {fault}" for fault in [*faults, *more])
        raise ConfigError(text, "--help lists the options; in YAML they have underscores.")
    options = {key: value for key, value in {**raw, **nested}.items() if key in allowed and value is not None}
    told = [f"{path}: {text}" for text, name in {**warnings, **said}.items() if name in allowed]
    return _as_click_takes(options), told, readings


def _mapping(path: Path) -> dict[str, Any]:
    import yaml

    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _yaml_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})", "Name a readable YAML file with -c.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})", _LINES) from None
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, not a mapping of options", _LINES)
    return raw or {}


def _yaml_loader():
    """YAML 1.1 reads 1e-5 as text; in mlx-lm's files it is a number. The keys yes, no, on and off stay text."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            self.flatten_mapping(node)  # resolves merge keys (<<)
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    key.tag = "tag:yaml.org,2002:str"
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
    return Loader


def _as_click_takes(options: dict[str, Any]) -> dict[str, Any]:
    """Convert mappings to pairs and single values to lists, for options that can be repeated."""
    for key in PATTERNS:
        if isinstance(options.get(key), dict):
            options[key] = list(options[key].items())
    if isinstance(tokens := options.get("trainable_token_indices"), dict):
        options["trainable_token_indices"] = [(k, v if isinstance(v, int) else tuple(v)) for k, v in tokens.items()]
    for key in LISTS:
        if isinstance(options.get(key), (str, int)):
            options[key] = [options[key]]
    return options


def _numbers(nested: dict[str, Any], alpha: Any) -> tuple[float, float, float] | None:
    try:
        return float(nested["scale"]), float(alpha), float(nested.get("rank", 8))
    except (TypeError, ValueError):
        return None


def _differ(nested: dict[str, Any], alpha: Any) -> bool:
    found = _numbers(nested, alpha)
    return found is None or found[0] * found[2] != found[1]


def _two_readings(nested: dict[str, Any], alpha: Any, old: bool) -> str:
    """The warning for ``alpha`` together with ``scale``: what this run does, and what the author may have meant.

    ``nested`` holds the scale and rank of the run, after its flags.
    """
    text = f"lora_parameters has scale {nested['scale']} and alpha {alpha}. As in mlx-lm, alpha is not used"
    if (found := _numbers(nested, alpha)) and found[2]:
        scale, alpha, rank = found
        text += f": the update is multiplied by {scale:g}. PEFT's reading, alpha / rank, would be {alpha / rank:g}"
        if old:
            text += f", and mlx-lm's from 2024-01-24 to 2024-06-02, scale * alpha / rank, {scale * alpha / rank:g}"
        text += f". For PEFT's, write alpha: {alpha:g} alone"
    return text + "."


# Pairs of options: a flag for one replaces the other one from the file.
_ALTERNATIVES = (("alpha", "scale"), ("num_layers", "layers_to_transform"), ("iters", "epochs"))


def settle(ctx: click.Context, params: dict[str, Any]) -> None:
    """Reset parameters from a file that a flag replaces or that mlx-lm ignores, with a warning."""
    from . import console

    source = {name: ctx.get_parameter_source(name) for name in params}
    in_file = {name for name, where in source.items() if where == ParameterSource.DEFAULT_MAP}
    on_line = {name for name, where in source.items() if where == ParameterSource.COMMANDLINE}
    defaults = {param.name: param.default for param in ctx.command.params}

    def reset(names: Iterable[str], reason: str = "") -> None:
        found = [name for name in names if name in in_file and params[name] != defaults[name]]
        params.update({name: defaults[name] for name in found})
        if found and reason:
            console.warn(f"not used from the file: {', '.join(found)} ({reason}).")

    if (readings := ctx.meta.get(_READINGS)) and not {"alpha", "scale"} & on_line:
        console.warn(_two_readings({"scale": params["scale"], "rank": params["rank"] or DEFAULT_RANK}, *readings))
    for one, other in _ALTERNATIVES:
        reset([other] if one in on_line else [one] if other in on_line else [])
    if "data" in on_line:
        ctx.default_map = {k: v for k, v in (ctx.default_map or {}).items() if k != "hf_dataset"}
    if (ctx.default_map or {}).get("hf_dataset"):
        reset(["data"], "hf_dataset names the data sets")
    if params.get("fine_tune_type") == "full":
        reset(NESTED, "full fine-tuning has no low-rank update")
    if (rate := first_rate(params.get("lr_schedule"))) is not None and params.get("learning_rate") != rate:
        reset(["learning_rate"], f"the arguments of lr_schedule begin with the rate {rate:g}")
    given, optimizer = params.get("optimizer_config"), params.get("optimizer")
    if isinstance(given, dict) and chooses_own_rate(optimizer, given):
        reset(["learning_rate"], "adafactor with relative_step chooses its own")
    if params.get("val_batches") == 0:
        reset(["steps_per_eval"], "val_batches is 0")
    if isinstance(given, dict) and "optimizer_config" in in_file:
        used = {optimizer, "adamw"} if optimizer == "muon" else {optimizer}
        others = sorted(name for name in given.keys() - used if name in OPTIMIZERS)
        params["optimizer_config"] = {name: value for name, value in given.items() if name not in others}
        if named := [name for name in others if given[name]]:
            of = f"optimizer_config of {', '.join(named)}"
            console.warn(f"not used from the file: {of} (the optimizer is {optimizer}).")
