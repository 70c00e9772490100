"""``generate``: answer one prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..config import GenerateConfig
from ..errors import ConfigError
from . import console
from .options import (
    adapter_option,
    build,
    checkpoint_option,
    chosen,
    config_options,
    json_option,
    model_option,
    system_option,
    trust_option,
)
from .sections import SectionedCommand


def load_engine(params: dict[str, Any], config: GenerateConfig, paths: Sequence[str] = ()):
    """An engine with the named model and draft model, and with adapters named after their folders.

    Folders that hold no adapter are refused before the model is loaded.

    Returns: the engine, and the names.
    """
    from ..formats import detect_format
    from ..model.loading import load
    from ..serving.engine import Engine

    adapters = [chosen(path, params["checkpoint"]) for path in paths]
    for adapter in adapters:
        detect_format(adapter)
    console.note(f"Loading {params['model']}")
    model, tokenizer = load(params["model"], trust_remote_code=params["trust_remote_code"])
    engine = Engine(
        model,
        tokenizer,
        prefill_step_size=config.prefill_step_size,
        draft_model=load_draft(config, tokenizer),
    )
    return engine, [add_adapter(engine.bank, path, adapter) for path, adapter in zip(paths, adapters, strict=True)]


def add_adapter(bank: Any, path: str, adapter: str) -> str:
    """Add the adapter in the folder ``adapter`` to the bank, unless it is already there. Returns its name.

    Its name is the folder name of ``path``, which the user gave, or the whole path if that name is taken.
    """
    known = {Path(each.path).resolve(): each.name for each in bank.listed() if each.path}
    if (name := known.get(Path(adapter).resolve())) is None:
        name = Path(path).resolve().name
        # reserved in chat for the model without adapter
        name = path if name in bank or name in ("none", "base") else name
        bank.add(name, adapter)
    return name


def answer_event(last: Any, text: str, **more: Any) -> None:
    """Print an answer as one line of JSON. ``last``: its last piece."""
    facts = {name: value for name, value in asdict(last).items() if name not in ("kind", "token", "logprobs")}
    console.event("Answer", {**facts, "text": text, **more})


def load_draft(config: GenerateConfig, tokenizer: Any):
    """The draft model that ``config`` names, or None. Raises: ConfigError: it has another vocabulary."""
    if config.draft_model is None:
        return None
    from ..model.loading import load

    console.note(f"Loading {config.draft_model}")
    draft, its_tokenizer = load(config.draft_model)
    if its_tokenizer.vocab_size != tokenizer.vocab_size:
        sizes = f"{its_tokenizer.vocab_size} tokens, not {tokenizer.vocab_size}"
        raise ConfigError(
            f"draft_model: its vocabulary has {sizes}", "Name a smaller model of the same family, or leave it out."
        )
    return draft


@click.command(cls=SectionedCommand)
@model_option(required=True)
@adapter_option()
@checkpoint_option
@click.option("-p", "--prompt", required=True, help="The prompt; - reads it from standard input.")
@system_option
@click.option("--ignore-chat-template", is_flag=True, help="Continue the prompt as plain text.")
@config_options(GenerateConfig, max_tokens=100)
@click.option("-m", "max_tokens_short", type=int, hidden=True)
@click.option(
    "--prompt-cache-file",
    metavar="FILE",
    help="Keys and values from mlx_lm.cache_prompt, made with the same model; the prompt follows their text.",
)
@trust_option
@json_option
def generate(**params: Any):
    """Answer one prompt. The answer is streamed to stdout, and statistics go to stderr.

    \b
    mlx-lora generate --model Qwen/Qwen3-0.6B --adapter-path adapters --prompt "Who are you?"
    mlx-lora generate --model Qwen/Qwen3-0.6B --prompt "Once upon a time" --ignore-chat-template --temp 0.8
    cat question.txt | mlx-lora generate --model Qwen/Qwen3-0.6B --prompt - --json
    """
    if params["max_tokens_short"] is not None:
        params["max_tokens"] = params["max_tokens_short"]
    config = build(GenerateConfig, params)
    text = sys.stdin.read() if params["prompt"] == "-" else params["prompt"]
    if not text.strip():
        raise ConfigError("the prompt is empty", "Give some text with --prompt.")
    if params["ignore_chat_template"] and params["system_prompt"]:
        raise ConfigError(
            "--system-prompt needs a chat template, and --ignore-chat-template turns it off",
            "Leave --ignore-chat-template out, or write the system prompt into --prompt.",
        )
    cache = _read_cache(params, config)
    if params["checkpoint"] and not params["adapter_path"]:
        chosen(None, params["checkpoint"])
    engine, names = load_engine(params, config, [params["adapter_path"]] if params["adapter_path"] else [])
    from ..serving.requests import Request

    tokens = _tokens(engine, text, params, config)
    answer, last = [], None
    for last in engine.stream(Request(tokens, config, names[0] if names else None, cache=cache)):
        answer.append(last.text)
        if not params["as_json"]:
            console.data(last.text, newline=False)
    if params["as_json"]:
        return answer_event(last, "".join(answer))
    console.data("")
    console.note(
        f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.0f} tokens/s. Generation: {last.generation_tokens} "
        f"tokens, {last.generation_tps:.1f} tokens/s. Peak memory: {last.peak_memory:.2f} GB"
    )


def _tokens(engine: Any, text: str, params: dict[str, Any], config: GenerateConfig) -> list[int]:
    """The prompt's tokens, made with the chat template unless there is none or it is turned off."""
    if not params["ignore_chat_template"] and getattr(engine.tokenizer, "chat_template", None):
        messages = [{"role": "system", "content": params["system_prompt"]}] if params["system_prompt"] else []
        messages.append({"role": "user", "content": text})
        if params["prompt_cache_file"]:
            return _suffix(engine, messages, config)
        return engine.prompt(messages, config=config)
    needs = {"--system-prompt": params["system_prompt"], "--chat-template-config": config.chat_template_config}
    if needs := [flag for flag, value in needs.items() if value]:
        raise ConfigError(
            f"{', '.join(needs)}: needs a chat template, and this model's tokenizer has none",
            "Leave it out, and write its text into --prompt.",
        )
    return engine.plain_prompt(text + (config.prefill_response or ""))


