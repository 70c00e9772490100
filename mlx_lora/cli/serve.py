"""``serve``: one model and its adapters over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..config import GenerateConfig, ServeConfig
from ..errors import ConfigError
from . import console
from .generate import load_draft
from .options import build, config_options, model_option, trust_option
from .sections import SectionedCommand

# Generation options of the whole server; requests set the others.
_FOR_ALL = (
    *("max_tokens", "temp", "top_p", "min_p", "top_k"),
    *("prefill_step_size", "chat_template_config", "extra_eos_token"),
    *("draft_model", "num_draft_tokens", "kv_bits", "kv_group_size", "quantized_kv_start"),
)


class Named(click.ParamType):
    """``NAME=PATH``; a path alone has its folder's name."""

    name = "name=path"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        name, equals, path = str(value).partition("=")
        if not equals:
            name, path = Path(value).resolve().name, value
        if not name or not path:
            self.fail(f"{value!r} is not of the form NAME=PATH", param, ctx)
        return name, path


@click.command(cls=SectionedCommand)
@model_option(required=True)
@click.option(
    "--adapter",
    "adapters",
    type=Named(),
    multiple=True,
    metavar="NAME=PATH",
    help="A name for requests and the adapter's folder, in any supported format; repeat the option.",
)
@click.option(
    "--adapters-dir",
    metavar="FOLDER",
    help="A folder of adapters: each subfolder is one, under its own name, and is read on first use.",
)
@click.option(
    "--pin",
    multiple=True,
    metavar="NAME",
    help="Keep this adapter in memory whatever --adapter-memory says; repeat the option.",
)
@click.option(
    "--merge", is_flag=True, help="Merge the only adapter into the model: faster answers, but no other adapters."
)
@config_options(ServeConfig)
@config_options(GenerateConfig, *_FOR_ALL, max_tokens=1024, temp=None)
@trust_option
def serve(**params: Any):
    """Serve a model and its adapters over HTTP, with the OpenAI and Anthropic APIs.

    A request's "model" is the name of the base or of an adapter. Requests with different adapters are answered
    together, in one batch. Open the address in a browser for a chat page, which also shows the progress of runs
    in --runs-dir. Needs the extra packages of serve: pip install '.[serve]' in a checkout.

    Without --temp, requests that set no temperature are sampled at 1.0, and the chat page takes the most likely tokens.

    \b
    mlx-lora serve --model Qwen/Qwen3-0.6B --adapter pirate=adapters
    mlx-lora serve --model mlx-community/Qwen3-4B-4bit --adapters-dir my_adapters --port 9000
    mlx-lora serve --model Qwen/Qwen3-0.6B --adapters-dir runs --runs-dir runs
    mlx-lora serve --model Qwen/Qwen3-0.6B --host 0.0.0.0 --api-key "$(openssl rand -hex 16)"
    """
    start(params)


def check_installed(command: str) -> None:
    """Refuse ``command`` if Python is too old or packages of the extra ``serve`` are missing."""
    if sys.version_info < (3, 11):  # mlx-lm 0.31, the newest for 3.10, does not pass the server's tests
        raise ConfigError(f"{command} needs Python 3.11 or newer", "Install mlx-lora in an environment with one.")
    try:
        from ..serving.server.run import serve  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{command} needs packages that are not installed ({error.name})", _INSTALL) from None


def start(params: dict[str, Any], on_ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve with the options of ``serve``. ``on_ready`` is called with the address when the server listens."""
    temp = params["temp"]
    config, defaults = build(ServeConfig, params), build(GenerateConfig, params, temp=1.0 if temp is None else temp)
    _check(params)
    check_installed("serve")
    from ..serving.server.run import serve as run
    from ..serving.server.state import Server
    from ..serving.worker import Worker

    engine, name = _engine(params, config, defaults)

    def ready(url: str) -> None:
        console.note(f"Models: {', '.join([name, *engine.bank.names])}")
        console.note(f"Chat page: {url}/")
        console.note(f"Serving at {url} (Ctrl-C ends it)")
        on_ready(url)

    run(Server(engine, Worker(engine), config, name, defaults, page_temp=temp or 0.0), ready)


_INSTALL = "pip install fastapi uvicorn prometheus-client llguidance markdown-it-py nh3 pygments"


def _check(params: dict[str, Any]) -> None:
    """Refuse invalid or contradictory options before the model is loaded."""
    from ..formats import detect_format

    faults: dict[str, str] = {}  # problem -> hint
    names = [name for name, _ in params["adapters"]]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults[f"two adapters are called {name}"] = "Give each adapter a name of its own."
    if params["merge"] and (len(names) != 1 or params["adapters_dir"]):
        faults["--merge takes one --adapter, and no --adapters-dir"] = "Leave --merge out to serve several."
    if params["pin"] and params["adapter_memory"] is None:
        faults["--pin has no effect without --adapter-memory"] = (
            "Without a limit all adapters stay in memory: leave it out."
        )
    for flag in ("adapters_dir", "runs_dir"):
        if params[flag] and not Path(params[flag]).is_dir():
            faults[f"--{flag.replace('_', '-')} {params[flag]}: no such folder"] = "Give a folder that exists."
    if params["upload_limit"] != ServeConfig.upload_limit and not params["adapters_dir"]:
        faults["--upload-limit has no effect without --adapters-dir"] = "Name the folder that uploads go to."
    if faults:
        raise ConfigError("\n".join(faults), " ".join(dict.fromkeys(faults.values())))
    for _, path in params["adapters"]:
        detect_format(path)


def _engine(params: dict[str, Any], config: ServeConfig, defaults: GenerateConfig):
    """The engine with its adapters, and the base's name."""
    from ..base.batching import why_not_batched
    from ..model.loading import load
    from ..serving.bank import AdapterBank
    from ..serving.engine import Engine

    console.note(f"Loading {params['model']}")
    merged = params["adapters"][0] if params["merge"] else None
    model, tokenizer = load(
        params["model"], merged[1] if merged else None, trust_remote_code=params["trust_remote_code"]
    )
    if why := why_not_batched(model):
        console.warn(f"This model answers one request at a time: {why}.")
    if merged:
        from ..merge.fuse import fuse

        fuse(model)
    limit = None if config.adapter_memory is None else int(1e9 * config.adapter_memory)
    bank = AdapterBank(model, limit, params["adapters_dir"])
    for name, path in () if merged else params["adapters"]:
        bank.add(name, path)
    for name in params["pin"]:
        bank.pin(name)
    for name in bank.registered:
        bank.load(name)
    engine = Engine(
        model,
        tokenizer,
        bank,
        batch_size=config.batch_size,
        queue_size=config.queue_size,
        prefill_step_size=defaults.prefill_step_size,
        prompt_cache_size=config.prompt_cache_size,
        prompt_cache_bytes=config.prompt_cache_bytes,
        draft_model=load_draft(defaults, tokenizer),
    )
    return engine, merged[0] if merged else _served_name(params["model"])


def _served_name(model: str) -> str:
    """Return the base's model name in requests: a repository's full name, or a folder's last part."""
    return Path(model).resolve().name if Path(model).is_dir() else model
