"""``train`` and ``test``: make a run from options, and show its reports. ``runs`` does the work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from ..config import REPORTERS, AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from ..config.preference import PREFERENCE_OPTIONS
from ..errors import ConfigError
from . import console
from .options import (
    adapter_option,
    build,
    checkpoint_option,
    chosen,
    config_options,
    flag_of,
    given_flags,
    given_only,
    json_option,
    model_option,
    trust_option,
    values_of,
    yaml_option,
)
from .reports import Stop, ask_for_prefix, show_reports
from .sections import SectionedCommand
from .yaml_files import settle

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
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --adapter-path exactly where it stopped, with its model, data and options; those given "
    "must be equal. These may change: --iters, --epochs, --patience, --best-by, --metric, --metric-rows, "
    "--metric-max-tokens, --val-batches, --steps-per-report, --steps-per-eval, --save-every, --keep, --report-prompts, "
    "--grad-checkpoint, --cache-prefix, --clear-cache-threshold, --max-skipped-steps, --peer-timeout.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Train even if, by the plan, the run does not fit into memory. With --resume also: change the learning "
    "rate, its schedule, --optimizer-config, --max-grad-norm or LoRA+.",
)
@click.option("--resume-adapter-file", metavar="FILE", help="Start from the weights in this adapters.safetensors.")
@click.option("--train/--no-train", default=None, help="Train (default: unless --test is given without it).")
@click.option(
    "--test/--no-test", default=False, help="Measure the loss on the test set; without --train, only measure."
)
@click.option(
    "--test-batches", default=500, show_default=True, help="With --test: number of batches; -1 for the whole set."
)
@click.option("--report-to", metavar="NAME,..", help=f"Also log to {', '.join(REPORTERS)}.")
@click.option("--project-name", metavar="NAME", help="Project to log under (default: the current folder's name).")
@click.option("--yes", is_flag=True, help="With --cache-prefix: do not ask to confirm the size.")
@yaml_option("hf_dataset")
@trust_option
@json_option
@click.pass_context
def train(ctx: click.Context, **params: Any):
    """Fine-tune a model with LoRA, DoRA, VeRA, or in full.

    The adapter is saved in --adapter-path in mlx-lm's format, every --save-every iterations and at the end. Ctrl-C
    saves and stops; --resume continues. The adapter of the best validation is kept in its folder best, and other
    commands use that one (--checkpoint). mlx-lm's flags and YAML files work unchanged; as there, --test without --train
    only measures the adapter in --adapter-path.

    \b
    mlx-lora train --model Qwen/Qwen3-0.6B --data my_data --iters 600
    mlx-lora train --model mlx-community/Llama-3.2-3B-Instruct-4bit --data chats.jsonl \\
        --mask-prompt --rank 16 --alpha 32 --num-layers -1 --learning-rate 1e-4
    mlx-lora train --fine-tune-type dora --keys q_proj,v_proj -c my_run.yaml
    mlx-lora train -c my_run.yaml --resume
    """
    settle(ctx, params)
    if not (params["train"] or (params["train"] is None and not params["test"])):
        return _test_only(ctx, _data(ctx, params), build(TrainConfig, params), params)
    _check_train(ctx, params)
    from ..runs import is_main_process, run

    stop, folder = Stop(), Path(params["adapter_path"])
    settings = {"model": params["model"], **_configs(ctx, params)}
    if params["resume"]:
        settings["model"] = given_only(ctx, "model", params["model"])
    reports = run(
        folder,
        **settings,
        resume=params["resume"],
        force=params["force"],
        resume_adapter_file=params["resume_adapter_file"],
        init_reference=params["init_reference"],
        test_batches=params["test_batches"] if params["test"] else None,
        report_to=[name.strip() for name in (params["report_to"] or "").split(",") if name.strip()],
        project_name=params["project_name"],
        trust_remote_code=params["trust_remote_code"],
        stop=stop,
    )
    if show_reports(ask_for_prefix(reports, params["yes"]), stop, as_json=params["as_json"])["Done"].stopped:
        console.note(f"Stopped and saved. Run the same command with --resume to continue. The adapter is in {folder}.")
        ctx.exit(130)
    if not params["test"] and not params["as_json"] and is_main_process():
        saved = json.loads((folder / "adapter_config.json").read_text("utf-8")) if params["resume"] else {}
        _next_steps(saved.get("model", params["model"]), folder, saved.get("fine_tune_type", params["fine_tune_type"]))


def _configs(ctx: click.Context, params: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run. For a resumed run, only the given ones, checked together with the run's own options."""
    kinds = {"data": DataConfig, "adapter": AdapterConfig, "optimizer": OptimizerConfig, "train": TrainConfig}
    if params["resume"]:
        values = {name: values_of(kind, params) for name, kind in kinds.items()}
        values["data"]["hf_dataset"] = (ctx.default_map or {}).get("hf_dataset")
        return {name: given_only(ctx, name, fields) for name, fields in values.items()}
    found = {name: build(kind, params) for name, kind in kinds.items() if name != "data"}
    return {"data": _data(ctx, params), **found, "optimizer": given_only(ctx, "optimizer", found["optimizer"])}


