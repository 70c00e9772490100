"""``generate``: answer one prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
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
    trust_option,
)


def load_engine(params: dict[str, Any], adapters: Sequence[str] = ()):
    """An engine with the model that the options name, and no adapter. ``adapters`` that are none are refused first."""
    from ..formats import detect_format
    from ..model.loading import load
    from ..serving.engine import Engine

    for path in adapters:
        detect_format(path)
    console.note(f"Loading {params['model']}")
    return Engine(*load(params["model"], trust_remote_code=params["trust_remote_code"]))


@click.command()
@model_option(required=True)
@adapter_option()
@checkpoint_option
@click.option("-p", "--prompt", required=True, help="The prompt; - reads it from standard input.")
@click.option("--system-prompt", help="System message.")
@click.option("--ignore-chat-template", is_flag=True, help="Continue the prompt as plain text.")
@config_options(GenerateConfig, max_tokens=100)
@click.option("-m", "max_tokens_short", type=int, hidden=True)
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
    adapter = chosen(params["adapter_path"], params["checkpoint"])
    engine = load_engine(params, [adapter] if adapter else [])
    if adapter:
        engine.bank.add(params["adapter_path"], adapter)
        engine.bank.use(params["adapter_path"])
    tokens = _tokens(engine, text, params)
    answer, last = [], None
    for last in engine.stream(tokens, config):
        answer.append(last.text)
        if not params["as_json"]:
            console.data(last.text, newline=False)
    if params["as_json"]:
        console.event("Answer", {**asdict(last), "text": "".join(answer)})
        return
    console.data("")
    console.note(
        f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.0f} tokens/s. Generation: {last.generation_tokens} "
        f"tokens, {last.generation_tps:.1f} tokens/s. Peak memory: {last.peak_memory:.2f} GB"
    )


def _tokens(engine: Any, text: str, params: dict[str, Any]) -> list[int]:
    """The prompt's tokens, through the chat template unless there is none or it is turned off."""
    if params["ignore_chat_template"] or not getattr(engine.tokenizer, "chat_template", None):
        if params["system_prompt"]:
            raise ConfigError(
                "--system-prompt needs a chat template, and this model's tokenizer has none",
                "Leave --system-prompt out, and write its text into --prompt.",
            )
        return engine.plain_prompt(text)
    messages = [{"role": "system", "content": params["system_prompt"]}] if params["system_prompt"] else []
    return engine.prompt([*messages, {"role": "user", "content": text}])
