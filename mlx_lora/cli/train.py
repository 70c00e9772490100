"""``train`` and ``test``: from options to a run, and its reports on the console. ``runs`` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..config import REPORTERS, AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from ..errors import ConfigError
from . import console
from .options import adapter_option, build, config_options, json_option, model_option, trust_option, yaml_option
from .reports import Stop, show_reports
from .sections import SectionedCommand

data_options = config_options(
    DataConfig,
    *("data", "mask_prompt", "mask_turns", "max_seq_length"),
    *("text_feature", "prompt_feature", "completion_feature", "chat_feature"),
)


@click.command(cls=SectionedCommand)
@model_option(default="Qwen/Qwen3-0.6b", show_default=True)
@data_options
@config_options(DataConfig, "valid_split")
@adapter_option("adapters", help="Folder to save the adapter in.")
@config_options(AdapterConfig)
@click.option("--init-reference", metavar="PATH_OR_REPO", help="loftq: the model before it was quantized.")
@config_options(OptimizerConfig)
@config_options(TrainConfig)
@click.option("--resume", is_flag=True, help="Continue the run in --adapter-path exactly where it stopped.")
@click.option("--resume-adapter-file", metavar="FILE", help="Start from the weights in this adapters.safetensors.")
@click.option("--train/--no-train", default=True, help="Train (the default).")
@click.option("--test/--no-test", default=False, help="Measure the loss on the test set afterwards.")
@click.option("--test-batches", default=500, show_default=True, help="Test batches; -1 for the whole set.")
@click.option("--report-to", metavar="NAME,..", help=f"Also log to {' or '.join(REPORTERS)}.")
@click.option("--project-name", metavar="NAME", help="Project to log under (default: the current folder's name).")
@yaml_option("hf_dataset")
@trust_option
@json_option
@click.pass_context
def train(ctx: click.Context, **params: Any):
    """Fine-tune a model with LoRA, DoRA, VeRA, or in full.

    The adapter is saved in --adapter-path in mlx-lm's format, every --save-every iterations and at the end. Ctrl-C
    saves and stops; --resume continues. mlx-lm's flags and YAML files work unchanged.

    \b
    mlx-lora train --model Qwen/Qwen3-0.6B --data my_data --iters 600
    mlx-lora train --model mlx-community/Llama-3.2-3B-Instruct-4bit --data chats.jsonl \\
        --mask-prompt --rank 16 --alpha 32 --num-layers -1 --learning-rate 1e-4
    mlx-lora train --fine-tune-type dora --keys q_proj,v_proj -c my_run.yaml
    mlx-lora train -c my_run.yaml --resume
    """
    data = build(DataConfig, params, hf_dataset=(ctx.default_map or {}).get("hf_dataset"))
    adapter, optimizer, config = (build(kind, params) for kind in (AdapterConfig, OptimizerConfig, TrainConfig))
    if not params["train"]:
        return _test_only(data, config, params)
    from ..runs import run

    stop, folder = Stop(), Path(params["adapter_path"])
    reports = run(
        folder,
        model=params["model"],
        data=data,
        adapter=adapter,
        optimizer=optimizer,
        train=config,
        resume=params["resume"],
        resume_adapter_file=params["resume_adapter_file"],
        init_reference=params["init_reference"],
        test_batches=params["test_batches"] if params["test"] else None,
        report_to=[name.strip() for name in (params["report_to"] or "").split(",") if name.strip()],
        project_name=params["project_name"],
        trust_remote_code=params["trust_remote_code"],
        stop=stop,
    )
    if show_reports(reports, stop, as_json=params["as_json"])["Done"].stopped:
        console.note(f"Stopped and saved. Run the same command with --resume to continue. The adapter is in {folder}.")
        ctx.exit(130)
    if not params["test"] and not params["as_json"]:
        _next_steps(params["model"], folder)


def _test_only(data: DataConfig, config: TrainConfig, params: dict[str, Any]) -> None:
    if not params["test"]:
        raise ConfigError("neither --train nor --test: nothing to do", "Leave --no-train out, or add --test.")
    if params["resume"] or params["resume_adapter_file"]:
        raise ConfigError("--resume and --resume-adapter-file contradict --no-train", "Leave --no-train out.")
    from ..runs import measure

    reports = measure(
        params["model"],
        data,
        params["adapter_path"],
        batch_size=config.batch_size,
        loss=config.loss,
        test_batches=params["test_batches"],
        trust_remote_code=params["trust_remote_code"],
    )
    show_reports(reports, as_json=params["as_json"])


def _next_steps(model: str, folder: Path) -> None:
    console.note()
    console.title("Next")
    for command in ("chat", "generate", "fuse"):
        rest = {"generate": ' --prompt "..."', "fuse": " --save-path fused_model"}.get(command, "")
        console.note(f"  mlx-lora {command} --model {model} --adapter-path {folder}{rest}")
    console.note(f"  mlx-lora convert {folder} {folder}-peft --to peft")


@click.command()
@model_option(required=True)
@data_options
@adapter_option(help="Folder of the adapter, in any supported format; without one, the base model is measured.")
@config_options(TrainConfig, "batch_size", "loss")
@click.option("--test-batches", default=-1, show_default=True, help="Batches to measure; -1 for the whole set.")
@click.option("--exact-match", default=0, metavar="N", help="Also answer N rows and count the exact matches.")
@click.option("--max-tokens", default=128, show_default=True, help="With --exact-match: longest answer.")
@yaml_option()
@trust_option
@json_option
def test(**params: Any):
    """Measure loss, perplexity and exact match on a test set.

    \b
    mlx-lora test --model Qwen/Qwen3-0.6B --adapter-path adapters --data my_data
    mlx-lora test --model Qwen/Qwen3-0.6B --data my_data --exact-match 100
    """
    data, config = build(DataConfig, params), build(TrainConfig, params)
    from ..runs import measure

    reports = measure(
        params["model"],
        data,
        params["adapter_path"],
        batch_size=config.batch_size,
        loss=config.loss,
        test_batches=params["test_batches"],
        exact_match=params["exact_match"],
        max_tokens=params["max_tokens"],
        trust_remote_code=params["trust_remote_code"],
    )
    show_reports(reports, as_json=params["as_json"], rows=params["exact_match"])