def _data(ctx: click.Context, params: dict[str, Any]) -> DataConfig:
    return build(DataConfig, params, hf_dataset=(ctx.default_map or {}).get("hf_dataset"))


def _check_train(ctx: click.Context, params: dict[str, Any]) -> None:
    """Refuse faults that only the command line can have; ``run`` checks the rest."""
    faults = {}
    if "test_batches" in given_flags(ctx) and not params["test"]:
        faults["--test-batches has no effect without --test"] = "Add --test, or leave it out."
    if params["yes"] and params["cache_prefix"] == "none" and not params["resume"]:
        faults["--yes has no effect without --cache-prefix"] = "Add --cache-prefix memory or disk, or leave it out."
    if not params["adapter_path"]:
        faults["--adapter-path is empty"] = "Name the folder to save the adapter in."
    if faults:
        raise ConfigError("\n".join(faults), "\n".join(faults.values()))


_MEASURING = {
    *(field.name for field in dataclasses.fields(DataConfig) if field.name != "valid_split"),
    *PREFERENCE_OPTIONS,
    *("model", "adapter_path", "batch_size", "loss", "train", "test", "test_batches", "trust_remote_code", "as_json"),
}


def _test_only(ctx: click.Context, data: DataConfig, config: TrainConfig, params: dict[str, Any]) -> None:
    """Measure the adapter in --adapter-path, as mlx-lm does for --test without --train; if empty, the base model."""
    if not params["test"]:
        raise ConfigError(
            "neither --train nor --test: nothing to do", "Leave --no-train (train: false) out, or add --test."
        )
    if unused := [flag_of(ctx, name) for name in given_flags(ctx) if name not in _MEASURING]:
        raise ConfigError(
            f"{', '.join(unused)}: no effect, because --test without --train measures and does not train",
            "Add --train to train first, or leave these options out.",
        )
    from ..runs import measure

    reports = measure(
        params["model"],
        data,
        chosen(params["adapter_path"] or None, None),
        batch_size=config.batch_size,
        loss=config.loss,
        options=config.preference_options(),
        test_batches=params["test_batches"],
        trust_remote_code=params["trust_remote_code"],
    )
    show_reports(reports, as_json=params["as_json"])


def _next_steps(model: str, folder: Path, method: str) -> None:
    console.note()
    console.title("Next")
    for command in ("chat", "generate", "fuse"):
        rest = {"generate": ' --prompt "..."', "fuse": " --save-path fused_model"}.get(command, "")
        console.note(f"  mlx-lora {command} --model {model} --adapter-path {folder}{rest}")
    if method != "full":  # PEFT's format holds adapters, not whole layers
        console.note(f"  mlx-lora convert {folder} {folder}-peft --to peft")


@click.command()
@model_option(required=True)
@data_options
@adapter_option(help="Folder of the adapter, in any supported format; without one, the base model is measured.")
@checkpoint_option
@config_options(TrainConfig, "batch_size", "loss", *PREFERENCE_OPTIONS)
@click.option("--test-batches", default=-1, show_default=True, help="Batches to measure; -1 for the whole set.")
@click.option("--exact-match", default=0, metavar="N", help="Also answer N rows and count the exact matches.")
@config_options(TrainConfig, "metric", "metric_rows")
@click.option(
    "--max-tokens",
    type=int,
    help="With --exact-match or --metric: tokens per answer (default: metric_max_tokens of a YAML file, or 128).",
)
@yaml_option("hf_dataset", "metric_max_tokens", passes=lambda: {param.name for param in train.params})
@trust_option
@json_option
@click.pass_context
def test(ctx: click.Context, **params: Any):
    """Measure loss, perplexity, exact match and other metrics on a test set.

    A YAML file for train may be given with -c: its training settings are ignored.

    \b
    mlx-lora test --model Qwen/Qwen3-0.6B --adapter-path adapters --data my_data
    mlx-lora test --model Qwen/Qwen3-0.6B --data my_data --exact-match 100
    mlx-lora test --model Qwen/Qwen3-0.6B --adapter-path adapters --checkpoint last --data my_data --metric rouge_l
    """
    settle(ctx, params)
    data, config = _data(ctx, params), build(TrainConfig, params)
    if "max_tokens" in given_flags(ctx) and not params["exact_match"] and not config.metric:
        raise ConfigError(
            "--max-tokens has no effect without --exact-match or --metric", "Add one of the two, or leave it out."
        )
    from ..runs import measure

    longest = params["max_tokens"] or (ctx.default_map or {}).get("metric_max_tokens") or config.metric_max_tokens
    reports = measure(
        params["model"],
        data,
        chosen(params["adapter_path"] or None, params["checkpoint"]),
        batch_size=config.batch_size,
        loss=config.loss,
        options=config.preference_options(),
        test_batches=params["test_batches"],
        exact_match=params["exact_match"],
        max_tokens=longest,
        metric=config.metric,
        metric_rows=config.metric_rows or -1,
        trust_remote_code=params["trust_remote_code"],
    )
    show_reports(reports, as_json=params["as_json"], rows=params["exact_match"] + max(0, config.metric_rows or 0))