def _suffix(engine: Any, messages: list[dict], config: GenerateConfig) -> list[int]:
    """The tokens that follow a cached prompt: the question, and the template's text after it."""
    mark = "\ue000"
    whole = engine.tokenizer.decode(engine.prompt([*messages[:-1], {**messages[-1], "content": mark}], config=config))
    after = whole.partition(mark)[2]
    return list(engine.tokenizer.encode(messages[-1]["content"] + after, add_special_tokens=False))


def _read_cache(params: dict[str, Any], config: GenerateConfig) -> list | None:
    """The prompt cache in --prompt-cache-file. Raises: ConfigError: it is of another model, or unreadable."""
    file = params["prompt_cache_file"]
    if not file:
        return None
    from mlx_lm.models.cache import load_prompt_cache

    try:
        cache, about = load_prompt_cache(file, return_metadata=True)
    except Exception as error:  # files that are not prompt caches raise many kinds of errors
        raise ConfigError(
            f"{file}: is not a prompt cache ({error})", "Make one with mlx_lm.cache_prompt --prompt-cache-file FILE."
        ) from None
    faults = []
    if about.get("model") not in (None, params["model"]):
        faults.append(f"{file}: was made with {about['model']}, and --model is {params['model']}")
    for name, given in (("bits", config.kv_bits), ("group_size", config.kv_bits and config.kv_group_size)):
        if given is not None and getattr(cache[0], name, given) != given:
            flag = f"--kv-{name.replace('_', '-')}"
            faults.append(f"{file}: its keys and values have {name} {getattr(cache[0], name)}, and {flag} is {given}")
    if config.draft_model is not None:
        faults.append("--prompt-cache-file has no keys and values for a --draft-model")
    if faults:
        raise ConfigError("\n".join(faults), "Give the model and options that the cache was made with.")
    return cache
